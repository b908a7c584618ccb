"""Models in this process: loading, the decoder, its KV pool. Needs transformers."""
