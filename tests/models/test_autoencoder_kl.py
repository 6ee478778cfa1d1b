"""The picture autoencoders of FLUX.1, Z-Image and FLUX.2 against diffusers (golden/make_autoencoder_kl.py)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import GOLDEN, cast, golden_tensor, match_keys, relative_error

from smartdiff_jax.errors import CheckpointError, InvalidConfig, InvalidRequest
from smartdiff_jax.models import layers
from smartdiff_jax.models.vae.autoencoder_kl import ARCHITECTURE, FLUX2_ARCHITECTURE
from smartdiff_jax.weights.stream import abstract, load
from smartdiff_jax.weights.tensor_file import ArrayTensor

ARCHITECTURES = {
    "autoencoder_kl_flux": ARCHITECTURE,
    "autoencoder_kl_quant": ARCHITECTURE,
    "autoencoder_kl_flux2": FLUX2_ARCHITECTURE,
    "autoencoder_kl_flux2_small": FLUX2_ARCHITECTURE,
}
CASES = sorted(ARCHITECTURES)
TYPES = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
# vae/config.json of FLUX.1-dev (Z-Image has the same numbers) and of FLUX.2-dev.
FLUX = dict(
    _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[128, 256, 512, 512], **TYPES, force_upcast=True,
    in_channels=3, latent_channels=16, latents_mean=None, latents_std=None, layers_per_block=2, mid_block_add_attention=True,
    norm_num_groups=32, out_channels=3, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
    use_post_quant_conv=False, use_quant_conv=False,
)  # fmt: skip
FLUX2 = dict(
    _class_name="AutoencoderKLFlux2", act_fn="silu", batch_norm_eps=0.0001, batch_norm_momentum=0.1, force_upcast=True,
    block_out_channels=[128, 256, 512, 512], **TYPES, in_channels=3, latent_channels=32, layers_per_block=2,
    mid_block_add_attention=True, norm_num_groups=32, out_channels=3, patch_size=[2, 2], sample_size=1024,
    use_post_quant_conv=True, use_quant_conv=True,
)  # fmt: skip


def anywhere(path, shape):
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def checkpoint(name, arrays):
    return {key: ArrayTensor(golden_tensor(name, key, shape)) for key, shape in json.loads(str(arrays["keys"])).items()}


@functools.cache
def golden(name):
    """Upstream's arrays, its configuration and the module with the same weights."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    architecture = ARCHITECTURES[name]
    config = architecture.config.model_validate(json.loads(str(arrays["config"])))
    graphdef, _ = abstract(architecture, config, np.float32, anywhere)
    return arrays, config, nnx.merge(graphdef, load(architecture, config, checkpoint(name, arrays), np.float32, anywhere))


@jax.jit
def decode(module, latents):
    return module.decode(latents, chunk=1)


@jax.jit
def encode(module, pixels):
    mean, logvar = module.encode(pixels)
    return jnp.stack([mean, logvar]), module.normalize(mean)


def picture(arrays):
    """[b c h w] to the [b 1 h w c] of a clip."""
    return np.moveaxis(arrays, 1, -1)[:, None]


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_diffusers(name):
    arrays, config, module = golden(name)
    pixels = decode(module, arrays["latents"][:, :, None])
    assert pixels.shape[2] == arrays["latents"].shape[2] * config.spatial_stride
    assert relative_error(pixels, picture(arrays["decoded"])) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_encode_equals_diffusers(name):
    arrays, _, module = golden(name)
    posterior, normalised = encode(module, picture(arrays["pixels"]))
    assert relative_error(posterior[:, :, :, 0], arrays["encoded"]) <= 1e-5
    assert relative_error(normalised[:, :, 0], arrays["normalised"]) <= 1e-5
    assert relative_error(module.denormalize(normalised), posterior[0]) <= 1e-5


def test_bfloat16_stays_near_float32():
    arrays, _, module = golden("autoencoder_kl_flux2_small")
    half = cast(module, FLUX2_ARCHITECTURE, jnp.bfloat16)
    pixels = decode(half, arrays["latents"][:, :, None])
    assert pixels.dtype == jnp.bfloat16
    assert relative_error(pixels, picture(arrays["decoded"])) <= 3e-2


