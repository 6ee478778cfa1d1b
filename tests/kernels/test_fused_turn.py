"""Norm, turn and join in one pass: the kernel, interpreted, against XLA's way, for every family's norms and tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.kernels import fp8, fused_turn
from smartdiff_jax.kernels.base import QKV
from smartdiff_jax.kernels.fp8 import Columns, Part, Product
from smartdiff_jax.kernels.xla import xla_attention
from smartdiff_jax.models import modules
from smartdiff_jax.models.layers import RMSNorm
from smartdiff_jax.models.turn import Unturned, joined, turned
from smartdiff_jax.sharding.context_parallel import LocalAttend, wrap
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.training.flow_matching import attend_with

plain, fused = LocalAttend(xla_attention), LocalAttend(xla_attention, fused=True)


@pytest.fixture
def interpreted(monkeypatch):
    """How many arrays each call of the kernel made."""
    made = []

    def run(streams, num_heads, *, multiple, groups):
        made.append(len(streams[0].columns))
        return fused_turn_turn(streams, num_heads, multiple=multiple, groups=groups, interpret=True)

    fused_turn_turn = fused_turn.turn
    monkeypatch.setattr(fused_turn, "turn", run)
    return made


def stream(seed, b, n, heads, head_dim, dtype, *, tables=1, over_all=False, kind="array", padding=3):
    """Queries, keys and values of an odd number of tokens, their norms, and as many rotary tables as are told."""
    rng, width = np.random.default_rng(seed), heads * head_dim

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def norm():
        made = RMSNorm(width if over_all else head_dim, eps=1e-6, dtype=dtype)
        made.scale[...] = (1 + 0.2 * normal(*made.scale.shape)).astype(dtype)
        return made

    if kind == "array":
        arrays = [Product(normal(b, n, width).astype(dtype), lead=(b, n)) for _ in range(3)]
    elif kind == "columns":
        wide = Product(normal(b, n, 3 * width + 40).astype(dtype), lead=(b, n))
        arrays = [Columns(wide, 40 + at * width, width) for at in range(3)]
    else:
        rows = fp8.join_rows([Part.of(normal(b, n, 64))])
        if padding:  # as a kernel makes them
            rows = fp8.join_rows([Part.of(normal(b * n + padding, 64))])
            rows = fp8.Rows(rows.values, rows.scale, (b, n))
        arrays = [fp8.multiply(rows, *fp8.quantize_kernel(normal(64, width)), normal(width), dtype) for _ in range(3)]
    angles = 6 * normal(tables, n, head_dim // 2)
    rope = (jnp.cos(angles), jnp.sin(angles)) if tables else None
    return Unturned.of(heads, rope, (arrays[0], norm()), (arrays[1], norm()), (arrays[2], None))


def assert_alike(made, expected, dtype, kind="array"):
    for array, wanted in zip(made, expected, strict=True):
        assert array.shape == wanted.shape and array.dtype == wanted.dtype == dtype
        array, wanted = (np.asarray(x, np.float64) for x in (array, wanted))
        # bfloat16: what a norm gives is rounded, and so is what is turned of it; where float32 sums differ in their last bit,
        # a number in the middle of two may go either way, half of a pair in the first rounding and itself in the second
        bound = 1e-6 if dtype == jnp.float32 else 2**-7
        size = np.sqrt(np.square(wanted.reshape(*wanted.shape[:-1], -1, 2)).sum(-1, keepdims=True))
        off = np.abs(array - wanted).reshape(*size.shape[:-1], 2)
        assert (off <= bound * size * 2 + 1e-7).all()
        if dtype == jnp.bfloat16 and kind != "product":  # which XLA is told to round to bfloat16 before it is normed, too
            assert (off > 2**-16 * size).mean() < 0.02


@pytest.mark.parametrize(
    "heads, head_dim, dtype, options",
    [
        (12, 128, jnp.bfloat16, dict(over_all=True)),  # Wan
        (12, 128, jnp.bfloat16, dict(over_all=True, tables=0, kind="product")),  # its text, in 8 bits
        (3, 64, jnp.float32, dict(tables=2)),  # Z-Image, where each sample has a table
        (30, 128, jnp.bfloat16, dict()),
        (2, 16, jnp.float32, dict(over_all=True)),
    ],
)
def test_a_stream_is_normed_and_turned(interpreted, heads, head_dim, dtype, options):
    x = stream(0, 2, 5, heads, head_dim, dtype, **options)
    assert_alike(turned(fused, x), turned(plain, x), dtype, options.get("kind"))
    # values need a pass where they are scaled, and else none
    assert interpreted == [3 if options.get("kind") == "product" else 2]


@pytest.mark.parametrize(
    "kind, dtype, text, text_length",
    [
        ("array", jnp.float32, dict(tables=0), (3, 1)),  # FLUX.1, whose text does not turn
        ("array", jnp.bfloat16, dict(tables=2), (1, 2)),  # Qwen-Image
        ("columns", jnp.bfloat16, dict(), None),  # FLUX.2's single blocks
        ("product", jnp.bfloat16, dict(tables=0), None),
    ],
)
def test_picture_and_text_are_joined(interpreted, kind, dtype, text, text_length):
    tokens, of_text = (stream(seed, 2, n, 6, 32, dtype, kind=kind, **told) for seed, n, told in ((1, 7, {}), (2, 3, text)))
    both = joined(fused, tokens, of_text)
    assert both is not None and interpreted == [3]
    pairs = zip(turned(plain, tokens), turned(plain, of_text), strict=True)
    assert_alike([x[:, :10] for x in both], [jnp.concatenate(pair, axis=1) for pair in pairs], dtype, kind)
    assert all(x.shape[1] == 16 and not x[:, 10:].any() for x in both)
    length = None if text_length is None else jnp.array(text_length, jnp.int32)
    outs = [modules.joint_attention(attend, lambda: (tokens, of_text), length) for attend in (fused, plain)]
    for out, wanted in zip(*outs, strict=True):
        out, wanted = (np.asarray(x, np.float32) for x in (out, wanted))
        # keys that differ in a last bit of bfloat16 move weights by as much
        np.testing.assert_allclose(out, wanted, atol=np.abs(wanted).max() * (1e-6 if dtype == jnp.float32 else 2**-6))


def test_what_is_left_to_xla(interpreted):
    x = stream(3, 1, 4, 2, 24, jnp.float32)  # not a power of two
    assert joined(fused, x, x) is None
    assert_alike(turned(fused, x), turned(plain, x), jnp.float32)
    y = stream(3, 1, 4, 2, 32, jnp.float32)
    assert joined(plain, y, y) is None and joined(fused.for_length(3), y, y) is None
    assert not interpreted


MESHES = [
    dict(ulysses=2),
    dict(ring=2, ulysses=2),
    dict(ring=3),
    dict(data=2, ulysses=2),
    dict(cfg=2, ulysses=2),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["array", "columns", "product"])
def test_a_mesh_turns_and_joins_what_each_device_has(interpreted, sizes, kind):
    """Self-attention, and picture and text together, as one device does it with XLA's turn; each kernel is one device's."""
    mesh = make_mesh(MeshConfig(**sizes))
    of_mesh = dataclasses.replace(wrap(xla_attention, mesh), fused=True)
    pieces = sizes.get("ring", 1) * sizes.get("ulysses", 1)
    # rows of 8 bits are not padded on meshes
    told = dict(kind=kind, padding=0)
    tokens = stream(1, 2, 4 * pieces, 6, 32, jnp.float32, **told)
    text = stream(2, 2, pieces, 6, 32, jnp.float32, tables=2, **told)

    def attended(attend):
        out = attend.self_attention(QKV(*turned(attend, tokens)))
        (q,) = turned(attend, dataclasses.replace(tokens, columns=tokens.columns[:1], norms=tokens.norms[:1]), "split")
        k, v = turned(attend, text, "whole")[1:]
        joint = modules.joint_attention(attend, lambda: (tokens, text), None)
        return out, attend.cross_attention(q, k, v), *joint

    for out, wanted in zip(jax.jit(lambda: attended(of_mesh))(), attended(plain), strict=True):
        np.testing.assert_allclose(out, wanted, atol=2e-6 * np.abs(wanted).max())
    assert of_mesh.pieces(tokens.tokens, text.tokens) == pieces and len(interpreted) > 0


def test_what_a_mesh_leaves_to_xla(interpreted):
    x = stream(3, 1, 6, 4, 32, jnp.float32)
    for sizes, place in [(dict(tensor=2), "exchanged"), (dict(ulysses=4), "exchanged"), (dict(ulysses=2), "whole")]:
        attend = dataclasses.replace(wrap(xla_attention, make_mesh(MeshConfig(**sizes))), fused=True)
        assert_alike(turned(attend, x, place), turned(plain, x), jnp.float32)
    assert not interpreted


def test_gpus_alone_are_served(monkeypatch):
    """No CPU, and no training, whose attention is not wrapped for a mesh."""

    def kernel(*_, **__):
        raise AssertionError

    one, two = (make_mesh(MeshConfig(ring=ring)) for ring in (1, 2))
    assert not wrap(kernel, one).fused and not wrap(kernel, two).fused and not attend_with("xla").fused
    wrap.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert wrap(kernel, one).fused and wrap(kernel, two).fused and not attend_with("xla").fused
    assert modules.HeldModules(wrap(kernel, one), lambda name, held, compute: compute(), ()).fuse("exchanged", 4)
    wrap.cache_clear()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="lowers without a device from JAX 0.11 on")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")  # docs/decisions/0070
@pytest.mark.parametrize("over_all, kind", [(False, "columns"), (True, "product")])
def test_it_lowers_for_gpus(over_all, kind):
    from jax.sharding import AbstractDevice

    abstract_device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    tokens = stream(1, 1, 21, 6, 128, jnp.bfloat16, over_all=over_all, kind=kind)
    text = stream(2, 1, 3, 6, 128, jnp.bfloat16, tables=0, over_all=over_all, kind=kind)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract_device)):
        traced = jax.jit(lambda: joined(fused, tokens, text)).trace()
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("xla.gpu.triton") == 1 and "tensor<1x24x768xbf16>" in lowered
