"""Ulysses (arXiv 2309.14509): trade a split sequence for split heads, attend over the whole sequence, trade back.

Runs inside shard_map, on what one device holds. Block u of the sequence is device u's, so that the whole comes out in order.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV


def split_heads(stream: QKV, axis: str) -> tuple[Float[Array, "b t g d"], Float[Array, "2 b t g d"]]:
    """A piece of the sequence with all heads [b, s, h, d] to the whole of it with some: q, and k and v packed.

    t = s * n and g = h / n on n devices. One all-to-all for all three.
    """
    whole = lax.all_to_all(jnp.stack(stream), axis, split_axis=3, concat_axis=2, tiled=True)
    return whole[0], whole[1:]


def split_sequence(out: Float[Array, "b t g d"], axis: str) -> Float[Array, "b s h d"]:
    """The way back."""
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


def split_sequence_of_lse(lse: Float[Array, "b g t"], axis: str) -> Float[Array, "b h s"]:
    """The way back of a log-sum-exp."""
    return lax.all_to_all(lse, axis, split_axis=2, concat_axis=1, tiled=True)
