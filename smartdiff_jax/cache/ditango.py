"""DiTango (HPDC 2026; Chitu's `ditango`): leave out attention to the keys of a ring's other devices, and what it would send.

    anchor steps       every block computes all of its attention; c = |mean feature - that of the anchor before| / steps between
    steps in between   a block computes the remote part every t steps, else merges the held one with the fresh local one

t grows with c^(-power), scaled so that the wished share of remote parts is held, and is at most `max_interval`. Blocks whose
attention moves fast are so computed more often. Held are an output and a log-sum-exp a block, of all other devices together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from smartdiff_jax.cache.base import CachePolicy, Hidden, Outlook, Stack, State, Step
from smartdiff_jax.cache.guards import Counters, GuardParams, Guards
from smartdiff_jax.cache.params import MAX_STEPS, ModelNumbers, check_numbers, check_params
from smartdiff_jax.errors import InvalidRequest

BISECTIONS = 40


class DiTangoParams(GuardParams):
    """share: of all remote parts of a run, how many are to be held; 0 computes all, and what cannot be reached comes near.

    anchor_interval: steps from one anchor to the next. max_interval: the longest that a block waits. power: of c.
    mask: where it does not say to compute, blocks go by their intervals.
    """

    share: float = Field(0.5, ge=0.0, le=1.0)
    anchor_interval: int = Field(5, ge=1, le=MAX_STEPS)
    max_interval: int = Field(8, ge=1, le=MAX_STEPS)
    power: float = Field(1 / 3, ge=0.0, le=4.0)
    warmup: int = Field(5, ge=2, le=MAX_STEPS)
    cooldown: int = Field(5, ge=0, le=MAX_STEPS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiTangoMemory:
    """A branch's memory.

    held: see `Stack.remotes`. means: of the last anchor, like "mean" of each scan. intervals: t of each scan's blocks.
    anchor: the last anchor's step. anchors: how many there were of these weights.
    """

    counters: Counters
    held: Any
    means: Any
    intervals: Any
    anchor: Any
    anchors: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiTango(CachePolicy):
    """rate: share of the remote parts to compute at steps between anchors. A step that holds any part counts as skipped."""

    guards: Guards
    rate: Float[Array, ""]
    anchor_interval: Int[Array, ""]
    max_interval: Float[Array, ""]
    power: Float[Array, ""]

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "DiTango":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "ditango")
        checked = check_params(DiTangoParams, numbers.params | params)
        guards, interval = Guards.create(checked, num_steps), checked.anchor_interval
        return cls(
            guards=guards,
            rate=_rate(checked.share, num_steps, guards, interval),
            anchor_interval=jnp.int32(interval),
            max_interval=jnp.float32(checked.max_interval),
            power=jnp.float32(checked.power),
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """A ratio is the share of remote parts, which cannot be kept to the step."""
        if outlook.ratio is None:
            return self, ()
        if "share" in outlook.given:
            raise InvalidRequest("cache_ratio", outlook.ratio, "cache_params.share says it already; leave one out")
        rate = _rate(outlook.ratio, outlook.num_steps, self.guards, int(self.anchor_interval))
        return dataclasses.replace(self, rate=rate), ("cache: the ratio is of what a ring sends and attends to, not of steps",)

    def init_stack(self, stack: Stack) -> DiTangoMemory:
        held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stack.remotes())
        return DiTangoMemory(
            counters=Counters.zero(),
            held=held,
            means=tuple(of_scan["mean"] for of_scan in held),
            intervals=tuple(jnp.ones(of_scan["fresh"].shape, jnp.int32) for of_scan in held),
            anchor=jnp.int32(0),
            anchors=jnp.int32(0),
        )

    def blocks(self, state: DiTangoMemory, step: Step, stack: Stack) -> tuple[Hidden, State, Bool[Array, ""]]:
        anchors = jnp.where(step.changed_weights, 0, state.anchors)
        # Two anchors in a row begin: one alone tells no speed.
        due = (anchors < 2) | (step.index - state.anchor >= self.anchor_interval)
        is_anchor = due & (step.index >= self.guards.warmup - 2)
        all_fresh, counters = self.guards.decide(state.counters, step, is_anchor, anchors > 0)
        since = step.index - state.anchor
        fresh = tuple(all_fresh | (since % interval == 0) for interval in state.intervals)
        told = tuple(of_scan | {"fresh": now} for of_scan, now in zip(state.held, fresh, strict=True))
        out, held = stack.run_remotes(told)

        # A forced step in between is no anchor: the speed is measured over even gaps.
        is_anchor &= all_fresh
        means = tuple(of_scan["mean"] for of_scan in held)
        moved = [_moved(*pair, step.token_weights) for pair in zip(means, state.means, strict=True)]
        planned = plan_intervals(jnp.concatenate(moved) / jnp.maximum(since, 1), self.rate, self.max_interval, self.power)
        planned = jnp.split(planned, [len(moved[0])]) if len(moved) == 2 else [planned]
        measured = is_anchor & (anchors > 0)
        memory = DiTangoMemory(
            counters=counters,
            held=held,
            means=tuple(jnp.where(is_anchor, new, old) for new, old in zip(means, state.means, strict=True)),
            intervals=tuple(jnp.where(measured, new, old) for new, old in zip(planned, state.intervals, strict=True)),
            anchor=jnp.where(is_anchor, step.index, state.anchor),
            anchors=jnp.where(is_anchor, anchors + 1, anchors),
        )
        return out, memory, jnp.all(jnp.concatenate(fresh))


def _rate(share: float, num_steps: int, guards: Guards, anchor_interval: int) -> Float[Array, ""]:
    """The share of remote parts to compute between anchors, so that `share` of those of all steps are held."""
    warmup, cooldown = int(guards.warmup), int(guards.cooldown)
    between = sum((index - warmup + 1) % anchor_interval != 0 for index in range(warmup, num_steps - cooldown))
    return jnp.float32(1.0 - min(1.0, share * num_steps / between) if between else 1.0)


def plan_intervals(
    speed: Float[Array, " n"], rate: Float[Array, ""], max_interval: Float[Array, ""], power: Float[Array, ""]
) -> Int[Array, " n"]:
    """Whole intervals t from 1 to max_interval, proportional to speed^(-power) in between, with mean(1 / t) near `rate`.

    The mean is met before rounding, by bisection; a rate under 1 / max_interval cannot be, and gives max_interval.
    """
    shape = jnp.maximum(speed / jnp.maximum(jnp.max(speed), 1e-30), 1e-6) ** -power

    def clipped(log_scale):
        return jnp.clip(jnp.exp(log_scale) * shape, 1.0, max_interval)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        too_often = jnp.mean(1.0 / clipped(middle)) > rate
        return jnp.where(too_often, middle, low), jnp.where(too_often, high, middle)

    # From where all blocks are computed at every step to where all wait longest.
    bounds = -jnp.log(jnp.max(shape)), jnp.log(max_interval)
    _, high = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return jnp.round(clipped(high)).astype(jnp.int32)


def _moved(
    new: Float[Array, "n b s 1"], old: Float[Array, "n b s 1"], token_weights: Float[Array, " s"] | None
) -> Float[Array, " n"]:
    """How far a block's mean features went, over all samples and all tokens that count."""
    squared = (new - old) ** 2
    if token_weights is not None:
        squared = squared * token_weights[:, None]
    return jnp.sqrt(jnp.sum(squared, axis=(1, 2, 3)))
