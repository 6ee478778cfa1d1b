import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import ARCHITECTURE, Config, checkpoint, put
from jax.sharding import SingleDeviceSharding

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.quantized import dequantized, quantize, save
from smartdiff_jax.weights.stream import load
from smartdiff_jax.weights.tensor_file import ArrayTensor, read_header

draw = np.random.default_rng(0).standard_normal


def read_back(stored):
    return {key: t.read() for key, t in dequantized({k: ArrayTensor(a) for k, a in stored.items()}).items()}


@pytest.mark.parametrize("shape", [(64, 128), (32, 8, 3, 3, 3), (4096, 2)])
def test_error_is_at_most_half_a_scale(shape):
    tensor = (draw(shape) * np.exp(draw((shape[0],) + (1,) * (len(shape) - 1)))).astype(np.float32)
    stored = quantize({"w": tensor})
    assert stored["w"].dtype == np.int8 and stored["w.scale"].dtype == np.float32
    error = np.abs(read_back(stored)["w"] - tensor)
    assert (error <= stored["w.scale"] * 0.50001).all()
    assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(tensor)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_whose_channels_differ_has_the_scales(axis):
    channel = np.exp(2 * draw(96)).astype(np.float32)
    tensor = draw((96, 96)).astype(np.float32) * (channel[:, None] if axis == 0 else channel)
    assert quantize({"w": tensor})["w.scale"].shape == ((96, 1) if axis == 0 else (1, 96))


def test_small_tensors_stay_floats():
    flat = {
        "bias": draw(5000).astype(np.float32),
        "small": draw((8, 8)).astype(np.float32),
        "huge": np.full(4, 1e6, np.float32),
        "ids": np.arange(3),
    }
    stored = quantize(flat)
    assert {key: str(array.dtype) for key, array in stored.items()} == {
        "bias": "float16",
        "small": "float16",
        "huge": "float32",
        "ids": "int64",
    }
    for key, array in read_back(stored).items():
        np.testing.assert_allclose(array, flat[key], rtol=2**-11, atol=2**-24)


def test_zero_channels_stay_zero():
    tensor = draw((64, 128)).astype(np.float32)
    tensor[3] = 0
    assert (read_back(quantize({"w": tensor}))["w"][3] == 0).all()


def test_a_name_that_a_scale_would_take():
    with pytest.raises(ValueError, match="w.scale"):
        quantize({"w": draw((64, 128)), "w.scale": draw(3)})


def test_a_lost_or_wrong_scale():
    stored = quantize({"w": draw((64, 128))})
    with pytest.raises(CheckpointError, match=r"w: .* without w\.scale"):
        read_back({"w": stored["w"]})
    with pytest.raises(CheckpointError, match="does not fit"):
        read_back({**stored, "w.scale": np.ones((7, 1), np.float32)})


def test_a_component_in_8_bits_loads_like_any_other(tmp_path):
    config = Config(width=64, hidden=128, num_layers=2)
    flat = checkpoint(config)
    put(tmp_path / "model_index.json", {"_class_name": "X", "vae": ["diffusers", "X"]})
    put(tmp_path / "vae" / "config.json", config.model_dump())
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", flat)
    stored = read_header(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")[0]
    assert stored["blocks.0.linear.weight"].dtype == np.int8

    tensors = open_folder(tmp_path).require("vae").tensors()
    state = load(ARCHITECTURE, config, tensors, jnp.float32, lambda path, shape: SingleDeviceSharding(jax.devices()[0]))
    kernel = np.asarray(state["blocks"]["kernel"][...])
    expected = np.stack([flat[f"blocks.{i}.linear.weight"].T for i in range(2)])
    assert kernel.shape == (2, 64, 128)
    assert np.linalg.norm(kernel - expected) <= 0.01 * np.linalg.norm(expected)
