"""What lies between a block's projections and its attention: queries and keys are normed, and turned by their positions.

A block says what is to be done (`Unturned`); what attends says whether a kernel may do it in one pass, and join picture and
text with it (`Attend.fuse`). Else it is left to XLA.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV, Attend, Fuse, Place
from smartdiff_jax.kernels.fp8 import Columns, Product
from smartdiff_jax.kernels.hopper import ROWS
from smartdiff_jax.models.family import Rope
from smartdiff_jax.models.layers import RMSNorm
from smartdiff_jax.models.rope import apply_rope

Normed = tuple[Product | Columns, RMSNorm | None]
"""What a projection gave [b, n, h * d], and its norm: over a head, or over all at once. None for values."""


@dataclasses.dataclass(frozen=True)
class Unturned:
    """Arrays of one stream, all [b, n, h * d]. rope: None where nothing turns."""

    columns: tuple[Columns, ...]
    norms: tuple[RMSNorm | None, ...]
    num_heads: int
    rope: Rope | None

    @classmethod
    def of(cls, num_heads: int, rope: Rope | None, *arrays: Normed) -> "Unturned":
        columns = tuple(x if isinstance(x, Columns) else Columns(x) for x, _ in arrays)
        return cls(columns, tuple(norm for _, norm in arrays), num_heads, rope)

    @property
    def tokens(self) -> int:
        return self.columns[0].product.lead[1]


def turned(attend: Attend, stream: Unturned, place: Place = "exchanged") -> tuple[Float[Array, "b n h d"], ...]:
    """The stream's arrays, ready to be attended to."""
    fuse = _fuse(attend, place, stream)
    if fuse is None:
        return tuple(_by_xla(stream, x, norm) for x, norm in zip(stream.columns, stream.norms, strict=True))
    # Values lie ready where they are neither scaled nor part of something wider.
    ready = [norm is None and _is_ready(x) for x, norm in zip(stream.columns, stream.norms, strict=True)]
    made = iter(_by_kernel(fuse, [i for i, is_ready in enumerate(ready) if not is_ready], stream))
    return tuple(
        _by_xla(stream, x, None) if is_ready else next(made) for x, is_ready in zip(stream.columns, ready, strict=True)
    )


def joined(attend: Attend, tokens: Unturned, text: Unturned) -> QKV | None:
    """Queries, keys and values of picture and text, in this order in each of `attend.pieces`, as one sequence, where that takes
    no pass more.

    If it is one piece, zeros are behind it, up to a multiple of ROWS, which must not count: attention kernels for Hopper would
    add them in a pass over each array.
    """
    pieces, fuse = attend.pieces(tokens.tokens, text.tokens), _fuse(attend, "exchanged", tokens, text)
    if pieces is None or fuse is None:
        return None
    return QKV(*_by_kernel(fuse, range(3), tokens, text, multiple=ROWS if pieces == 1 else 1))


def _fuse(attend: Attend, place: Place, *streams: Unturned) -> Fuse | None:
    fuse = attend.fuse(place, *(stream.tokens for stream in streams))
    if fuse is None:
        return None
    from smartdiff_jax.kernels import fused_turn  # Pallas takes half a second to import

    return fuse if all(fused_turn.serves(stream.num_heads, x) for stream in streams for x in stream.columns) else None


def _is_ready(x: Columns) -> bool:
    return x.product.row_scale is None and x.size == x.product.values.shape[-1]


def _by_kernel(fuse: Fuse, picked: Sequence[int], *streams: Unturned, multiple: int = 1) -> tuple[Array, ...]:
    """Of each of the picked arrays one, with the streams behind each other."""
    if fuse.sent and len(picked) > 1:
        return tuple(_by_kernel(fuse, [i], *streams, multiple=multiple)[0] for i in picked)
    from smartdiff_jax.kernels import fused_turn

    def scaled(norm: RMSNorm | None) -> tuple[Array, float] | None:
        return None if norm is None else (norm.scale[...], norm.eps)

    told = [
        fused_turn.Stream(tuple(x.columns[i] for i in picked), tuple(scaled(x.norms[i]) for i in picked), x.rope)
        for x in streams
    ]
    leaves, tree = jax.tree.flatten(told)
    is_array = [isinstance(leaf, Array) for leaf in leaves]

    def kernel(arrays: list[Array]) -> tuple[Array, ...]:
        own = iter(arrays)
        parts = jax.tree.unflatten(tree, [next(own) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)])
        parts = jax.tree.map(_of_device, parts, is_leaf=lambda part: isinstance(part, Product))
        return fused_turn.turn(parts, streams[0].num_heads, multiple=multiple, groups=fuse.groups)

    return fuse.run(kernel, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])


def _of_device(part: Any) -> Any:
    """A product whose values are a device's part of what they were."""
    if not isinstance(part, Product) or part.values.ndim == 2:
        return part
    return dataclasses.replace(part, lead=part.values.shape[:-1])


def _by_xla(stream: Unturned, columns: Columns, norm: RMSNorm | None) -> Array:
    dtype = columns.product.values.dtype
    x = columns.array(dtype)
    heads = (*x.shape[:-1], stream.num_heads, -1)
    if norm is None:
        return x.reshape(heads)
    over_all = norm.scale.shape[-1] == x.shape[-1]
    x = norm(x).reshape(heads) if over_all else norm(x.reshape(heads))
    return x.astype(dtype) if stream.rope is None else apply_rope(x, stream.rope, dtype)
