"""What may be loaded, and what is refused before anything runs."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.errors import CheckpointError, InvalidConfig, SmartdiffError

DIT = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path, system, kind=CheckpointError):
    with pytest.raises(kind) as raised:
        Pipeline.from_pretrained(path, system=system)
    return str(raised.value)


def test_all_wrong_tensors_are_named_together(copy, system):
    tensors = load_file(copy / DIT)
    del tensors["proj_out.weight"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors["proj_out.bias"] = np.zeros(5, np.float32)
    save_file(tensors, copy / DIT)
    message = refused(copy, system)
    assert all(word in message for word in ("head_projection.kernel", "extra.weight", "proj_out.bias", "missing", "unexpected"))


def test_truncated_weights(copy, system):
    content = (copy / DIT).read_bytes()
    (copy / DIT).write_bytes(content[:-100])
    assert "download" in refused(copy, system)


def test_corrupt_weights(copy, system):
    content = bytearray((copy / DIT).read_bytes())
    content[3:40] = bytes(37)
    (copy / DIT).write_bytes(content)
    assert DIT.split("/")[1] in refused(copy, system)


def test_a_model_of_another_kind(copy, system):
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    message = refused(copy, system)
    assert "StableDiffusionPipeline" in message and "WanPipeline" in message and "FluxPipeline" in message


def test_a_config_with_another_architecture(copy, system):
    edit(copy / "transformer/config.json", image_dim=1280)
    assert "image_dim" in refused(copy, system, InvalidConfig)
    edit(copy / "transformer/config.json", image_dim=None, num_double_layers=3)
    message = refused(copy, system, InvalidConfig)
    assert "num_double_layers" in message and "config.json" in message


def test_two_experts_need_a_boundary(experts_folder, tmp_path, system):
    copy = shutil.copytree(experts_folder, tmp_path / "copy")
    edit(copy / "model_index.json", boundary_ratio=None)
    assert "boundary_ratio" in refused(copy, system)


def test_a_folder_under_the_name_of_another_model(folder, system):
    with pytest.raises(CheckpointError, match="num_attention_heads=2.*wan2.1-t2v-14b has 40"):
        Pipeline.from_pretrained("wan2.1-t2v-14b", weights=folder, system=system)


@pytest.mark.parametrize("name", ["no-such-model", "./no/folder", "/nowhere"])
def test_an_unknown_name_lists_the_known_ones(name, system):
    assert "pocket-video" in refused(name, system, InvalidConfig)


def test_weights_go_with_a_known_name_only(folder, system):
    with pytest.raises(InvalidConfig, match="weights"):
        Pipeline.from_pretrained(folder, weights=folder, system=system)


def test_sampling_follows_the_folder(folder, experts_folder, system, pipe, experts_pipe):
    assert pipe.spec.sampling.sampler == "flow_unipc" and pipe.spec.sampling.shift == 3.0
    assert experts_pipe.spec.sampling.boundary == 0.875 and experts_pipe.spec.sampling.shift == 12.0


def test_a_scheduler_that_is_not_served(copy, system):
    edit(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert "DDIMScheduler" in refused(copy, system)


def test_a_second_load_restores_the_same_numbers_and_converts_nothing(folder, tmp_path, monkeypatch):
    from smartdiff_jax.engine import loading

    system = SystemConfig.create(cache_dir=tmp_path, dtype="float32")
    settings = dict(size=(32, 32), num_frames=1, num_inference_steps=2, seed=1, output_type="latent")
    first = Pipeline.from_pretrained(folder, system=system)("a fox", **settings).latents
    monkeypatch.setattr(loading, "fill", lambda *args, **kwargs: pytest.fail("converted again"))
    second = Pipeline.from_pretrained(folder, system=system)("a fox", **settings).latents
    assert np.array_equal(first, second)


def test_bfloat16_keeps_what_upstream_keeps_in_float32(folder, system):
    pipe = Pipeline.from_pretrained(folder, system=system, dtype="bfloat16")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(pipe._model.denoisers[0])}
    assert dtypes == {"bfloat16", "float32"}
    out = pipe("a fox", size=(32, 32), num_frames=1, num_inference_steps=2, seed=1)
    assert out.report.dtype == "bfloat16" and np.isfinite(out.latents).all()


def test_every_refusal_is_one_of_ours(copy, system):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(SmartdiffError, match="model_index.json"):
        Pipeline.from_pretrained(copy, system=system)
    shutil.rmtree(copy / "tokenizer")
    assert refused(copy, system)
