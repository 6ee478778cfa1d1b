import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import original_wan
import pytest
from original_wan import random, write_release

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.models.families import WAN
from smartdiff_jax.weights import convert as convert_module
from smartdiff_jax.weights.convert import convert
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.stream import check, load
from smartdiff_jax.weights.tensor_file import read_header


def tensors_of(folder, component):
    return open_folder(folder).require(component).tensors()


def test_a_release_becomes_a_folder_that_loads(tmp_path):
    files = []
    folder = convert(write_release(tmp_path / "original"), tmp_path / "new" / "wan", files.append)
    opened = open_folder(folder)
    assert opened.pipeline_class == "WanPipeline" and opened.settings == {}
    assert opened.component("transformer_2") is None
    assert opened.require("scheduler").class_name == "UniPCMultistepScheduler"
    assert opened.require("scheduler").config["flow_shift"] == 3.0
    assert opened.require("tokenizer").config == {"model_max_length": 512}
    assert files == [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    for name in ("transformer", "text_encoder", "vae"):
        architecture, component = WAN.architectures[name], opened.require(name)
        config = architecture.config.model_validate(component.config)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        load(architecture, config, component.tensors(), jnp.float32, lambda path, shape, s=sharding: s)


def test_every_tensor_keeps_its_numbers(tmp_path):
    write_release(tmp_path / "original")
    folder = convert(tmp_path / "original", tmp_path / "wan")
    sources = {
        "transformer": original_wan.transformer(),
        "text_encoder": random(original_wan.TEXT_ENCODER),
        "vae": random(original_wan.VAE),
    }
    for name, source in sources.items():
        converted = tensors_of(folder, name)
        assert len(converted) == len(source)
        left = sorted(tensor.read().tobytes() for tensor in converted.values())
        assert left == sorted(array.tobytes() for array in source.values())


@pytest.mark.parametrize(
    "component, original, diffusers",
    [
        ("transformer", "blocks.1.norm3.weight", "blocks.1.norm2.weight"),  # norm3 of Wan is used second
        ("transformer", "blocks.1.self_attn.q.weight", "blocks.1.attn1.to_q.weight"),
        ("transformer", "blocks.0.cross_attn.o.bias", "blocks.0.attn2.to_out.0.bias"),
        ("transformer", "blocks.0.cross_attn.norm_k.weight", "blocks.0.attn2.norm_k.weight"),
        ("transformer", "blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("transformer", "blocks.0.ffn.2.bias", "blocks.0.ffn.net.2.bias"),
        ("transformer", "blocks.1.modulation", "blocks.1.scale_shift_table"),
        ("transformer", "head.modulation", "scale_shift_table"),
        ("transformer", "head.head.weight", "proj_out.weight"),
        ("transformer", "text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
        ("transformer", "time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight"),
        ("transformer", "time_projection.1.bias", "condition_embedder.time_proj.bias"),
        ("text_encoder", "blocks.0.ffn.gate.0.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        ("text_encoder", "blocks.0.ffn.fc1.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
        ("text_encoder", "blocks.0.norm2.weight", "encoder.block.0.layer.1.layer_norm.weight"),
        (
            "text_encoder",
            "blocks.0.pos_embedding.embedding.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        ("vae", "conv1.weight", "quant_conv.weight"),
        ("vae", "conv2.bias", "post_quant_conv.bias"),
        ("vae", "encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
        ("vae", "encoder.downsamples.5.time_conv.weight", "encoder.down_blocks.5.time_conv.weight"),
        ("vae", "decoder.middle.2.residual.6.weight", "decoder.mid_block.resnets.1.conv2.weight"),
        ("vae", "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        ("vae", "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
        ("vae", "decoder.upsamples.11.resample.1.weight", "decoder.up_blocks.2.upsamplers.0.resample.1.weight"),
        ("vae", "decoder.upsamples.14.residual.3.gamma", "decoder.up_blocks.3.resnets.2.norm2.gamma"),
        ("vae", "decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ],
)
def test_names(tmp_path_factory, component, original, diffusers):
    sources = {
        "transformer": original_wan.transformer(),
        "text_encoder": random(original_wan.TEXT_ENCODER),
        "vae": random(original_wan.VAE),
    }
    shared = tmp_path_factory.getbasetemp() / "converted"
    if not shared.exists():
        convert(write_release(tmp_path_factory.mktemp("release")), shared)
    np.testing.assert_array_equal(tensors_of(shared, component)[diffusers].read(), sources[component][original])


def test_two_experts_and_shards(tmp_path):
    folder = convert(write_release(tmp_path / "original", num_shards=3, experts=True), tmp_path / "wan")
    opened = open_folder(folder)
    assert opened.settings == {"boundary_ratio": 0.875}
    for name, seed in (("transformer", 1), ("transformer_2", 2)):  # the high-noise expert first
        component = opened.require(name)
        assert len(component.files) == 3
        config = WAN.architectures[name].config.model_validate(component.config)
        check(WAN.architectures[name], config, component.tensors())
        np.testing.assert_array_equal(
            component.tensors()["proj_out.weight"].read(), original_wan.transformer(seed)["head.head.weight"]
        )


def test_numbers_come_from_the_config_and_the_shapes(tmp_path):
    opened = open_folder(convert(write_release(tmp_path / "original"), tmp_path / "wan"))
    transformer, text, vae = (opened.require(name).config for name in ("transformer", "text_encoder", "vae"))
    assert (transformer["num_attention_heads"], transformer["attention_head_dim"], transformer["text_dim"]) == (2, 12, 16)
    assert transformer["patch_size"] == [1, 2, 2]
    assert (text["d_model"], text["d_kv"], text["num_heads"], text["d_ff"], text["vocab_size"]) == (16, 4, 3, 20, 50)
    assert text["num_layers"] == 1 and text["relative_attention_num_buckets"] == 32
    assert vae["base_dim"] == 4 and len(vae["latents_mean"]) == vae["z_dim"] == 16


def test_bfloat16_stays_bfloat16(tmp_path):
    text = random(original_wan.TEXT_ENCODER, dtype=ml_dtypes.bfloat16)
    folder = convert(write_release(tmp_path / "original", text_encoder=text), tmp_path / "wan")
    stored = tensors_of(folder, "text_encoder")["shared.weight"]
    assert (
        stored.dtype == ml_dtypes.bfloat16 and open_folder(folder).require("text_encoder").config["torch_dtype"] == "bfloat16"
    )
    assert stored.read().tobytes() == text["token_embedding.weight"].tobytes()


def refused(tmp_path, message):
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "original", tmp_path / "wan")
    assert sorted(p.name for p in tmp_path.iterdir()) in (["original"], [])


def test_a_missing_folder(tmp_path):
    refused(tmp_path, "no such folder")


@pytest.mark.parametrize(
    "name, message",
    [
        ("config.json", "no config.json"),
        ("diffusion_pytorch_model-00002-of-00002.safetensors", "1 shards of 00002"),
        ("models_t5_umt5-xxl-enc-bf16.safetensors", r"models_t5_umt5-xxl-enc-bf16\.pth: not found"),
        ("Wan2.1_VAE.safetensors", r"Wan2\.1_VAE\.pth: not found"),
        ("google/umt5-xxl/tokenizer.json", "tokenizer.json: not found"),
    ],
)
def test_a_missing_file(tmp_path, name, message):
    (write_release(tmp_path / "original", num_shards=2) / name).unlink()
    refused(tmp_path, message)


def test_a_truncated_file(tmp_path):
    file = write_release(tmp_path / "original") / "Wan2.1_VAE.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "Wan2.1_VAE.safetensors.*download it again")


def test_image_to_video_is_refused(tmp_path):
    folder = write_release(tmp_path / "original")
    (folder / "config.json").write_text(json.dumps(original_wan.CONFIG | {"model_type": "i2v"}))
    refused(tmp_path, "model_type='i2v'; only text-to-video")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "t2v"}'])
def test_a_broken_config(tmp_path, content):
    (write_release(tmp_path / "original") / "config.json").write_text(content)
    refused(tmp_path, "config.json: not the config of an original Wan")


def test_unknown_keys_are_listed(tmp_path):
    vae = random(original_wan.VAE) | {"decoder.extra.weight": np.zeros(2), "another": np.zeros(2)}
    write_release(tmp_path / "original", vae=vae)
    refused(tmp_path, "the VAE: .*another, decoder.extra.weight; use the original release")


def test_a_missing_key_is_found_before_anything_is_written(tmp_path):
    vae = random(original_wan.VAE)
    del vae["decoder.upsamples.7.time_conv.bias"]
    write_release(tmp_path / "original", vae=vae)
    refused(tmp_path, "vae: the weights do not fit")


def test_an_existing_target_is_left_alone(tmp_path):
    write_release(tmp_path / "original")
    (tmp_path / "wan").mkdir()
    with pytest.raises(CheckpointError, match="wan: already exists"):
        convert(tmp_path / "original", tmp_path / "wan")
    with pytest.raises(CheckpointError, match="already in diffusers layout"):
        (tmp_path / "wan" / "model_index.json").touch()
        convert(tmp_path / "wan", tmp_path / "other")


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    write_release(tmp_path / "original")
    monkeypatch.setattr(convert_module, "_model_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "original", tmp_path / "wan")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_a_pickle_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    folder = write_release(tmp_path / "original")
    (folder / "Wan2.1_VAE.safetensors").unlink()
    (folder / "Wan2.1_VAE.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path, r"pip install smartdiff_jax\[convert\]")


def test_the_index_of_shards(tmp_path):
    folder = convert(write_release(tmp_path / "original", num_shards=2), tmp_path / "wan")
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = [array.nbytes for array in original_wan.transformer().values()]
    assert index["metadata"]["total_size"] == sum(sizes) and len(index["weight_map"]) == len(sizes)
    assert read_header(folder / "vae" / "diffusion_pytorch_model.safetensors")[1] == {"format": "pt"}
