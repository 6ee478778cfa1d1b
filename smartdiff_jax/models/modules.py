"""The seam around the attention modules of a block, for caches that hold what single modules give.

    out = module(attend, "self_attention", compute)      in a block: compute(), or what a cache makes of it
    hidden = scan_attending(blocks, lo, hi, call, hidden, attend)

Blocks are handed one thing that outlives them, their `attend`; so the seam travels in it. An ordinary `Attend` computes, and
nothing of the seam is left in what is compiled. A `HeldModules` hands every module of every block to a function, together with
what that function remembered of it at the step before.

What is remembered is stacked over the blocks of a scan and goes through it in its carry, where each block's part is written in
place. As the scan's inputs and outputs it would lie in memory twice.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV, Attend
from smartdiff_jax.models.layers import scan_blocks
from smartdiff_jax.models.turn import Unturned, joined, turned

T = TypeVar("T")
Out = Any

Module = Literal["self_attention", "cross_attention", "text_attention", "joint_attention"]
"""Named as the way of attending; a block has at most one of each."""

Held = tuple[Mapping[str, Out], ...]
"""What is remembered: for each scan in the order they run, for each module, what it gave, stacked over the blocks [n, ...]."""

Streams = tuple[Float[Array, "b _ d"], ...]
Pair = tuple[Float[Array, "b s d"], Float[Array, "b l d"]]
Ropes = tuple[tuple[Float[Array, "_ _ r"], Float[Array, "_ _ r"]] | None, ...]
"""Of each stream the rotary table, or None where nothing turns."""

Attention = Callable[[Callable[[], Sequence[Unturned]]], Streams]
"""What gives each stream's queries, keys and values -> what each attended to."""

Around = Callable[[str, Out, Callable[[], Out]], Out]
"""(module, what was held of it, compute) -> what the module gives now, which is held from then on."""


def module(attend: Attend, name: Module, compute: Callable[[], T]) -> T:
    """What a block's module gives: arrays [b n d] whose token axis is the last but one, as layouts on a mesh expect them."""
    return attend.module(name, compute) if isinstance(attend, _BlockAttend) else compute()


def joint_attention(attend: Attend, streams: Callable[[], Sequence[Unturned]], text_length: Any) -> tuple[Any, Any]:
    """The module in which picture and text meet: what both attended to, heads side by side, each [b n d].

    streams: their queries, keys and values, computed only if the module is.
    """

    def attended():
        tokens, text = streams()
        with jax.named_scope("attention"):
            both, size, pieces = joined(attend, tokens, text), tokens.tokens, attend.pieces(tokens.tokens, text.tokens)
            if both is None or pieces is None:
                pair = QKV(*turned(attend, tokens)), QKV(*turned(attend, text))
                out = attend.joint_attention(*pair, text_length=text_length)
                return side_by_side(out[0]), side_by_side(out[1])
            length = None if text_length is None else size + text_length
            if length is None and both.k.shape[1] > size + text.tokens:
                length = jnp.full(both.k.shape[0], size + text.tokens, jnp.int32)
            out = side_by_side(attend.text_attention(both, text_length=length, picture=size))
            return split_pieces(out, size, text.tokens, pieces)

    return module(attend, "joint_attention", attended)


def joined_attention(attend: Attend, stream: Callable[[], Unturned], length: Any, picture: int) -> Float[Array, "b n d"]:
    """The same module where picture and text, in this order, are one stream. length: int32 [b], what of it counts, or None.
    picture: how many of its tokens are the picture's."""

    def attended():
        with jax.named_scope("attention"):
            return side_by_side(attend.text_attention(QKV(*turned(attend, stream())), text_length=length, picture=picture))

    return module(attend, "joint_attention", attended)


def side_by_side(heads: Float[Array, "b n h k"]) -> Float[Array, "b n d"]:
    """What the heads attended to as one vector."""
    return heads.reshape(*heads.shape[:2], -1)


def scan_attending(blocks: nnx.Module, lo: int, hi: int, call: Callable[[Any, T, Any], T], hidden: T, attend: Attend) -> T:
    """`scan_blocks` for blocks that attend: `call(block, hidden, attend)` is traced once."""
    if isinstance(attend, HeldModules):
        return attend.scan(blocks, lo, hi, call, hidden)
    return scan_blocks(blocks, lo, hi, lambda block, hidden: call(block, hidden, attend), hidden)


