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


def check_latents(latents: object, shape: tuple[int, ...], is_picture: bool) -> Float[np.ndarray, "n c f h w"]:
    """Latents a caller brings, as float32: [n, c, f, h, w], of a picture model [n, c, h, w]; `shape` is (1, c, f, h, w)."""
    array = np.asarray(latents, dtype=np.float32)
    wanted = (shape[1], *shape[3:]) if is_picture else shape[1:]
    if array.ndim != 1 + len(wanted) or array.shape[1:] != wanted or len(array) == 0:
        raise InvalidRequest("latents", array.shape, f"must be shaped (n, {', '.join(map(str, wanted))}) for this size")
    if not np.isfinite(array).all():
        raise InvalidRequest("latents", "non-finite values", "pass finite numbers")
    return array[:, :, None] if is_picture else array
