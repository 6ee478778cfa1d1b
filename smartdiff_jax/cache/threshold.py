"""Where a threshold belongs that is to compute so many steps: its rule, simulated on what is known of the model.

    a step is computed unless score(last computed step, step) < threshold

Scores are a model's by calibration, not a picture's. So a simulation does not foretell the steps of a run, but how they will
lie: a budget's controller starts from its threshold, and keeps its pace instead of an even one.
"""

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from smartdiff_jax.cache.base import Outlook
from smartdiff_jax.cache.guards import SKIP

Policy = TypeVar("Policy")


def started(policy: Policy, scores: Float[np.ndarray, "t t"] | None, outlook: Outlook) -> Policy:
    """A policy that is held to a budget, led from the simulated threshold along the simulated pace.

    scores: of each pair (last computed step, step). None, or a threshold that the user gave, leave the policy as it is.
    """
    if scores is None or outlook.budget is None or "threshold" in outlook.given:
        return policy
    held: Any = policy
    guards, steps = held.guards, outlook.num_steps
    forced, barred = guards.forced(outlook), np.asarray(guards.mask)[:steps] == SKIP
    threshold, computed = find_threshold(scores, forced, barred, int(guards.max_skips_in_row), outlook.budget)
    guards = guards.paced(outlook, computed)
    return dataclasses.replace(held, threshold=jnp.float32(threshold), guards=guards)


def find_threshold(
    scores: Float[np.ndarray, "t t"],
    forced: Bool[np.ndarray, " t"],
    barred: Bool[np.ndarray, " t"],
    max_skips_in_row: int,
    budget: int,
) -> tuple[float, Bool[np.ndarray, " t"]]:
    """The highest threshold that computes `budget` steps or more, half-way between two scores, and which steps those are.

    By bisection, as if more steps were skipped with every higher threshold, which is nearly so.
    """
    levels = np.unique(scores[np.triu_indices(len(scores), 1)]) if len(scores) > 1 else np.zeros(1)
    ends = levels[0] - 1.0, levels[-1] + 1.0
    thresholds = np.concatenate([ends[:1], (levels[:-1] + levels[1:]) / 2, ends[1:]])
    low, high = 0, len(thresholds)
    while high - low > 1:
        middle = (low + high) // 2
        enough = simulate(scores, forced, barred, max_skips_in_row, thresholds[middle]).sum() >= budget
        low, high = (middle, high) if enough else (low, middle)
    return float(thresholds[low]), simulate(scores, forced, barred, max_skips_in_row, thresholds[low])


def simulate(
    scores: Float[np.ndarray, "t t"],
    forced: Bool[np.ndarray, " t"],
    barred: Bool[np.ndarray, " t"],
    max_skips_in_row: int,
    threshold: float,
) -> Bool[np.ndarray, " t"]:
    """Which steps the rule computes. forced, barred: those that are, and are not, whatever it says."""
    computed, last = np.zeros(len(scores), bool), -1
    for step in range(len(scores)):
        wanted = last < 0 or step - last > max_skips_in_row or not scores[last, step] < threshold
        if forced[step] or (wanted and not barred[step]):
            computed[step], last = True, step
    return computed


def between_ends(num_steps: int, recorded: int) -> Float[np.ndarray, " t"]:
    """Where the steps of a run lie among those of a recorded one, whose ends are theirs."""
    return np.linspace(0.0, recorded - 1.0, num_steps)


def added_up(distances: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t t"]:
    """Scores that grow by a distance at each step behind the last computed one."""
    total = np.cumsum(distances)
    return total[None] - total[:, None]
