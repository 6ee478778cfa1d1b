"""The service: HTTP over an engine. Nothing here imports JAX."""
