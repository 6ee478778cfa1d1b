"""Memory of the devices: what they have and use, and whether a request can fit them at all.

What a request needs is planned (sharding/plan.py): weights are counted, activations are estimated. Refused is what needs more
than a device has even by half the estimate; what is taken and does not fit fails alone, out of memory.
"""

from collections.abc import Mapping

import jax

from smartdiff_jax.config.request import ResolvedParams
from smartdiff_jax.engine.announced import Announced
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.sharding.plan import GB

CERTAIN = 0.5
"""The share of the estimated activations that is needed for certain: for Wan2.1-1.3B, 832x480x81, on an H100 the estimate of a
step is 2.8 GB and 1.4 were measured."""


def device_memory() -> dict[str, int]:
    """Bytes in use, at most so far, and in all, of the first device; empty where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {kind: int(stats[name]) for kind, name in names.items() if name in stats}


def least_bytes(models: Mapping[str, Announced], model: str, params: ResolvedParams) -> int:
    """What one output of a request takes of a device at least, beside the weights of all models that are kept there."""
    plan = models[model].plan(params)
    if plan.residency != "all":
        return max(size + round(CERTAIN * plan.made.get(name, 0)) for name, size in plan.weights.items())
    weights = sum(each.weight_bytes for each in models.values())
    return weights + round(CERTAIN * max(plan.denoising, plan.decoding))


def check_memory(models: Mapping[str, Announced], model: str, params: ResolvedParams) -> None:
    """Raises InvalidRequest for what no device here has room for; where devices do not tell what they have, for nothing."""
    limit = device_memory().get("limit")
    if limit is None:
        return
    needed = least_bytes(models, model, params)
    if needed > limit:
        frames = params.num_frames
        what, less = (f" with {frames} frames", " or fewer frames") if frames > 1 else ("", "")
        told = f"needs at least {needed / GB:.1f} GB{what} on a device of {limit / GB:.1f}; ask for a smaller size{less}"
        raise InvalidRequest("size", f"{params.width}x{params.height}", told)
