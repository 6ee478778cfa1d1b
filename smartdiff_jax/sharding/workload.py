"""What a plan needs to know of a model at one size: how much it computes, and what it keeps. Numbers only."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.kernels.hopper import ROWS
from smartdiff_jax.sharding.mesh import AXES
from smartdiff_jax.sharding.weights import ShardingFor

AttentionKind = Literal["self", "joint", "cross", "text"]
Placement = Callable[[str, Mesh, MeshConfig], ShardingFor]
"""(component, mesh, its configuration) -> where the component's parameters lie."""


def tokens_per_device(tokens: int, ring: int, ulysses: int) -> int:
    """Of a sequence over both axes, padding included: all have as many, and attention's kernels see a multiple of ROWS.

    A kernel sees all of the sequence, but along a ring a part of it: a piece of each device along `ulysses`.
    """
    pieces = ring * ulysses
    multiple = math.lcm(pieces, ROWS * ring) if pieces > 1 else 1
    return math.ceil(tokens / multiple) * multiple // pieces


@dataclasses.dataclass(frozen=True)
class Attention:
    """Equal calls of attention in one evaluation of the model (kernels.base.Attend).

    text: rows of the text that takes part, 0 where there is none.
    """

    kind: AttentionKind
    count: int
    text: int
    heads: int
    head_dim: int

    @property
    def is_split(self) -> bool:
        """Whether every token attends to every other, which a mesh pays for in messages."""
        return self.kind in ("self", "joint")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of a component: dotted path, shape, bytes of a number."""

    path: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def bytes_on_device(self, mesh: Mesh, spec: PartitionSpec) -> int:
        return self.itemsize * self.size // num_shards(mesh, spec)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model at one size. An evaluation is the model run once, for one branch of guidance of one output.

    model: its name. tokens: of one output. features: of a token. latent_shape: [1, c, f, h, w].
    text: rows of text in the residual stream, whole on every device (0: text is only looked at, as in Wan).
    width: features of the residual stream. inner: the most features of a projection of it. num_blocks, num_heads: of the model.
    guided: whether it has a negative branch. branches: how many a step evaluates by default.
    itemsize: bytes of an activation.
    matmul_per_token, matmul_fixed: FLOP of an evaluation's projections, of a token and of text and timestep.
    read: bytes of kernels that an evaluation multiplies with one row: reading them is all the work.
    parameters, placement: by component, and where a mesh puts them.
    decoder: bytes of activations while one output is decoded, on one device.
    """

    model: str
    tokens: int
    features: int
    latent_shape: tuple[int, ...]
    text: int
    width: int
    inner: int
    num_blocks: int
    num_heads: int
    guided: bool
    branches: int
    itemsize: int
    attention: tuple[Attention, ...]
    matmul_per_token: float
    matmul_fixed: float
    read: int
    parameters: dict[str, tuple[Parameter, ...]]
    placement: Placement
    decoder: int

    @property
    def split_attention(self) -> tuple[Attention, ...]:
        return tuple(calls for calls in self.attention if calls.is_split)


def mesh_of_numbers(mesh: MeshConfig) -> Mesh:
    """A mesh to ask for placements, whose devices are only counted: numbers stand in for them."""
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    return Mesh(np.arange(math.prod(shape)).reshape(shape), AXES)


def num_shards(mesh: Mesh, spec: PartitionSpec) -> int:
    """Into how many different pieces an array is cut."""
    axes = jax.tree.leaves(tuple(spec))
    return math.prod(mesh.shape[axis] for axis in axes)
