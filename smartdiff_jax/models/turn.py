"""What lies between a block's projections and its attention: queries and keys are normed, and turned by their positions.

A block says what is to be done (`Unturned`); what attends says whether one kernel may do it in one pass, and join picture and
text with it (`Attend.fused`). Else it is left to XLA.
"""

import dataclasses

from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV, Attend
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


def turned(attend: Attend, stream: Unturned) -> tuple[Float[Array, "b n h d"], ...]:
    """The stream's arrays, ready to be attended to."""
    if not _are_fused(attend, stream):
        return tuple(_by_xla(stream, x, norm) for x, norm in zip(stream.columns, stream.norms, strict=True))
    # Values lie ready where they are neither scaled nor part of something wider.
    ready = [norm is None and _is_ready(x) for x, norm in zip(stream.columns, stream.norms, strict=True)]
    picked = [i for i, is_ready in enumerate(ready) if not is_ready]
    columns, norms = (tuple(of[i] for i in picked) for of in (stream.columns, stream.norms))
    made = dict(zip(picked, _by_kernel(dataclasses.replace(stream, columns=columns, norms=norms)), strict=True))
    return tuple(made[i] if i in made else _by_xla(stream, x, None) for i, x in enumerate(stream.columns))


def joined(attend: Attend, tokens: Unturned, text: Unturned) -> QKV | None:
    """Queries, keys and values of picture and text, in this order, as one sequence, where that takes no pass more.

    Zeros behind them, up to a multiple of ROWS, which must not count: attention kernels for Hopper would add them in a pass
    over each array.
    """
    if attend.pieces(tokens.tokens, text.tokens) != 1 or not _are_fused(attend, tokens, text):
        return None
    return QKV(*_by_kernel(tokens, text, multiple=ROWS))


def _are_fused(attend: Attend, *streams: Unturned) -> bool:
    if not attend.fused:
        return False
    from smartdiff_jax.kernels import fused_turn  # Pallas takes half a second to import

    return all(fused_turn.serves(stream.num_heads, x) for stream in streams for x in stream.columns)


def _is_ready(x: Columns) -> bool:
    return x.product.row_scale is None and x.size == x.product.values.shape[-1]


def _by_kernel(*streams: Unturned, multiple: int = 1) -> tuple[Array, ...]:
    from smartdiff_jax.kernels import fused_turn

    def scaled(norm: RMSNorm | None) -> tuple[Array, float] | None:
        return None if norm is None else (norm.scale[...], norm.eps)

    told = [fused_turn.Stream(x.columns, tuple(map(scaled, x.norms)), x.rope) for x in streams]
    return fused_turn.turn(told, streams[0].num_heads, multiple=multiple)


def _by_xla(stream: Unturned, columns: Columns, norm: RMSNorm | None) -> Array:
    dtype = columns.product.values.dtype
    x = columns.array(dtype)
    heads = (*x.shape[:-1], stream.num_heads, -1)
    if norm is None:
        return x.reshape(heads)
    over_all = norm.scale.shape[-1] == x.shape[-1]
    x = norm(x).reshape(heads) if over_all else norm(x.reshape(heads))
    return x.astype(dtype) if stream.rope is None else apply_rope(x, stream.rope, dtype)
