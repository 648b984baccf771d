"""Whole models made smaller: blocks in low rank, or gone."""
