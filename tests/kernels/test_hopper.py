"""The Pallas kernels for Hopper as far as a CPU can tell: the interpreter runs the exact one, both lower for sm90, and 8 bits
lose what 8 bits lose. On a GPU `benchmarks/attention.py --check` runs the kernels themselves."""

import functools
import sys

import arithmetic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arithmetic import exact
from jax import export
from jax.sharding import AbstractMesh

from benchmarks.recorded import PROMPTS, record
from smartdiff_jax.errors import Unsupported
from smartdiff_jax.kernels import ATTENTION, DIFFERENTIABLE, PREFERENCE, SPARSE, hopper, pallas_flash, pallas_sage
from smartdiff_jax.kernels.quantize import quantize
from smartdiff_jax.kernels.sparse import choose_blocks

needs_jax_011 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def draw(b, s, t, h, d, outliers=0.0):
    keys = jax.random.split(jax.random.key(s + t), 4)
    q, k, v = (jax.random.normal(key, (b, n, h, d)) for key, n in zip(keys[:3], (s, t, t), strict=True))
    k = k + outliers * (jax.random.uniform(keys[3], (d,)) < 0.05)
    return [x.astype(jnp.bfloat16) for x in (q, k, v)]


@needs_jax_011
@pytest.mark.parametrize(
    "s, t, lengths, d, cluster",
    [
        (64, 64, [64], 128, 1),  # one block, half a tile
        (104, 304, [250], 128, 1),  # a masked block and a full one
        (136, 600, [457], 64, 2),  # two blocks of queries fetch together; the second has a tile behind the end
        (8, 400, [400, 8], 64, 1),  # a batch of two, of which one ends in the first block
    ],
)
def test_the_interpreter_agrees_with_float64(s, t, lengths, d, cluster):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from smartdiff_jax.kernels.mosaic.flash import flash

    q, k, v = draw(len(lengths), s, t, 1, d)
    counted = jnp.array(lengths, jnp.int32)
    run = functools.partial(flash, scale=d**-0.5, with_lse=True, cluster=cluster, interpret=plgpu.InterpretGPUParams())
    out, lse = run(q, k, v, counted)
    true, true_lse = exact(q, k, v, lengths)
    assert lse is not None
    # bfloat16 keeps 8 bits of a weight and 8 of the result: 2**-9 each, relative to the largest
    np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=2**-8 * np.abs(true).max())
    np.testing.assert_allclose(lse, true_lse, atol=1e-5)


@needs_jax_011
def test_no_key_that_counts_is_nothing_and_not_nan():
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from smartdiff_jax.kernels.mosaic.flash import flash

    q, k, v = draw(1, 8, 8, 1, 64)
    interpret = plgpu.InterpretGPUParams()
    out, lse = flash(q, k, v, jnp.zeros(1, jnp.int32), scale=1.0, with_lse=True, cluster=1, interpret=interpret)
    assert lse is not None and not np.asarray(out, np.float32).any() and np.isneginf(lse).all()


@needs_jax_011
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")  # docs/decisions/0070
@pytest.mark.parametrize("name", ["pallas_flash", "pallas_sage"])
@pytest.mark.parametrize("d, t, lengths, lists", [(64, 1, False, False), (128, 1003, True, False), (128, 1003, True, True)])
def test_it_lowers_for_hopper(monkeypatch, name, d, t, lengths, lists):
    """Layouts, dtypes and shared memory are what the hardware takes; what ptxas says only a GPU tells."""
    from jax.sharding import AbstractDevice

    for module in (pallas_flash, pallas_sage):
        monkeypatch.setattr(module, "require_hopper", lambda *_: None)
    hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    q, k = (jax.ShapeDtypeStruct((2, n, 3, d), jnp.bfloat16) for n in (1000, t))
    counted = jax.ShapeDtypeStruct((2,), jnp.int32) if lengths else None

    def attend(q, k, v, n):
        kernel, size = SPARSE[name]
        blocks = {"blocks": choose_blocks(q, k, jnp.float32(0.5), size, kv_length=n)} if lists else {}
        return kernel(q, k, v, kv_length=n, with_lse=True, **blocks)

    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=hopper)):
        lowered = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=unchecked)(q, k, k, counted)
    assert "mosaic_gpu_v2" in lowered.mlir_module()
    assert [out.shape for out in lowered.out_avals] == [(2, 1000, 3, d), (2, 3, 1000)]


@pytest.mark.parametrize("outliers", [0.0, 20.0])
@pytest.mark.parametrize("lengths", [None, [700, 433]])
def test_8_bits_lose_what_8_bits_lose(outliers, lengths):
    """The arithmetic of the 8-bit kernel, against float64. Keys' outliers cost nothing."""
    q, k, v = draw(2, 64, 704, 2, 64, outliers)
    out, lse = arithmetic.sage(q, k, v, lengths)
    true, true_lse = exact(q, k, v, lengths or [704, 704])
    # weights and values have four bits each, of random signs: 2**-4 / sqrt(3) / 1.4 each
    assert np.linalg.norm(out - true) / np.linalg.norm(true) < 0.042
    assert np.abs(lse - true_lse).max() < 0.02


