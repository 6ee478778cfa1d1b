"""The whole pipeline against diffusers' WanPipeline, and what a request may rely on."""

import numpy as np
import pytest
import tiny

from smartdiff_jax.engine.pipeline import split_outputs
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.stages.base import Progress
from smartdiff_jax.stages.text import Branch

SMALL = dict(size=(32, 32), num_frames=5, num_inference_steps=4, seed=3)


def relative_error(out, reference):
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("name", tiny.CASES)
@pytest.mark.parametrize("guidance", ["sequential", "batched"])
def test_equals_diffusers_from_prompt_to_pixels(name, guidance, request, system):
    from smartdiff_jax.engine.pipeline import Pipeline

    case = dict(tiny.CASES[name])
    folder = request.getfixturevalue("experts_folder" if case.pop("two_experts") else "folder")
    pipe = Pipeline.from_pretrained(folder, system=system.model_copy(update={"guidance": guidance}))
    width, height = case["size"]
    shift = case.pop("flow_shift")
    out = pipe(
        tiny.PROMPT,
        negative_prompt="the lazy cat",
        latents=tiny.noise(case["num_frames"], height, width),
        output_type="np",
        shift=shift,
        **case,
    )
    with np.load(f"{tiny.KEYS.parent}/pipeline_{name}.npz") as golden:
        latents, frames = golden["latents"], golden["frames"] / 65535.0
    assert out.frames.shape == frames.shape
    assert relative_error(out.latents, latents) < 1e-4
    assert relative_error(out.frames, frames) < 1e-3


def test_a_second_request_compiles_nothing(pipe, compiles):
    pipe("a red fox", **SMALL)
    pipe("a red fox", **SMALL, num_outputs=2)
    before = compiles.count
    assert before > 0
    pipe("the lazy dog runs", size=(32, 32), num_frames=5, num_inference_steps=7, seed=9)
    pipe("a cat", **SMALL | dict(num_inference_steps=1, guidance_scale=1.0))
    pipe("", **SMALL | dict(guidance_scale=7.5, shift=2.0, negative_prompt="blue"), num_outputs=2)
    pipe(tiny.PROMPT, **SMALL | dict(num_inference_steps=200))
    assert compiles.count == before


def test_all_chunks_of_a_first_request_share_one_executable(folder, system, compiles):
    from smartdiff_jax.engine.pipeline import Pipeline

    pipe, counts = Pipeline.from_pretrained(folder, system=system), []
    pipe("a red fox", **SMALL, on_progress=lambda event: counts.append((event.stage, event.done, compiles.count)))
    first, *others = [count for stage, _, count in counts if stage == "denoise"]
    assert others and set(others) == {first}


def test_each_sampler_compiles_once(pipe, compiles):
    for sampler in ("flow_euler", "flow_dpmpp"):
        pipe("a red fox", **SMALL, sampler=sampler)
        before = compiles.count
        pipe("a dog", **SMALL | dict(num_inference_steps=9, shift=3.5, seed=1), sampler=sampler)
        assert compiles.count == before


def test_two_experts_share_one_executable(experts_pipe, compiles):
    experts_pipe("a red fox", **SMALL)
    before = compiles.count
    experts_pipe("a fox", **SMALL | dict(num_inference_steps=12), guidance_scale_2=1.0)
    assert compiles.count == before


def test_the_same_seed_gives_the_same_picture(pipe):
    one, two = pipe("a red fox", **SMALL), pipe("a red fox", **SMALL)
    assert np.array_equal(one.latents, two.latents) and np.array_equal(one.frames, two.frames)
    assert not np.array_equal(one.latents, pipe("a red fox", **SMALL | dict(seed=4)).latents)


@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
def test_any_chunk_length_gives_the_same_bits(pipe, monkeypatch, chunk):
    from smartdiff_jax.engine import pipeline

    reference = pipe("a red fox", **SMALL | dict(num_inference_steps=10))
    denoise = pipeline.denoise
    monkeypatch.setattr(pipeline, "denoise", lambda *args, **options: denoise(*args, **options | {"chunk": chunk}))
    assert np.array_equal(pipe("a red fox", **SMALL | dict(num_inference_steps=10)).latents, reference.latents)


def test_each_output_is_its_seed_alone(pipe):
    both = pipe("a red fox", **SMALL, num_outputs=2)
    alone = pipe("a red fox", **SMALL | dict(seed=4))
    assert both.frames.shape == (2, 5, 32, 32, 3)
    # Both go through the loop as one batch, whose sums may be taken in another order.
    assert relative_error(both.latents[1], alone.latents[0]) < 1e-5
    assert np.abs(both.frames[1].astype(int) - alone.frames[0]).max() <= 1


def test_many_outputs_go_in_batches_of_few_sizes():
    assert [len(batch) for batch in split_outputs(7, 4096)] == [4, 2, 1]
    assert [len(batch) for batch in split_outputs(20, 4096)] == [8, 8, 4]
    assert [len(batch) for batch in split_outputs(3, 32760)] == [1, 1, 1]
    assert [len(batch) for batch in split_outputs(2, 75600)] == [1, 1]
    assert [index for batch in split_outputs(7, 4096) for index in batch] == list(range(7))
    assert [len(batch) for batch in split_outputs(7, 4096, data=2)] == [4, 2, 2]
    assert [len(batch) for batch in split_outputs(1, 4096, data=4)] == [4]


