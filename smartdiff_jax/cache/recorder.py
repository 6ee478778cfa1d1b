"""What a calibration writes down, along one run that computes everything.

A policy like any other, so that it sees exactly what the others see, under any model, sampler and mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smartdiff_jax.cache.base import CachePolicy, Evaluate, Hidden, Stack, State, Step
from smartdiff_jax.cache.block_cache import picture
from smartdiff_jax.cache.distance import relative_l1
from smartdiff_jax.cache.memory import MAX_ANCHORS, Anchors
from smartdiff_jax.cache.teacache import Signal, empty_signal, signal_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signals:
    """Numbers of one branch, by step; those of the first step have nothing to compare with and mean nothing.

    magnitude: mean over tokens of |residual| / |residual of the step before| (MagCache's gamma).
    residual: relative L1 distance of the residual of the whole stack from the step before.
    signal: the same of TeaCache's signal.
    first_block: [.., g], of what block 0 adds, from g + 1 steps before (FBCache's signal).
    """

    # Not annotated with shapes: the loop stacks the memories of its branches, and asks for shapes alone.
    magnitude: Any
    residual: Any
    signal: Any
    first_block: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder(CachePolicy):
    """Runs of exactly `num_steps` steps. signal, rows: TeaCache's, see `teacache.TeaCacheNumbers`.

    After the run the memory of the blocks is (signals, scratch), and the memory of the step (latents, velocities), each
    [num_steps, b, s, p] float32: what the sampler was at, and the guided velocity there.
    """

    num_steps: int = dataclasses.field(metadata={"static": True})
    signal: Signal = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})

    def init_blocks(self, hidden: Hidden) -> State:
        stream = picture(hidden)
        zeros = jnp.zeros(self.num_steps)
        signals = Signals(zeros, zeros, zeros, jnp.zeros((self.num_steps, MAX_ANCHORS)))
        previous = {
            "residual": jnp.zeros_like(stream),
            "signal": empty_signal(self.signal, self.rows, stream),
            "first_block": Anchors.empty(stream, MAX_ANCHORS),
        }
        return signals, previous

    def blocks(self, state: State, step: Step, stack: Stack) -> tuple[Hidden, State, Bool[Array, ""]]:
        signals, previous = state
        weights = step.token_weights
        entering = stack.run(stack.hidden, 0, 1)
        out = stack.run(entering, 1, stack.num_blocks)
        now = {
            "residual": picture(out) - picture(stack.hidden),
            "signal": signal_of(self.signal, stack).astype(previous["signal"].dtype),
        }
        first = picture(entering) - picture(stack.hidden)
        ring = previous["first_block"]
        apart = jnp.stack([jnp.mean(relative_l1(first, ring.values[g], weights)) for g in range(MAX_ANCHORS)])

        counted = {"residual": weights, "signal": None if self.signal == "time_embedding" else weights}

        def write(table, value):
            return table.at[step.index].set(jnp.where(jnp.isfinite(value), value, 0.0))

        signals = Signals(
            magnitude=write(signals.magnitude, _magnitude(now["residual"], previous["residual"], weights)),
            first_block=write(signals.first_block, apart),
            **{
                name: write(getattr(signals, name), jnp.mean(relative_l1(value, previous[name], counted[name])))
                for name, value in now.items()
            },
        )
        return out, (signals, now | {"first_block": ring.push(first, step.index)}), jnp.bool_(True)

    def init_step(self, tokens: Float[Array, "b s p"]) -> State:
        table = jnp.zeros((self.num_steps, *tokens.shape), jnp.float32)
        return table, table

    def step(
        self, state: State, inner: State, step: Step, tokens: Float[Array, "b s p"], evaluate: Evaluate, num_branches: int
    ) -> tuple[Float[Array, "b s p"], State, State, Float[Array, " n"]]:
        velocity, _, inner, computed = evaluate(inner)
        latents, velocities = state
        state = (
            latents.at[step.index].set(tokens.astype(jnp.float32)),
            velocities.at[step.index].set(velocity.astype(jnp.float32)),
        )
        return velocity, state, inner, computed


def _magnitude(new: Float[Array, "b s d"], old: Float[Array, "b s d"], weights: Float[Array, " s"] | None) -> Array:
    norms = [jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (new, old)]
    weights = jnp.ones(new.shape[1]) if weights is None else weights
    return jnp.sum(weights * norms[0] / norms[1]) / (jnp.sum(weights) * new.shape[0])
