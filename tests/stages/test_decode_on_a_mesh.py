"""The decoder on 8 virtual devices: pieces of any size, the pixels of one device, and what its executable really sends."""

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
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=decoder._layout.picture(shape))
    return decoder._decode.lower(decoder._weights.kept, latents, to_uint8=False).compile()


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_decoded_as_the_whole(monkeypatch, name):
    """Equal pixels, an eighth of the memory, edges between neighbours, and nothing gathered but at the size of the latents."""
    # As with large pictures: clips go through in chunks, and of attention's scores only some rows exist at a time.
    monkeypatch.setattr(decode, "WHOLE_CLIP_LATENTS", 0)
    monkeypatch.setattr(layers, "ATTENTION_ROWS", 16)
    alone, shape = stage(name)
    split, _ = stage(name, ulysses=2, ring=4)
    whole, piece = compiled(alone, shape), compiled(split, shape)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reference, pixels = (
        np.asarray(executable(decoder._weights.kept, jax.device_put(latents, decoder._layout.picture(shape))))
        for executable, decoder in ((whole, alone), (piece, split))
    )
    np.testing.assert_allclose(pixels, reference, rtol=0, atol=1e-5)

    text = piece.as_text()
    assert "collective-permute" in text
    # Of the middle of the networks, 16 channels wide; Wan's three taps in time lie beside each other when it is passed in.
    gathered = [math.prod(map(int, sizes.split(","))) for sizes in GATHER.findall(text)]
    # JAX 0.10 gathers the finished pixels of a clip besides, which are fetched next; no activation at their size is as small.
    assert max(gathered, default=0) <= max(3 * 16 * math.prod(shape[3:]), pixels.size)
    ratio = whole.memory_analysis().temp_size_in_bytes / piece.memory_analysis().temp_size_in_bytes
    assert ratio > 4  # edges and the middle weigh more at this size than at a true one