@pytest.mark.parametrize("model", PROMPTS)
def test_of_real_models_8_bits_lose_half_of_what_fp8_does(model):
    """Each block of a bundled model at some step, beside the arithmetic of FlashAttention-3 in fp8."""
    for recorded in record(model)[::5]:
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in recorded)
        true = exact(q, k, v, [k.shape[1]])[0]
        ours, peer = arithmetic.sage(q, k, v)[0], arithmetic.fa3(q, k, v)
        assert np.vdot(ours, true) / np.linalg.norm(ours) / np.linalg.norm(true) >= 0.9995
        assert np.abs(ours - true).sum() <= 0.7 * np.abs(peer - true).sum()


@needs_jax_011
@pytest.mark.parametrize("s, t, d, lengths", [(37, 203, 64, None), (5, 400, 128, [400, 33])])
def test_one_pass_each_makes_the_same_8_bits(s, t, d, lengths):
    """The kernels that make them, interpreted, for lengths that 8 does not divide, too."""
    from smartdiff_jax.kernels import fused_quantize

    order = np.random.default_rng(0).permutation(16)
    q, k, v = draw(len(lengths or [t]), s, t, 2, d, 20.0)
    counted = None if lengths is None else jnp.array(lengths, jnp.int32)
    options = dict(scale=0.125, block=192, order=order)
    x = fused_quantize.quantize(q, k, v, counted, **options, interpret=True)
    # there, padding must be known not to count
    known = jnp.array(lengths or [t], jnp.int32)
    expected = quantize(*(hopper.pad_tokens(array) for array in (q, k, v)), known, **options)
    for made, wanted in zip(x, expected, strict=True):
        made, wanted = (np.asarray(array.astype(jnp.float32)) for array in (made, wanted))
        if made.dtype == wanted.dtype and made.shape[1] == -(-s // 8) * 8 and made.ndim == 4:
            made, wanted = made[:, :s], wanted[:, :s]  # what is behind queries is nobody's
        off = np.abs(made - wanted)
        # a number in the middle of two integers goes up in one, to the even one in the other
        assert (off > 1e-6 * np.abs(wanted)).mean() < 2e-3 and off.max() <= 1.001


Q = jnp.ones((2, 5, 3, 64), jnp.bfloat16)


@pytest.mark.parametrize("name", ["pallas_flash", "pallas_sage"])
@pytest.mark.parametrize(
    "q, words",
    [(Q.astype(jnp.float32), "not float32"), (jnp.ones((1, 5, 3, 96), jnp.bfloat16), "64 or 128, not 96")],
)
def test_what_they_do_not_serve(monkeypatch, name, q, words):
    with pytest.raises(Unsupported, match="Hopper GPU" if jax.__version_info__ >= (0, 11) else "JAX 0.11"):
        ATTENTION[name](q, q, q)

    class Hopper:
        compute_capability, device_kind = "9.0", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with pytest.raises(Unsupported, match=words):
        ATTENTION[name](q, q, q)
    Hopper.compute_capability, Hopper.device_kind = "8.9", "NVIDIA L4"
    with pytest.raises(Unsupported, match="not NVIDIA L4"):
        hopper.require_hopper(name, Q)


@needs_jax_011
def test_the_import_goes_ahead_where_it_is_of_use(monkeypatch):
    assert hopper.import_ahead() is None
    monkeypatch.setattr(hopper, "_is_hopper", lambda: True)
    thread = hopper.import_ahead()
    assert thread is not None
    thread.join(60)
    assert "smartdiff_jax.kernels.mosaic.flash" in sys.modules


def test_auto_takes_the_first_that_serves(monkeypatch):
    """Few keys go to cuDNN; the exact kernel has the rest, never the one that rounds to 8 bits."""
    asked = []

    def refuse(name):
        def kernel(*_, **__):
            asked.append(name)
            raise Unsupported(f"{name} is not asked for more")

        return kernel

    auto, trained = ATTENTION["auto"], DIFFERENTIABLE["auto"]
    monkeypatch.setattr(ATTENTION, "_entries", {name: refuse(name) for name in ATTENTION})
    for keys, expected in ((1024, ["pallas_flash", "cudnn", "xla"]), (1023, ["cudnn", "xla"])):
        asked.clear()
        x = jnp.ones((1, keys, 1, 64), jnp.bfloat16)
        with pytest.raises(Unsupported, match="cudnn is not asked for more; xla"):
            auto(x[:, :8], x, x)
        assert asked == expected
    asked.clear()
    with pytest.raises(Unsupported):
        trained(x, x, x)
    # Kernels in Pallas have no gradient.
    assert asked == ["cudnn", "xla"] and set(DIFFERENTIABLE) == {"auto", "cudnn", "xla"} and "pallas_sage" not in PREFERENCE
