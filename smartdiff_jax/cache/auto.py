"""`auto`: the best that is known for a model.

Calibrated, its steps are planned; else EasyCache decides, and the budget holds it to the ratio.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from smartdiff_jax.cache.base import CachePolicy, Outlook
from smartdiff_jax.cache.easycache import EasyCache
from smartdiff_jax.cache.params import CacheParams, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.planned import Planned
from smartdiff_jax.cache.planner import NUM_ANCHORS, Plan, between, make_plan
from smartdiff_jax.errors import InvalidRequest

DEFAULT_RATIO = 0.5
FEW_STEPS = 8
"""Models distilled to so few steps have nothing to spare: no step resembles the one before."""


class Recorded(CacheParams):
    """Full runs of one step count, averaged over prompts.

    sigmas: noise levels of the steps. gram: inner products of their guided velocities, the lower triangle by rows.
    size: |noise|. prompts: how many runs.
    """

    sigmas: tuple[float, ...] = Field(min_length=2)
    gram: tuple[tuple[float, ...], ...]
    size: float = Field(gt=0.0)
    prompts: int = Field(ge=1)

    @model_validator(mode="after")
    def _triangle(self) -> "Recorded":
        if [len(row) for row in self.gram] != list(range(1, len(self.sigmas) + 1)):
            raise ValueError("gram must be the lower triangle of a matrix with a row for each sigma")
        return self

    def matrix(self) -> np.ndarray:
        matrix = np.zeros((len(self.sigmas), len(self.sigmas)))
        for index, row in enumerate(self.gram):
            matrix[index, : index + 1] = matrix[: index + 1, index] = row
        return matrix


class AutoNumbers(ModelNumbers):
    """runs: by number of steps; the nearest serves a request."""

    runs: tuple[Recorded, ...] = ()


@dataclasses.dataclass(frozen=True)
class Auto(CachePolicy):
    """What `within` makes of it is what runs. fallback: where there are no recorded runs."""

    runs: tuple[Recorded, ...]
    fallback: CachePolicy | None

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "Auto":
        """Takes no parameters. Raises InvalidRequest for any."""
        check_params(CacheParams, params)
        numbers = check_numbers(AutoNumbers, model_numbers, "auto")
        return cls(numbers.runs, None if numbers.runs else EasyCache.create(num_steps, model_numbers))

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        ratio = DEFAULT_RATIO if outlook.ratio is None else outlook.ratio
        outlook = dataclasses.replace(outlook, ratio=ratio)
        steps = outlook.num_steps
        if steps <= FEW_STEPS and ratio:
            note = f"cache: all steps were computed; auto skips none of {FEW_STEPS} or fewer, for which name a policy"
            return Planned.of(np.ones(steps, bool), np.zeros((steps, NUM_ANCHORS))), (note,)
        if self.fallback is not None:
            policy, notes = self.fallback.within(outlook)
            return policy, (*notes, "cache: this model is not calibrated (smartdiff calibrate), so EasyCache decided")
        assert outlook.budget is not None
        nearest = min(self.runs, key=lambda run: abs(np.log(len(run.sigmas) / steps)))
        try:
            # Frozen models hash by what they hold.
            plan = _plan(nearest, tuple(outlook.sigmas.tolist()), outlook.budget, outlook.restarts)  # type: ignore[arg-type]
        except ValueError:
            most = round(1.0 - (1 + len(outlook.restarts)) / steps, 3)
            raise InvalidRequest("cache_ratio", ratio, f"of {steps} steps at most {most} can be skipped") from None
        return Planned.of(plan.fresh, plan.weights), ()


@lru_cache(maxsize=64)
def _plan(run: Recorded, sigmas: tuple[float, ...], budget: int, restarts: tuple[int, ...]) -> Plan:
    levels = np.asarray(sigmas)
    carry = between(np.asarray(run.sigmas), levels[:-1])
    return make_plan(carry @ run.matrix() @ carry.T, levels, budget, size=run.size, restarts=restarts)
