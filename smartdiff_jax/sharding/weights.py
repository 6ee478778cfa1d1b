"""Where weights lie on a mesh: a rule by the name of a parameter, the same for every architecture.

    tensor   projections into heads or hidden features are split by column, those out of them by row (Megatron-LM,
             arXiv 1909.08053): one reduction behind attention and one behind the feed-forward
    fsdp     besides, a block's kernels are cut over the sequence axes along their first free axis, so that pieces lie behind
             each other; a block gathers its own weights when its turn comes (models/modules.py)

Blocks are stacked along a leading axis that is never cut: the scan takes one layer from every device. What is outside of blocks
is used once in an evaluation and is small: fsdp leaves it whole, because what is gathered for a loop stays for all of it.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from smartdiff_jax.sharding.mesh import SEQUENCE

INTO = r"(?:.*\.)?(?:q|k|v|qkv|gate|up|linear_1|text_q|text_k|text_v)\.(?:kernel|bias)"
OUT_OF = r"(?:.*\.)?(?:out|down|linear_2|text_out)\.kernel"
SMALLEST = 2**16
"""Parameters of a block under so many numbers are not worth a message: each device keeps its own."""

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
        if fsdp and is_stacked(path) and math.prod(shape[1:]) >= SMALLEST:
            rest = tuple(axis for axis in SEQUENCE if axis not in axes and mesh.shape[axis] > 1)
            fitting = [i for i in range(1, len(shape)) if spec[i] is None and shape[i] % _size(mesh, rest) == 0]
            if rest and fitting:
                spec[fitting[0]] = rest
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place


def gather_weight(mesh: Mesh, path: str, weight: Shaped[Array, "*n"]) -> Shaped[Array, "*n"]:
    """A block's parameter, of its dotted path within the block, as it lies without fsdp. Itself where fsdp does not cut it."""
    cut = weight_sharding(mesh, fsdp=True)(f"blocks.{path}", (1, *weight.shape)).spec[1:]
    whole = weight_sharding(mesh)(path, weight.shape).spec
    axes = [axis for axis in range(weight.ndim) if cut[axis] != whole[axis]]
    if not axes:
        return weight

    def gather(piece: Array) -> Array:
        # Gathers want their axis outermost in memory. Told of the stack that the piece was taken from, XLA would lay all of it
        # anew, in a second copy; it does not look past the barrier.
        return lax.all_gather(lax.optimization_barrier(piece), cut[axes[0]], axis=axes[0], tiled=True)

    # A gathered array is the same on every device, which cannot be checked.
    return jax.shard_map(gather, mesh=mesh, in_specs=PartitionSpec(*cut), out_specs=whole, check_vma=False)(weight)


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
