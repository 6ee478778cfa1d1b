"""First-Block Cache and its generalisation DBCache: the first blocks tell whether the others need to run.

    d = relative L1 distance of what the first F blocks add, from what they added at the last computed step
    skip if d < threshold

What the middle blocks add is held, or extrapolated from the last computed steps; the last B blocks always run and correct it.
FBCache (ParaAttention, diffusers' FirstBlockCache) is F = 1, B = 0. DBCache (cache-dit) adds the guards.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Hidden, Outlook, Stack, Step
from smartdiff_jax.cache.block_cache import BlockCache, BlockMemory, Verdict, picture
from smartdiff_jax.cache.distance import relative_l1
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.memory import MAX_ANCHORS
from smartdiff_jax.cache.params import ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.predict import forecast
from smartdiff_jax.cache.threshold import between_ends, started
from smartdiff_jax.errors import InvalidRequest

Distances = tuple[tuple[float, ...], ...]


class FirstBlockParams(GuardParams):
    """threshold: more skips more; 0 computes every step.

    first_blocks, last_blocks: F and B. order: degree of the extrapolation, each one more copy of the stream; 0 holds.
    predictor: how, see `cache.predict`.
    """

    threshold: float = Field(0.05, ge=0.0)
    first_blocks: int = Field(1, ge=1)
    last_blocks: int = Field(0, ge=0)
    order: int = Field(0, ge=0, lt=MAX_ANCHORS)
    predictor: Literal["taylor", "newton"] = "taylor"


class DualBlockParams(FirstBlockParams):
    """cache-dit's defaults."""

    threshold: float = Field(0.08, ge=0.0)
    first_blocks: int = Field(8, ge=1)
    warmup: int = Field(8, ge=0)


class FirstBlockNumbers(ModelNumbers):
    """distances: d of every step from 1, 2, .. steps before, for one first block, where it was calibrated."""

    distances: Distances | None = Field(None, min_length=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstBlockCache(BlockCache):
    """The decision looks at the picture's stream alone. distances: as calibrated, until the policy is fitted to a run."""

    guards: Guards
    threshold: Float[Array, ""]
    order: Int[Array, ""]
    exact: Bool[Array, ""]
    first_blocks: int = dataclasses.field(metadata={"static": True})
    last_blocks: int = dataclasses.field(metadata={"static": True})
    num_anchors: int = dataclasses.field(metadata={"static": True})
    distances: Distances | None = dataclasses.field(default=None, metadata={"static": True})

    name: ClassVar[str] = "fbcache"
    params: ClassVar[type[FirstBlockParams]] = FirstBlockParams

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "FirstBlockCache":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(FirstBlockNumbers, model_numbers, cls.name)
        checked = check_params(cls.params, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            threshold=jnp.float32(checked.threshold),
            order=jnp.int32(checked.order),
            exact=jnp.bool_(checked.predictor == "newton"),
            first_blocks=checked.first_blocks,
            last_blocks=checked.last_blocks,
            num_anchors=checked.order + 1,
            distances=numbers.distances if checked.first_blocks == 1 else None,
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        # One executable, calibrated or not.
        fitted, notes = super(FirstBlockCache, dataclasses.replace(self, distances=None)).within(outlook)
        return started(fitted, self._scores(outlook.num_steps), outlook), notes

    def _scores(self, num_steps: int) -> Float[np.ndarray, "t t"] | None:
        if self.distances is None:
            return None
        table = np.pad(np.asarray(self.distances), ((0, 0), (1, 0)))  # no distance from a step to itself
        at = between_ends(num_steps, len(table))
        scores = np.zeros((num_steps, num_steps))
        for step, place in enumerate(at):
            low = int(place)
            high, share = min(low + 1, len(table) - 1), place - low
            row = (1.0 - share) * table[low] + share * table[high]
            scores[:step, step] = np.interp(place - at[:step], np.arange(len(row)), row)
        return scores

    def span(self, num_blocks: int) -> tuple[int, int]:
        if self.first_blocks + self.last_blocks >= num_blocks:
            field, value = (
                ("last_blocks", self.last_blocks) if self.first_blocks < num_blocks else ("first_blocks", self.first_blocks)
            )
            remedy = f"the model has {num_blocks} blocks, and some must be left between the first and the last ones"
            raise InvalidRequest(f"cache_params.{field}", value, remedy)
        return self.first_blocks, num_blocks - self.last_blocks

    def init_blocks(self, hidden: Hidden) -> BlockMemory:
        return dataclasses.replace(super().init_blocks(hidden), reference=jnp.zeros_like(picture(hidden)))

    def reference(self, stack: Stack, entering: Hidden) -> Array:
        """What the first blocks added."""
        return picture(entering) - picture(stack.hidden)

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        distance = relative_l1(self.reference(stack, entering), memory.reference, step.token_weights)
        threshold = self.guards.led(self.threshold, memory.counters, step)
        return Verdict(~jnp.all(distance < threshold))

    def weights(self, at: Float[Array, " h"], count: Int[Array, ""], position: Float[Array, ""]) -> Float[Array, " h"]:
        return forecast(at, count, position, self.order, self.exact)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualBlockCache(FirstBlockCache):
    """FirstBlockCache with DBCache's defaults."""

    name: ClassVar[str] = "dbcache"
    params: ClassVar[type[FirstBlockParams]] = DualBlockParams
