"""Plans in the real denoise loop, and what a calibration writes down there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import relative_error
from loops import Tiny, toy_stacks

from smartdiff_jax.cache import POLICIES
from smartdiff_jax.cache.auto import Auto
from smartdiff_jax.cache.base import Outlook, Step
from smartdiff_jax.cache.params import MAX_STEPS
from smartdiff_jax.cache.planned import Planned
from smartdiff_jax.cache.planner import make_plan
from smartdiff_jax.cache.recorder import Recorder
from smartdiff_jax.errors import InvalidConfig, InvalidRequest

STEPS = 14


@pytest.fixture(scope="module")
def tiny():
    return Tiny.load("cache_wan")


@pytest.fixture(scope="module")
def sigmas(tiny):
    return np.linspace(1.0, 0.0, STEPS + 1).astype(np.float32) ** 1.5


def test_held_velocities_are_longer_steps_of_euler(tiny, sigmas):
    """The one oracle that goes through the loop, the sampler and the mask."""
    fresh = np.isin(np.arange(STEPS), [0, 1, 4, 5, 9, 12])
    hold = np.tile([1.0, 0.0], (STEPS, 1))
    cached, strings = tiny(Planned.of(fresh, hold), sigmas=sigmas)
    fewer, _ = tiny(POLICIES["none"](), sigmas=np.append(sigmas[:-1][fresh], 0.0))
    assert strings == ["".join("F" if done else "." for done in fresh)] * 2
    assert relative_error(cached, fewer) < 1e-5


def test_a_plan_that_skips_nothing_changes_nothing(tiny, sigmas):
    policy = Planned.of(np.ones(STEPS, bool), np.zeros((STEPS, 2)))
    one, strings = tiny(policy, sigmas=sigmas)
    assert strings == ["F" * STEPS] * 2 and relative_error(one, tiny(POLICIES["none"](), sigmas=sigmas)[0]) < 1e-6


def test_requests_leave_nothing_behind(tiny, sigmas):
    a = Planned.of(np.arange(STEPS) % 3 == 0, np.tile([1.5, -0.5], (STEPS, 1)))
    b = Planned.of(np.arange(STEPS) % 2 == 0, np.tile([1.0, 0.0], (STEPS, 1)))
    first, _ = tiny(a, sigmas=sigmas)
    tiny(b, sigmas=sigmas)
    assert np.array_equal(first, tiny(a, sigmas=sigmas)[0])


def test_other_weights_begin_with_a_computed_step(tiny, sigmas):
    _, strings = tiny(Planned.of(np.arange(STEPS) == 0, np.tile([1.0, 0.0], (STEPS, 1))), sigmas=sigmas, switch=5)
    assert strings == ["F....F........"] * 2


def test_predictions_are_the_plans():
    rng = np.random.RandomState(0)
    velocities = rng.standard_normal((9, 1, 4, 3)).astype(np.float32)
    flat = velocities.reshape(9, -1)
    plan = make_plan(flat @ flat.T, np.linspace(1, 0, 10), 4)
    policy, computed = Planned.of(plan.fresh, plan.weights), []
    state = policy.init_step(jnp.zeros((1, 4, 3)))

    @jax.jit
    def run(state, index, velocity):
        step = Step(index, jnp.int32(9), jnp.zeros(MAX_STEPS + 1), jnp.float32(0), jnp.bool_(False))
        return policy.step(state, (), step, velocity, lambda inner: (velocity, None, inner, jnp.ones(2)), 2)

    for index in range(9):
        out, state, _, done = run(state, jnp.int32(index), velocities[index])
        if plan.fresh[index]:
            computed.append(index)
        expected = velocities[index] if plan.fresh[index] else sum(
            weight * velocities[anchor] for weight, anchor in zip(plan.weights[index], computed[::-1], strict=False)
        )  # fmt: skip
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(done, [plan.fresh[index]] * 2)


def test_a_recording_is_the_run(tiny, sigmas):
    """Euler's own rule leads from each recorded state to the next."""
    seen = []
    loop_run = tiny.loop.functions

    def spy(*arguments):
        start, run = loop_run(*arguments)

        def kept(*arguments):
            seen.append(run(*arguments))
            return seen[-1]

        return start, kept

    tiny.loop.functions = spy
    try:
        last, _ = tiny(Recorder(STEPS, "time_embedding", 6), sigmas=sigmas)
    finally:
        del tiny.loop.functions
    (signals, _), (latents, velocities) = seen[-1].cache_state
    latents, velocities = np.asarray(latents), np.asarray(velocities)
    following = latents + np.diff(sigmas)[:, None, None, None] * velocities
    assert relative_error(following, np.concatenate([latents[1:], last[None]])) < 1e-5
    assert signals.magnitude.shape == (2, STEPS) and np.all(np.asarray(signals.magnitude)[:, 1:] > 0)


