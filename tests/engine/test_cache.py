"""A request's cache, from its fields to the report; calibration; with and without side by side."""

import dataclasses
import json

import numpy as np
import pytest

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.caching import executed_letters, policy_for, skipped_share
from smartdiff_jax.engine.calibration import calibration_files, fit, inner_products, read_calibration
from smartdiff_jax.engine.comparison import compare
from smartdiff_jax.engine.loading import load_model
from smartdiff_jax.errors import CheckpointError, InvalidRequest
from smartdiff_jax.evaluation.metrics import psnr, ssim
from smartdiff_jax.samplers import SAMPLERS
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.weights.folder import open_folder

SMALL = dict(size=(32, 32), num_frames=5, num_inference_steps=10, seed=3, output_type="latent")


@pytest.fixture(scope="module")
def calibrated(pipe):
    """The shared pipeline, which knows nothing of it afterwards."""
    before, seen = pipe._model, []
    settings = {key: SMALL[key] for key in ("size", "num_frames")}
    file = pipe.calibrate(["a red fox", "the lazy dog"], (12,), seen.append, **settings)
    yield pipe, file, seen
    pipe._model = before
    file.unlink()


def test_numbers_of_a_cache_compile_nothing(pipe, compiles):
    pipe("a red fox", **SMALL, cache="fbcache", cache_ratio=0.4)
    before, strings = compiles.count, set()
    for ratio, params in (
        (None, dict(threshold=0.0)),
        (0.5, {}),
        (0.8, dict(threshold=0.3, warmup=2)),
        (None, dict(threshold=1e3, max_skips=4, cooldown=2)),
        (None, dict(threshold=0.1, mask=[1, -1] * 5)),
    ):
        out = pipe("a red fox", **SMALL, cache="fbcache", cache_ratio=ratio, cache_params=params)
        strings.add(out.report.steps[0])
    pipe("a red fox", **SMALL | dict(num_inference_steps=33), cache="fbcache", cache_ratio=0.3)
    assert compiles.count == before and len(strings) == 5


def test_the_report_tells_what_the_cache_did(pipe):
    report = pipe("a red fox", **SMALL, cache="fbcache", cache_ratio=0.6, cache_params=dict(threshold=0.25)).report
    assert report.steps[0].count("F") == 4 and report.cache["ratio"] == 0.6
    assert report.cache["policy"] == "FirstBlockCache" and report.cache["threshold"] == 0.25 and report.cache["warmup"] == 1
    # Two branches' anchor and reference, 8 tokens x 2 frames' worth of the stream each, and a few counters.
    width = pipe._model.configs["transformer"].num_attention_heads * pipe._model.configs["transformer"].attention_head_dim
    stream = 2 * report.shapes["tokens"][1] * width * 4
    assert 2 * stream <= report.cache["bytes"] < 2 * stream + 200
    assert json.loads(report.to_json())["params"]["cache_params"] == {"threshold": 0.25}
    none = pipe("a red fox", **SMALL).report.cache
    assert none == {"policy": "NoCache", "ratio": 0.0, "bytes": 0}


def test_calibration_is_written_read_and_used(calibrated, folder, system):
    pipe, file, seen = calibrated
    assert file == folder / "cache.json"
    assert seen == [Progress("calibrate", 1, 2), Progress("calibrate", 2, 2)]
    numbers = json.loads(file.read_text())
    assert load_model(folder, None, system).cache_numbers == numbers
    assert [len(run["sigmas"]) for run in numbers["auto"]["runs"]] == [12]
    assert len(numbers["magcache"]["ratios"]) == 2 and len(numbers["magcache"]["ratios"][0]) == 12
    assert numbers["teacache"]["signal"] == "time_embedding" and numbers["teacache"]["r2"] <= 1.0
    for name in ("auto", "magcache"):
        report = pipe("a red fox", **SMALL, cache=name, cache_ratio=0.4).report
        assert report.steps[0].count("F") == 6 and report.notes == ()


def test_auto_is_nearer_to_the_full_run_than_fewer_steps(calibrated):
    pipe, *_ = calibrated
    full = pipe("a cat runs", **SMALL).latents
    auto = pipe("a cat runs", **SMALL, cache="auto").latents
    fewer = pipe("a cat runs", **SMALL | dict(num_inference_steps=5)).latents
    assert 0 < np.linalg.norm(auto - full) < np.linalg.norm(fewer - full)


def test_plans_compile_nothing(calibrated, compiles):
    pipe, *_ = calibrated
    pipe("a cat runs", **SMALL, cache="auto")
    before = compiles.count
    for steps, ratio in ((10, 0.0), (10, 0.7), (25, None), (4, 0.5)):
        pipe("a cat runs", **SMALL | dict(num_inference_steps=steps), cache="auto", cache_ratio=ratio)
    assert compiles.count == before


def test_a_change_of_experts_is_told(pipe):
    params = pipe.check(GenerateParams.create(prompt="", cache="fbcache", num_inference_steps=10, cache_ratio=0.8))
    schedule = SAMPLERS[params.sampler].schedule(10, 3.0)
    policy, notes = policy_for(params, {}, schedule, (6,))
    assert "before step 6" in notes[0] and int(policy.guards.budget) == 2
    with pytest.raises(InvalidRequest, match="cache_ratio=0.9.*from 2 to 10 of 10"):
        policy_for(params.model_copy(update={"cache_ratio": 0.9}), {}, schedule, (6,))


