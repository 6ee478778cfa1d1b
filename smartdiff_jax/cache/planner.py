"""Which steps to compute when only so many may be: a shortest path over the steps, from what one calibration recorded.

    edge (h, i) -> (i, j):  i and j are computed one after the other, h before them; the steps between are predicted
    E(h, i, j) = | sum over i < l < j of (sigma_l - sigma_{l+1}) (v_l - predicted v_l) | / | x_0 |,    least sum of E ** power

Predictions are linear in the velocities, so their inner products (the Gram matrix) are all that is needed of a recorded run: a
plan takes a tenth of a second on the host. `power` 4 keeps single bad stretches out, as the peak-suppressed path of MeanCache
does (arXiv 2601.19961); an infinite one would be LeMiCa's minimax (arXiv 2511.00090).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

POWER = 4.0
NUM_ANCHORS = 2
RIDGE = 1e-3
"""Of the fitted slope, as a share of the squared difference of its two anchors: what little it leaves is noise."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """fresh: which steps are computed. weights: of the anchors, newest first, at the others. cost: sum of E ** power."""

    fresh: Bool[np.ndarray, " t"]
    weights: Float[np.ndarray, "t h"]
    cost: float


def make_plan(
    gram: Float[np.ndarray, "t t"],
    sigmas: Float[np.ndarray, " t_plus_1"],
    budget: int,
    *,
    size: float = 1.0,
    power: float = POWER,
    fresh: Sequence[int] = (),
    restarts: Sequence[int] = (),
    max_gap: int | None = None,
) -> Plan:
    """The best plan that computes `budget` of the T steps; the first always.

    gram: inner products of the T velocities of a full run, averaged over runs. sigmas: of the steps and the end.
    size: |x_0|, in which errors are measured. fresh: steps that must be computed. restarts: steps before which nothing is
    remembered, because other weights serve from there on. max_gap: most steps from one computed step to the next.
    Raises ValueError where no plan has that budget.
    """
    steps = len(gram)
    needed = {0, *fresh, *restarts}
    if not len(needed) <= budget <= steps:
        raise ValueError(f"budget={budget}: from {len(needed)} to {steps}")
    reach = min(steps, max_gap or 4 * -(-steps // budget) + 4)
    costs, slopes = edges(gram, sigmas, reach, restarts)
    costs = (costs / size) ** power
    # An edge that jumps over a step that must be computed is none; behind the last step lies the end, which is reached free.
    for must in needed:
        for i in range(max(0, must - reach + 1), must):
            costs[:, i, must - i + 1 :] = np.inf

    # best[a, i]: least cost to have computed step i and, a steps before it, the step before (a = 0: nothing is remembered).
    best = np.full((reach + 1, steps + 1), np.inf)
    best[0, 0] = 0.0
    came: list[np.ndarray] = []
    for _ in range(budget):
        total = best[:, :, None] + costs
        from_gap = np.argmin(total, axis=0)
        least = np.take_along_axis(total, from_gap[None], axis=0)[0]
        best, gaps = np.full_like(best, np.inf), np.zeros_like(from_gap.T)
        for d in range(1, reach + 1):
            ends = np.arange(d, steps + 1)
            best[d, ends], gaps[d, ends] = least[ends - d, d], from_gap[ends - d, d]
        for restart in restarts:
            # Whatever came before, nothing is remembered here.
            gaps[0, restart] = (d := int(np.argmin(best[:, restart])))
            best[0, restart], gaps[1:, restart] = best[d, restart], gaps[1:, restart]
            best[1:, restart] = np.inf
            gaps[0, restart] = d * (reach + 1) + gaps[d, restart]
        came.append(gaps)

    return _walk_back(best, came, slopes, steps, budget, reach, set(restarts))


def _walk_back(best, came, slopes, steps, budget, reach, restarts) -> Plan:
    gap = int(np.argmin(best[:, steps]))
    cost = float(best[gap, steps])
    if not np.isfinite(cost):
        raise ValueError(f"budget={budget}: no plan within {reach} steps from one computed step to the next")
    fresh, weights, node = np.zeros(steps, bool), np.zeros((steps, NUM_ANCHORS)), steps
    for gaps in reversed(came):
        before = int(gaps[gap, node])
        if node in restarts:
            gap, before = divmod(before, reach + 1)
        i = node - gap
        fresh[i] = True
        for step in range(i + 1, node):
            slope = slopes[before, i, step - i]
            weights[step] = 1.0 + slope, -slope
        node, gap = i, before
    return Plan(fresh, weights, cost)


def edges(
    gram: Float[np.ndarray, "t t"],
    sigmas: Float[np.ndarray, " t_plus_1"],
    reach: int,
    restarts: Sequence[int] = (),
) -> tuple[Float[np.ndarray, "a i a"], Float[np.ndarray, "a i a"]]:
    """(costs, slopes), each [reach + 1, T + 1, reach + 1] and indexed [i - h, i, j - i]; i - h = 0 where there is no h.

    The prediction of step l is v_i + slope (v_i - v_h). slopes [.., l - i] are those that fit the recorded runs best.
    """
    steps, widths = len(gram), -np.diff(sigmas)
    costs = np.full((reach + 1, steps + 1, reach + 1), np.inf)
    slopes = np.zeros((reach + 1, steps + 1, reach + 1))
    starts = {0, *restarts}
    for i in range(steps):
        last = min(reach, steps - i)
        after = np.arange(i + 1, i + last)
        for a in range(reach + 1) if i not in starts else (0,):
            h = i - a
            if h < 0 or any(h < start <= i for start in starts):
                continue
            # Everything within v_i + span(v_l - v_i, v_h - v_i).
            rows = np.concatenate([after, [h]])
            inner = gram[np.ix_(rows, rows)] - gram[rows, i][:, None] - gram[i, rows][None] + gram[i, i]
            length = inner[-1, -1]
            slope = np.zeros(len(after))
            if a and length > 0:
                slope = -inner[:-1, -1] / (length * (1.0 + RIDGE))
            # Rows of coefficients of the error of each step, added up along the stretch.
            errors = np.zeros((last, len(rows)))
            errors[1:, :-1] = np.eye(len(after)) * widths[after]
            errors[1:, -1] = slope * widths[after]
            errors = np.cumsum(errors, axis=0)
            squared = np.einsum("dr,rq,dq->d", errors, inner, errors)
            costs[a, i, 1 : last + 1] = np.sqrt(np.maximum(squared, 0.0))
            slopes[a, i, 1:last] = slope
    return costs, slopes


def between(recorded: Float[np.ndarray, " r"], wanted: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t r"]:
    """Linear interpolation from recorded noise levels (falling) to others, as a matrix: it carries a Gram matrix along."""
    matrix = np.zeros((len(wanted), len(recorded)))
    if len(recorded) == 1:
        matrix[:] = 1.0
        return matrix
    above = np.clip(np.searchsorted(-recorded, -wanted, side="right") - 1, 0, len(recorded) - 2)
    share = np.clip((recorded[above] - wanted) / (recorded[above] - recorded[above + 1]), 0.0, 1.0)
    rows = np.arange(len(wanted))
    matrix[rows, above], matrix[rows, above + 1] = 1.0 - share, share
    return matrix
