"""The planner against all plans there are, and against what the loop makes of its plan."""

import itertools

import numpy as np
import pytest

from smartdiff_jax.cache.planner import RIDGE, between, edges, make_plan


def trajectory(steps, seed=0, rough=0.3, size=6):
    """Velocities [T, size] that drift and jump, and noise levels [T + 1]."""
    rng = np.random.RandomState(seed)
    velocities = np.cumsum(rng.standard_normal((steps, size)), axis=0) + rough * rng.standard_normal((steps, size))
    sigmas = np.sort(rng.rand(steps + 1))[::-1]
    sigmas[-1] = 0.0
    return velocities, sigmas


def cost_of(velocities, sigmas, computed, power, restarts=()):
    """What a plan's edges cost, from the velocities themselves, in the order in which they are computed."""
    steps, total = len(velocities), 0.0
    for position, i in enumerate(computed):
        end = computed[position + 1] if position + 1 < len(computed) else steps
        before = [h for h in computed[:position] if not any(h < restart <= i for restart in restarts)]
        error = np.zeros(velocities.shape[1])
        for step in range(i + 1, end):
            moved = velocities[step] - velocities[i]
            if before:
                slope = velocities[i] - velocities[before[-1]]
                moved = moved - (moved @ slope) / (slope @ slope * (1 + RIDGE)) * slope
            error += (sigmas[step] - sigmas[step + 1]) * moved
        total += np.linalg.norm(error) ** power
    return total


@pytest.mark.parametrize("restarts", [(), (4,)])
@pytest.mark.parametrize("power", [1.0, 4.0])
@pytest.mark.parametrize("budget", [2, 3, 5, 8, 9])
def test_no_plan_is_better(budget, power, restarts):
    for seed in range(3):
        velocities, sigmas = trajectory(9, seed)
        plan = make_plan(velocities @ velocities.T, sigmas, budget, power=power, restarts=restarts)
        others = [{0, *restarts, *rest} for rest in itertools.combinations(range(9), budget)]
        costs = [cost_of(velocities, sigmas, sorted(o), power, restarts) for o in others if len(o) == budget]
        assert plan.fresh.sum() == budget and plan.fresh[0] and all(plan.fresh[list(restarts)])
        np.testing.assert_allclose(plan.cost, min(costs), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            cost_of(velocities, sigmas, np.flatnonzero(plan.fresh).tolist(), power, restarts), plan.cost, rtol=1e-9, atol=1e-12
        )


def test_more_steps_never_cost_more():
    velocities, sigmas = trajectory(24, seed=5)
    costs = [make_plan(velocities @ velocities.T, sigmas, budget).cost for budget in range(1, 25)]
    assert all(more <= less for less, more in itertools.pairwise(costs)) and costs[0] > 0 == costs[-1]


def test_weights_predict_what_lies_on_a_line():
    sigmas = np.linspace(1.0, 0.0, 13)
    velocities = np.outer(sigmas[:-1] ** 2, [1.0, 2.0, 3.0]) + np.array([5.0, 0.0, -1.0])
    plan = make_plan(velocities @ velocities.T, sigmas, 5)
    assert plan.fresh[:2].all(), "a slope wants two computed steps"
    computed: list[int] = []
    for step in range(12):
        if plan.fresh[step]:
            computed.append(step)
        else:
            guess = plan.weights[step] @ velocities[computed[:-3:-1]]
            assert np.linalg.norm(guess - velocities[step]) < 3 * RIDGE * np.linalg.norm(
                velocities[step] - velocities[computed[-1]]
            )
    assert not plan.weights[plan.fresh].any()


def test_what_must_be_computed_is():
    velocities, sigmas = trajectory(12)
    gram = velocities @ velocities.T
    plan = make_plan(gram, sigmas, 6, fresh=(5, 11))
    assert plan.fresh[[0, 5, 11]].all() and plan.fresh.sum() == 6
    assert make_plan(gram, sigmas, 6).cost <= plan.cost
    for budget in (0, 2, 13):
        with pytest.raises(ValueError, match="budget"):
            make_plan(gram, sigmas, budget, fresh=(5, 11))


def test_nothing_is_remembered_over_a_restart():
    velocities, sigmas = trajectory(10)
    gram = velocities @ velocities.T
    costs, slopes = edges(gram, sigmas, 9, restarts=(6,))
    assert np.isinf(costs[1:, 6]).all() and np.isfinite(costs[0, 6, 1:5]).all() and not slopes[:, 6].any()
    assert np.isinf(costs[2:, 7]).all() and np.isfinite(costs[1, 7, 1:4]).all()
    plan = make_plan(gram, sigmas, 4, restarts=(6,))
    # With one computed step behind the restart there is no slope yet.
    second = next((step for step in range(7, 10) if plan.fresh[step]), 10)
    assert not plan.weights[6:second, 1].any()


def test_levels_between_recorded_ones():
    recorded = np.array([1.0, 0.8, 0.5, 0.1])
    matrix = between(recorded, np.array([1.0, 0.9, 0.5, 0.2, 0.05]))
    np.testing.assert_allclose(matrix @ recorded, [1.0, 0.9, 0.5, 0.2, 0.1])
    assert np.allclose(matrix.sum(axis=1), 1.0) and np.array_equal(between(recorded, recorded), np.eye(4))
    rng = np.random.RandomState(0).rand(4, 7)
    np.testing.assert_allclose(matrix @ (rng @ rng.T) @ matrix.T, (matrix @ rng) @ (matrix @ rng).T)
