"""Where weights lie on a mesh: a rule by the name of a parameter, the same for every architecture.

    tensor   projections into heads or hidden features are split by column, those out of them by row (Megatron-LM,
             arXiv 1909.08053): one reduction behind attention and one behind the feed-forward
    fsdp     besides, a whole leaf is cut over the sequence axes along its first free axis that divides; a block gathers its
             own weights when its turn comes, and the next block's come while it computes. Pieces of the first axis lie one
             behind the other; cut along the last, XLA would lay a whole stack of kernels anew in every step

Blocks are stacked along a leading axis that is never cut: the scan takes one layer from every device.
"""

import math
import re
from collections.abc import Callable, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smartdiff_jax.sharding.context_parallel import SEQUENCE

INTO = r"(?:.*\.)?(?:q|k|v|qkv|gate|up|linear_1|text_q|text_k|text_v)\.(?:kernel|bias)"
OUT_OF = r"(?:.*\.)?(?:out|down|linear_2|text_out)\.kernel"
SMALLEST = 2**16
"""Parameters under so many numbers, of a block, are not worth a message: each device keeps its own."""

ShardingFor = Callable[[str, tuple[int, ...]], NamedSharding]


def weight_sharding(mesh: Mesh, *, fsdp: bool = False, tensor: Sequence[str] = ("tensor",)) -> ShardingFor:
    """The placement of a parameter by its dotted path and shape.

    tensor: the axes that split features; text encoders, which have no long sequence to split, take all of them.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec: list[tuple[str, ...] | None] = [None] * len(shape)
        along = _tensor_axis(path, shape)
        axes = _dividing(mesh, tensor, shape[along]) if along is not None else ()
        if along is not None and axes:
            spec[along] = axes
        if fsdp and math.prod(shape[is_stacked(path) :]) >= SMALLEST:
            rest = tuple(axis for axis in SEQUENCE if axis not in axes and mesh.shape[axis] > 1)
            free = [i for i in range(is_stacked(path), len(shape)) if spec[i] is None and _size(mesh, rest)]
            fitting = [i for i in free if shape[i] % _size(mesh, rest) == 0]
            if rest and fitting:
                spec[fitting[0]] = rest
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place


def _tensor_axis(path: str, shape: tuple[int, ...]) -> int | None:
    if re.fullmatch(INTO, path):
        return len(shape) - 1
    return len(shape) - 2 if re.fullmatch(OUT_OF, path) else None


def is_stacked(path: str) -> bool:
    """Whether the parameter of that dotted path has a leading axis of blocks."""
    return "blocks." in path or "refiners." in path


def _dividing(mesh: Mesh, axes: Sequence[str], size: int) -> tuple[str, ...]:
    """As many of the axes, first to last, as divide `size` together."""
    taken: list[str] = []
    for axis in axes:
        if mesh.shape[axis] > 1 and size % (_size(mesh, [*taken, axis])) == 0:
            taken.append(axis)
    return tuple(taken)


def _size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
