"""One round over Flower: the part of a client's site, the part of the server, and the app folder for `flwr run`."""
