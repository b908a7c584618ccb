"""Domains: how answers are read, compared and graded."""
