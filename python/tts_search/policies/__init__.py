"""Policies, which sample steps: a checkpoint in this process, a server, vLLM, a function over text."""