@pytest.mark.parametrize("steps, words", [(1, "nothing to skip in one step"), (6, "each of 6 steps differs"), (9, None)])
def test_short_runs_are_told(pipe, steps, words):
    params = pipe.check(GenerateParams.create(prompt="", cache="fbcache", num_inference_steps=steps, cache_ratio=0.4))
    _, notes = policy_for(params, {}, SAMPLERS[params.sampler].schedule(steps, 3.0), ())
    assert (words in notes[0]) if words else not notes


def test_letters():
    executed = np.zeros((200, 2), np.float32)
    executed[:5] = [[1, 1], [1, 0], [0, 1], [0, 0], [1, 0]]
    scales = np.full(200, 4.0, np.float32)
    scales[4] = 1.0
    assert executed_letters(executed, 5, scales) == "Fhh.F" and skipped_share(["Fhh.F", "FF..."]) == 0.5
    assert executed_letters(executed[:, :1], 5, scales) == "FF..F"
    executed[5:9] = [[0.25] * 2, [0.5] * 2, [0.75] * 2, [1] * 2]
    assert executed_letters(executed, 9, scales)[5:] == "123F" and skipped_share(["123F", "F..."]) == round(1 - 3.5 / 8, 4)


def test_a_damaged_calibration_is_an_error(tmp_path):
    assert read_calibration([tmp_path / "cache.json"]) == {}
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cache.json.*calibrate"):
        read_calibration([tmp_path / "cache.json"])


def test_borrowed_folders_are_not_written_to(folder, tmp_path):
    opened = open_folder(folder)
    assert calibration_files(opened, False, tmp_path, lambda: "key") == [folder / "cache.json"]
    elsewhere = [tmp_path / "calibration" / "key.json", folder / "cache.json"]
    assert calibration_files(opened, True, tmp_path, lambda: "key") == elsewhere


def test_with_and_without(pipe):
    settings = {key: value for key, value in SMALL.items() if key != "output_type"}
    request = GenerateParams.create(prompt="a red fox", cache="fbcache", cache_ratio=0.5, **settings)
    result = compare(pipe, request)
    assert result.full.report.steps == ["F" * 10] and result.cached.report.cache["ratio"] == 0.5
    assert result.speed_up > 0 and 5 < result.psnr[0] < 100 and -1 < result.ssim[0] < 1
    both = result.side_by_side().frames
    assert both.shape == (1, 5, 32, 64, 3)
    assert np.array_equal(both[0, :, :, :32], result.full.frames[0]) and np.array_equal(
        both[0, :, :, 32:], result.cached.frames[0]
    )
    with pytest.raises(InvalidRequest, match="cache='none'"):
        compare(pipe, request.model_copy(update={"cache": "none"}))


def test_likeness_by_hand():
    rng = np.random.RandomState(0)
    frames = rng.randint(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    assert psnr(frames, frames) == np.inf and ssim(frames, frames) == pytest.approx(1.0)
    dark, light = (np.full((1, 24, 24, 3), value, np.uint8) for value in (100, 110))
    assert psnr(dark, light) == pytest.approx(20 * np.log10(25.5))
    # Of flat pictures only the first factor is left.
    a, b, c1 = 100 / 255, 110 / 255, 0.01**2
    assert ssim(dark, light) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert ssim(frames, 255 - frames) < 0 < ssim(frames, np.clip(frames + 3.0, 0, 255).astype(np.uint8))


def test_fit_by_hand():
    x = np.linspace(0.01, 0.2, 30)
    coefficients, r2 = fit(x, 3 * x**2 - 0.5 * x + 0.1)
    assert r2 == pytest.approx(1.0) and np.allclose(np.polyval(coefficients, x), 3 * x**2 - 0.5 * x + 0.1)
    assert fit(x, np.random.RandomState(0).rand(30))[1] < 0.5
    velocities = np.random.RandomState(1).standard_normal((3, 1, 5, 2)).astype(np.float32)
    assert np.allclose(inner_products(velocities), np.einsum("aijk,bijk->ab", velocities, velocities))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(cache="teacach"), ["cache='teacach'", "did you mean 'teacache'"]),
        (dict(cache="teacache"), ["cache='teacache'", "calibrate"]),
        (dict(cache="fbcache", cache_ratio=1.0), ["cache_ratio=1.0", "less than 1"]),
        (dict(cache="fbcache", cache_ratio=-0.1), ["cache_ratio=-0.1"]),
        (dict(cache_ratio=0.5), ["cache_ratio=0.5", "auto"]),
        (dict(cache_params=dict(threshold=1.0)), ["cache_params.threshold=1.0", "unknown field"]),
        (dict(cache="fbcache", cache_params=dict(treshold=1.0)), ["cache_params.treshold=1.0", "did you mean 'threshold'"]),
        (dict(cache="fbcache", cache_params=dict(threshold=-1.0)), ["cache_params.threshold=-1.0"]),
        (dict(cache="fbcache", cache_params=dict(mask=[1, 1])), ["cache_params.mask=[1, 1]", "10 steps"]),
        (dict(cache="dbcache"), ["cache_params.first_blocks=8", "blocks"]),
        (dict(cache="blockdance", cache_params=dict(block=40)), ["cache_params.block=40", "blocks"]),
        (dict(cache="fbcache", cache_ratio=0.9, cache_params=dict(warmup=5)), ["cache_ratio=0.9", "from 5 to 10 of 10"]),
    ],
)
def test_a_wrong_cache_is_one_clear_error_before_anything_runs(pipe, settings, words, monkeypatch):
    monkeypatch.setattr(pipe, "_model", dataclasses.replace(pipe._model, cache_numbers={}))

    with pytest.raises(InvalidRequest) as raised:
        events = pipe.stream(GenerateParams.create(prompt="a red fox", num_inference_steps=10, **settings))
        next(events)
    assert all(word in str(raised.value) for word in words), str(raised.value)
