"""Where weights are between their uses.

    all     on their devices always
    stage   in the hosts' pinned memory; whoever needs a component brings it to the devices, and the one before it leaves

With `stage` device memory holds one component at a time: a text encoder, a denoiser (of two experts the one in use), or the
autoencoder. Nothing is written back, because weights never change: leaving means that the copy on the devices is freed.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from smartdiff_jax.sharding.weights import ShardingFor

HOST, DEVICE = "pinned_host", "device"


class Resident:
    """Weights that are on their devices always.

    kept: the weights where they lie between uses, to look at their shapes.
    """

    def __init__(self, weights: Any):
        self.kept = weights

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """The weights on their devices. What is computed from them must be ready before the block ends."""
        yield self.kept


class Room:
    """The devices' memory for one component at a time. Threads that need different ones wait for each other."""

    def __init__(self):
        self._lock = threading.RLock()
        self._tenant: object = None
        self._weights: Any = None

    @contextlib.contextmanager
    def enter(self, tenant: object, weights: Any) -> Iterator[Any]:
        with self._lock:
            if self._tenant is not tenant:
                self.clear()
                there = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(DEVICE), weights)
                self._weights, self._tenant = jax.device_put(weights, there), tenant
            yield self._weights

    def clear(self) -> None:
        """Free what is there."""
        with self._lock:
            for leaf in jax.tree.leaves(self._weights):
                leaf.delete()
            self._tenant = self._weights = None


class Staged:
    """Weights in pinned host memory that share a room with others; `kept` and `use` as in Resident."""

    def __init__(self, room: Room, weights: Any):
        self.kept, self._room = weights, room

    def use(self) -> contextlib.AbstractContextManager[Any]:
        return self._room.enter(self, self.kept)


Held = Resident | Staged


def holder(residency: str) -> Callable[[Any], Held]:
    """What holds the weights of each component of one model. residency: "all" or "stage"."""
    if residency == "all":
        return Resident
    room = Room()
    return lambda weights: Staged(room, weights)


def at_rest(place: ShardingFor, residency: str) -> ShardingFor:
    """The placements of `place`, in the memory where weights lie between uses."""
    if residency == "all":
        return place
    return lambda path, shape: place(path, shape).with_memory_kind(HOST)