@pytest.mark.parametrize("name", CASES)
def test_every_key_has_one_rule_and_every_parameter_a_key(name):
    arrays, config, _ = golden(name)
    tensors, architecture = checkpoint(name, arrays), ARCHITECTURES[name]
    assert all(len(matches) == 1 for matches in match_keys(architecture, tensors).values())
    key = "decoder.up_blocks.0.resnets.1.conv2.weight"
    with pytest.raises(CheckpointError, match="decoder.up_blocks.0.resnets.1.conv2.kernel"):
        load(architecture, config, {k: v for k, v in tensors.items() if k != key}, np.float32, anywhere)
    if architecture is FLUX2_ARCHITECTURE:
        load(architecture, config, tensors | {"bn.num_batches_tracked": ArrayTensor(np.array(1))}, np.float32, anywhere)


def test_statistics_stay_float32():
    _, config, _ = golden("autoencoder_kl_flux2")
    _, state = abstract(FLUX2_ARCHITECTURE, config, jnp.bfloat16, anywhere)
    dtypes = {".".join(map(str, path)): leaf.get_value().dtype for path, leaf in nnx.to_flat_state(state)}
    kept = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert kept == {"latent_norm.mean", "latent_norm.variance"}


def test_every_parameter_of_a_level_learns(key):
    _, _, module = golden("autoencoder_kl_quant")
    graphdef, state = nnx.split(module.decoder.up_blocks[0])
    x = jax.random.normal(key, (1, 5, 3, 9))

    @jax.jit
    def gradient(state):
        return jax.grad(lambda state: jnp.mean(nnx.merge(graphdef, state)(x)[0] ** 2))(state)

    for path, leaf in nnx.to_flat_state(gradient(state)):
        norm = np.linalg.norm(np.asarray(leaf[...]))
        assert np.isfinite(norm) and norm > 0, path


@pytest.mark.parametrize("tokens", [8, 19])
def test_attention_by_rows_equals_attention_at_once(tokens, monkeypatch):
    q, k, v = (jnp.asarray(np.random.RandomState(n).standard_normal((2, tokens, 6)), jnp.float32) for n in range(3))
    value_and_grad = jax.value_and_grad(lambda *qkv: jnp.sum(layers.wide_attention(*qkv) ** 3), argnums=(0, 1, 2))
    at_once = jax.jit(value_and_grad)(q, k, v)
    monkeypatch.setattr(layers, "ATTENTION_ROWS", 4)
    by_rows = jax.jit(lambda *qkv: value_and_grad(*qkv))(q, k, v)
    for out, reference in zip(jax.tree.leaves(by_rows), jax.tree.leaves(at_once), strict=True):
        assert relative_error(out, reference) <= 1e-5
    scores = f"{tokens},{tokens}]"
    assert scores not in str(jax.make_jaxpr(lambda *qkv: value_and_grad(*qkv))(q, k, v))


def test_published_configurations():
    flux = ARCHITECTURE.config.model_validate(FLUX)
    assert (flux.z_dim, flux.spatial_stride, flux.temporal_stride) == (16, 8, 0)
    flux2 = FLUX2_ARCHITECTURE.config.model_validate(FLUX2)
    assert (flux2.z_dim, flux2.spatial_stride, flux2.temporal_stride) == (32, 8, 0)
    assert FLUX2_ARCHITECTURE.config.model_validate({}) == FLUX2_ARCHITECTURE.config()
    small = FLUX2_ARCHITECTURE.config.model_validate(FLUX2 | {"decoder_block_out_channels": [96, 192, 384, 384]})
    assert small.decoder_widths == (96, 192, 384, 384)


@pytest.mark.parametrize(
    "field,value",
    [
        ("act_fn", "gelu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("block_out_channels", [128, 250, 512, 512]),
        ("scaling_factor", 0.0),
        ("latents_mean", [0.0] * 16),
    ],
)
def test_configurations_it_cannot_serve(field, value):
    with pytest.raises(InvalidConfig, match=field):
        ARCHITECTURE.config.model_validate(FLUX | {field: value})
    with pytest.raises(InvalidConfig, match="decoder_block_out_channels"):
        FLUX2_ARCHITECTURE.config.model_validate(FLUX2 | {"decoder_block_out_channels": [96, 192]})


def test_sizes_it_cannot_serve():
    _, _, module = golden("autoencoder_kl_flux2")
    with pytest.raises(InvalidRequest, match="frames=2"):
        module.decode(jnp.zeros((1, 6, 2, 2, 2)))
    with pytest.raises(InvalidRequest, match="frames=5"):
        module.encode(jnp.zeros((1, 5, 8, 8, 3)))
    with pytest.raises(InvalidRequest, match="size='10x8'"):
        module.encode(jnp.zeros((1, 1, 8, 10, 3)))
    with pytest.raises(InvalidRequest, match="size='12x8'"):  # half a patch
        module.decode(jnp.zeros((1, 6, 1, 2, 3)))
