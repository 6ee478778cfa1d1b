"""Every family on meshes of 8 virtual devices: the picture of one device, whatever is split."""

import jax
import numpy as np
import pytest
import tiny_meshes

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.engine import loading
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.families import FAMILIES
from smartdiff_jax.sharding import weights

MESHES = {
    "ring8": dict(ring=8),
    "ring3": dict(ring=3),
    "ulysses4": dict(ulysses=4),
    "ulysses2-ring4": dict(ulysses=2, ring=4),
    "cfg2-ulysses2-ring2": dict(cfg=2, ulysses=2, ring=2),
    "tensor2-ring2": dict(tensor=2, ring=2),
    "fsdp4": dict(ring=4, fsdp=True),
    "data2": dict(data=2),
}
# 35 tokens a picture and 39 a clip: they divide by nothing in the meshes but 3 and 13.
REQUESTS = {
    family: dict(size=(28, 20), num_inference_steps=2, seed=1) | (dict(size=(12, 52), num_frames=1) if family == "wan" else {})
    for family in FAMILIES
}


@pytest.fixture(scope="session")
def on_one_device(tmp_path_factory, system):
    """(folder, output) by family."""
    made = {}

    def get(family):
        if family not in made:
            folder = tiny_meshes.write(tmp_path_factory.mktemp("mesh") / family, family)
            pipe = Pipeline.from_pretrained(folder, system=system)
            made[family] = folder, pipe("a red fox", output_type="np", **REQUESTS[family])
        return made[family]

    return get


def places(arrays):
    """Which device holds which part of every array."""
    return str([leaf.sharding.devices_indices_map(leaf.shape) for leaf in jax.tree.leaves(arrays)])


@pytest.fixture(scope="session")
def on_a_mesh(on_one_device, system):
    """A pipeline of a family on a mesh.

    A text encoder or a VAE whose parts lie on the same devices is the same program, whatever the mesh calls its axes: such
    pipelines share it, and only the denoiser is compiled for each. Weights come from the folder: to keep and restore them
    takes longer, and has tests of its own.
    """
    text, decode = {}, {}

    def get(family, **axes):
        folder, _ = on_one_device(family)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "WeightStore", lambda root: None)
            patch.setattr(weights, "SMALLEST", 64)  # or these models would have nothing worth splitting
            pipe = Pipeline.from_pretrained(folder, system=system, mesh=MeshConfig(**axes))
        pipe._text = text.setdefault((family, places(pipe._model.text_encoders)), pipe._text)
        pipe._decode = decode.setdefault((family, places(pipe._model.vae[1])), pipe._decode)
        return pipe

    return get


# Models without guidance have no branches to give devices of their own.
PAIRS = [
    (family, mesh) for family in FAMILIES for mesh in MESHES if "cfg" not in mesh or family in ("wan", "qwen-image", "z-image")
]


@pytest.mark.parametrize("family, mesh", PAIRS)
def test_a_mesh_gives_the_picture_of_one_device(on_one_device, on_a_mesh, compiles, family, mesh):
    _, reference = on_one_device(family)
    pipe = on_a_mesh(family, **MESHES[mesh])
    if "fsdp" in MESHES[mesh]:
        split = [leaf.size for leaf in jax.tree.leaves(pipe._model.denoisers) if not leaf.is_fully_replicated]
        assert sum(split) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(pipe._model.denoisers))
    out = pipe("a red fox", output_type="np", **REQUESTS[family])
    # Of the norm: guidance multiplies what float32 sums in another order differ by.
    assert np.linalg.norm(out.latents - reference.latents) <= 1e-5 * np.linalg.norm(reference.latents)
    assert np.linalg.norm(out.frames - reference.frames) <= 1e-5 * np.linalg.norm(reference.frames)
    assert out.report.steps == reference.report.steps
    before = compiles.count
    pipe("two dogs", output_type="np", **REQUESTS[family] | dict(seed=2, num_inference_steps=3, shift=2.0))
    assert compiles.count == before


def test_a_mesh_file(on_one_device, system, tmp_path):
    """The file's path in the place of the mesh; it holds any system parameter, and so goes with no other."""
    folder, reference = on_one_device("flux1")
    file = tmp_path / "mesh.yaml"
    file.write_text(f"mesh: {{ring: 2, ulysses: 2}}\ndtype: float32\ncache_dir: {system.cache_dir}\n")
    for path in (file, str(file)):
        pipe = Pipeline.from_pretrained(folder, mesh=path)
        assert pipe.system.mesh == MeshConfig(ring=2, ulysses=2)
    out = pipe("a red fox", output_type="np", **REQUESTS["flux1"])
    assert np.linalg.norm(out.frames - reference.frames) <= 1e-5 * np.linalg.norm(reference.frames)
    with pytest.raises(InvalidConfig, match=r"mesh='.*mesh.yaml': is a file of system parameters, and `system` is given too"):
        Pipeline.from_pretrained(folder, mesh=file, system=pipe.system)
    with pytest.raises(InvalidConfig, match=r"absent.yaml.*cannot be read"):
        Pipeline.from_pretrained(folder, mesh=tmp_path / "absent.yaml")


def test_outputs_that_do_not_fill_the_data_axis(on_one_device, on_a_mesh):
    _, reference = on_one_device("qwen-image")
    pipe = on_a_mesh("qwen-image", data=2, ring=2)
    out = pipe("a red fox", output_type="np", num_outputs=3, **REQUESTS["qwen-image"])
    assert out.frames.shape[0] == out.latents.shape[0] == len(out.report.steps) == 3
    np.testing.assert_allclose(out.frames[:1], reference.frames, rtol=0, atol=1e-5)
    alone = pipe("a red fox", output_type="np", **REQUESTS["qwen-image"] | dict(seed=3))
    np.testing.assert_allclose(out.frames[2:], alone.frames, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family, mesh, words",
    [
        ("flux1", dict(cfg=2), ["mesh.cfg=2", "no negative branch"]),
        ("flux1", dict(ulysses=8), ["mesh.ulysses=8", "4 heads", "ring=2 ulysses=4"]),
        ("flux1", dict(ring=16), ["mesh=16", "8 present"]),
        ("wan", dict(tensor=8), ["mesh.tensor"]),
    ],
)
def test_an_impossible_mesh_is_one_clear_error(on_one_device, system, family, mesh, words):
    folder, _ = on_one_device(family)
    with pytest.raises(InvalidConfig) as raised:
        Pipeline.from_pretrained(folder, system=system, mesh=MeshConfig(**mesh))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_weights_and_tokens_lie_as_declared(on_a_mesh):
    pipe = on_a_mesh("qwen-image", ring=2, ulysses=2, tensor=2)
    weights = pipe._model.denoisers[0]
    into, out_of = weights["blocks"]["text"]["k"]["kernel"], weights["blocks"]["text"]["out"]["kernel"]
    assert into[...].sharding.spec[-1] == "tensor" and out_of[...].sharding.spec[-2] == "tensor"
    seen = []
    denoise = pipe._loop.functions

    def spy(*arguments):
        start, run = denoise(*arguments)

        def kept(*arguments):
            carry = run(*arguments)
            seen.append(carry.tokens.sharding.spec)
            return carry

        return start, kept

    pipe._loop.functions = spy
    pipe("a red fox", output_type="latent", **REQUESTS["qwen-image"])
    assert seen and all(tuple(spec) == ("data", ("ring", "ulysses")) for spec in seen)
