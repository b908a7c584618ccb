"""Checkpoints that are not in transformers' own format: one module for each format."""