def scan_shared(
    blocks: nnx.Module,
    lo: int,
    hi: int,
    call: Callable[[Any, Streams, Ropes, Attention], Streams],
    hidden: Pair,
    ropes: Ropes,
    text_length: Any,
    attend: Attend,
) -> Pair:
    """`scan_attending` for blocks that have one set of parameters for picture and text.

    Where they can the two are one stream, on each device in this order: products of a few rows of text take as long as they
    take for many, and side by side with the picture's nearly nothing.
    """
    if lo >= hi:
        return hidden
    tokens, text = hidden
    size = tokens.shape[1]
    pieces = attend.pieces(size, text.shape[1])
    if pieces is None:

        def apart(block: Any, hidden: Pair, attend: Attend) -> Pair:
            tokens, text = call(block, hidden, ropes, partial(joint_attention, attend, text_length=text_length))
            return tokens, text

        return scan_attending(blocks, lo, hi, apart, hidden, attend)

    both, length = _joined_rope(ropes, text.shape[1], pieces), None if text_length is None else size + text_length

    def as_one(block: Any, stream: Array, attend: Attend) -> Array:
        def attention(qkv: Callable[[], Sequence[Unturned]]) -> tuple[Array]:
            return (joined_attention(attend, lambda: qkv()[0], length, size),)

        return call(block, (stream,), (both,), attention)[0]

    stream = scan_attending(blocks, lo, hi, as_one, join_pieces(tokens, text, pieces), attend)
    return split_pieces(stream, size, text.shape[1], pieces)


def join_pieces(tokens: Array, text: Array, pieces: int) -> Array:
    """[b s d] and [b l d] to [b s+l d]: of each piece the tokens, then the text."""
    batch, _, width = tokens.shape
    return jnp.concatenate([x.reshape(batch, pieces, -1, width) for x in (tokens, text)], axis=2).reshape(batch, -1, width)


def split_pieces(stream: Array, num_tokens: int, num_text: int, pieces: int) -> Pair:
    """The way back of `join_pieces`; what is behind the text of a piece is left."""
    batch, _, width = stream.shape
    in_pieces, first = stream.reshape(batch, pieces, -1, width), num_tokens // pieces
    tokens, text = in_pieces[:, :, :first], in_pieces[:, :, first : first + num_text // pieces]
    return tokens.reshape(batch, num_tokens, width), text.reshape(batch, num_text, width)


def _joined_rope(ropes: Ropes, num_text: int, pieces: int) -> tuple[Float[Array, "_ m r"], Float[Array, "_ m r"]]:
    """Of picture and text as one; of a text that does not turn the table says so."""
    rope, text_rope = ropes
    assert rope is not None
    if text_rope is None:
        shape = (1, num_text, rope[0].shape[-1])
        text_rope = jnp.ones(shape), jnp.zeros(shape)
    batch = max(rope[0].shape[0], text_rope[0].shape[0])

    def joined(of_tokens: Array, of_text: Array) -> Array:
        of_tokens, of_text = (jnp.broadcast_to(table, (batch, *table.shape[1:])) for table in (of_tokens, of_text))
        return join_pieces(of_tokens, of_text, pieces)

    return joined(rope[0], text_rope[0]), joined(rope[1], text_rope[1])


class Wrapped:
    """An `Attend` that attends as another one does."""

    def __init__(self, attend: Attend):
        self._attend = attend

    def pieces(self, picture, text):
        return self._attend.pieces(picture, text)

    def fuse(self, place, *lengths):
        return self._attend.fuse(place, *lengths)

    def self_attention(self, tokens):
        return self._attend.self_attention(tokens)

    def cross_attention(self, q, k, v, *, text_length=None):
        return self._attend.cross_attention(q, k, v, text_length=text_length)

    def text_attention(self, text, *, text_length=None, picture=0):
        return self._attend.text_attention(text, text_length=text_length, picture=picture)

    def joint_attention(self, tokens, text, *, text_length=None):
        return self._attend.joint_attention(tokens, text, text_length=text_length)


class Apart(Wrapped):
    """An `Attend` for which picture and text stay two streams."""

    def pieces(self, picture, text):
        return None


class HeldModules(Wrapped):
    """An `Attend` for one call of `Denoiser.run_blocks` over all blocks, and no longer: it lives while that is traced.

    held: what was remembered at the step before. `after`: what is remembered now, once all blocks were run.
    """

    def __init__(self, attend: Attend, around: Around, held: Held):
        super().__init__(attend)
        self._around, self._held = around, held
        self.after: Held = ()

    def _of_block(self, own: Mapping[str, Any]) -> Any:
        return _BlockAttend(self._attend, self._around, own)

    def scan(self, blocks: nnx.Module, lo: int, hi: int, call: Callable[[Any, T, Any], T], hidden: T) -> T:
        def remembering(block, carry):
            hidden, held, at = carry
            own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False), held)
            attend = self._of_block(own)
            hidden = call(block, hidden, attend)
            held = jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, at, 0), held, attend.held)
            return hidden, held, at + 1

        carry = hidden, self._held[len(self.after)], jnp.int32(0)
        hidden, held, _ = scan_blocks(blocks, lo, hi, remembering, carry)
        self.after = (*self.after, held)
        return hidden


