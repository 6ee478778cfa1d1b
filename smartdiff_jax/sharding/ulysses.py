"""Ulysses (arXiv 2309.14509): trade a split sequence for split heads, attend over the whole sequence, trade back.

Runs inside shard_map, on what one device holds. Block u of the sequence is device u's, so that the whole comes out in order.

Queries, keys and values travel apart, each as soon as it is there, while the others are projected. A device's heads may go in
parts: the second part travels while the first attends, and the first one's result goes back while the second attends.
What a device sends another lies in one piece, the receiver first: an exchange then is a copy of memory, and what comes in
is the whole sequence as it lies (for a batch of one). Packed into one message the three would have to be taken apart again,
which costs more than messages of their own do.

Order is what makes this overlap. XLA starts an exchange behind the operation that makes its operand and waits for it before
the first that reads its result; in between it orders by memory, and may well pack the second part behind the first one's
attention, or send it ahead of what that needs. `lax.optimization_barrier` ties one to the other without doing anything: XLA
for GPUs keeps it until the order is fixed. An operand that only stands in a barrier for that is used by its exchange from
before it, so that the exchange starts at the latest where the barrier is.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV

MIN_PART = 2 << 20
"""Bytes of a message under which no part is taken: it would be latency for the most part."""


def default_parts(sent: int, heads: int) -> int:
    """In how many parts `heads` go, of which one array's messages have `sent` bytes together: 2, or 3 where 2 do not divide."""
    fitting = [parts for parts in (2, 3) if heads % parts == 0 and sent // parts >= MIN_PART]
    return fitting[0] if fitting else 1


def attend_in_parts(
    attend: Callable[[QKV], Float[Array, "b t g d"]], stream: QKV, axis: str, parts: int
) -> Float[Array, "b s h d"]:
    """Attention of a piece of the sequence [b, s, h, d], where `attend` serves the whole of it with some of the heads.

    parts: must divide the heads of a device, h / n on n devices. t = s * n and g = h / n / parts.
    """
    sends = [packed(array, axis, parts) for array in stream]
    in_parts = [tuple(array[part] for array in sends) for part in range(parts)]
    for part in range(1, parts):
        # Behind the messages of the part before, which is needed first.
        in_parts[part] = lax.optimization_barrier((in_parts[part - 1], in_parts[part]))[1]
    whole = [QKV(*(exchanged(array, axis) for array in arrays)) for arrays in in_parts]
    back = []
    for part in range(parts):
        # What is to travel meanwhile is on its way before this part attends.
        meanwhile = (in_parts[part + 1 :], back[-1:])
        here = lax.optimization_barrier((whole[part], meanwhile))[0] if parts > 1 else whole[part]
        back.append(by_piece(attend(here), axis))
    return unpacked([lax.all_to_all(out, axis, 0, 0, tiled=True) for out in back])


def packed(x: Float[Array, "b s h d"], axis: str, parts: int) -> list[Float[Array, "n b s g d"]]:
    """What goes to each of the axis's n devices, part by part of their heads."""
    b, s, h, d = x.shape
    devices = lax.axis_size(axis)
    by_part = jnp.transpose(x.reshape(b, s, devices, parts, -1, d), (3, 2, 0, 1, 4, 5))
    return [by_part[part] for part in range(parts)]


def exchanged(sent: Float[Array, "n b s g d"], axis: str) -> Float[Array, "b t g d"]:
    """The whole sequence of some heads, t = n * s, from what every device sends."""
    n, b, s, g, d = sent.shape
    received = lax.all_to_all(sent, axis, 0, 0, tiled=True)
    return jnp.moveaxis(received, 0, 1).reshape(b, n * s, g, d)


def by_piece(out: Float[Array, "b t g d"], axis: str) -> Float[Array, "n b s g d"]:
    """The way back of `exchanged`, before its messages."""
    b, _, g, d = out.shape
    return jnp.moveaxis(out.reshape(b, lax.axis_size(axis), -1, g, d), 1, 0)


def unpacked(received: Sequence[Float[Array, "n b s g d"]]) -> Float[Array, "b s h d"]:
    """All heads of a piece, from what comes back of every part."""
    _, b, s, _, d = received[0].shape
    return jnp.transpose(jnp.stack(received), (2, 3, 1, 0, 4, 5)).reshape(b, s, -1, d)


def split_heads(x: Float[Array, "b s h d"], axis: str) -> Float[Array, "b t g d"]:
    """A piece of the sequence with all heads to the whole of it with some."""
    return exchanged(packed(x, axis, 1)[0], axis)


def split_sequence(out: Float[Array, "b t g d"], axis: str) -> Float[Array, "b s h d"]:
    """The way back of `split_heads`."""
    return unpacked([lax.all_to_all(by_piece(out, axis), axis, 0, 0, tiled=True)])


def split_sequence_of_lse(lse: Float[Array, "b g t"], axis: str) -> Float[Array, "b h s"]:
    """The way back of a log-sum-exp."""
    return lax.all_to_all(lse, axis, split_axis=2, concat_axis=1, tiled=True)
