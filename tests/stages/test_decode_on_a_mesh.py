"""The decoder on 8 virtual devices: pieces of any size, the pixels of one device, and what its executable really sends."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.models import layers
from smartdiff_jax.models.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from smartdiff_jax.models.vae.wan_vae import WanVAE, WanVAEConfig
from smartdiff_jax.sharding.layout import Layout, describe_pieces, split_picture
from smartdiff_jax.sharding.mesh import make_mesh, replicated
from smartdiff_jax.sharding.windows import Side, halos
from smartdiff_jax.stages import decode
from smartdiff_jax.stages.decode import Decode
from smartdiff_jax.weights.residency import Resident

PICTURE = AutoencoderKLConfig(
    block_out_channels=(16,) * 3, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4, layers_per_block=1,
)  # fmt: skip
CLIP = WanVAEConfig(
    base_dim=8, z_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1,
    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
)  # fmt: skip
MODELS = {"picture": (AutoencoderKL, PICTURE, (1, 4, 1, 16, 32)), "clip": (WanVAE, CLIP, (1, 4, 3, 32, 64))}
GATHER = re.compile(r"= (?:\()?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(")


@pytest.mark.parametrize("devices", [1, 2, 3, 6, 8, 16])
def test_as_many_pieces_as_sides_allow(devices):
    for height, width in [(60, 104), (166, 166), (7, 13), (96, 170), (9, 8), (1, 24), (128, 128)]:
        rows, columns = split_picture(height, width, devices)
        assert height % rows == 0 and width % columns == 0 and devices % (rows * columns) == 0
        most = max(
            r * c for r in range(1, devices + 1) for c in range(1, devices + 1)
            if devices % (r * c) == 0 and height % r == 0 and width % c == 0
        )  # fmt: skip
        assert rows * columns == most


def test_pieces_have_short_edges():
    assert split_picture(60, 104, 8) == (2, 4)
    assert split_picture(104, 60, 8) == (4, 2)
    assert split_picture(128, 128, 2) == (2, 1)
    # 166 is twice a prime.
    assert split_picture(166, 166, 8) == (2, 2)
    assert describe_pieces(166, 166, 8) == "2 x 2 pieces of 83 x 83 latents, each by 2 devices: 166 x 166 divides no further"
    assert describe_pieces(60, 104, 8) == "2 x 4 pieces of 30 x 26 latents"


def stage(name: str, **axes: int) -> tuple[Decode, tuple[int, ...]]:
    build, config, shape = MODELS[name]
    mesh = make_mesh(MeshConfig(**axes))
    graphdef, weights = nnx.split(build(config, nnx.Rngs(0)))
    weights = jax.device_put(weights, replicated(mesh))
    return Decode(graphdef, Resident(weights), jnp.float32, Layout(mesh)), shape


def compiled(decoder: Decode, shape: tuple[int, ...]):
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=decoder._layout.replicated)
    return decoder._decode.lower(decoder._weights.kept, latents, to_uint8=False).compile()


MESSAGE = re.compile(r"= .* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
# Norms of a picture, five in the middle, four at each size and one at the end; what attention reads and what it gives. Of a
# clip only the latter, for every latent frame.
MESSAGES = {"picture": (5 + 3 * 4 + 1) + 2, "clip": 2}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axes, sides", [(dict(ulysses=2), 1), (dict(ring=2, ulysses=2, data=2), 2)], ids=str)
def test_pieces_are_decoded_as_the_whole(monkeypatch, name, axes, sides):
    """Equal pixels, which lie in pieces; a message a norm and two around attention, along each side that is cut, and nothing
    gathered but at the size of the latents."""
    # As with large pictures: clips go through in chunks, and of attention's scores only some rows exist at a time.
    monkeypatch.setattr(decode, "WHOLE_CLIP_LATENTS", 0)
    monkeypatch.setattr(layers, "ATTENTION_ROWS", 16)
    alone, shape = stage(name)
    split, _ = stage(name, **axes)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reference, pixels = alone(latents, to_uint8=False), split(latents, to_uint8=False)
    np.testing.assert_allclose(np.asarray(pixels), np.asarray(reference), rtol=0, atol=1e-5)
    assert len({str(shard.index) for shard in pixels.addressable_shards}) == math.prod(split._layout.mesh.shape.values())
    split(latents + 1, to_uint8=False)
    assert split._decode._cache_size() == 1

    text = compiled(split, shape).as_text()
    assert MESSAGE.findall(text) == ["all-gather"] * MESSAGES[name] * sides
    # Of the middle of the networks, 16 channels wide.
    assert max(math.prod(map(int, sizes.split(","))) for sizes in GATHER.findall(text)) <= 16 * math.prod(shape[3:])


@pytest.mark.parametrize("size", [(26, 31), (34, 20), (7, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_of_odd_sizes(name, size):
    """Sides that are primes or twice one: pieces that need more of their neighbours than there is, or are decoded twice."""
    shape = (*MODELS[name][2][:3], *size)
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    alone, split = stage(name)[0], stage(name, ulysses=2, ring=2)[0]
    ours, theirs = (np.asarray(decoder(latents, to_uint8=False)) for decoder in (split, alone))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_divided(monkeypatch, name):
    """At a size where what is around a piece is little beside it."""
    monkeypatch.setattr(decode, "WHOLE_CLIP_LATENTS", 0)
    monkeypatch.setattr(layers, "ATTENTION_ROWS", 16)
    shape = (*MODELS[name][2][:3], 96, 128)
    whole, piece = (compiled(stage(name, **axes)[0], shape) for axes in ({}, dict(ulysses=2, ring=4)))
    assert whole.memory_analysis().temp_size_in_bytes > 5 * piece.memory_analysis().temp_size_in_bytes


def test_halos_of_the_true_networks():
    """Wan and FLUX.1: three residual blocks of two convolutions at each of four sizes."""
    assert halos([6, 6, 6, 6]) == ([7, 6, 4, 1], 13)
    assert halos([4]) == ([1], 5)


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_windows_hold_what_pieces_need(pieces):
    """All alike, inside the picture, with the halo on every side that is not the picture's own border."""
    for length, halo in itertools.product((12, 24, 60), (0, 1, 5, 13)):
        side = Side("columns", pieces, length, halo)
        for index in range(pieces):
            start = min(max(index * side.own - halo, 0), length - side.size)
            first, last = index * side.own, (index + 1) * side.own
            assert 0 <= start <= max(0, first - halo) and min(length, last + halo) <= start + side.size <= length
