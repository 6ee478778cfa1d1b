"""Every sampler of the registry: diffusers' trajectories, analytic oracles, one executable for all requests."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.samplers import MAX_STEPS, SAMPLERS
from smartdiff_jax.samplers.schedules import from_sigmas

SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)  # as in golden/make_samplers.py
STEP_COUNTS = (1, 2, 3, 5, 20, 50)
ORDERS = {"flow_euler": 1, "flow_unipc": 3, "flow_dpmpp": 2}  # the corrector gives UniPC-2 its third order
MEAN, DEVIATION = 0.7, 0.4  # of the Gaussian data whose flow is known exactly

every_sampler = pytest.mark.parametrize("name", list(SAMPLERS))


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "samplers.npz") as file:
        return dict(file)


def solver(name, velocity):
    """jitted (schedule, latents) -> the latents after each step [MAX_STEPS, *shape]."""
    sampler = SAMPLERS[name]

    @jax.jit
    def solve(schedule, latents):
        def body(index, carry):
            latents, state, path = carry
            latents, state = sampler.step(state, latents, velocity(latents, schedule.sigmas[index]), schedule, index)
            return latents, state, path.at[index].set(latents)

        path = jnp.zeros((MAX_STEPS, *latents.shape))
        return jax.lax.fori_loop(0, schedule.num_steps, body, (latents, sampler.init(latents), path))[2]

    return solve


def golden_velocity(golden):
    def velocity(latents, sigma):
        return (golden["matrix"] @ latents.reshape(-1) + jnp.sin(3 * sigma + golden["phase"])).reshape(latents.shape)

    return velocity


def gaussian_scale(sigma):
    """The standard deviation of x_sigma for data of N(MEAN, DEVIATION**2)."""
    return ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5


def gaussian_velocity(latents, sigma):
    """E[noise - data | x_sigma]: linear in x, and its flow keeps (x - (1 - sigma) MEAN) / gaussian_scale constant."""
    gain = (sigma - (1 - sigma) * DEVIATION**2) / gaussian_scale(sigma) ** 2
    return gain * (latents - (1 - sigma) * MEAN) - MEAN


@every_sampler
def test_trajectories_and_tables_equal_diffusers(name, golden):
    solve = solver(name, golden_velocity(golden))
    row = 0
    for shift in SHIFTS:
        for num_steps in STEP_COUNTS:
            rows = slice(row, row := row + num_steps)
            schedule = SAMPLERS[name].schedule(num_steps, shift)
            np.testing.assert_array_equal(schedule.sigmas[:num_steps], golden[f"{name}/sigmas"][rows])
            np.testing.assert_array_equal(schedule.timesteps[:num_steps], golden[f"{name}/timesteps"][rows])
            path = np.asarray(solve(schedule, golden["start"]))[:num_steps].reshape(num_steps, -1)
            reference = golden[f"{name}/latents"][rows].reshape(num_steps, -1)
            error = np.linalg.norm(path - reference, axis=1) / np.linalg.norm(reference, axis=1)
            assert error.max() <= 3e-6, (shift, num_steps)
    assert row == len(golden[f"{name}/sigmas"])


@every_sampler
def test_the_order_of_convergence_on_gaussian_data(name):
    """Between two noise levels, steps even in log-SNR; the last, to sigma = 0, is infinite there and left out."""
    solve = solver(name, gaussian_velocity)
    z = jnp.array([-1.5, 0.3, 2.0])
    counts, errors = (20, 40, 80), []
    for num_steps in counts:
        sigmas = 1 / (1 + np.exp(np.linspace(-3, 3, num_steps + 1)))
        path = solve(from_sigmas(sigmas), (1 - sigmas[0]) * MEAN + gaussian_scale(sigmas[0]) * z)
        exact = (1 - sigmas[-1]) * MEAN + gaussian_scale(sigmas[-1]) * z
        errors.append(float(jnp.abs(path[num_steps - 1] - exact).max()))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(order - ORDERS[name]) < 0.1, errors


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17, 200])
def test_a_single_datum_is_reached_exactly(name, num_steps):
    """With one possible picture the data prediction is constant and every solver is exact, at any step count."""
    datum = jnp.array([0.5, -2.0, 3.0])
    schedule = SAMPLERS[name].schedule(num_steps, 5.0)
    start = (1 - schedule.sigmas[0]) * datum + schedule.sigmas[0] * jnp.array([1.0, -1.0, 0.2])
    end = solver(name, lambda latents, sigma: (latents - datum) / sigma)(schedule, start)[num_steps - 1]
    np.testing.assert_allclose(end, datum, rtol=2e-5)


@every_sampler
def test_one_executable_for_all_step_counts_and_shifts(name):
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    solve = solver(name, gaussian_velocity)
    latents = jnp.ones((2, 3))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        solve(SAMPLERS[name].schedule(7, 3.0), latents)
        after_first = len(compiled)
        for num_steps in (1, 2, 3, 50, MAX_STEPS):
            for shift in (1.0, 12.0):
                solve(SAMPLERS[name].schedule(num_steps, shift), latents)
        solve(from_sigmas([1.0, 0.6, 0.2]), latents)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert after_first >= 1  # the event is still called so
    assert len(compiled) == after_first


@every_sampler
def test_any_request_is_finite_and_its_sigmas_fall(name):
    solve = solver(name, gaussian_velocity)
    latents = jnp.array([-1.0, 0.0, 2.5])

    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(st.integers(1, MAX_STEPS), st.floats(0.1, 20.0))
    def check(num_steps, shift):
        schedule = SAMPLERS[name].schedule(num_steps, shift)
        sigmas = np.asarray(schedule.sigmas)
        assert sigmas[0] <= 1
        assert np.all(np.diff(sigmas[: num_steps + 1]) < 0)
        assert np.all(sigmas[num_steps:] == 0)
        timesteps = np.asarray(schedule.timesteps)
        assert np.all(np.diff(timesteps[:num_steps]) <= 0)
        assert np.all(timesteps[num_steps:] == 0)
        path = np.asarray(solve(schedule, latents))
        assert np.all(np.isfinite(path))
        assert np.abs(path[num_steps - 1] - (MEAN + DEVIATION * np.asarray(latents))).max() < 1.5

    check()


@every_sampler
@pytest.mark.parametrize("shift", [0.01, 100.0])
def test_the_ends_of_the_shift_range_are_served(name, shift):
    schedule = SAMPLERS[name].schedule(MAX_STEPS, shift)
    assert np.all(np.isfinite(solver(name, gaussian_velocity)(schedule, jnp.array([-1.0, 2.5]))))


@every_sampler
def test_sigmas_from_exactly_one_are_served(name):
    sigmas = np.linspace(1, 0, 9)[:-1]
    schedule = from_sigmas(sigmas)
    np.testing.assert_allclose(schedule.timesteps[:8], 1000 * sigmas)
    z = jnp.array([-1.0, 2.5])
    end = solver(name, gaussian_velocity)(schedule, z)[7]
    np.testing.assert_allclose(end, MEAN + DEVIATION * z, atol=0.2)


@every_sampler
def test_its_own_schedule_ends_on_the_data(name):
    z = jnp.array([-1.0, 0.3, 2.5])
    end = solver(name, gaussian_velocity)(SAMPLERS[name].schedule(MAX_STEPS, 3.0), z)[MAX_STEPS - 1]
    np.testing.assert_allclose(end, MEAN + DEVIATION * z, atol=0.02)


@every_sampler
def test_a_step_past_the_end_changes_nothing(name):
    sampler = SAMPLERS[name]
    schedule = sampler.schedule(3, 3.0)
    latents, velocity = jnp.array([1.0, -2.0]), jnp.array([0.5, 4.0])
    state = jax.tree.map(lambda leaf: leaf + 0.25, sampler.init(latents))
    for index in (3, 4, MAX_STEPS - 1):
        moved, state = sampler.step(state, latents, velocity, schedule, jnp.int32(index))
        np.testing.assert_array_equal(moved, latents)


@every_sampler
def test_bfloat16_comes_out_as_float32(name):
    sampler = SAMPLERS[name]
    latents = jnp.ones((2, 2), jnp.bfloat16)
    state = sampler.init(latents)
    moved, state = sampler.step(state, latents, latents, sampler.schedule(4, 3.0), jnp.int32(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((moved, state))} == {jnp.dtype("float32")}


@every_sampler
@pytest.mark.parametrize("num_steps", [0, -1, MAX_STEPS + 1, 10_000])
def test_a_wrong_step_count_is_one_clear_error(name, num_steps):
    with pytest.raises(InvalidRequest, match=rf"num_inference_steps={num_steps}: .*1 to {MAX_STEPS}"):
        SAMPLERS[name].schedule(num_steps, 3.0)


@every_sampler
@pytest.mark.parametrize("shift", [0.0, -1.0, 1e9, float("nan"), float("inf")])
def test_a_wrong_shift_is_one_clear_error(name, shift):
    with pytest.raises(InvalidRequest, match="shift=.*0.01 to 100"):
        SAMPLERS[name].schedule(20, shift)


@pytest.mark.parametrize("sigmas", [[], [0.5] * 3, [0.2, 0.8], [0.5, 0.0], [1.5, 0.5], [float("nan"), 0.5], [0.5] * 201])
def test_wrong_sigmas_are_one_clear_error(sigmas):
    with pytest.raises(InvalidRequest, match="sigmas="):
        from_sigmas(sigmas)


@pytest.mark.parametrize("one, other", list(itertools.combinations(SAMPLERS, 2)))
def test_jit_tells_samplers_apart(one, other):
    assert jax.tree.structure(SAMPLERS[one]) != jax.tree.structure(SAMPLERS[other])
