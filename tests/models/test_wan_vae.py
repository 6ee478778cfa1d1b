"""The causal video autoencoder: parity with diffusers, chunks against the whole clip, gradients, one compilation."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartdiff_jax.errors import InvalidConfig, InvalidRequest
from smartdiff_jax.models.vae import causal_conv
from smartdiff_jax.models.vae.wan_vae import ARCHITECTURE, WanVAE, WanVAEConfig

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_wan_vae", GOLDEN / "make_wan_vae.py")
golden_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_script)

SHALLOW = dict(dim_mult=(1, 2), temperal_downsample=(True,))
TINY = dict(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.5, -0.5),
    latents_std=(2.0, 0.5),
)


def relative_error(out, reference):
    out, reference = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    assert out.shape == reference.shape
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def filled(config, weight):
    """(graphdef, state) of a model whose parameters are weight(path, shape), without drawing its own."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))))
    leaves = [(path, leaf.replace(jnp.asarray(weight(path, leaf.shape)))) for path, leaf in nnx.to_flat_state(state)]
    return graphdef, nnx.from_flat_state(leaves)


@functools.cache
def golden(name):
    """Upstream's arrays, and the model with the same weights, reached through the key rules."""
    with np.load(GOLDEN / f"wan_vae_{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    tensors = {}
    for key, shape in meta["shapes"].items():
        [(rule, match)] = [(r, m) for r in ARCHITECTURE.key_rules if (m := re.fullmatch(r.pattern, key))]
        path = match.expand(rule.path)
        assert path not in tensors, "two tensors for one parameter"
        tensors[path] = rule.transform(golden_script.weight(key, shape))
    vae = filled(WanVAEConfig.model_validate(meta["config"]), lambda path, _: tensors.pop(".".join(map(str, path))))
    assert not tensors, "no parameter for these"
    return meta, arrays, vae


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"))
def decode(graphdef, state, latents, chunk):
    return nnx.merge(graphdef, state).decode(latents, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"))
def encode(graphdef, state, pixels, chunk):
    return jnp.stack(nnx.merge(graphdef, state).encode(pixels, chunk=chunk))


# Upstream is causal (the golden script checks it), so the beginning of one golden is the golden of a shorter clip.
@pytest.mark.parametrize("name,frames,chunk", [("wan", 1, 1), ("wan", 2, 1), ("wan", 3, 1), ("odd", 3, None), ("odd", 5, 2)])
def test_decode_equals_diffusers(name, frames, chunk):
    meta, arrays, vae = golden(name)
    latents = golden_script.random("latents", meta["latents"])[:, :, :frames]
    pixels = decode(*vae, latents, chunk)
    assert pixels.shape[1] == 1 + (frames - 1) * nnx.merge(*vae).config.temporal_stride
    assert relative_error(pixels, np.moveaxis(arrays["decoded"], 1, -1)[:, : pixels.shape[1]]) < 1e-4


@pytest.mark.parametrize("name,frames,chunk", [("wan", 1, 1), ("wan", 5, 1), ("wan", 17, 1), ("odd", 17, None), ("odd", 9, 2)])
def test_encode_equals_diffusers(name, frames, chunk):
    meta, arrays, vae = golden(name)
    pixels = np.moveaxis(golden_script.random("pixels", meta["pixels"]), 1, -1)[:, :frames]
    posterior = encode(*vae, pixels, chunk)
    assert relative_error(posterior, arrays["encoded"][:, :, :, : posterior.shape[3]]) < 1e-4


@functools.cache
def tiny(**changes):
    """A small model whose biases are not zero, so that a frame that should be void would show."""
    return filled(WanVAEConfig(**TINY | changes), golden_weight)


def golden_weight(path, shape):
    """The golden script's weights for our layout."""
    name = ".".join(map(str, path))
    scale = 1.0 if name.endswith(("gamma", "bias")) else np.sqrt(np.prod(shape[1:]) / np.prod(shape[:-1]))
    return golden_script.weight(name, shape) * np.float32(scale)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_equal_the_whole_clip(chunk, key):
    latents = jax.random.normal(key, (2, 2, 5, 3, 2))
    whole = decode(*tiny(), latents, None)
    assert whole.shape == (2, 17, 12, 8, 3)
    assert relative_error(decode(*tiny(), latents, chunk), whole) < 1e-6
    assert relative_error(encode(*tiny(), whole, chunk), encode(*tiny(), whole, None)) < 1e-6


def test_the_convolution_is_a_3d_one():
    x = golden_script.random("x", (2, 5, 4, 3, 6))
    kernel = golden_script.random("kernel", (3, 3, 3, 6, 5))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), axis=(1, 2, 3))
    reference = np.einsum("bthwiTHW,HWTio->bthwo", windows, kernel)
    assert relative_error(causal_conv.convolve(jnp.asarray(x), jnp.asarray(kernel)), reference) < 1e-6


