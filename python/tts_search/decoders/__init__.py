"""Decoders that are written for one model family."""
