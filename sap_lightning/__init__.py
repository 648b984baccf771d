"""Pruning as alignment, for one-shot federated domain generalization."""

__version__ = "0.2.0"
