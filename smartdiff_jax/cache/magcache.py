"""MagCache (NeurIPS 2025, arXiv 2506.09045): skip as long as the residual's magnitude is known to stay what it was.

    ratio <- ratio * gamma_i,  error <- error + |1 - ratio|;  skip while error < threshold, else ratio <- 1, error <- 0

gamma_i = mean over tokens of |residual of step i| / |residual of step i - 1|, measured once for a model: no decision depends on
the picture. The residual of the whole stack is held, and not rescaled. Where there is a table for each branch of guidance, both
are followed and the branches skip together, whichever way they run.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Hidden, Outlook, Stack, Step
from smartdiff_jax.cache.block_cache import BlockCache, BlockMemory, Verdict
from smartdiff_jax.cache.guards import COMPUTE, GuardParams, Guards
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.threshold import started
from smartdiff_jax.errors import InvalidRequest

Ratios = tuple[Annotated[tuple[float, ...], Field(min_length=1)], ...]


class MagCacheNumbers(ModelNumbers):
    """ratios: gamma by step, for both branches of guidance (positive first) or for the only one.

    computed: entries of the table whose steps are always computed.
    switch: of a model with two experts, the fraction of the steps that the first one served when `ratios` were measured.
    """

    ratios: Ratios | None = Field(None, min_length=1, max_length=2)
    computed: tuple[int, ...] = ()
    switch: float | None = Field(None, gt=0.0, lt=1.0)


class MagCacheParams(GuardParams):
    """threshold: more skips more; 0 computes every step. retention: fraction of the steps, from the first on (with two
    experts: of each one's), that is computed. ratios: instead of the model's."""

    threshold: float = Field(0.06, ge=0.0)
    max_skips_in_row: int | None = Field(3, ge=0)
    retention: float = Field(0.2, ge=0.0, le=1.0)
    ratios: Ratios | None = Field(None, min_length=1, max_length=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MagCache(BlockCache):
    """ratios: gamma of both branches, padded with ones; the same twice where there is one branch."""

    guards: Guards
    threshold: Float[Array, ""]
    ratios: Float[Array, "max_steps 2"]

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "MagCache":
        """Raises InvalidRequest for wrong parameters, and for a model without ratios if none are given."""
        numbers = check_numbers(MagCacheNumbers, model_numbers, "magcache")
        checked = check_params(MagCacheParams, numbers.params | params)
        ratios = checked.ratios or numbers.ratios
        if ratios is None:
            remedy = "this model has no ratios; calibrate it, or give them as cache_params.ratios"
            raise InvalidRequest("cache", "magcache", remedy)
        padded = np.ones((MAX_STEPS, 2), np.float32)
        for branch, table in zip(range(2), ratios * 2, strict=False):
            padded[:num_steps, branch] = resample(table, num_steps)

        of_first_expert = num_steps if numbers.switch is None else round(numbers.switch * num_steps)
        warmup = max(checked.warmup, int(checked.retention * of_first_expert + 0.5))
        guards = Guards.create(
            checked.model_copy(update={"warmup": warmup}),
            num_steps,
            warmup_after_switch=0.0 if numbers.switch is None else checked.retention,
        )
        if checked.mask is None and checked.ratios is None:
            entries = resample(np.arange(len(ratios[0])), num_steps)
            mask = np.asarray(guards.mask).copy()
            mask[:num_steps][np.isin(entries, numbers.computed)] = COMPUTE
            guards = dataclasses.replace(guards, mask=jnp.asarray(mask))
        return cls(guards=guards, threshold=jnp.float32(checked.threshold), ratios=jnp.asarray(padded))

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        fitted, notes = super().within(outlook)
        return started(fitted, self._scores(outlook.num_steps), outlook), notes

    def _scores(self, num_steps: int) -> Float[np.ndarray, "t t"]:
        """The error of the branch that has most of it, from each step on."""
        ratios = np.asarray(self.ratios, np.float64)[:num_steps]
        scores = np.zeros((num_steps, num_steps))
        for last in range(num_steps - 1):
            errors = np.abs(1.0 - np.cumprod(ratios[last + 1 :], axis=0))
            scores[last, last + 1 :] = np.cumsum(errors, axis=0).max(axis=1)
        return scores

    def init_blocks(self, hidden: Hidden) -> BlockMemory:
        return dataclasses.replace(super().init_blocks(hidden), score={"ratio": jnp.zeros(2), "error": jnp.zeros(2)})

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        # The memory is zeroed at computed steps, where the ratio is one.
        so_far = jnp.where(memory.counters.skips_in_row == 0, 1.0, memory.score["ratio"])
        ratio = so_far * self.ratios[step.index]
        error = memory.score["error"] + jnp.abs(1.0 - ratio)
        threshold = self.guards.led(self.threshold, memory.counters, step)
        return Verdict(~jnp.all(error < threshold), score={"ratio": ratio, "error": error})


def resample(table: Sequence[float] | np.ndarray, num_steps: int) -> np.ndarray:
    """A table of any length at `num_steps` steps: of each the nearest entry, the ends kept."""
    table = np.asarray(table)
    if num_steps == 1:
        return table[-1:]
    return table[np.round(np.arange(num_steps) * ((len(table) - 1) / (num_steps - 1))).astype(int)]
