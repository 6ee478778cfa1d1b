"""A picture in overlapping windows, one a device, for networks of 3x3 convolutions. Runs inside shard_map.

A device has its own piece and, around it, `halo` rows or columns of its neighbours'. A convolution pads a window with zeros
where a piece of the whole would see its neighbours: what it computes there is wrong, one row further in with each layer, and is
cut off before it reaches the device's own piece. So a halo as wide as the layers ahead reach takes the place of a message in
front of every one of them: some work is done twice instead, where the picture is still small.

Windows are shifted to lie inside the picture: where one ends at the picture's border its padding is the one that the whole has
there. That makes all windows alike, with nothing to mask.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ROWS, COLUMNS = -3, -2
"""Where height and width are in activations [... h w c]."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the picture, cut into equal pieces over a mesh axis.

    name: of that axis. length: of the whole side, of which `pieces` is a divisor. halo: of a window, on either side; where
    there are two pieces, each has one neighbour, and its window one halo.
    """

    name: str
    pieces: int
    length: int
    halo: int = 0

    @property
    def own(self) -> int:
        return self.length // self.pieces

    @property
    def size(self) -> int:
        """Of a window."""
        return min(self.length, self.own + min(self.pieces - 1, 2) * self.halo)

    def start(self) -> Array:
        """Where this device's window begins."""
        return jnp.clip(lax.axis_index(self.name) * self.own - self.halo, 0, self.length - self.size)


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of one size of the picture; WHOLE where one device has it all, and nothing below does anything."""

    rows: Side
    columns: Side

    @property
    def sides(self) -> list[tuple[int, Side]]:
        """(axis, side) of those that are cut."""
        return [(axis, side) for axis, side in ((ROWS, self.rows), (COLUMNS, self.columns)) if side.pieces > 1]

    def with_halo(self, halo: int) -> "Windows":
        return Windows(*(dataclasses.replace(side, halo=halo) for side in (self.rows, self.columns)))

    def doubled(self) -> "Windows":
        """Of the picture at twice the size."""
        return Windows(
            *(dataclasses.replace(side, length=2 * side.length, halo=2 * side.halo) for side in (self.rows, self.columns))
        )

    def cut(self, whole: Float[Array, "*n h w c"]) -> Float[Array, "*n r s c"]:
        """This device's window of a picture that every device has whole."""
        for axis, side in self.sides:
            whole = lax.dynamic_slice_in_dim(whole, side.start(), side.size, axis % whole.ndim)
        return whole

    def crop(self, x: Float[Array, "*n r s c"], halo: int) -> tuple[Float[Array, "*n r2 s2 c"], "Windows"]:
        """A window with less around it."""
        smaller = self.with_halo(halo)
        for (axis, side), (_, to) in zip(self.sides, smaller.sides, strict=True):
            x = lax.dynamic_slice_in_dim(x, to.start() - side.start(), to.size, axis % x.ndim)
        return x, smaller

    def own(self, x: Float[Array, "*n r s c"]) -> Float[Array, "*n y x c"]:
        """The device's own piece of its window."""
        return self.crop(x, 0)[0]

    def gathered(self, own: Float[Array, "*n y x c"]) -> Float[Array, "*n h w c"]:
        """The whole picture from everybody's own piece: one message a side that is cut."""
        for axis, side in reversed(self.sides):
            own = lax.all_gather(own, side.name, axis=axis % own.ndim, tiled=True)
        return own

    def refreshed(self, own: Float[Array, "*n y x c"], halo: int) -> tuple[Float[Array, "*n r s c"], "Windows"]:
        """A window around everybody's own piece. Gathers the whole, for use where the picture is at its smallest."""
        windows = self.with_halo(halo)
        return windows.cut(self.gathered(own)), windows

    def pooled(self, mean: Float[Array, "*n"], variance: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """Of the whole picture, from those of everybody's own piece: one message a side that is cut.

        Squared deviations are from each piece's own mean, so that nothing cancels.
        """
        # Not one message over both: where the mesh's axes are cut anew into rows and columns, XLA aborts on naming two of them.
        for _, side in self.sides:
            means, variances = jnp.moveaxis(lax.all_gather(jnp.stack([mean, variance]), side.name), 1, 0)
            mean = jnp.mean(means, axis=0)
            variance = jnp.mean(variances + jnp.square(means - mean), axis=0)
        return mean, variance


WHOLE = Windows(Side("rows", 1, 0), Side("columns", 1, 0))


def halos(convolutions: Sequence[int]) -> tuple[list[int], int]:
    """How much of its neighbours a decoder needs: behind each level's convolutions, and in front of the first's.

    convolutions: 3x3 ones of each level, coarsest first. Between two levels the picture is doubled, with one more behind; and
    one more makes the pixels.
    """
    behind, ahead = [], 1
    for count in reversed(convolutions):
        behind.append(ahead)
        # Doubled, and convolved once at the size of the level that this one comes behind.
        entry = ahead + count
        ahead = (entry + 2) // 2
    return behind[::-1], entry


def windows_of(mesh: jax.sharding.Mesh, height: int, width: int) -> Windows:
    """Of a picture height x width on a mesh of rows and columns (layout.Layout.pieces)."""
    return Windows(Side("rows", mesh.shape["rows"], height), Side("columns", mesh.shape["columns"], width))
