"""The first latents of a request."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smartdiff_jax.errors import InvalidRequest

_normal = jax.jit(lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.float32), static_argnames="shape")


def draw_noise(seed: int, shape: tuple[int, ...]) -> Float[Array, "b c f h w"]:
    """Standard normal noise, float32 [1, c, f, h, w]; drawn whole before any sharding, so a mesh does not change it."""
    return _normal(np.uint32(seed), shape)


def check_latents(latents: object, shape: tuple[int, ...]) -> np.ndarray:
    """Latents a caller brings, shaped [n, c, f, h, w] as the model's diffusers pipeline takes them, as float32."""
    array = np.asarray(latents, dtype=np.float32)
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise InvalidRequest("latents", array.shape, f"must be shaped (n, {', '.join(map(str, shape[1:]))}) for this size")
    if not np.isfinite(array).all():
        raise InvalidRequest("latents", "non-finite values", "pass finite numbers")
    return array
