"""Pyramid Attention Broadcast (ICLR 2025, arXiv 2408.12588): hold what attention gives for a few steps of the middle of a run.

    compute if step % interval == 0 or the timestep is outside (min_timestep, max_timestep)

Cross-attention changes less than self-attention and is held longer. Everything else in a block is computed at every step. The
outputs of all attention modules are remembered, one residual stream each: 6 GB for Wan 2.1 1.3B at 480p, 62 GB for 14B at 720p.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, model_validator

from smartdiff_jax.cache.base import CachePolicy, Hidden, Outlook, Stack, State, Step
from smartdiff_jax.cache.guards import Counters, Guarded, GuardParams, Guards
from smartdiff_jax.cache.params import LAST_TIMESTEP, MAX_STEPS, ModelNumbers, check_numbers, check_params


class PABParams(GuardParams):
    """self_interval: a self-attention, or joint attention of picture and text, is computed every so many steps; 1 is always.

    cross_interval: the same of cross-attention to the text.
    min_timestep, max_timestep: of 0 to 1000; outside of them every step is computed.
    The guards hold for either kind of attention by itself.
    """

    self_interval: int = Field(2, ge=1, le=MAX_STEPS)
    cross_interval: int = Field(3, ge=1, le=MAX_STEPS)
    min_timestep: float = Field(100.0, ge=0.0, le=1000.0)
    max_timestep: float = Field(800.0, ge=0.0, le=1000.0)

    @model_validator(mode="after")
    def _in_order(self) -> "PABParams":
        if self.min_timestep > self.max_timestep:
            raise ValueError(f"min_timestep={self.min_timestep} must not be above max_timestep={self.max_timestep}")
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PABMemory:
    """A branch's memory. counters: of either kind of attention. begun: whether there is anything in it."""

    counters: dict[str, Counters]
    held: Any
    begun: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PyramidAttentionBroadcast(Guarded):
    """A step at which any attention is held counts as skipped, though the blocks run. intervals: by kind of attention."""

    guards: Guards
    intervals: dict[str, Int[Array, ""]]
    min_timestep: Float[Array, ""]
    max_timestep: Float[Array, ""]

    evenly: ClassVar[bool] = True

    @classmethod
    def create(cls, num_steps: int, model_numbers: Mapping[str, Any], **params: Any) -> "PyramidAttentionBroadcast":
        """Raises InvalidRequest for wrong parameters."""
        numbers = check_numbers(ModelNumbers, model_numbers, "pab")
        checked = check_params(PABParams, numbers.params | params)
        return cls(
            guards=Guards.create(checked, num_steps),
            intervals={"self": jnp.int32(checked.self_interval), "cross": jnp.int32(checked.cross_interval)},
            min_timestep=jnp.float32(checked.min_timestep),
            max_timestep=jnp.float32(checked.max_timestep),
        )

    def within(self, outlook: Outlook) -> tuple[CachePolicy, tuple[str, ...]]:
        """With a ratio all attention is computed at the same steps, evenly spread over those between the timesteps."""
        fitted, _ = super().within(outlook)
        return fitted, () if outlook.ratio is None else ("cache: at a skipped step attention is held and the rest computed",)

    def busy(self, outlook: Outlook) -> Bool[np.ndarray, " t"]:
        timesteps = LAST_TIMESTEP * outlook.sigmas[:-1]
        return (timesteps <= float(self.min_timestep)) | (timesteps >= float(self.max_timestep))

    def init_stack(self, stack: Stack) -> PABMemory:
        held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stack.modules())
        kinds = {_kind(name) for of_scan in held for name in of_scan}
        return PABMemory({kind: Counters.zero() for kind in sorted(kinds)}, held, jnp.bool_(False))

    def blocks(self, state: PABMemory, step: Step, stack: Stack) -> tuple[Hidden, State, Bool[Array, ""]]:
        outside = (step.timestep <= self.min_timestep) | (step.timestep >= self.max_timestep)
        fresh, counters = {}, {}
        for kind, counted in state.counters.items():
            wanted = outside | (step.index % self.intervals[kind] == 0)
            fresh[kind], counters[kind] = self.guards.decide(counted, step, wanted, state.begun)

        def around(name, held, compute):
            return jax.lax.cond(fresh[_kind(name)], lambda held: compute(), lambda held: held, held)

        out, held = stack.run_modules(around, state.held)
        return out, PABMemory(counters, held, jnp.bool_(True)), jnp.all(jnp.stack(list(fresh.values())))


def _kind(name: str) -> str:
    """Of a module's name. Whatever the picture's tokens take part in as keys changes as they do."""
    return "cross" if name == "cross_attention" else "self"
