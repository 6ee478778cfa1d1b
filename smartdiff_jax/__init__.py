"""Diffusion transformers as a fast image and video service on GPU meshes, in JAX."""

from smartdiff_jax.config import GenerateParams as GenerateParams
from smartdiff_jax.config import MeshConfig as MeshConfig
from smartdiff_jax.config import SystemConfig as SystemConfig

__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use, so that `smartdiff --help` does not wait for JAX.
    if name == "Pipeline":
        from smartdiff_jax.engine.pipeline import Pipeline

        return Pipeline
    if name in ("Client", "AsyncClient"):
        from smartdiff_jax import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
