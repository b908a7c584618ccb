"""The engine: the searches of many problems over a policy and a verifier."""
