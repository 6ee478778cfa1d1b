"""The one contract of every attention kernel."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class AttentionFn(Protocol):
    """Softmax attention on one device, unmasked but for the length of K and V.

    q [b, s, h, d]; k, v [b, t, h, d], same dtype. `kv_length` int32 [b]: keys at and behind it are ignored (None: all t
    count). `scale` multiplies q @ k (None: 1/sqrt(d)). `with_lse` is static: only context parallelism asks for the
    log-sum-exp. Returns out [b, s, h, d] in q's dtype and, if asked, lse float32 [b, h, s] (natural log).
    A kernel that cannot serve the call raises `Unsupported(why)` while tracing.
    """

    def __call__(
        self,
        q: Float[Array, "b s h d"],
        k: Float[Array, "b t h d"],
        v: Float[Array, "b t h d"],
        *,
        kv_length: Int[Array, " b"] | None = None,
        scale: float | None = None,
        with_lse: bool = False,
    ) -> tuple[Float[Array, "b s h d"], Float[Array, "b h s"] | None]: ...


class QKV(NamedTuple):
    """Queries, keys and values of one stream of tokens, each [b, s, h, d]; r = s queries, or those of some of the tokens."""

    q: Float[Array, "b r h d"]
    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]


Place = Literal["exchanged", "split", "whole"]
"""Where a stream is attended to: where heads are exchanged between devices, where it is split, or whole on every device."""


@dataclasses.dataclass(frozen=True)
class Fuse:
    """How kernels that know one GPU alone, and have no gradient, make what is attended to (models/turn.py).

    run: (kernel, arrays) -> what it gives [b, n, ...], on each device of its part: arrays [b or 1, n, _] are split as the
    stream is, arrays [_] are whole. groups: how the heads are to lie, see fused_turn.turn. sent: other devices get what is
    made, which then is made one by one, so that it leaves as soon as it is there.
    """

    run: Callable[[Callable[[list[Array]], tuple[Array, ...]], list[Array]], tuple[Array, ...]]
    groups: int = 1
    sent: bool = False


@runtime_checkable
class Attend(Protocol):
    """What a model's block calls: a kernel, already wrapped for the mesh it runs on (sharding/context_parallel.py).

    The four ways differ in which streams a mesh may have split: the tokens of the picture are, the text need not be.
    All scale by 1/sqrt(d) and return out [b, r, h, d] in q's dtype. Where queries are of some of the picture's tokens alone,
    they are of as many on every device.
    """

    def pieces(self, picture: int, text: int) -> int | None:
        """In how many pieces, each [picture | text], streams of so many tokens may be joined into one; None: in no way.

        As many as devices share them: joined so, each device's part of both stays where it is.
        """
        ...

    def fuse(self, place: Place, *lengths: int) -> Fuse | None:
        """How to make arrays of streams of so many tokens with kernels; None leaves it to XLA."""
        ...

    def self_attention(self, tokens: QKV) -> Float[Array, "b r h d"]:
        """The picture's tokens among themselves."""
        ...

    def cross_attention(
        self,
        q: Float[Array, "b s h d"],
        k: Float[Array, "b l h d"],
        v: Float[Array, "b l h d"],
        *,
        text_length: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s h d"]:
        """From the picture's tokens to the text; text at and behind `text_length` is ignored (None: all l count)."""
        ...

    def text_attention(
        self, text: QKV, *, text_length: Int[Array, " b"] | None = None, picture: int = 0
    ) -> Float[Array, "b l h d"]:
        """The text among itself. picture: so many tokens of the picture come before it in the same stream, and count in
        `text_length`; the stream is joined in as many pieces as `pieces` says."""
        ...

    def joint_attention(
        self, tokens: QKV, text: QKV, *, text_length: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b r h d"], Float[Array, "b l h d"]]:
        """Both streams as one sequence (MM-DiT, arXiv 2403.03206); returns the picture's part and the text's."""
        ...


@runtime_checkable
class PaddedAttend(Attend, Protocol):
    """An `Attend` that can be told how many of its tokens count, and what share of the keys it may leave out."""

    def for_length(self, num_tokens: int | Int[Array, ""]) -> Attend:
        """The same for tokens that were padded behind `num_tokens`, which may be traced."""
        ...

    def leaving_out(self, sparsity: Float[Array, ""]) -> Attend:
        """The same, where the picture's tokens leave out this share of the blocks of keys (traced; at 0 nothing differs)."""
        ...
