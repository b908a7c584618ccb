"""Domains: what an answer is worth."""
