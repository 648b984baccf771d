"""Rounds over Flower, one or several: the part of a site, the part of the server, and the app folder for `flwr run`."""
