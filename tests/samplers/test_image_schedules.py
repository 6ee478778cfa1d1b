"""The image models' noise levels: diffusers' pipelines, from known models' own sampling defaults."""

from pathlib import Path

import numpy as np
import pytest

from smartdiff_jax.config.model import known_models
from smartdiff_jax.samplers import SAMPLERS, Spacing

MODELS = {"flux": "flux1-dev", "qwen": "qwen-image", "klein": "flux2-klein-4b", "fixed": "z-image"}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "image_schedules.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", MODELS)
def test_sigmas_and_timesteps_equal_diffusers(golden, name):
    defaults = known_models()[MODELS[name]].sampling
    cases = [key for key in golden if key.startswith(f"{name}/") and key.endswith("/sigmas")]
    assert len(cases) >= 35
    for key in cases:
        steps, tokens = (int(part) for part in key.split("/")[1:3])
        shift = defaults.shift_for(1024, tokens, steps)
        schedule = SAMPLERS[defaults.sampler].schedule(steps, shift, Spacing(defaults.from_one, defaults.terminal))
        np.testing.assert_allclose(schedule.sigmas[: steps + 1], golden[key], rtol=0, atol=2e-7)
        np.testing.assert_allclose(schedule.timesteps[:steps], golden[key.replace("sigmas", "timesteps")], rtol=0, atol=2e-4)


@pytest.mark.parametrize("terminal", [None, 0.02, 0.3])
def test_one_step_begins_at_one_and_the_last_level_is_the_terminal(terminal):
    euler = SAMPLERS["flow_euler"]
    assert float(euler.schedule(1, 3.0, Spacing(True, terminal)).sigmas[0]) == 1.0
    last = float(euler.schedule(10, 3.0, Spacing(True, terminal)).sigmas[9])
    assert last == pytest.approx(terminal or 3.0 * 0.1 / (1 + 2.0 * 0.1), rel=1e-6)
