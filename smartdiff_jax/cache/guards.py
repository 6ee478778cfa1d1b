"""What every policy's decision has in common: when a step must be computed, and when it may not be.

In this order: a step is computed where nothing is remembered, where other weights serve than before, and in the warm-up
and the cool-down; else as the mask says; else where skips have come to their limits; else as the policy wishes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import Step
from smartdiff_jax.cache.params import MAX_STEPS, CacheParams
from smartdiff_jax.errors import InvalidRequest

COMPUTE, DECIDE, SKIP = 1, 0, -1


class GuardParams(CacheParams):
    """A user's numbers.

    warmup, cooldown: how many steps at the beginning and at the end are computed whatever happens.
    mask: for every step 1 to compute it, -1 to skip it, 0 to decide.
    max_skips_in_row, max_skips: at most so many, one after the other and altogether; None sets no limit.
    """

    warmup: int = Field(1, ge=0, le=MAX_STEPS)
    cooldown: int = Field(0, ge=0, le=MAX_STEPS)
    mask: tuple[Literal[-1, 0, 1], ...] | None = None
    max_skips_in_row: int | None = Field(None, ge=0, le=MAX_STEPS)
    max_skips: int | None = Field(None, ge=0, le=MAX_STEPS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """What is counted along a run.

    skips_in_row: since the last computed step. skips: altogether. first: the step from which on these weights serve.
    """

    # Not annotated with shapes: the loop stacks the memories of its branches, and asks for shapes alone.
    skips_in_row: Any
    skips: Any
    first: Any

    @classmethod
    def zero(cls) -> "Counters":
        return cls(jnp.int32(0), jnp.int32(0), jnp.int32(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guards:
    """GuardParams as arrays.

    warmup_after_switch: fraction of the steps left that is computed again once other weights serve; the first always is.
    """

    warmup: Int[Array, ""]
    cooldown: Int[Array, ""]
    mask: Int[Array, " max_steps"]
    max_skips_in_row: Int[Array, ""]
    max_skips: Int[Array, ""]
    warmup_after_switch: Float[Array, ""]

    @classmethod
    def create(cls, params: GuardParams, num_steps: int, *, warmup_after_switch: float = 0.0) -> "Guards":
        """Raises InvalidRequest for a mask that does not have num_steps entries."""
        return cls(
            warmup=jnp.int32(params.warmup),
            cooldown=jnp.int32(params.cooldown),
            mask=jnp.asarray(_padded_mask(params.mask, num_steps)),
            max_skips_in_row=jnp.int32(MAX_STEPS if params.max_skips_in_row is None else params.max_skips_in_row),
            max_skips=jnp.int32(MAX_STEPS if params.max_skips is None else params.max_skips),
            warmup_after_switch=jnp.float32(warmup_after_switch),
        )

    def decide(
        self, counters: Counters, step: Step, wants_fresh: Bool[Array, ""], has_memory: Bool[Array, ""]
    ) -> tuple[Bool[Array, ""], Counters]:
        """Whether this step is computed, and the counters after it."""
        first = jnp.where(step.changed_weights, step.index, counters.first)
        since, left = (step.index - first).astype(jnp.float32), (step.num_steps - first).astype(jnp.float32)
        warming_up = (step.index < self.warmup) | ((first > 0) & (since <= self.warmup_after_switch * left))
        cooling_down = step.index >= step.num_steps - self.cooldown
        forced = ~has_memory | step.changed_weights | warming_up | cooling_down

        told = self.mask[step.index]
        at_limit = (counters.skips_in_row >= self.max_skips_in_row) | (counters.skips >= self.max_skips)
        fresh = forced | (told == COMPUTE) | ((told == DECIDE) & (at_limit | wants_fresh))
        return fresh, Counters(
            skips_in_row=jnp.where(fresh, 0, counters.skips_in_row + 1),
            skips=counters.skips + jnp.where(fresh, 0, 1),
            first=first,
        )


def _padded_mask(mask: Sequence[int] | None, num_steps: int) -> np.ndarray:
    padded = np.full(MAX_STEPS, DECIDE, np.int8)
    if mask is not None:
        if len(mask) != num_steps:
            raise InvalidRequest("cache_params.mask", list(mask), f"give one entry for each of the {num_steps} steps")
        padded[:num_steps] = mask
    return padded
