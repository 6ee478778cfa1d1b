"""The devices of one host that train together: each takes its part of every batch, and their gradients are averaged.

Everything that is trained is on all of them alike; scenes, latents and captions are split. One device is the same code over a
mesh of one. What is drawn (noise, noise levels) is drawn by sample and not by device, so that a step of N devices and one of a
single device with the same batch are the same up to rounding.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXIS = "data"
EVERYWHERE, BY_ROW, BY_COLUMN = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
"""Not split; split along the first axis; along the second."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of one axis."""

    mesh: Mesh

    @classmethod
    def of(cls, *batches: int) -> "Devices":
        """As many of the visible devices as divide every batch."""
        seen = jax.devices()
        count = math.gcd(len(seen), *batches)
        return cls(Mesh(np.array(seen[:count]), (AXIS,), axis_types=(AxisType.Auto,)))

    @property
    def count(self) -> int:
        """How many there are."""
        return self.mesh.size

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Of an array over these devices."""
        return NamedSharding(self.mesh, spec)

    def replicate(self, tree: Any) -> Any:
        """Everything on every device."""
        return jax.device_put(tree, self.sharding(EVERYWHERE))

    def each(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`local` on every device, with its part of the arguments."""
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def own(self, whole: Array) -> Array:
        """Within `each`: this device's rows of what was drawn for the whole batch."""
        rows = len(whole) // self.count
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(AXIS) * rows, rows)

    def noise(self, key: Array, rows: int, shape: tuple[int, ...]) -> Array:
        """Within `each`: this device's part of normal noise [rows, *shape], which is the same on any number of devices."""
        return jax.vmap(lambda key: jax.random.normal(key, shape))(self.own(jax.random.split(key, rows)))


def mean(tree: T) -> T:
    """Within `Devices.each`: over the devices."""
    return jax.lax.pmean(tree, AXIS)


def one(tree: T) -> T:
    """The first device's copy of what is on all of them: what is sampled from, and saved, needs one. It belongs to no mesh, or
    the one of sampling would meet that of training in one program."""

    def copy(leaf: jax.Array) -> jax.Array:
        shard = leaf.addressable_shards[0]
        return jax.device_put(shard.data, shard.device)

    return jax.tree.map(copy, tree)
