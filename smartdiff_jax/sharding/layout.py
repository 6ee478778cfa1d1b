"""Where activations lie on a mesh: tokens over the sequence axes, outputs over `data`, branches of guidance over `cfg`.

Tokens stay split from the noise to the decoder. Their number is padded once, so that every device has as many; attention and
caches are told how many count.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from smartdiff_jax.sharding.context_parallel import SEQUENCE
from smartdiff_jax.sharding.workload import tokens_per_device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placements of one mesh."""

    mesh: Mesh

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """What the batch inside the model is split over: outputs, and branches where they run as one batch."""
        return ("cfg", "data") if self.mesh.shape["cfg"] > 1 else ("data",)

    @property
    def shards(self) -> int:
        """How many devices a sample's tokens are split over."""
        return _size(self.mesh, SEQUENCE)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def tokens(self) -> NamedSharding:
        """Of packed latents [b, s, p]."""
        return NamedSharding(self.mesh, PartitionSpec("data", SEQUENCE))

    def padding(self, num_tokens: int) -> int:
        """How many tokens are added, to be split (workload.tokens_per_device)."""
        ring, ulysses = (self.mesh.shape[axis] for axis in SEQUENCE)
        return ring * ulysses * tokens_per_device(num_tokens, ring, ulysses) - num_tokens

    def pad_tokens(self, tokens: Float[Array, "b s p"]) -> Float[Array, "b t p"]:
        return jnp.pad(tokens, ((0, 0), (0, self.padding(tokens.shape[1])), (0, 0)))

    def place_rope(self, rope: tuple[np.ndarray, np.ndarray]) -> tuple[Array, Array]:
        """The tokens' rotary table [n, c, s, r], split as they are, with rows of position zero for the padding."""
        cos, sin = rope
        rows = ((0, 0), (0, 0), (0, self.padding(cos.shape[2])), (0, 0))
        split = NamedSharding(self.mesh, PartitionSpec(None, None, SEQUENCE))
        return jax.device_put((np.pad(cos, rows, constant_values=1), np.pad(sin, rows)), split)

    def carry(self, shapes: T, num_tokens: int) -> T:
        """Placements of whatever the loop carries: [..., b, num_tokens, d] as the tokens, all else whole.

        Memories of caches are among it, with leading axes of branches and anchors.
        """

        def place(leaf: Any) -> NamedSharding:
            if leaf.ndim < 3 or leaf.shape[-2] != num_tokens:
                return self.replicated
            batch = leaf.shape[-3]
            axes = next((axes for axes in (self.batch_axes, ("data",)) if batch % _size(self.mesh, axes) == 0), None)
            return NamedSharding(self.mesh, PartitionSpec(*[None] * (leaf.ndim - 3), axes, SEQUENCE))

        return jax.tree.map(place, shapes)

    def as_branches(self, x: Float[Array, "b s p"]) -> Float[Array, "b s p"]:
        """Tokens of all branches as one batch: each branch on devices of its own, where the mesh has them."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.batch_axes, SEQUENCE)))

    def pieces(self, shape: tuple[int, ...]) -> Mesh:
        """For latents [b, c, f, h, w] on their way to pixels: a mesh of its own over the same devices, because no axis of
        `mesh` can be cut into rows and columns (see `split_picture`)."""
        rows, columns = split_picture(shape[3], shape[4], self.mesh.size)
        return Mesh(self.mesh.devices.reshape(rows, columns, -1), ("rows", "columns", "copies"))


def split_picture(height: int, width: int, devices: int) -> tuple[int, int]:
    """(rows, columns) of equal pieces that latents height x width are cut into: as many as `devices` allow, and among those
    with the shortest edges, along which work is done twice (sharding/windows.py).

    Pieces must be equal. Where fewer pieces than devices are possible, every piece is decoded by several devices.
    """

    def edges(rows: int, columns: int) -> int:
        return (rows > 1) * width // columns + (columns > 1) * height // rows

    pairs = [(r, c) for r in range(1, devices + 1) for c in range(1, devices // r + 1) if devices % (r * c) == 0]
    usable = [(r, c) for r, c in pairs if height % r == 0 and width % c == 0]
    return max(usable, key=lambda pair: (pair[0] * pair[1], -edges(*pair), pair[0]))


def describe_pieces(height: int, width: int, devices: int) -> str:
    """How latents height x width are decoded, and whether devices do the same work twice; for plans and reports."""
    rows, columns = split_picture(height, width, devices)
    text = f"{rows} x {columns} pieces of {height // rows} x {width // columns} latents"
    copies = devices // (rows * columns)
    return text + (f", each by {copies} devices: {height} x {width} divides no further" if copies > 1 else "")


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
