"""The autoencoder of Qwen-Image against diffusers (golden/make_qwen_image_vae.py)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import GOLDEN, cast, golden_tensor, match_keys, relative_error

from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.models.vae.qwen_image_vae import ARCHITECTURE, QwenImageVAEConfig
from smartdiff_jax.models.vae.wan_vae import WanVAE, WanVAEConfig
from smartdiff_jax.weights.stream import abstract, load
from smartdiff_jax.weights.tensor_file import ArrayTensor

CASES = ["qwen_image_vae_deep", "qwen_image_vae_shallow"]


def anywhere(path, shape):
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@functools.cache
def golden(name):
    """Upstream's arrays, its checkpoint, its configuration and the module with the same weights."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    config = ARCHITECTURE.config.model_validate(json.loads(str(arrays["config"])))
    shapes = json.loads(str(arrays["keys"]))
    tensors = {key: ArrayTensor(golden_tensor(name, key, shape)) for key, shape in shapes.items()}
    graphdef, _ = abstract(ARCHITECTURE, config, np.float32, anywhere)
    return arrays, tensors, config, nnx.merge(graphdef, load(ARCHITECTURE, config, tensors, np.float32, anywhere))


@functools.partial(jax.jit, static_argnames="chunk")
def decode(module, latents, chunk=None):
    return module.decode(latents, chunk=chunk)


@jax.jit
def encode(module, pixels):
    mean, logvar = module.encode(pixels)
    return jnp.stack([mean, logvar]), module.normalize(mean)


@pytest.mark.parametrize("name,chunk", [("qwen_image_vae_deep", 1), ("qwen_image_vae_shallow", None)])
def test_decode_equals_diffusers(name, chunk):
    arrays, _, config, module = golden(name)
    pixels = decode(module, arrays["latents"], chunk)
    assert pixels.shape[2] == arrays["latents"].shape[3] * config.spatial_stride
    assert relative_error(pixels, np.moveaxis(arrays["decoded"], 1, -1)) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_encode_equals_diffusers(name):
    arrays, _, _, module = golden(name)
    posterior, normalised = encode(module, np.moveaxis(arrays["pixels"], 1, -1))
    assert relative_error(posterior, arrays["encoded"]) <= 1e-5
    assert relative_error(normalised, arrays["normalised"]) <= 1e-5


def test_bfloat16_stays_near_float32():
    arrays, _, _, module = golden("qwen_image_vae_shallow")
    pixels = decode(cast(module, ARCHITECTURE, jnp.bfloat16), arrays["latents"])
    assert pixels.dtype == jnp.bfloat16
    assert relative_error(pixels, np.moveaxis(arrays["decoded"], 1, -1)) <= 3e-2


@pytest.mark.parametrize("name", CASES)
def test_every_key_has_one_rule(name):
    assert all(len(matches) == 1 for matches in match_keys(ARCHITECTURE, golden(name)[1]).values())


def test_a_still_is_computed_without_the_frames_before_it():
    """A third of the arithmetic of the causal convolutions, as of kernels with one tap in time."""
    config = QwenImageVAEConfig(base_dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))))
    latents = jax.ShapeDtypeStruct((1, 4, 1, 3, 5), jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda state, latents: nnx.merge(graphdef, state).decode(latents))(state, latents))
    kernels = [leaf for _, leaf in nnx.to_flat_state(state["decoder"]) if len(leaf.shape) >= 4]
    assert jaxpr.count("conv_general_dilated[") == sum(kernel.shape[0] == 3 for kernel in kernels)
    assert "3,3,96,32" not in jaxpr and "3,3,32,32" in jaxpr


def test_fields():
    published = dict(base_dim=96, z_dim=16, attn_scales=[], dim_mult=[1, 2, 4, 4], dropout=0.0, num_res_blocks=2)
    config = QwenImageVAEConfig.model_validate(
        {"_class_name": "AutoencoderKLQwenImage", "temperal_downsample": [False, True, True], **published}
    )
    assert (config.z_dim, config.spatial_stride, config.temporal_stride) == (16, 8, 0)
    assert config.latents_mean == WanVAEConfig().latents_mean
    layered = QwenImageVAEConfig.model_validate(config.model_dump() | {"input_channels": 4})
    assert (layered.in_channels, layered.out_channels) == (4, 4)
    with pytest.raises(InvalidConfig, match="attn_scales"):
        QwenImageVAEConfig.model_validate(published | {"attn_scales": [1.0]})


def test_it_is_one_for_pictures():
    _, _, config, module = golden("qwen_image_vae_shallow")
    with pytest.raises(InvalidRequest, match="frames=2"):
        module.decode(jnp.zeros((1, 3, 2, 2, 2)))
    for frames in (0, 5):
        with pytest.raises(InvalidRequest, match=f"frames={frames}: give 1"):
            module.encode(jnp.zeros((1, frames, 8, 8, 3)))
    with pytest.raises(InvalidRequest, match="size='10x8'"):
        module.encode(jnp.zeros((1, 1, 8, 10, 3)))