def test_seeds_go_round_at_the_end(pipe):
    last = pipe("a red fox", **SMALL | dict(seed=2**32 - 1), num_outputs=2, output_type="latent")
    assert relative_error(last.latents[1:], pipe("a red fox", **SMALL | dict(seed=0), output_type="latent").latents) < 1e-5


def test_guidance_one_does_not_see_the_negative_prompt(pipe):
    plain = pipe("a red fox", **SMALL, guidance_scale=1.0, negative_prompt="dog")
    assert np.array_equal(plain.latents, pipe("a red fox", **SMALL, guidance_scale=1.0, negative_prompt="cat").latents)
    assert not np.array_equal(plain.latents, pipe("a red fox", **SMALL, guidance_scale=2.0).latents)


def test_embeds_stand_in_for_prompts(pipe):
    states, negative = np.asarray(pipe._text([Branch("prompt", "a red fox"), Branch("negative_prompt", "")]).text)
    out = pipe(prompt_embeds=states, negative_prompt_embeds=negative, **SMALL)
    assert np.array_equal(out.latents, pipe("a red fox", negative_prompt="", **SMALL).latents)


def test_report_tells_what_was_done(pipe):
    report = pipe("a red fox", **SMALL).report
    assert report.steps == ["FFFF"]
    assert set(report.seconds) == {"text", "denoise", "decode"} and all(s >= 0 for s in report.seconds.values())
    assert report.shapes["latents"] == (1, 4, 2, 4, 4) and report.shapes["frames"] == (1, 5, 32, 32, 3)
    assert report.params["seed"] == 3 and report.peak_memory > 1e6 and "1 device" in report.mesh
    assert report.notes == ()


def test_a_long_prompt_is_cut_and_the_report_says_so(pipe):
    out = pipe("fox " * 600, **SMALL)
    assert "601 tokens" in out.report.notes[0] and "512" in out.report.notes[0]
    assert np.array_equal(out.latents, pipe("fox " * 511, **SMALL).latents)


def test_an_unset_seed_is_drawn_and_told(pipe):
    settings = {key: value for key, value in SMALL.items() if key != "seed"}
    out = pipe("a red fox", **settings)
    assert np.array_equal(out.latents, pipe("a red fox", **settings, seed=out.report.params["seed"]).latents)


def test_progress_reaches_the_end_of_every_stage(pipe):
    seen: list[Progress] = []
    pipe("a red fox", **SMALL, on_progress=seen.append)
    last = {event.stage: event for event in seen}
    assert list(last) == ["text", "denoise", "decode"]
    assert all(event.done == event.total for event in last.values())
    assert last["denoise"].total == 4


def test_cancelling_between_chunks_leaves_the_pipeline_usable(pipe):
    def stop(event):
        if event.stage == "denoise":
            raise KeyboardInterrupt

    before = pipe("a red fox", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        pipe("a red fox", **SMALL, on_progress=stop)
    assert np.array_equal(pipe("a red fox", **SMALL).latents, before.latents)


def test_save_writes_every_output(pipe, tmp_path):
    out = pipe("a red fox", **SMALL, num_outputs=2)
    paths = out.save(tmp_path / "fox.webp")
    assert [path.name for path in paths] == ["fox-0.webp", "fox-1.webp"] and all(path.stat().st_size for path in paths)
    with pytest.raises(InvalidRequest, match="output_type"):
        pipe("a red fox", **SMALL, output_type="latent").save(tmp_path / "fox.mp4")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(size=(100, 100)), ["size='100x100'", "16", "96x96"]),
        (dict(size="32by32"), ["size", "WIDTHxHEIGHT"]),
        (dict(num_frames=0), ["num_frames=0", "1"]),
        (dict(num_frames=6), ["num_frames=6", "5 or 9"]),
        (dict(num_inference_steps=10_000), ["num_inference_steps=10000", "200"]),
        (dict(num_inference_steps=0), ["num_inference_steps=0"]),
        (dict(guidance_scale=float("nan")), ["guidance_scale=nan", "finite"]),
        (dict(guidance_scale=0.5), ["guidance_scale=0.5", "1"]),
        (dict(shift=-1.0), ["shift=-1.0"]),
        (dict(seed=-1), ["seed=-1"]),
        (dict(sampler="unipc"), ["sampler='unipc'", "flow_unipc"]),
        (dict(cache="teacach"), ["cache='teacach'", "none"]),
        (dict(num_inference_step=4), ["num_inference_step=4", "did you mean 'num_inference_steps'"]),
        (dict(guidance_scale_2=3.0), ["guidance_scale_2=3.0", "one expert"]),
        (dict(latents=np.zeros((1, 4, 2, 4, 5))), ["latents", "4, 2, 4, 4"]),
        (dict(latents=np.full((1, 4, 2, 4, 4), np.nan)), ["latents", "finite"]),
        (dict(prompt_embeds=np.zeros((1, 513, 16))), ["prompt_embeds", "512", "16"]),
        (dict(pooled_prompt_embeds=np.zeros((1, 8))), ["pooled_prompt_embeds", "no pooled text encoder"]),
        (dict(output_type="pil"), ["output_type='pil'", "latent"]),
    ],
)
def test_bad_input_is_one_clear_error(pipe, settings, words):
    with pytest.raises(InvalidRequest) as raised:
        pipe("a red fox", **SMALL | settings)
    assert all(word in str(raised.value) for word in words), str(raised.value)
