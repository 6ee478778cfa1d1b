"""Kernels for Hopper written in Pallas on Mosaic GPU. Imported when first called: the import takes seconds, and JAX 0.11."""
