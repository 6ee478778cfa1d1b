"""Latents to pixels.

On a mesh every device decodes its piece of the picture (sharding/layout.py: split_picture) out of a window that is somewhat
larger (sharding/windows.py). Convolutions, norms and attention are those of the whole picture: devices tell each other the
statistics of norms, and gather what the attention in the middle of the network reads and gives, at the size of the latents.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from smartdiff_jax.sharding.layout import Layout
from smartdiff_jax.sharding.windows import WHOLE, windows_of
from smartdiff_jax.stages.base import jit_in
from smartdiff_jax.weights.residency import Held, Resident

WHOLE_CLIP_LATENTS = 4096
"""A clip of at most so many latent positions is decoded at once: its activations are small, and one pass is faster."""


class Decode:
    """The VAE's decoder and the last mile to pixel values, one executable a shape."""

    def __init__(self, graphdef: Any, weights: Held, dtype: Any, layout: Layout):
        self._weights, self._layout = weights, layout

        def piece(weights, latents, to_uint8, windows):
            chunk = None if math.prod(latents.shape[2:]) <= WHOLE_CLIP_LATENTS else 1
            with jax.named_scope("decode"):
                pixels = nnx.merge(graphdef, weights).decode(latents, chunk=chunk, windows=windows)
                unit = jnp.clip(pixels.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
                return jnp.round(unit * 255.0).astype(jnp.uint8) if to_uint8 else unit

        def decode(weights, latents, to_uint8):
            if layout.mesh.size == 1:
                return piece(weights, latents, to_uint8, WHOLE)
            mesh = layout.pieces(latents.shape)
            local = partial(piece, to_uint8=to_uint8, windows=windows_of(mesh, *latents.shape[3:]))
            out = PartitionSpec(None, None, "rows", "columns")
            # Devices that decode the same piece hold the same pixels, which cannot be checked behind a gather.
            run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=out, check_vma=False)
            return run(weights, latents)

        self._decode = jit_in(dtype, decode, static_argnames="to_uint8")

    def compile(self, shape: tuple[int, ...]) -> None:
        """What latents of a shape need, which the call finds on disk: jax keeps it nowhere else. Weights that come and go
        between uses are left alone."""
        if isinstance(self._weights, Resident):
            latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._layout.replicated)
            self._decode.lower(self._weights.kept, latents, to_uint8=True).compile()

    def __call__(self, latents: Float[Array | np.ndarray, "b c f h w"], to_uint8: bool = True) -> Array:
        """[b c f h w] to frames [b, f', h', w', 3]: uint8, or float32 in [0, 1]."""
        latents = jax.device_put(latents, self._layout.replicated)
        with self._weights.use() as weights:
            return self._decode(weights, latents, to_uint8=to_uint8).block_until_ready()
