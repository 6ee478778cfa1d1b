"""MeanCache (ICLR 2026, arXiv 2601.19961): steps known beforehand, the velocities of the others moved along a mean slope.

Where a step is skipped the slope of the last K steps, predicted ones included, against their own mean is followed
(`predict.mean_slope`); K is a number for each gap between computed steps, and 1 holds the velocity. Its authors searched the
steps and the orders for a few models at one number of steps and one shift. Elsewhere `spread` lays them: the published tables
cut off, or stretched, would be schedules that nobody tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, model_validator

from smartdiff_jax.cache.base import Step
from smartdiff_jax.cache.block_cache import Verdict
from smartdiff_jax.cache.guards import SKIP, GuardParams, Guards
from smartdiff_jax.cache.memory import MAX_ANCHORS, Anchors
from smartdiff_jax.cache.params import MAX_STEPS, CacheParams, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.predict import mean_slope
from smartdiff_jax.cache.step_cache import StepCache, StepMemory
from smartdiff_jax.errors import InvalidRequest

LONGEST_GAP = 0.16
"""As a fraction of the steps: what the published tables have in common."""

Order = Annotated[int, Field(ge=1, le=MAX_ANCHORS)]


class Table(CacheParams):
    """computed: steps of `num_steps` in order. orders: K of each gap between computed steps that are not neighbours."""

    num_steps: int = Field(ge=1, le=MAX_STEPS)
    computed: tuple[int, ...] = Field(min_length=1)
    orders: tuple[Order, ...]

    @model_validator(mode="after")
    def _fits(self) -> "Table":
        gaps = np.diff(self.computed)
        if self.computed[0] != 0 or self.computed[-1] >= self.num_steps or np.any(gaps < 1):
            raise ValueError("computed must rise from 0 to below num_steps")
        if len(self.orders) != np.sum(gaps > 1):
            raise ValueError(f"orders must have one entry for each of the {np.sum(gaps > 1)} gaps")
        return self


class MeanCacheNumbers(ModelNumbers):
    """tables: what was searched for this model."""

    tables: tuple[Table, ...] = ()


class MeanCacheParams(GuardParams):
    """budget: how many steps are computed; None takes half of them. The model's table for this number of steps serves if it
    has that budget (None: its nearest), `spread` otherwise.

    mask: instead of a budget. orders: K at each step, where it is skipped; None takes 2 where the two steps before are computed
    and else 1, because a slope against a predicted velocity is one of its error.
    """

    budget: int | None = Field(None, ge=1, le=MAX_STEPS)
    orders: tuple[Order, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanCache(StepCache):
    """computed: which steps. orders: K at the others."""

    guards: Guards
    computed: Bool[Array, " max_steps"]
    orders: Int[Array, " max_steps"]

    num_anchors: ClassVar[int] = MAX_ANCHORS
    every_step: ClassVar[bool] = True

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "MeanCache":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(MeanCacheNumbers, model_numbers, "meancache")
        checked = check_params(MeanCacheParams, numbers.params | params)
        if checked.budget is not None and checked.budget > num_steps:
            raise InvalidRequest("cache_params.budget", checked.budget, f"there are {num_steps} steps; give at most so many")
        if checked.budget is not None and checked.mask is not None:
            raise InvalidRequest("cache_params.budget", checked.budget, "the mask says which steps are computed; leave one out")
        if checked.orders is not None and len(checked.orders) != num_steps:
            remedy = f"give one entry for each of the {num_steps} steps"
            raise InvalidRequest("cache_params.orders", list(checked.orders), remedy)
        guards = Guards.create(checked, num_steps)
        if checked.mask is None:
            computed, orders = plan(num_steps, checked.budget, numbers.tables)
        else:
            computed = np.asarray(checked.mask) != SKIP
            orders = slopes_of_computed(computed)
        if checked.orders is not None:
            orders = np.asarray(checked.orders)
        more = MAX_STEPS - num_steps
        return cls(
            guards=guards,
            computed=jnp.asarray(np.pad(computed, (0, more), constant_values=True)),
            orders=jnp.asarray(np.pad(orders, (0, more), constant_values=1), jnp.int32),
        )

    def judge(self, memory: StepMemory, step: Step, tokens: Float[Array, "b s p"]) -> Verdict:
        return Verdict(self.computed[step.index])

    def weights(self, anchors: Anchors, step: Step) -> Float[Array, " h"]:
        starts = anchors.at.astype(jnp.int32)
        after, following = step.sigmas[starts[0] + 1], step.sigmas[step.index + 1]
        return mean_slope(step.sigmas[starts], anchors.count, after, following, self.orders[step.index])


def plan(num_steps: int, budget: int | None, tables: Sequence[Table]) -> tuple[Bool[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """(computed, orders) of a table that fits, else of `spread`. budget: None takes the nearest to half of the steps."""
    fitting = [table for table in tables if table.num_steps == num_steps]
    if budget is None:
        half = (num_steps + 1) // 2
        budget = min((len(table.computed) for table in fitting), key=lambda found: abs(found - half), default=half)
    for table in fitting:
        if len(table.computed) == budget:
            computed, orders = np.zeros(num_steps, bool), np.ones(num_steps, int)
            computed[list(table.computed)] = True
            gaps = [(i, j) for i, j in zip(table.computed, table.computed[1:], strict=False) if j > i + 1]
            for (i, j), order in zip(gaps, table.orders, strict=True):
                orders[i + 1 : j] = order
            return computed, orders
    computed = spread(num_steps, budget)
    return computed, slopes_of_computed(computed)


def spread(num_steps: int, budget: int) -> Bool[np.ndarray, " t"]:
    """`budget` computed steps laid as the published tables lay them, of any number of steps.

    At the end up to three; at the beginning as many as the budget allows if no gap in between is to be longer than
    LONGEST_GAP of all steps; those in between evenly.
    """
    tail = min(max(1, budget // 5), 3, budget - 1)
    last = num_steps - tail
    gap = max(2.0, LONGEST_GAP * num_steps)
    head = round((budget - tail - last / gap) * gap / (gap - 1.0))
    head = min(max(1, head), budget - tail)
    between = np.linspace(head - 1, last, budget - head - tail + 2)[1:-1]
    computed = np.zeros(num_steps, bool)
    computed[:head], computed[last:] = True, True
    computed[np.floor(between + 0.5).astype(int)] = True
    return computed


def slopes_of_computed(computed: Bool[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
    """K at each step: 2 throughout a gap that two computed steps come before, else 1."""
    orders = np.ones(len(computed), int)
    for index in range(2, len(computed)):
        if not computed[index]:
            orders[index] = 2 if computed[index - 2 : index].all() else orders[index - 1] if not computed[index - 1] else 1
    return orders
