"""Checkpoints of other kinds than transformers' own: how their files lay weights out, one module a kind."""
