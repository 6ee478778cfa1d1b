"""Attention over a split sequence, put together from a kernel that knows one device only.

Outside, arrays are whole and lie on the mesh: tokens over ("ring", "ulysses"), ring outermost, heads over "tensor", the
batch over axes of the caller's choice. Attention alone runs inside shard_map, where every device holds its piece:

    self, joint   a device's piece of both streams, [tokens | text]
                  Ulysses: all-to-alls to some heads of all pieces along the axis, in order
                  ring: chunks of keys and values go round, or are gathered at once
                  Ulysses: an all-to-all back
    cross, text   no communication: the text is whole on every device

In joint attention the text is divided as the picture is: its queries, so that no work is done twice, and its keys, which
travel in the picture's messages. Keys kept whole on every device would save the text's share of those, a few percent, at the
price of a second layout; queries kept whole would cost a ring as much again as the picture's where text is an eighth of it.

Any length is exact. What does not divide is padded, padding is moved behind the keys that count, chunk by chunk, and the
kernel's `kv_length` ends before it; where all divides there is no mask. A softmax does not mind the order of its keys, and
so unmasked joint attention is self-attention over the pieces as they lie.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.kernels.base import QKV, AttentionFn, Fuse
from smartdiff_jax.kernels.sparse import SparseKernel
from smartdiff_jax.sharding.chunks import Chunks
from smartdiff_jax.sharding.ring import KV, Part, merge, own_and_remote, own_chunk, ring_attention
from smartdiff_jax.sharding.ulysses import split_heads, split_sequence, split_sequence_of_lse
from smartdiff_jax.sharding.whole import attend_to_whole

SEQUENCE = ("ring", "ulysses")

RingMode = Literal["permute", "gather"]
TextMode = Literal["replicated", "split"]
NumTokens = int | Int[Array, ""]


def ring_mode(ring: int, told: RingMode | None = None) -> RingMode:
    """How keys and values get along a ring of so many devices.

    Between two a gather sends what a permute does, while queries are projected; then there is one kernel and nothing to merge.
    On two H200 both take the same time, to 1 %.
    """
    return told or ("gather" if ring <= 2 else "permute")


def padded_length(length: int, mesh: Mesh) -> int:
    """The least length from `length` on that splits evenly over the sequence axes of `mesh`."""
    pieces = _size(mesh, SEQUENCE)
    return math.ceil(length / pieces) * pieces


def factorise(num_devices: int, num_heads: int) -> list[tuple[int, int]]:
    """Every (ring, ulysses) of `num_devices` that serves `num_heads` heads (with a tensor axis, its share), best first.

    Most Ulysses first. On P devices it sends 4 (P - 1) / P^2 of a sequence's activations, less the larger P, and leaves one
    kernel over the whole length. A ring sends 2 (P - 1) / P, hidden behind attention where sequences are long, and cuts it
    into P smaller kernels with a float32 merge after each. Published: FLUX on 4 GPUs, Ulysses before 2 x 2 (xDiT); 64K
    tokens on 8 GPUs, -8 to +1 % with Ulysses and -29 to -32 % with a ring (prime-rl). On two H200 a ring is ahead
    by 1 % (Wan2.1-1.3B) and 4 % (FLUX.1).
    """
    degrees = (size for size in range(num_devices, 0, -1) if num_devices % size == 0 and num_heads % size == 0)
    return [(num_devices // ulysses, ulysses) for ulysses in degrees]


def check_heads(mesh: Mesh, heads: int) -> None:
    """Raises InvalidConfig, with what would work, unless `mesh` can split that many heads."""
    ring, ulysses, tensor = (mesh.shape[axis] for axis in (*SEQUENCE, "tensor"))
    if heads % tensor:
        raise InvalidConfig("mesh.tensor", tensor, f"must divide the model's {heads} heads")
    if heads % (ulysses * tensor):
        served = " or ".join(f"ring={r} ulysses={u}" for r, u in factorise(ring * ulysses, heads // tensor))
        per_tensor = f" over tensor={tensor}" if tensor > 1 else ""
        raise InvalidConfig("mesh.ulysses", ulysses, f"must divide the model's {heads} heads{per_tensor}; use {served}")


@dataclasses.dataclass(frozen=True)
class LocalAttend:
    """`Attend` where one device holds everything: the kernel itself. The fields are `MeshAttend`'s.

    Joint attention puts the text behind the picture, so that padded text is the end of the keys.
    """

    kernel: AttentionFn
    num_tokens: NumTokens | None = None
    fused: bool = False
    sparse: SparseKernel | None = None
    sparsity: Array | None = None

    def pieces(self, picture, text):
        return 1 if self.num_tokens is None else None

    def fuse(self, place, *lengths):
        return Fuse(lambda kernel, arrays: kernel(arrays)) if self.fused else None

    def for_length(self, num_tokens: NumTokens) -> "LocalAttend":
        """As `MeshAttend.for_length`."""
        return dataclasses.replace(self, num_tokens=num_tokens)

    def leaving_out(self, sparsity: Array) -> "LocalAttend":
        """As `MeshAttend.leaving_out`."""
        return dataclasses.replace(self, sparsity=sparsity)

    def remote_shapes(self, tokens: QKV, text: QKV | None) -> "Remote":
        """As `MeshAttend.remote_shapes`, which one device has not."""
        raise _no_ring(1)

    def self_attention(self, tokens):
        q, k, v = tokens
        return self._attend(q, k, v, Chunks(1, k.shape[1], 0, self.num_tokens, None))

    def cross_attention(self, q, k, v, *, text_length=None):
        return self.kernel(q, k, v, kv_length=text_length)[0]

    def text_attention(self, text, *, text_length=None, picture=0):
        if picture and self.sparsity is not None:
            length = None if text_length is None else text_length - picture
            q, k, v = text
            return self._attend(q, k, v, Chunks(1, picture, q.shape[1] - picture, None, length))
        return self.kernel(*text, kv_length=text_length)[0]

    def joint_attention(self, tokens, text, *, text_length=None):
        size = tokens.q.shape[1]
        chunks = Chunks(1, tokens.k.shape[1], text.q.shape[1], self.num_tokens, text_length)
        q, k, v = _joined(tokens, text)
        out = self._attend(q, k, v, chunks)
        return out[:, :size], out[:, size:]

    def _attend(self, q, k, v, chunks):
        return attend_to_whole(self.kernel, q, k, v, chunks, self.sparse, self.sparsity)


@dataclasses.dataclass(frozen=True)
class MeshAttend:
    """`Attend` on a mesh of several devices. What comes out lies as the queries do, joint attention's text as `text` says.

    ring: how keys and values get along the ring axis. "permute" hides transport behind attention and needs the kernel's
        log-sum-exp; "gather" brings them all at once to one call of the kernel. None: as `ring_mode` says.
    text: "split" leaves the text's part of joint attention as the tokens are, and with it all work on the text stream
        is divided: the partitioner follows the placement. "replicated" hands it whole to every device. None: "split"
        where the text divides evenly; padded rows could not be cut off again without moving all others.
    batch: the axes that the batch is split over.
    num_tokens: how many tokens count (see `for_length`); None if all do.
    fused: whether `fuse` has kernels to give: on GPUs.
    sparse: the kernel for what leaves keys out. sparsity: see `leaving_out`.

    Called within a shard_map over other axes than the sequence's (say "cfg"), it is one over the rest.

    Raises InvalidConfig while tracing, where heads or batch do not divide.
    """

    kernel: AttentionFn
    mesh: Mesh
    ring: RingMode | None = None
    text: TextMode | None = None
    batch: tuple[str, ...] = ("data",)
    num_tokens: NumTokens | None = None
    fused: bool = False
    sparse: SparseKernel | None = None
    sparsity: Array | None = None

    def pieces(self, picture, text):
        pieces = _size(self.mesh, SEQUENCE)
        return None if picture % pieces or text % pieces or self.text == "replicated" else pieces

    def fuse(self, place, *lengths):
        pieces = _size(self.mesh, SEQUENCE)
        # Wan's norms are over all heads, which a tensor axis splits. What is whole is short.
        if not self.fused or place == "whole" or self.mesh.shape["tensor"] > 1 or any(length % pieces for length in lengths):
            return None
        if place == "split":
            return Fuse(self._run_kernel)
        return Fuse(self._run_kernel, groups=self.mesh.shape["ulysses"], sent=pieces > 1)

    def for_length(self, num_tokens: NumTokens) -> "MeshAttend":
        """This attention for token axes padded behind `num_tokens`, which may be traced.

        For callers who pad once, to `padded_length`, and not in every call. Outputs of padding are finite and mean nothing.
        """
        return dataclasses.replace(self, num_tokens=num_tokens)

    def leaving_out(self, sparsity: Array) -> "MeshAttend":
        """This attention, where the picture's tokens leave out this share of the blocks of keys (traced, in [0, 1)).

        0 is the kernel for all keys itself. Not along a ring: the best blocks would lie on some of its devices.
        """
        return dataclasses.replace(self, sparsity=sparsity)

    def self_attention(self, tokens):
        return self._split_attention(tokens, None, None)[0]

    def joint_attention(self, tokens, text, *, text_length=None):
        return self._split_attention(tokens, text, text_length)[:2]

    def remote_shapes(self, tokens: QKV, text: QKV | None) -> "Remote":
        """Of what `attention_with_remote` holds. Raises InvalidConfig on a mesh that nothing goes round on."""
        if self.mesh.shape["ring"] == 1 or self.ring == "gather":
            raise _no_ring(self.mesh.shape["ring"])
        batch, _, heads, width = tokens.q.shape
        lengths = [padded_length(stream.q.shape[1], self.mesh) for stream in (tokens, text) if stream is not None]
        return Remote(
            tuple(jax.ShapeDtypeStruct((batch, length, heads * width), tokens.q.dtype) for length in lengths),
            tuple(jax.ShapeDtypeStruct((batch, length, heads), jnp.float32) for length in lengths),
        )

    def attention_with_remote(
        self, tokens: QKV, text: QKV | None, text_length: Array | None, held: "Remote", fresh: Bool[Array, ""]
    ) -> tuple[Array, Array | None, "Remote"]:
        """Self-attention, or joint attention with text, whose part from a ring's other devices is computed if `fresh`.

        Else it is `held`, and nothing goes round. Returns what is held from then on as well.
        """
        return self._split_attention(tokens, text, text_length, held, fresh)

    def cross_attention(self, q, k, v, *, text_length=None):
        def local(q, k, v, length):
            return self.kernel(q, k, v, kv_length=length)[0]

        split, whole, rows = self._specs(q)
        run = self._shard_map(local, (split, whole, whole, rows), split)
        return run(self._padded(q), k, v, text_length)[:, : q.shape[1]]

    def text_attention(self, text, *, text_length=None, picture=0):
        if picture:
            return self._pieces_attention(text, None if text_length is None else text_length - picture, picture)

        def local(text, length):
            return self.kernel(*text, kv_length=length)[0]

        _, whole, rows = self._specs(text.q)
        return self._shard_map(local, (whole, rows), whole)(text, text_length)

    def _pieces_attention(self, stream: QKV, text_length: Array | None, picture: int) -> Array:
        """Attention of picture and text as one stream in pieces (`pieces`). picture: so many tokens of it are the picture's."""
        check_heads(self.mesh, stream.q.shape[2])
        split, _, rows = self._specs(stream.q)
        pieces, everywhere = _size(self.mesh, SEQUENCE), PartitionSpec()

        def local(piece: QKV, num_tokens: Array | None, text_length: Array | None, sparsity: Array | None) -> Array:
            tokens = picture // pieces
            chunks = Chunks(self.mesh.shape["ulysses"], tokens, piece.k.shape[1] - tokens, num_tokens, text_length)
            return self._attend_pieces(piece, chunks, sparsity)

        num_tokens = None if self.num_tokens is None else jnp.asarray(self.num_tokens, jnp.int32)
        run = self._shard_map(local, (split, everywhere, rows, everywhere), split)
        return run(stream, num_tokens, text_length, self.sparsity)

    def _attend_pieces(self, piece: QKV, chunks: Chunks, sparsity: Array | None) -> Array:
        """Of one device's piece, [tokens | text]."""
        if self.mesh.shape["ulysses"] == 1:
            return self._attend(piece, chunks, sparsity)
        whole = QKV(*(split_heads(x, "ulysses") for x in piece))
        return split_sequence(self._attend(whole, chunks, sparsity), "ulysses")

    def _split_attention(
        self, tokens: QKV, text: QKV | None, text_length: Array | None, held: Any = None, fresh: Array | None = None
    ) -> tuple[Array, Any, Any]:
        """Attention of all streams to all streams: the tokens' part, the text's where there is text, and what is held."""
        batch, size, heads, _ = tokens.q.shape
        num_keys, pieces = tokens.k.shape[1], _size(self.mesh, SEQUENCE)
        check_heads(self.mesh, heads)
        num_tokens, text_size = self.num_tokens, 0 if text is None else text.q.shape[1]
        if num_tokens is None and num_keys % pieces:
            num_tokens = num_keys
        if text_length is None and text_size % pieces:
            text_length = jnp.full(batch, text_size, jnp.int32)

        split, whole, rows = self._specs(tokens.q)
        text_mode = self.text or ("replicated" if text_size % pieces else "split")
        text_split = split if text_mode == "split" else whole
        everywhere = PartitionSpec()
        local = partial(self._local, text_mode)
        specs = (split, split, everywhere, rows, split, everywhere, everywhere)
        run = self._shard_map(local, specs, (split, text_split, split))
        operands = jax.tree.map(self._padded, (tokens, text))
        num_tokens = None if num_tokens is None else jnp.asarray(num_tokens, jnp.int32)
        out, text_out, held = run(*operands, num_tokens, text_length, held, fresh, self.sparsity)
        return out[:, :size], None if text_out is None else text_out[:, :text_size], held

    def _local(
        self,
        text_mode: TextMode,
        tokens: QKV,
        text: QKV | None,
        num_tokens: Array | None,
        text_length: Array | None,
        held: Any,
        fresh: Array | None,
        sparsity: Array | None,
    ) -> tuple[Array, Array | None, Any]:
        """One device's part of `_split_attention`, on its pieces."""
        size, ring, ulysses = tokens.q.shape[1], self.mesh.shape["ring"], self.mesh.shape["ulysses"]
        chunks = Chunks(ulysses, tokens.k.shape[1], 0 if text is None else text.q.shape[1], num_tokens, text_length)
        piece = tokens if text is None else _joined(tokens, text)
        if held is not None:
            # What is held is all heads of a piece, and comes back in one message.
            q, k, v = (split_heads(x, "ulysses") for x in piece) if ulysses > 1 else piece
            out, held = self._with_remote(q, self._arranged(k, v, chunks), chunks, held, fresh)
        else:
            out = self._attend_pieces(piece, chunks, sparsity)
        if text is None:
            return out, None, held
        out, text_out = out[:, :size], out[:, size:]
        if text_mode == "replicated" and ring * ulysses > 1:
            text_out = lax.all_gather(text_out, SEQUENCE, axis=1, tiled=True)
        return out, text_out, held

    def _attend(self, whole: QKV, chunks: Chunks, sparsity: Array | None) -> Array:
        """Attention of what Ulysses has put together to all that lies along the ring."""
        q, k, v = whole
        ring = self.mesh.shape["ring"]
        if ring_mode(ring, self.ring) == "permute":
            return ring_attention(self.kernel, q, self._arranged(k, v, chunks), "ring", chunks)
        if ring > 1:
            k, v = (lax.all_gather(x, "ring", axis=1, tiled=True) for x in (k, v))
            chunks = dataclasses.replace(chunks, blocks=ring * chunks.blocks)
        return attend_to_whole(self.kernel, q, k, v, chunks, self.sparse, sparsity)

    def _arranged(self, k: Array, v: Array, chunks: Chunks) -> KV:
        own = lax.axis_index("ring")
        return chunks.arrange(k, own), chunks.arrange(v, own)

    def _with_remote(self, q: Array, kv: KV, chunks: Chunks, held: "Remote", fresh: Any) -> tuple[Array, "Remote"]:
        """Attention of a device's queries by its own keys and the others', split along the sequence as what is held is."""
        dtype = q.dtype

        def split(part: Part) -> Part:
            out, lse = part
            if self.mesh.shape["ulysses"] == 1:
                return out, lse
            return split_sequence(out, "ulysses"), split_sequence_of_lse(lse, "ulysses")

        def compute(held: Part) -> tuple[Part, Part]:
            own, (out, lse) = own_and_remote(self.kernel, q, kv, "ring", chunks)
            out, lse = split((out, lse))
            return own, (out.astype(dtype), lse)

        def reuse(held: Part) -> tuple[Part, Part]:
            return own_chunk(self.kernel, q, kv, "ring", chunks), held

        heads = held.lse[0].shape[-1]
        out = jnp.concatenate(held.out, axis=1)
        flat = out.shape
        lse = jnp.swapaxes(jnp.concatenate(held.lse, axis=1), 1, 2)
        # Every device takes the same branch, or those that compute would wait for the others forever.
        own, (out, lse) = lax.cond(fresh, compute, reuse, (out.reshape(*flat[:2], heads, -1), lse))
        merged, _ = merge(*split(own), out.astype(jnp.float32), lse)
        cuts = [stream.shape[1] for stream in held.out[:-1]]
        remote = Remote(
            tuple(jnp.split(out.reshape(flat), cuts, axis=1)), tuple(jnp.split(jnp.swapaxes(lse, 1, 2), cuts, axis=1))
        )
        return merged.astype(dtype), remote

    def _run_kernel(self, kernel: Callable[[list[Array]], tuple[Array, ...]], arrays: list[Array]) -> tuple[Array, ...]:
        most = max(len(x) for x in arrays if x.ndim == 3)
        batch = self._batch_axes(most)

        def spec(x: Array) -> PartitionSpec:
            return PartitionSpec(batch if len(x) == most else None, SEQUENCE) if x.ndim == 3 else PartitionSpec()

        return self._shard_map(kernel, (list(map(spec, arrays)),), PartitionSpec(batch, SEQUENCE))(arrays)

    def _specs(self, x: Array) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Where arrays [b, s, h, d] lie, split along s and whole along it, and arrays [b]."""
        batch = self._batch_axes(x.shape[0])
        self._check_divides(x.shape[2], "heads", ("tensor",))
        return PartitionSpec(batch, SEQUENCE, "tensor"), PartitionSpec(batch, None, "tensor"), PartitionSpec(batch)

    def _batch_axes(self, outputs: int) -> tuple[str, ...]:
        """Those of `batch` that are not split already, where they divide so many outputs."""
        axes = tuple(axis for axis in self.batch if axis not in _manual_axes())
        self._check_divides(outputs, "outputs", axes)
        return axes

    def _check_divides(self, size: int, what: str, axes: tuple[str, ...]) -> None:
        pieces = _size(self.mesh, axes)
        if size % pieces:
            raise InvalidConfig(" * ".join(f"mesh.{axis}" for axis in axes), pieces, f"must divide the {size} {what}")

    def _padded(self, x: Array) -> Array:
        """x [b, s, h, d] with s evenly split; x itself where it is already."""
        missing = padded_length(x.shape[1], self.mesh) - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x

    def _shard_map(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`local` on every device of the mesh, inside whatever shard_map is around already."""
        manual = _manual_axes()
        mesh = jax.sharding.get_abstract_mesh() if manual else self.mesh
        axes = frozenset(self.mesh.axis_names) - manual
        # A kernel is opaque: which of its results differ from device to device cannot be checked.
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remote:
    """What the keys of a ring's other devices gave to tokens, and to text if it takes part; padded, and split as tokens.

    out: [b, s, h * d] each, in the queries' dtype. lse: its log-sum-exp, float32 [b, s, h] each.
    """

    # Not annotated with shapes: the loop stacks what it carries, and asks for shapes alone.
    out: Any
    lse: Any


