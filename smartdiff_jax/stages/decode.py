"""Latents to pixels.

On a mesh every device decodes its piece of the picture (sharding/layout.py: split_picture). Convolutions, norms and attention
are those of the whole picture: the partitioner exchanges the rows and columns next to the cuts and sums over all devices; only
the middle of the network, at the size of the latents, gathers anything (JAX 0.10 the finished pixels of a clip too).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.stages.base import jit_in
from smartdiff_jax.weights.residency import Held

WHOLE_CLIP_LATENTS = 4096
"""A clip of at most so many latent positions is decoded at once: its activations are small, and one pass is faster."""


class Decode:
    """The VAE's decoder and the last mile to pixel values, one executable a shape."""

    def __init__(self, graphdef: Any, weights: Held, dtype: Any, layout: Layout):
        self._weights, self._layout = weights, layout

        def decode(weights, latents, to_uint8):
            chunk = None if math.prod(latents.shape[2:]) <= WHOLE_CLIP_LATENTS else 1
            pixels = nnx.merge(graphdef, weights).decode(latents, chunk=chunk)
            unit = jnp.clip(pixels.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
            unit = jnp.round(unit * 255.0).astype(jnp.uint8) if to_uint8 else unit
            return layout.as_picture(unit, latents.shape)

        self._decode = jit_in(dtype, decode, static_argnames="to_uint8")

    def __call__(self, latents: Float[Array | np.ndarray, "b c f h w"], to_uint8: bool = True) -> Array:
        """[b c f h w] to frames [b, f', h', w', 3]: uint8, or float32 in [0, 1]."""
        latents = jax.device_put(latents, self._layout.picture(latents.shape))
        with self._weights.use() as weights:
            return self._decode(weights, latents, to_uint8=to_uint8).block_until_ready()
