"""TeaCache (CVPR 2025, arXiv 2411.19108): compute again once the inputs of the blocks have moved far enough.

    a <- a + p(d),  d = relative L1 distance of a signal from the step before;  skip while a < threshold, else a <- 0

The residual of the whole stack is held. p is a polynomial fitted to each model, on the modulated input of block 0 (FLUX.1,
Qwen-Image) or on the embedded timestep alone (Wan, whose decisions are then the same for every prompt).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Hidden, Outlook, Stack, Step
from smartdiff_jax.cache.block_cache import BlockCache, BlockMemory, Verdict, picture
from smartdiff_jax.cache.distance import relative_l1
from smartdiff_jax.cache.guards import GuardParams, Guards
from smartdiff_jax.cache.params import ModelNumbers, check_numbers, check_params
from smartdiff_jax.cache.threshold import added_up, between_ends, started
from smartdiff_jax.errors import InvalidRequest

MAX_DEGREE = 5

Signal = Literal["modulated_input", "time_embedding"]
Coefficients = tuple[float, ...]


class TeaCacheNumbers(ModelNumbers):
    """coefficients: of p, highest power first. rows: vectors in the time embedding, each as wide as the residual stream.

    r2: the share of the variance that p explains, where it was calibrated here. distances: d of every step, likewise.
    """

    signal: Signal = "modulated_input"
    rows: int = Field(1, ge=1)
    coefficients: Coefficients | None = Field(None, min_length=1, max_length=MAX_DEGREE + 1)
    r2: float | None = None
    distances: tuple[float, ...] | None = Field(None, min_length=2)


class TeaCacheParams(GuardParams):
    """threshold: more skips more; 0 computes every step.

    coefficients: instead of the model's. clamp_nonneg: take p for 0 where it is negative, as fitted polynomials are for small
    distances; False is the published rule, where such steps pay back what others used up.
    """

    threshold: float = Field(0.1, ge=0.0)
    coefficients: Coefficients | None = Field(None, min_length=1, max_length=MAX_DEGREE + 1)
    clamp_nonneg: bool = True
    cooldown: int = Field(1, ge=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeaCache(BlockCache):
    """coefficients: of p, highest power first, zeros in front. distances: calibrated, until it is fitted to a run."""

    guards: Guards
    threshold: Float[Array, ""]
    coefficients: Float[Array, " degree_plus_1"]
    clamp_nonneg: Bool[Array, ""]
    signal: Signal = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    distances: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "TeaCache":
        """Raises InvalidRequest for wrong parameters, and for a model without coefficients if none are given."""
        numbers = check_numbers(TeaCacheNumbers, model_numbers, "teacache")
        checked = check_params(TeaCacheParams, numbers.params | params)
        found = checked.coefficients or numbers.coefficients
        if found is None:
            remedy = "this model has no coefficients; calibrate it, or give them as cache_params.coefficients"
            raise InvalidRequest("cache", "teacache", remedy)
        coefficients = np.zeros(MAX_DEGREE + 1, np.float32)
        coefficients[MAX_DEGREE + 1 - len(found) :] = found
        return cls(
            guards=Guards.create(checked, num_steps),
            threshold=jnp.float32(checked.threshold),
            coefficients=jnp.asarray(coefficients),
            clamp_nonneg=jnp.bool_(checked.clamp_nonneg),
            signal=numbers.signal,
            rows=numbers.rows,
            distances=numbers.distances,
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        # One executable, calibrated or not.
        fitted, notes = super(TeaCache, dataclasses.replace(self, distances=None)).within(outlook)
        return started(fitted, self._scores(outlook.num_steps), outlook), notes

    def _scores(self, num_steps: int) -> Float[np.ndarray, "t t"] | None:
        if self.distances is None:
            return None
        # The way that the signal goes, shared out over more or fewer steps.
        way = np.interp(between_ends(num_steps, len(self.distances)), np.arange(len(self.distances)), np.cumsum(self.distances))
        moved = np.polyval(np.asarray(self.coefficients, np.float64), np.diff(way, prepend=way[:1]))
        return added_up(np.maximum(moved, 0.0) if self.clamp_nonneg else moved)

    def init_blocks(self, hidden: Hidden) -> BlockMemory:
        stream = picture(hidden)
        previous = empty_signal(self.signal, self.rows, stream)
        return dataclasses.replace(super().init_blocks(hidden), previous=previous, score=jnp.zeros(stream.shape[0]))

    def judge(self, memory: BlockMemory, step: Step, stack: Stack, entering: Hidden) -> Verdict:
        of_time = self.signal == "time_embedding"
        signal = signal_of(self.signal, stack).astype(memory.previous.dtype)
        # The step before, computed or not: p is fitted to distances of neighbours.
        distance = relative_l1(signal, memory.previous, None if of_time else step.token_weights)
        moved = jnp.polyval(self.coefficients, distance)
        score = memory.score + jnp.where(self.clamp_nonneg, jnp.maximum(moved, 0.0), moved)
        threshold = self.guards.led(self.threshold, memory.counters, step)
        # One sample of a batch that wants to be computed is enough: no picture is the worse for its neighbours.
        return Verdict(~jnp.all(score < threshold), previous=signal, score=score)


def empty_signal(signal: Signal, rows: int, stream: Float[Array, "b s d"]) -> Array:
    """Zeros where a signal will be remembered, for a stream like this one. rows: vectors in the time embedding."""
    if signal == "time_embedding":
        return jnp.zeros((stream.shape[0], rows, stream.shape[2]), jnp.float32)
    return jnp.zeros_like(stream)


def signal_of(signal: Signal, stack: Stack) -> Array:
    """What the decision looks at."""
    return stack.time_embedding() if signal == "time_embedding" else stack.modulated_input()
