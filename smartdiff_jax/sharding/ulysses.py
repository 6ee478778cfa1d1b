"""Ulysses (arXiv 2309.14509): trade a split sequence for split heads, attend over the whole sequence, trade back.

Runs inside shard_map, on what one device holds. Block u of the sequence is device u's, so that the whole comes out in order.

Queries, keys and values travel apart, each as soon as it is there. What a device sends another lies in one piece, the receiver
first: an exchange then is a copy of memory, and what comes in is the whole sequence as it lies (for a batch of one). Packed
into one message the three would have to be taken apart again, which costs more than messages of their own do.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def split_heads(x: Float[Array, "b s h d"], axis: str) -> Float[Array, "b t g d"]:
    """A piece of the sequence with all heads to the whole of it with some: t = s * n and g = h / n on n devices."""
    b, s, h, d = x.shape
    n = lax.axis_size(axis)
    sent = jnp.moveaxis(x.reshape(b, s, n, h // n, d), 2, 0)
    return jnp.moveaxis(_exchanged(sent, axis), 0, 1).reshape(b, n * s, h // n, d)


def split_sequence(out: Float[Array, "b t g d"], axis: str) -> Float[Array, "b s h d"]:
    """The way back of `split_heads`."""
    b, t, g, d = out.shape
    n = lax.axis_size(axis)
    sent = jnp.moveaxis(out.reshape(b, n, t // n, g, d), 1, 0)
    return jnp.moveaxis(_exchanged(sent, axis), 0, 2).reshape(b, t // n, n * g, d)


def split_sequence_of_lse(lse: Float[Array, "b g t"], axis: str) -> Float[Array, "b h s"]:
    """The way back of a log-sum-exp."""
    return lax.all_to_all(lse, axis, split_axis=2, concat_axis=1, tiled=True)


def _exchanged(sent: Float[Array, "n b s g d"], axis: str) -> Float[Array, "n b s g d"]:
    """What every device sends to this one, from what this one sends to every device."""
    return lax.all_to_all(sent, axis, 0, 0, tiled=True)