@cache
def wrap(
    kernel: AttentionFn,
    mesh: Mesh,
    *,
    ring: RingMode | None = None,
    text: TextMode | None = None,
    batch: tuple[str, ...] = ("data",),
    sparse: SparseKernel | None = None,
) -> LocalAttend | MeshAttend:
    """`kernel` made to serve arrays laid out on `mesh`; the options are `MeshAttend`'s.

    A mesh of several devices along other axes than the sequence's is inside shard_map as well: kernels are custom calls
    that the partitioner cannot see into, and would gather everything for.

    Memoised: the same kernel and mesh give the same object, which is what keeps an executable from being compiled twice.
    """
    fused = jax.default_backend() == "gpu"
    if mesh.size == 1:
        return LocalAttend(kernel, fused=fused, sparse=sparse)
    return MeshAttend(kernel, mesh, ring, text, batch, fused=fused, sparse=sparse)


def _no_ring(size: int) -> InvalidConfig:
    return InvalidConfig("mesh.ring", size, "no keys of other devices go round, and so none can be left out; give 2 or more")


def _joined(tokens: QKV, text: QKV) -> QKV:
    return QKV(*(jnp.concatenate(pair, axis=1) for pair in zip(tokens, text, strict=True)))


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _manual_axes() -> frozenset[str]:
    """The axes of the shard_map that is being traced."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)