@pytest.mark.parametrize("chunk", [1, None])
def test_every_parameter_learns(chunk, key):
    # Biases of zero, as a fresh model has them: the activations of the pixels of zeros below have norm 0.
    graphdef, state = filled(WanVAEConfig(**TINY | SHALLOW), lambda p, s: golden_weight(p, s) * float(p[-1] != "bias"))
    pixels = np.array(jax.random.uniform(key, (1, 5, 4, 4, 3), minval=-1.0))
    pixels[:, :2] = 0.0
    pixels = jnp.asarray(pixels)

    @jax.jit
    def gradient(state):
        def loss(state):
            vae = nnx.merge(graphdef, state)
            mean, logvar = vae.encode(pixels, chunk=chunk)
            return jnp.mean((vae.decode(vae.normalize(mean), chunk=chunk) - pixels) ** 2) + jnp.mean(logvar**2)

        return jax.grad(loss)(state)

    for path, leaf in nnx.to_flat_state(gradient(state)):
        norm = np.linalg.norm(np.asarray(leaf[...]))
        assert np.isfinite(norm) and norm > 0, path


def test_computes_in_the_dtype_of_its_weights(key):
    graphdef, state = tiny(**SHALLOW)
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), state)
    latents = jax.random.normal(key, (1, 2, 2, 3, 2))
    pixels = decode(graphdef, half, latents, 1)
    assert pixels.dtype == jnp.bfloat16
    assert relative_error(pixels, decode(graphdef, state, latents, 1)) < 0.05


def test_one_compilation_a_shape(key):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    vae, shape = tiny(**SHALLOW), (1, 2, 3, 2, 2)
    first, second = (np.asarray(jax.random.normal(k, shape)) for k in jax.random.split(key))
    decode(*vae, first, 1)
    assert compiled
    compiled.clear()
    decode(*vae, second, 1)
    assert not compiled


def test_normalize(key):
    vae = nnx.merge(*tiny())
    latents = jax.random.normal(key, (1, 2, 1, 2, 2))
    assert np.allclose(
        vae.normalize(latents)[0, :, 0, 0, 0], (latents[0, :, 0, 0, 0] - jnp.array([0.5, -0.5])) / jnp.array([2, 0.5])
    )
    assert np.allclose(vae.denormalize(vae.normalize(latents)), latents, atol=1e-6)


def test_strides_follow_the_configuration():
    wan = WanVAEConfig.model_validate({"_class_name": "AutoencoderKLWan", "base_dim": 96})
    assert (wan.temporal_stride, wan.spatial_stride) == (4, 8)
    small = WanVAEConfig(**TINY | dict(dim_mult=(1, 2), temperal_downsample=(False,)))
    assert (small.temporal_stride, small.spatial_stride) == (1, 2)


@pytest.mark.parametrize(
    "field,value",
    [
        ("is_residual", True),
        ("patch_size", 2),
        ("attn_scales", (1.0,)),
        ("temperal_downsample", (True,)),
        ("latents_mean", (0.0,)),
        ("latents_std", (1.0, 0.0)),
    ],
)
def test_configurations_it_cannot_serve(field, value):
    with pytest.raises(InvalidConfig, match=field):
        WanVAEConfig(**TINY | {field: value})


@pytest.mark.parametrize("shape", [(1, 4, 8, 8, 3), (1, 5, 8, 10, 3), (1, 0, 8, 8, 3)])
def test_encode_refuses_sizes_that_do_not_fit(shape):
    with pytest.raises(InvalidRequest):
        nnx.merge(*tiny()).encode(jnp.zeros(shape))
