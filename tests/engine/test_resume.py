"""A request left between two chunks and taken up elsewhere ends in the same bits; a checkpoint that does not fit is refused."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine import pipeline
from smartdiff_jax.engine.pipeline import GenerateOutput, Pause
from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.stages.checkpoint import Checkpoint

SMALL = dict(size=(32, 32), num_frames=5, num_inference_steps=4, seed=3)


def request(**changes):
    return GenerateParams.create(prompt="a red fox", **SMALL | changes)


def stopped(pipe, done, path, **changes):
    """The checkpoint of a request that was stopped after `done` steps of all its outputs, through bytes and back."""
    for event in pipe.stream(request(**changes)):
        if isinstance(event, Pause) and event.done == done:
            path.write_bytes(event.checkpoint().to_bytes("here"))
            return Checkpoint.from_file(str(path), "here")
    raise AssertionError(f"no pause at {done}")


def finished(pipe, resume=None, **changes):
    return [event for event in pipe.stream(request(**changes), resume=resume) if isinstance(event, GenerateOutput)][0]


@pytest.fixture(autouse=True)
def steps_are_chunks(monkeypatch):
    denoise = pipeline.denoise
    monkeypatch.setattr(pipeline, "denoise", lambda *args, **options: denoise(*args, **options | {"chunk": 1}))


@pytest.mark.parametrize("sampler", ["flow_unipc", "flow_euler"])
@pytest.mark.parametrize("done", [1, 3, 4])
def test_resumed_equals_never_stopped(pipe, tmp_path, done, sampler):
    whole = finished(pipe, sampler=sampler)
    out = finished(pipe, stopped(pipe, done, tmp_path / "c", sampler=sampler), sampler=sampler)
    assert np.array_equal(out.latents, whole.latents) and np.array_equal(out.frames, whole.frames)
    assert out.report.steps == whole.report.steps


def test_resuming_compiles_nothing(pipe, tmp_path, compiles):
    finished(pipe)
    checkpoint = stopped(pipe, 2, tmp_path / "c")
    before = compiles.count
    finished(pipe, checkpoint)
    assert compiles.count == before


def test_two_experts_resume_on_either_side_of_the_switch(experts_pipe, tmp_path):
    whole = finished(experts_pipe)
    for done in (1, 3):
        checkpoint = stopped(experts_pipe, done, tmp_path / "c")
        assert np.array_equal(finished(experts_pipe, checkpoint).latents, whole.latents)


def test_outputs_that_were_finished_are_kept(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_BATCH_TOKENS", 1)  # a batch an output
    whole = finished(pipe, num_outputs=3)
    checkpoint = stopped(pipe, 2 * 4 + 1, tmp_path / "c", num_outputs=3)
    assert checkpoint.batch == 2 and len(checkpoint.results) == 2
    out = finished(pipe, checkpoint, num_outputs=3)
    assert np.array_equal(out.frames, whole.frames) and out.report.steps == whole.report.steps == ["FFFF"] * 3


def test_previews_come_at_the_steps_asked_for_and_near_the_picture(pipe):
    events = list(pipe.stream(request(num_inference_steps=12), stops=(4, 8, 11)))
    previews = {event.done: event.preview() for event in events if isinstance(event, Pause) and event.preview}
    assert list(previews) == [4, 8, 11]
    first = events[-1].frames[0, 0].astype(float)
    errors = [np.abs(picture - first).mean() for picture in previews.values()]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 3.0, errors
    assert np.array_equal(events[-1].latents, finished(pipe, num_inference_steps=12).latents)


def test_a_checkpoint_of_another_place_or_request_is_refused(pipe, tmp_path):
    path = tmp_path / "c"
    checkpoint = stopped(pipe, 1, path)
    with pytest.raises(CheckpointError, match="'here'.*'there'"):
        Checkpoint.from_file(str(path), "there")
    with pytest.raises(CheckpointError, match="tokens"):
        finished(pipe, checkpoint, size=(48, 32))
    with pytest.raises(CheckpointError, match="sampler_state"):
        finished(pipe, dataclasses.replace(checkpoint, carry={".tokens": checkpoint.carry[".tokens"]}))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_file_is_no_checkpoint(pipe, tmp_path, size):
    path = tmp_path / "c"
    stopped(pipe, 1, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot|no checkpoint"):
        Checkpoint.from_file(str(path), "here")


def test_another_safetensors_file_is_no_checkpoint(tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "c")
    assert load_file(tmp_path / "c")
    with pytest.raises(CheckpointError):
        Checkpoint.from_file(str(tmp_path / "c"), "here")
