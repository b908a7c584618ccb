"""Policies: who samples. A checkpoint in this process, a server, vLLM, a function over text."""