def test_recorded_signals_by_hand():
    stacks = toy_stacks(num_blocks=5)
    recorder = Recorder(8, "modulated_input", 1)
    state = recorder.init_blocks(stacks.hidden[0])

    @jax.jit
    def run(state, index, stack):
        step = Step(index, jnp.int32(8), jnp.zeros(MAX_STEPS + 1), jnp.float32(0), jnp.bool_(False))
        return recorder.blocks(state, step, stack)

    for index in range(8):
        stack = type(stacks)(stacks.hidden[index], stacks.parts[index], stacks.time[index])
        out, state, computed = run(state, jnp.int32(index), stack)
        assert computed and np.allclose(out, stack.hidden + stack.parts.sum(0), atol=1e-5)
    signals, residual = state[0], np.asarray(stacks.parts.sum(axis=1))

    def apart(new, old):
        return np.abs(new - old).sum() / np.abs(old).sum()

    hidden, first = np.asarray(stacks.hidden), np.asarray(stacks.parts[:, 0])
    for i in range(1, 8):
        norms = np.linalg.norm(residual[i], axis=-1) / np.linalg.norm(residual[i - 1], axis=-1)
        np.testing.assert_allclose(signals.magnitude[i], norms.mean(), rtol=1e-4)
        np.testing.assert_allclose(signals.residual[i], apart(residual[i], residual[i - 1]), rtol=1e-4)
        np.testing.assert_allclose(signals.signal[i], apart(hidden[i], hidden[i - 1]), rtol=1e-4)
        for gap in range(1, min(i, 6) + 1):
            np.testing.assert_allclose(signals.first_block[i, gap - 1], apart(first[i], first[i - gap]), rtol=1e-3)


def recorded(steps=20):
    rng = np.random.RandomState(0)
    velocities = np.cumsum(rng.standard_normal((steps, 5)), axis=0)
    gram = velocities @ velocities.T
    rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(gram.tolist()))
    return {"auto": {"runs": [{"sigmas": np.linspace(1, 0.1, steps).tolist(), "gram": rows, "size": 3.0, "prompts": 1}]}}


@pytest.mark.parametrize("steps", [9, 20, 37])
def test_auto_plans_any_number_of_steps(steps):
    for ratio, restarts in ((None, ()), (0.0, ()), (0.3, ()), (0.8, ()), (0.5, (4,))):
        outlook = Outlook(steps, np.linspace(1, 0, steps + 1), restarts, ratio)
        policy, notes = Auto.create(steps, recorded()).within(outlook)
        fresh = np.asarray(policy.fresh)[:steps]
        assert fresh.sum() == max(1, round((1 - (0.5 if ratio is None else ratio)) * steps)) and not notes
        assert fresh[0] and fresh[list(restarts)].all() and isinstance(policy, Planned)


def test_auto_leaves_short_runs_alone_and_says_so():
    for steps in (1, 4, 8):
        policy, notes = Auto.create(steps, recorded()).within(Outlook(steps, np.linspace(1, 0, steps + 1), ratio=0.5))
        assert np.asarray(policy.fresh)[:steps].all() and "all steps were computed" in notes[0]


def test_what_auto_cannot_do():
    with pytest.raises(InvalidRequest, match="cache_params.threshold"):
        Auto.create(20, recorded(), threshold=0.2)
    with pytest.raises(InvalidRequest, match="cache_ratio=0.95.*0.9 "):
        Auto.create(20, recorded()).within(Outlook(20, np.linspace(1, 0, 21), (4,), 0.95))
    numbers = recorded()
    numbers["auto"]["runs"][0]["gram"] = numbers["auto"]["runs"][0]["gram"][:-1]
    with pytest.raises(InvalidConfig, match="triangle"):
        Auto.create(20, numbers)
