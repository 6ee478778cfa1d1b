"""Every image family against diffusers' own pipeline, from prompt and noise to pixels; one row a family."""

import numpy as np
import pytest
import tiny_images

from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.models.families import FAMILIES

every_family = pytest.mark.parametrize("family", list(tiny_images.FAMILIES))


def relative_error(out, reference):
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


@pytest.fixture(scope="session")
def pipes(tmp_path_factory, system):
    """Pipelines by family, each loaded when first asked for."""
    loaded = {}

    def get(family: str) -> Pipeline:
        if family not in loaded:
            folder = tiny_images.write_folder(tmp_path_factory.mktemp("images") / family, family)
            loaded[family] = Pipeline.from_pretrained(folder, system=system)
        return loaded[family]

    return get


def arguments(family, case):
    negative = {"negative_prompt": tiny_images.NEGATIVE} if family in ("qwen-image", "z-image") else {}
    return dict(case, latents=tiny_images.noise(case["size"]), **negative)


def test_every_family_of_pictures_has_a_row():
    assert set(tiny_images.FAMILIES) == {name for name, family in FAMILIES.items() if family.task == "t2i"}


@every_family
@pytest.mark.parametrize("number", [0, 1])
def test_equals_diffusers_from_prompt_to_pixels(pipes, family, number):
    case = tiny_images.CASES[family][number]
    out = pipes(family)(tiny_images.PROMPT, output_type="np", **arguments(family, case))
    with np.load(tiny_images.GOLDEN / f"image_pipeline_{family}.npz") as golden:
        latents, pixels = golden[f"{number}/latents"], golden[f"{number}/pixels"] / 65535.0
    assert out.latents.shape == latents.shape and out.frames[:, 0].shape == pixels.shape
    assert relative_error(out.latents, latents) < 1e-4
    assert relative_error(out.frames[:, 0], pixels) < 1e-3


@every_family
def test_batched_guidance_gives_the_same(pipes, family, tmp_path, system):
    case = tiny_images.CASES[family][0]
    folder = tiny_images.write_folder(tmp_path / family, family)
    batched = Pipeline.from_pretrained(folder, system=system.model_copy(update={"guidance": "batched"}))
    settings = dict(arguments(family, case), output_type="latent")
    reference = pipes(family)(tiny_images.PROMPT, **settings).latents
    assert relative_error(batched(tiny_images.PROMPT, **settings).latents, reference) < 1e-5


@every_family
def test_other_prompts_and_knobs_compile_nothing(pipes, family, compiles):
    pipe, settings = pipes(family), dict(size=(48, 48), output_type="latent")
    pipe("a red fox", num_inference_steps=2, **settings)
    before = compiles.count
    guidance = {} if pipe.spec.sampling.guidance == "none" else {"guidance_scale": 2.5}
    pipe("two dogs, one of them blue", num_inference_steps=5, seed=7, shift=2.0, **guidance, **settings)
    pipe("", num_inference_steps=1, **settings)
    assert compiles.count == before


@every_family
def test_each_output_is_its_seed_alone(pipes, family):
    settings = dict(size=(48, 32), num_inference_steps=2, output_type="latent")
    both = pipes(family)("a fox", seed=3, num_outputs=2, **settings).latents
    assert relative_error(both[1:], pipes(family)("a fox", seed=4, **settings).latents) < 1e-5


def test_what_a_model_cannot_be_told_is_refused(pipes):
    for family, settings, words in (
        ("flux2-klein", dict(guidance_scale=4.0), ["guidance_scale=4.0", "distilled"]),
        ("flux1", dict(negative_prompt="blurry"), ["negative_prompt", "no negative branch"]),
        ("flux1", dict(prompt_embeds=np.zeros((1, 4, 16))), ["pooled_prompt_embeds", "both"]),
        ("flux1", dict(size="17:9"), ["size", "16:9"]),
        ("qwen-image", dict(guidance_scale=0.5), ["guidance_scale=0.5", "1"]),
        ("z-image", dict(num_frames=5), ["num_frames=5", "pictures"]),
        ("z-image", dict(size=(40, 48)), ["40x48", "16"]),
    ):
        with pytest.raises(InvalidRequest) as raised:
            pipes(family)("a fox", **{"size": (48, 48), "num_inference_steps": 1} | settings)
        assert all(word in str(raised.value) for word in words), str(raised.value)


def test_sampling_follows_the_folder(pipes):
    flux, klein, qwen, z = (pipes(family).spec.sampling for family in tiny_images.FAMILIES)
    assert flux.guidance == "embedded" and flux.dynamic_shift.max_image_seq_len == 64
    assert klein.guidance == "none" and klein.num_inference_steps == 4
    assert qwen.terminal == 0.02 and qwen.guidance_norm == "per_token"
    assert z.shift == 3.0 and z.guidance_off == 0.0 and z.dynamic_shift is None
