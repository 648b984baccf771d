"""Whole models: weights in, weights out, a part of one tensor at a time."""
