"""Adapters to third parties, one module each; imported on use."""
