"""What every policy's decision has in common: when a step must be computed, and when it may not be.

In this order: a step is computed where nothing is remembered, where other weights serve than before, and in the warm-up
and the cool-down; else as the mask says; else as the budget demands; else where skips have come to their limits; else as the
policy wishes.

With a budget exactly so many steps are computed, whatever the policy: what is left of it is kept for the steps that will be
computed in any case, and is spent where every step left is needed to spend it. A policy that goes by a threshold is led there:
its threshold rises with every step computed ahead of an even pace, falls with every one behind, and counts for nothing where
that would be more than a few steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Outlook, Step
from smartdiff_jax.cache.params import MAX_STEPS, CacheParams
from smartdiff_jax.errors import InvalidRequest

COMPUTE, DECIDE, SKIP = 1, 0, -1
NEVER = 2 * MAX_STEPS
PACE_GAIN = 0.4
"""A step ahead of the pace raises the threshold by a half."""
SLACK = 1.0, 0.05
"""The most steps ahead of the pace or behind it: so many, and this share of the budget."""
SHARES = 1.0, 0.75, 0.5, 0.25, 0.0


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
    budget: how many steps are computed. reserved: of each step, how many after it are computed in any case. open: how many
    from it on may be computed. pace: how many would be before it, evenly spread. slack: the most steps off it. gain: of the
    threshold, by step off it.
    """

    warmup: Int[Array, ""]
    cooldown: Int[Array, ""]
    mask: Int[Array, " max_steps"]
    max_skips_in_row: Int[Array, ""]
    max_skips: Int[Array, ""]
    warmup_after_switch: Float[Array, ""]
    budget: Int[Array, ""]
    reserved: Int[Array, " max_steps"]
    open: Int[Array, " max_steps"]
    pace: Float[Array, " max_steps"]
    slack: Float[Array, ""]
    gain: Float[Array, ""]

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
            budget=jnp.int32(0),
            reserved=jnp.full(MAX_STEPS, -NEVER, jnp.int32),
            open=jnp.full(MAX_STEPS, NEVER, jnp.int32),
            pace=jnp.zeros(MAX_STEPS),
            slack=jnp.float32(NEVER),
            gain=jnp.float32(0.0),
        )

    def within(self, outlook: Outlook, busy: Bool[np.ndarray, " t"] | None = None, *, evenly: bool = False) -> "Guards":
        """Guards that compute exactly `outlook.budget` steps; without one, these.

        A warm-up and a cool-down that the user did not ask for are shortened until half of the budget is free; the last step
        is computed, where that leaves it free.
        busy: steps that the policy computes in any case. evenly: the rest is spread as a mask, and nothing left to decide.
        Raises InvalidRequest where the budget cannot be kept.
        """
        if outlook.budget is None:
            return self
        steps, budget = outlook.num_steps, outlook.budget
        guards, forced = self, np.zeros(steps, bool)
        for share in SHARES:
            guards = self._shortened(share, outlook.given)
            forced = guards.forced(outlook) | (np.zeros(steps, bool) if busy is None else busy)
            if 2 * forced.sum() <= budget:
                break
        told = np.asarray(self.mask)[:steps]
        open_ = forced | (told != SKIP)
        if not forced.sum() <= budget <= open_.sum():
            least, most = (round(1.0 - count / steps, 3) for count in (open_.sum(), forced.sum()))
            remedy = f"from {forced.sum()} to {open_.sum()} of {steps} steps can be computed; give {least} to {most}"
            raise InvalidRequest("cache_ratio", outlook.ratio, remedy)
        free = open_ & ~forced
        rate = np.where(free, (budget - forced.sum()) / max(1, free.sum()), forced)
        mask = np.asarray(guards.mask).copy()
        if evenly:
            places, count = np.flatnonzero(free), budget - forced.sum()
            chosen = places[np.floor(np.arange(1, count + 1) * (len(places) + 1) / (count + 1) + 0.5).astype(int) - 1]
            mask[:steps] = np.where(forced, COMPUTE, SKIP)
            mask[chosen] = COMPUTE
        counted = _padded(np.flip(np.cumsum(np.flip(forced))) - forced)
        return dataclasses.replace(
            guards,
            mask=jnp.asarray(mask),
            budget=jnp.int32(budget),
            reserved=jnp.asarray(counted.astype(np.int32)),
            open=jnp.asarray(_padded(np.flip(np.cumsum(np.flip(open_)))).astype(np.int32)),
            pace=jnp.asarray(_padded(np.cumsum(rate) - rate).astype(np.float32)),
            slack=jnp.float32(SLACK[0] + SLACK[1] * budget),
            gain=jnp.float32(PACE_GAIN),
        )

    def paced(self, outlook: Outlook, computed: Bool[np.ndarray, " t"]) -> "Guards":
        """The same budget at the pace of a run that computes these steps, instead of an even one."""
        forced = self.forced(outlook)
        free = computed & ~forced
        rate = np.where(free, (int(self.budget) - forced.sum()) / max(1, free.sum()), forced)
        return dataclasses.replace(self, pace=jnp.asarray(_padded(np.cumsum(rate) - rate).astype(np.float32)))

    def _shortened(self, share: float, given: frozenset[str]) -> "Guards":
        keep_warmup, keep_cooldown = "warmup" in given or "retention" in given, "cooldown" in given
        cooldown = max(int(self.cooldown), "mask" not in given)  # a mask may bar the last step
        return dataclasses.replace(
            self,
            warmup=self.warmup if keep_warmup else jnp.int32(math.ceil(int(self.warmup) * share)),
            cooldown=self.cooldown if keep_cooldown else jnp.int32(math.ceil(cooldown * share)),
            warmup_after_switch=jnp.float32(float(self.warmup_after_switch) * (1.0 if keep_warmup else share)),
        )

    def forced(self, outlook: Outlook) -> Bool[np.ndarray, " t"]:
        """The steps that are computed whatever the policy wishes, if one computed step is memory enough for it."""
        index = np.arange(outlook.num_steps)
        forced = (index == 0) | (index < int(self.warmup)) | (index >= outlook.num_steps - int(self.cooldown))
        for first in outlook.restarts:
            left = np.float32(outlook.num_steps - first)
            since = index - first
            forced |= (since >= 0) & (since.astype(np.float32) <= np.float32(self.warmup_after_switch) * left)
        return forced | (np.asarray(self.mask)[: outlook.num_steps] == COMPUTE)

    def led(self, threshold: Float[Array, ""], counters: "Counters", step: Step) -> Float[Array, ""]:
        """A threshold, moved to keep the pace; without a budget the threshold itself."""
        return threshold * jnp.exp(self.gain * self._ahead(counters, step))

    def _ahead(self, counters: "Counters", step: Step) -> Float[Array, ""]:
        """Steps computed so far, over the pace."""
        return step.index - counters.skips - self.pace[step.index]

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
        left_of_budget = self.budget - (step.index - counters.skips)
        spent = left_of_budget <= self.reserved[step.index]
        all_needed = left_of_budget >= self.open[step.index]
        at_limit = (counters.skips_in_row >= self.max_skips_in_row) | (counters.skips >= self.max_skips)
        ahead = self._ahead(counters, step)
        wanted = (ahead < self.slack) & ((ahead <= -self.slack) | at_limit | wants_fresh)
        fresh = forced | (told == COMPUTE) | ((told == DECIDE) & ~spent & (all_needed | wanted))
        return fresh, Counters(
            skips_in_row=jnp.where(fresh, 0, counters.skips_in_row + 1),
            skips=counters.skips + jnp.where(fresh, 0, 1),
            first=first,
        )


class Guarded(CachePolicy):
    """A policy that asks its guards: a registered dataclass that holds them.

    evenly: with a budget the computed steps are spread evenly, instead of as the policy wishes.
    """

    guards: Guards
    evenly: ClassVar[bool] = False

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        guards = self.guards.within(outlook, self.busy(outlook), evenly=self.evenly)
        return dataclasses.replace(self, guards=guards), ()  # type: ignore[type-var]

    def busy(self, outlook: Outlook) -> Bool[np.ndarray, " t"]:
        """The steps that are computed whatever the budget."""
        return np.zeros(outlook.num_steps, bool)


def _padded(table: np.ndarray) -> np.ndarray:
    return np.pad(table, (0, MAX_STEPS - len(table)))


def _padded_mask(mask: Sequence[int] | None, num_steps: int) -> np.ndarray:
    padded = np.full(MAX_STEPS, DECIDE, np.int8)
    if mask is not None:
        if len(mask) != num_steps:
            raise InvalidRequest("cache_params.mask", list(mask), f"give one entry for each of the {num_steps} steps")
        padded[:num_steps] = mask
    return padded
