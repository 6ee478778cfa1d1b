"""From the cache fields of a request to the policy that runs, and what the report says of it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.auto import FEW_STEPS
from smartdiff_jax.cache.base import CachePolicy, Outlook
from smartdiff_jax.config.request import ResolvedParams
from smartdiff_jax.samplers.base import Schedule

MAX_SHOWN = 1
"""Arrays of more elements are tables, which a report leaves out."""


def policy_for(
    params: ResolvedParams, model_numbers: dict[str, Any], schedule: Schedule, restarts: tuple[int, ...]
) -> tuple[CachePolicy, tuple[str, ...]]:
    """The policy of a request, and notes for its report. Raises InvalidRequest for what cannot be served.

    restarts: steps from which on other weights serve.
    """
    steps = params.num_inference_steps
    outlook = Outlook(
        num_steps=steps,
        sigmas=np.asarray(schedule.sigmas, np.float64)[: steps + 1],
        restarts=restarts,
        ratio=params.cache_ratio,
        given=frozenset(params.cache_params),
    )
    policy, notes = POLICIES[params.cache].create(steps, model_numbers, **params.cache_params).within(outlook)
    if params.cache == "none":
        return policy, notes
    if steps == 1:
        notes = ("cache: there is nothing to skip in one step",)
    elif steps <= FEW_STEPS and not notes:
        notes = (f"cache: each of {steps} steps differs much from the last; expect another picture than without",)
    if restarts:
        notes = *notes, f"cache: nothing is remembered over the change of experts before step {restarts[0]}"
    return policy, notes


def executed_letters(
    executed: Float[np.ndarray, "max_steps n"], num_steps: int, guidance_scale: Float[np.ndarray, " max_steps"]
) -> str:
    """A letter a step: F where every branch that runs computed its blocks, . where none did, h where one of two did.

    1, 2 or 3 where they computed them for so many quarters of the tokens. At guidance scale 1 the positive branch is the only
    one that runs.
    """
    running = [step[: 1 if scale == 1.0 else None] for step, scale in zip(executed, guidance_scale, strict=True)]
    return "".join(map(_letter, running[:num_steps]))


def _letter(shares: Float[np.ndarray, " n"]) -> str:
    if np.ptp(shares):
        return "h"
    return ".123F"[round(4 * float(shares[0]))]


def skipped_share(letters: list[str]) -> float:
    """Of all evaluations of all outputs; of one for some of the tokens, the others' share."""
    every = "".join(letters)
    computed = {"F": 1.0, "h": 0.5, ".": 0.0} | {str(quarters): quarters / 4 for quarters in (1, 2, 3)}
    return round(1.0 - sum(computed[letter] for letter in every) / len(every), 4)


def describe_policy(policy: CachePolicy) -> dict[str, Any]:
    """The policy's numbers by name, tables left out."""
    return {"policy": type(policy).__name__} | _numbers(policy)


def _numbers(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        name, item = field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            found |= _numbers(item)
        elif isinstance(item, jax.Array | np.ndarray | np.generic):
            if np.size(item) <= MAX_SHOWN:
                found[name] = _rounded(np.asarray(item).item())
        elif isinstance(item, str | int | float | bool | None):
            found[name] = item
    return found


def _rounded(number: Any) -> Any:
    """Float32 as it was written."""
    return float(f"{number:.7g}") if isinstance(number, float) else number


def memory_bytes(cache_state: Any) -> int:
    """Of what a policy remembers of one batch, on all devices together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache_state))