class HeldRemotes(HeldModules):
    """The same for attention around a ring of devices: of each block the part that comes from the other devices is held.

    attend: one that has `remote_shapes` and `attention_with_remote`, as all that context parallelism wraps have the former.
    held: for each scan {"fresh": bool [n], whether a block's is computed, "remote": it, "mean": what the block attended to, the
    mean of its features [n b s 1]}.
    """

    def __init__(self, attend: Any, held: Held):
        super().__init__(attend, _compute, held)

    def pieces(self, picture, text):
        return None

    def _of_block(self, own: Mapping[str, Any]) -> Any:
        return _RemoteAttend(self._attend, own)


def module_shapes(run: Callable[[Any], Any], attend: Attend) -> Held:
    """What the modules give, as shapes and dtypes stacked like `Held`. run: all blocks, for an `Attend`."""
    return recorded_shapes(run, attend, lambda: _BlockAttend(attend, _compute, {}))


def remote_shapes(run: Callable[[Any], Any], attend: Attend) -> Held:
    """The same for `HeldRemotes`. Raises InvalidConfig where no attention goes around a ring."""
    return recorded_shapes(run, Apart(attend), lambda: _RemoteAttend(attend, {}))


def recorded_shapes(run: Callable[[Any], Any], attend: Attend, of_block: Callable[[], Any]) -> Held:
    """What blocks hold, as shapes and dtypes stacked like `Held`. of_block: makes a block's `Attend` that holds nothing yet."""
    recorder = _Recorder(attend, of_block)
    jax.eval_shape(lambda: run(recorder))
    return recorder.shapes


def _compute(name: str, held: Out, compute: Callable[[], Out]) -> Out:
    return compute()


class _BlockAttend(Wrapped):
    """The `Attend` of one block. held: of each of its modules, what it gave last."""

    def __init__(self, attend: Attend, around: Around, held: Mapping[str, Out]):
        super().__init__(attend)
        self._around = around
        self.held = dict(held)

    def module(self, name: str, compute: Callable[[], Out]) -> Out:
        self.held[name] = self._around(name, self.held.get(name), compute)
        return self.held[name]


class _RemoteAttend(Wrapped):
    """The `Attend` of one block, one of whose attentions goes around the ring. held: see `HeldRemotes`; empty at first."""

    def __init__(self, attend: Any, held: Mapping[str, Any]):
        super().__init__(attend)
        self.held = dict(held)

    def self_attention(self, tokens):
        return self._around_the_ring(tokens, None, None)[0]

    def joint_attention(self, tokens, text, *, text_length=None):
        return self._around_the_ring(tokens, text, text_length)

    def _around_the_ring(self, tokens: QKV, text: QKV | None, text_length: Any) -> tuple[Any, Any]:
        attend: Any = self._attend
        if not self.held:
            shapes = attend.remote_shapes(tokens, text)
            self.held = {"fresh": jnp.bool_(True), "remote": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)}
        fresh = self.held["fresh"]
        out, text_out, remote = attend.attention_with_remote(tokens, text, text_length, self.held["remote"], fresh)
        mean = jnp.mean(out.astype(jnp.float32), axis=(2, 3))[..., None]
        self.held = {"fresh": fresh, "remote": remote, "mean": mean}
        return out, text_out


class _Recorder(HeldModules):
    def __init__(self, attend: Attend, of_block: Callable[[], Any]):
        super().__init__(attend, _compute, ())
        self._new, self.shapes = of_block, ()

    def scan(self, blocks, lo, hi, call, hidden):
        shapes: dict[str, Out] = {}

        def recording(block, hidden):
            attend = self._new()
            hidden = call(block, hidden, attend)
            shapes.update(attend.held)
            return hidden

        hidden = scan_blocks(blocks, lo, hi, recording, hidden)
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((hi - lo, *leaf.shape), leaf.dtype), shapes)
        self.shapes = (*self.shapes, stacked)
        return hidden
