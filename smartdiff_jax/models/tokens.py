"""Blocks for some of a picture's tokens: which ones, and the keys and values by which they attend to the others.

A token is chosen on the device that holds it, as many on every device: nothing is sent that would not be for all of them. What
a block remembers goes through its scan as in `models.modules`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smartdiff_jax.kernels.base import QKV, Attend
from smartdiff_jax.models.modules import Apart, Held, HeldModules, Wrapped, recorded_shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenTokens:
    """cache.base.Chosen. index: int32 [b, shards, k], within each shard, in the order in which they lie."""

    # Not annotated with shapes: it is mapped over.
    index: Any

    @classmethod
    def of(cls, priority: Float[Array, "b s 1"], share: float, shards: int) -> "ChosenTokens":
        """The highest priorities of each of `shards` equal parts of the tokens; the first of equal ones."""
        own = priority.reshape(priority.shape[0], shards, -1)
        count = max(1, round(share * own.shape[-1]))
        # A sort, which the partitioner splits over shards by itself.
        return cls(jnp.sort(jnp.argsort(-own, axis=-1)[..., :count], axis=-1))

    def pick(self, x: Any) -> Any:
        """See `cache.base.Chosen`; the batch of x may be 1."""
        if isinstance(x, tuple):
            return self.pick(x[0]), x[1]
        batch, shards, _ = self.index.shape
        parts = jnp.broadcast_to(x, (batch, *x.shape[1:])).reshape(batch, shards, -1, x.shape[-1])
        return _each(lambda part, index: part.at[index].get(**_MODE))(parts, self.index).reshape(batch, -1, x.shape[-1])

    def put(self, x: Any, rows: Any) -> Any:
        """See `cache.base.Chosen`."""
        if isinstance(x, tuple):
            return self.put(x[0], rows[0]), rows[1]
        batch, shards, _ = self.index.shape
        parts, rows = (of.reshape(batch, shards, -1, x.shape[-1]) for of in (x, rows))
        return _each(lambda part, index, new: part.at[index].set(new, **_MODE))(parts, self.index, rows).reshape(x.shape)


_MODE: dict[str, Any] = dict(mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)


def _each(of_shard: Callable[..., Array]) -> Callable[..., Array]:
    """For every sample and shard, axes that a gather keeps apart: none reads another's."""
    return jax.vmap(jax.vmap(of_shard))


class HeldKeys(HeldModules):
    """An `Attend` for one call of `Denoiser.run_blocks` over all blocks, whose picture's keys and values are remembered.

    chosen: the tokens that the blocks run for; None for all.
    """

    def __init__(self, attend: Attend, held: Held, chosen: ChosenTokens | None):
        # Of the picture there may be few rows, and its keys alone are remembered.
        super().__init__(Apart(attend), lambda name, held, compute: compute(), held)
        self._chosen = chosen

    def _of_block(self, own: Any) -> Any:
        return _KeysAttend(self._attend, own, self._chosen)


class _KeysAttend(Wrapped):
    """The `Attend` of one block. held: {"k", "v": [b, s, h * d]} of all tokens; empty at first."""

    def __init__(self, attend: Attend, held: Any, chosen: ChosenTokens | None):
        super().__init__(attend)
        self.held, self._chosen = dict(held), chosen

    def self_attention(self, tokens):
        return self._attend.self_attention(self._to_all(tokens))

    def joint_attention(self, tokens, text, *, text_length=None):
        return self._attend.joint_attention(self._to_all(tokens), text, text_length=text_length)

    def _to_all(self, tokens: QKV) -> QKV:
        flat = {"k": tokens.k, "v": tokens.v}
        flat = {name: x.reshape(*x.shape[:2], -1) for name, x in flat.items()}
        if self._chosen is None:
            self.held = flat
            return tokens
        self.held = {name: self._chosen.put(self.held[name], x) for name, x in flat.items()}
        k, v = (x.reshape(*x.shape[:2], *tokens.k.shape[2:]) for x in self.held.values())
        return QKV(tokens.q, k, v)


def key_shapes(run: Callable[[Any], Any], attend: Attend) -> Held:
    """The keys and values of every block, as shapes and dtypes. run: all blocks, for an `Attend`."""
    apart = Apart(attend)
    return recorded_shapes(run, apart, lambda: _KeysAttend(apart, {}, None))
