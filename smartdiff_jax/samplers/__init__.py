"""Samplers: ODE solvers for flow matching, by name."""

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.registry import Registry
from smartdiff_jax.samplers.base import MAX_STEPS, Sampler, Schedule, Spacing
from smartdiff_jax.samplers.flow_dpmpp import FlowDPMpp
from smartdiff_jax.samplers.flow_euler import FlowEuler
from smartdiff_jax.samplers.flow_unipc import FlowUniPC

SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    {"flow_euler": FlowEuler(), "flow_unipc": FlowUniPC(), "flow_dpmpp": FlowDPMpp()},
    error=InvalidRequest,
)

__all__ = ["MAX_STEPS", "SAMPLERS", "Sampler", "Schedule", "Spacing"]
