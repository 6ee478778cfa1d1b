"""Three tiers of parameters: what is known, what is refused, and how defaults are filled in."""

from pathlib import Path

import pytest

from smartdiff_jax.config.model import SamplingDefaults, bundled_folder, known_models, parse_spec
from smartdiff_jax.config.request import GenerateParams, resolve
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.models.families import FAMILIES

ROOT = Path(__file__).parents[2]

# name: (guidance, second guidance, shift at 480p, shift at 720p, steps, boundary), from the model cards
CARDS = {
    "wan2.1-t2v-1.3b": (6.0, None, 8.0, 8.0, 50, None),
    "wan2.1-t2v-14b": (5.0, None, 3.0, 5.0, 50, None),
    "wan2.2-t2v-a14b": (4.0, 3.0, 12.0, 12.0, 40, 0.875),
}


def resolved(model="wan2.1-t2v-1.3b", **fields):
    spec = known_models()[model]
    return resolve(
        GenerateParams.create(prompt="a cat", **fields),
        spec,
        size_multiple=16,
        frame_multiple=4 if spec.task == "t2v" else 0,
        count_tokens=lambda width, height, frames: width * height // 256 * frames,
    )


@pytest.mark.parametrize("name", CARDS)
def test_defaults_follow_the_model_card(name):
    guidance, second, shift_480, shift_720, steps, boundary = CARDS[name]
    small, large = resolved(name, size="832x480"), resolved(name, size="1280x720")
    assert (small.guidance_scale, small.guidance_scale_2, small.shift, small.num_inference_steps) == (
        guidance,
        second,
        shift_480,
        steps,
    )
    assert large.shift == shift_720
    assert known_models()[name].sampling.boundary == boundary
    assert small.sampler == "flow_unipc" and small.num_frames == 81 and small.fps == 16
    assert "静态" in small.negative_prompt


PARITY = {"wan": "| Wan 2.1", "flux1": "| FLUX.1 dev", "flux2-klein": "| FLUX.2 klein", "qwen-image": "| Qwen-Image",
          "z-image": "| Z-Image, Turbo"}  # rows of docs/parity.md  # fmt: skip


@pytest.mark.parametrize("spec", known_models().values(), ids=lambda spec: spec.name)
def test_the_state_of_a_model_is_what_the_records_say(spec):
    if spec.bundled:
        assert (bundled_folder(spec.name) / "README.md").is_file() and "card" in spec.state
        return
    assert "parity" in spec.state and PARITY[spec.family] in (ROOT / "docs" / "parity.md").read_text()
    folder = ROOT / "benchmarks" / "results"
    results = [file.read_text() for what in ("denoise", "images") for file in folder.glob(f"{what}-nvidia-*.json")]
    assert ("speed measured" in spec.state) == any(f'"{spec.name}' in text for text in results)


@pytest.mark.parametrize("name", list(known_models()))
def test_every_known_model_has_a_family_and_its_numbers_fit_the_code(name):
    spec = known_models()[name]
    family = FAMILIES[spec.family]
    assert spec.task == family.task
    for component, numbers in spec.components.items():
        assert numbers.keys() <= family.architectures[component].config.model_fields.keys()


def test_what_the_user_says_wins():
    params = resolved("wan2.2-t2v-a14b", guidance_scale=7.0, shift=2.0, negative_prompt="", seed=0)
    assert (params.guidance_scale, params.guidance_scale_2, params.shift, params.negative_prompt, params.seed) == (
        7.0,
        7.0,
        2.0,
        "",
        0,
    )
    assert resolved("wan2.2-t2v-a14b", guidance_scale_2=2.0).guidance_scale_2 == 2.0


def test_size_may_be_words_or_numbers():
    assert resolved(size="640X352").width == resolved(size=(640, 352)).width == 640


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(InvalidRequest) as raised:
        GenerateParams.create(prompt="a cat", num_frames=0, guidence_scale=3.0)
    assert "num_frames=0" in str(raised.value) and "did you mean 'guidance_scale'" in str(raised.value)


@pytest.mark.parametrize("size", ["832x", "832", "axb", "0x16", "16x-16", "832x481", (9000, 16)])
def test_impossible_sizes(size):
    with pytest.raises(InvalidRequest, match="size"):
        resolved(size=size)


def test_shift_of_the_smallest_fitting_height():
    defaults = SamplingDefaults(shift=5.0, shift_by_height={480: 3.0, 720: 4.0})
    assert [defaults.shift_for(height, 1024, 50) for height in (256, 480, 512, 1080)] == [3.0, 3.0, 4.0, 5.0]


def test_a_wrong_model_file_names_its_field_and_itself():
    with pytest.raises(InvalidConfig, match=r"famly.*did you mean 'family'.*x\.yaml"):
        parse_spec({"name": "x", "famly": "wan", "family": "wan", "task": "t2v"}, source="x.yaml")


def test_system_config_from_a_file(tmp_path):
    file = tmp_path / "system.yaml"
    file.write_text("dtype: float32\nmesh: {ring: 1}\n")
    assert SystemConfig.from_file(file).dtype == "float32"
    for text, word in [("dtype: fp8", "dtype"), ("mesh: {rings: 2}", "mesh.rings"), ("- 1", "fields"), ("a: [", "YAML")]:
        file.write_text(text)
        with pytest.raises(InvalidConfig, match=word):
            SystemConfig.from_file(file)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        SystemConfig.from_file(tmp_path / "none.yaml")


def test_a_mesh_larger_than_the_machine_is_refused_and_not_run_unsplit():
    from smartdiff_jax.sharding.mesh import make_mesh

    assert make_mesh(MeshConfig()).size == 1
    assert make_mesh(MeshConfig(ring=2)).shape["ring"] == 2
    with pytest.raises(InvalidConfig, match=r"mesh=16.*needs more devices than the 8 present"):
        make_mesh(MeshConfig(ring=16))
