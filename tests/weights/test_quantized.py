import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import ARCHITECTURE, Config, checkpoint, put
from jax.sharding import SingleDeviceSharding

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.quantized import BITS, dequantized, quantize, save
from smartdiff_jax.weights.stream import load
from smartdiff_jax.weights.tensor_file import ArrayTensor, read_header

draw = np.random.default_rng(0).standard_normal


def read_back(flat, bits=8):
    stored, metadata = quantize(flat, bits)
    return unpacked(stored, metadata)


def unpacked(stored, metadata):
    return {key: t.read() for key, t in dequantized({k: ArrayTensor(a) for k, a in stored.items()}, metadata).items()}


@pytest.mark.parametrize("bits", BITS)
def test_numbers_of_so_many_bits_come_back_to_half_a_step(bits):
    """Against the definition: with scale 1 every integer of the range is its own, and all others go to the nearest."""
    highest = 2 ** (bits - 1) - 1
    integers = np.random.default_rng(bits).integers(-highest, highest + 1, (80, 64)).astype(np.float32)
    integers[:, 0] = highest  # so that the scale of each group is 1
    stored, metadata = quantize({"w": integers}, bits)
    assert stored["w"].shape == (80, 8 * bits) and stored["w"].dtype == np.uint8 and (stored["w.scale"] == 1).all()
    np.testing.assert_array_equal(unpacked(stored, metadata)["w"], integers)


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.008), (6, 0.03), (5, 0.06), (4, 0.12)])
@pytest.mark.parametrize("shape", [(64, 128), (32, 8, 3, 3, 3), (4099, 2)])
def test_error_follows_the_bits(shape, bits, loss):
    tensor = draw(shape).astype(np.float32)
    stored, metadata = quantize({"w": tensor}, bits)
    back = unpacked(stored, metadata)["w"]
    assert back.shape == shape and back.dtype == np.float32
    assert np.linalg.norm(back - tensor) <= loss * np.linalg.norm(tensor)
    size = sum(array.nbytes for array in stored.values())
    assert size == pytest.approx(tensor.size * (bits + 16 / 64) / 8, rel=0.01)


def test_a_group_has_the_scale_that_loses_least():
    """One number far out: at 4 bits it is cut a little, for the sake of the others."""
    group = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    stored, metadata = quantize({"w": group}, 4)
    widest = np.abs(group).max(1, keepdims=True) / 7
    plain = np.rint(group / widest) * widest
    assert np.square(unpacked(stored, metadata)["w"] - group).sum() < 0.95 * np.square(plain - group).sum()


def test_zeros_in_front_are_not_stored():
    kernel = draw((32, 16, 3, 3, 3)).astype(np.float32)
    full = read_back({"w": kernel}, 6)["w"]
    kernel[:, :, :2] = 0
    stored, metadata = quantize({"w": kernel}, 6)
    assert stored["w"].size == 32 * 16 * 9 * 6 // 8 and json.loads(metadata["shapes"])["w"][1] == [32, 16, 1, 3, 3]
    back = unpacked(stored, metadata)["w"]
    assert back.shape == kernel.shape == full.shape and (back[:, :, :2] == 0).all() and back[:, :, 2].any()
    nothing = read_back({"w": np.zeros((64, 128), np.float32)})["w"]
    assert nothing.shape == (64, 128) and not nothing.any()


def test_small_tensors_stay_floats():
    flat = {
        "bias": draw(5000).astype(np.float32),
        "small": draw((8, 8)).astype(np.float32),
        "huge": np.full(4, 1e6, np.float32),
        "ids": np.arange(3),
    }
    stored, metadata = quantize(flat, 8)
    assert {key: str(array.dtype) for key, array in stored.items()} == {
        "bias": "float16",
        "small": "float16",
        "huge": "float32",
        "ids": "int64",
    }
    for key, array in unpacked(stored, metadata).items():
        np.testing.assert_allclose(array, flat[key], rtol=2**-11, atol=2**-24)


def test_a_name_that_a_scale_would_take():
    with pytest.raises(ValueError, match="w.scale"):
        quantize({"w": draw((64, 128)), "w.scale": draw(3)}, 8)
    with pytest.raises(ValueError, match="bits=9"):
        quantize({}, 9)


def test_lost_or_wrong_scales_and_shapes():
    stored, metadata = quantize({"w": draw((64, 128))}, 6)
    for damaged, about, message in (
        ({"w": stored["w"]}, metadata, "w.scale"),
        ({**stored, "w.scale": np.ones(7, np.float16)}, metadata, "do not fit"),
        ({**stored, "w": stored["w"][:-1]}, metadata, "do not fit"),
        (stored, {"format": metadata["format"]}, "shapes"),
        (stored, {**metadata, "shapes": "[1]"}, "packed file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            unpacked(damaged, about)


def test_a_component_in_few_bits_loads_like_any_other(tmp_path):
    config = Config(width=64, hidden=128, num_layers=2)
    flat = checkpoint(config)
    put(tmp_path / "model_index.json", {"_class_name": "X", "vae": ["diffusers", "X"]})
    put(tmp_path / "vae" / "config.json", config.model_dump())
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", flat, 6)
    stored = read_header(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")[0]
    assert stored["blocks.0.linear.weight"].dtype == np.uint8

    tensors = open_folder(tmp_path).require("vae").tensors()
    state = load(ARCHITECTURE, config, tensors, jnp.float32, lambda path, shape: SingleDeviceSharding(jax.devices()[0]))
    kernel = np.asarray(state["blocks"]["kernel"][...])
    expected = np.stack([flat[f"blocks.{i}.linear.weight"].T for i in range(2)])
    assert kernel.shape == (2, 64, 128)
    assert np.linalg.norm(kernel - expected) <= 0.03 * np.linalg.norm(expected)
