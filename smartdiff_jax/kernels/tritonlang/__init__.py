"""Kernels in Triton's language, which jax-triton hands to XLA."""
