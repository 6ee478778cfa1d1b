"""Whether what a cache remembers fits the devices, asked before anything is allocated."""

import math
from typing import Any

from jax.sharding import Mesh

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.base import CachePolicy
from smartdiff_jax.errors import InvalidRequest


def check_fits(policy: CachePolicy, carry: list[Any], placements: list[Any], mesh: Mesh) -> None:
    """Raises InvalidRequest where a loop's carry needs more of a device than is free on it.

    carry: shapes of all that goes from step to step, nearly all of it the cache's. A lower bound: activations come on top, and
    branches that run one after the other work on copies of their memory. Devices that do not tell their size are trusted.
    """
    free = free_bytes(mesh)
    if free is None:
        return
    needed = bytes_per_device(carry, placements)
    if needed > free:
        name = next((name for name, kind in POLICIES.items() if type(policy) is kind), type(policy).__name__)
        remedy = (
            f"at this size a device has at least {needed / 1e9:.3g} GB to remember, and {free / 1e9:.3g} GB are free; choose a "
            "smaller size, a larger mesh.ring or mesh.ulysses, or a cache that remembers less, such as fbcache"
        )
        raise InvalidRequest("cache", name, remedy)


def bytes_per_device(arrays: list[Any], placements: list[Any]) -> int:
    """Of arrays (or their shapes) that lie so."""
    pairs = zip(arrays, placements, strict=True)
    return sum(math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, placement in pairs)


def free_bytes(mesh: Mesh) -> int | None:
    """Of the fullest device of this process; None where devices do not tell."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    return min((s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if s and "bytes_limit" in s), default=None)
