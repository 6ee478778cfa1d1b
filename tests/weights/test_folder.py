import numpy as np
import pytest
from fake_model import put

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.tensor_file import write


@pytest.fixture
def folder(tmp_path):
    """One sharded component, one single file, one of transformers, two without weights, one absent."""
    tmp_path = tmp_path / "checkpoint"
    put(
        tmp_path / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "_diffusers_version": "0.35.0",
            "boundary_ratio": 0.875,
            "expand_timesteps": False,
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
        },
    )
    put(tmp_path / "transformer" / "config.json", {"num_layers": 2})
    put(tmp_path / "vae" / "config.json", {"z_dim": 16})
    put(tmp_path / "text_encoder" / "config.json", {"d_model": 8})
    put(tmp_path / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    put(tmp_path / "tokenizer" / "tokenizer_config.json", {"model_max_length": 512})
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": {f"block.{n}": np.full(3, n)} for n in (1, 2)}
    for name, tensors in shards.items():
        write(tmp_path / "transformer" / name, tensors)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    put(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"conv": np.ones((2, 2))})
    write(tmp_path / "text_encoder" / "model.safetensors", {"shared.weight": np.ones((2, 2))})
    return tmp_path


def test_what_a_folder_holds(folder):
    opened = open_folder(folder)
    assert opened.pipeline_class == "WanPipeline"
    assert opened.settings == {"boundary_ratio": 0.875, "expand_timesteps": False}
    assert opened.component("transformer_2") is None and opened.component("nothing") is None
    assert opened.require("scheduler").class_name == "UniPCMultistepScheduler"
    assert opened.require("scheduler").config == {"flow_shift": 3.0}
    assert opened.require("tokenizer").config == {"model_max_length": 512}
    assert opened.require("vae").config == {"z_dim": 16}
    assert [f.name for f in opened.require("text_encoder").files] == ["model.safetensors"]
    tensors = opened.require("transformer").tensors()
    assert sorted(tensors) == ["block.1", "block.2"] and tensors["block.2"].read().tolist() == [2, 2, 2]


def test_an_absent_component_that_is_required(folder):
    with pytest.raises(CheckpointError, match="no 'transformer_2'"):
        open_folder(folder).require("transformer_2")


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder(tmp_path / "nowhere")


def test_no_index(tmp_path):
    with pytest.raises(CheckpointError, match="no model_index.json"):
        open_folder(tmp_path)


def test_the_folder_above_is_told_which_to_give(folder):
    with pytest.raises(CheckpointError, match=f"give {folder}"):
        open_folder(folder.parent)


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "high_noise_model"])
def test_the_original_layout_is_sent_to_convert(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="smartdiff convert"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"vae": ["diffusers", "AutoencoderKLWan"]}', ""])
def test_broken_index(folder, content):
    (folder / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model_index.json: .*download the file again"):
        open_folder(folder)


def test_broken_config(folder):
    (folder / "vae" / "config.json").write_text('{"z_dim": 16,,}')
    with pytest.raises(CheckpointError, match=r"vae/config\.json: not valid JSON"):
        open_folder(folder)


def test_missing_component_folder(folder):
    (folder / "vae").rename(folder / "moved")
    with pytest.raises(CheckpointError, match="vae: .* missing"):
        open_folder(folder)


def test_missing_shard(folder):
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors, not found; download"):
        open_folder(folder)


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 3])
def test_an_index_reaches_no_other_folder(folder, shard):
    put(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        open_folder(folder)


def test_broken_weight_map(folder):
    put(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_folder(folder)


def test_shard_without_a_promised_key(folder):
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    write(folder / "transformer" / name, {"other": np.ones(2)})
    with pytest.raises(CheckpointError, match=f"{name}: the index promises 'block.2'"):
        open_folder(folder).require("transformer").tensors()


def test_a_key_in_two_shards(folder):
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    write(folder / "transformer" / name, {"block.1": np.ones(2), "block.2": np.ones(2)})
    with pytest.raises(CheckpointError, match="'block.1' is in another file"):
        open_folder(folder).require("transformer").tensors()


def test_shards_without_an_index(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="download the index"):
        open_folder(folder)


def test_only_pickled_weights(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights only as diffusion_pytorch_model.bin"):
        open_folder(folder)


def test_no_weights(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae: no safetensors files"):
        open_folder(folder).require("vae").tensors()


def test_truncated_weights_are_named(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"{file}.*download it again"):
        open_folder(folder).require("vae").tensors()
