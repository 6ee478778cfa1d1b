"""The Triton kernel without a GPU: its own interpreter runs it, its compiler compiles it for every GPU it is for."""

import linecache
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.errors import Unsupported
from smartdiff_jax.kernels import ATTENTION, triton_sage
from smartdiff_jax.kernels.quantize import quantize

triton = pytest.importorskip("triton")

FILE = Path(triton_sage.__file__).parent / "tritonlang" / "sage.py"
sage: Any = types.ModuleType("sage")  # apart from the package, whose functions are wrapped in checks of types here
sage.__file__ = str(FILE)
linecache.updatecache(str(FILE))
exec(compile(FILE.read_text(), FILE, "exec"), sage.__dict__)
KEYS, QUERIES, forward = sage.KEYS, sage.QUERIES, sage.forward

CASES = [(70, 200, None, True, 0.0), (70, 200, None, False, 20.0), (5, 130, [130, 1], False, 0.0), (3, 64, [64, 0], True, 0.0)]
"""Queries, keys, those that count, fp8, outliers of keys."""

HEADS, HEAD_DIM = 2, 64


def draw(s, t, lengths, outliers):
    b = len(lengths or [t])
    keys = jax.random.split(jax.random.key(s), 4)
    q, k, v = (jax.random.normal(key, (b, n, HEADS, HEAD_DIM)) for key, n in zip(keys[:3], (s, t, t), strict=True))
    k = k + outliers * (jax.random.uniform(keys[3], (HEAD_DIM,)) < 0.05)
    return [x.astype(jnp.bfloat16) for x in (q, k, v)]


def operands(q, k, v, lengths, fp8):
    """What the kernel is given, with names of dtypes, and what keys shared."""
    (b, s, h, d), t = q.shape, k.shape[1]
    counted = None if lengths is None else jnp.array(lengths, jnp.int32)
    x = quantize(q, k, v, counted, scale=d**-0.5, block=KEYS, order=np.arange(16))
    values, v_scale = (x.v8, x.v_scale) if fp8 else triton_sage.in_float16(v)
    given = [np.asarray(array) for array in (x.q8, x.q_scale, x.k8, x.k_scale, values, v_scale)]
    given[4] = given[4].view(np.uint8) if fp8 else given[4]
    out, lse = np.full(q.shape, np.nan, np.float16), np.full((b, h, s), np.nan, np.float32)
    arrays = [*given, np.asarray(lengths or [t] * b, np.int32), out, lse]
    names = [
        "int8",
        "float32",
        "int8",
        "float32",
        "float8_e4m3fn" if fp8 else "float16",
        "float32",
        "int32",
        "float16",
        "float32",
    ]
    return list(zip(arrays, names, strict=True)), np.asarray(x.shared, np.float64)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Of each case (out, lse)."""
    file = tmp_path_factory.mktemp("triton") / "cases.pickle"
    runs = []
    for s, t, lengths, fp8, outliers in CASES:
        q, k, v = draw(s, t, lengths, outliers)
        grid = -(-s // QUERIES), HEADS, q.shape[0]
        runs.append((grid, operands(q, k, v, lengths, fp8)[0], triton_sage.constants(s, t, HEADS, HEAD_DIM, fp8)))
    file.write_bytes(pickle.dumps(runs))
    script = Path(__file__).with_name("interpret_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, script, FILE, file], env=environment, check=True, timeout=120)
    return pickle.loads(file.with_name("cases.pickle.out").read_bytes())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_interpreter_agrees_with_float64(interpreted, case):
    s, t, lengths, fp8, outliers = CASES[case]
    d, (out, lse) = HEAD_DIM, interpreted[case]
    q, k, v = draw(s, t, lengths, outliers)
    keys_shared = operands(q, k, v, lengths, fp8)[1]
    exact_q, exact_k, exact_v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bshd,bthd->bhst", exact_q, exact_k) / np.sqrt(d)
    for i, length in enumerate(lengths or [t]):
        if not length:
            assert not out[i].any() and np.isneginf(lse[i]).all()
            continue
        counts = logits[i, ..., :length]
        top = counts.max(-1, keepdims=True)
        weights = np.exp(counts - top)
        true = np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), exact_v[i, :length])
        # fp8 has four bits of weights and of values, which the interpreter cuts, not rounds; float16 leaves what int8 loses
        assert np.linalg.norm(out[i] - true) / np.linalg.norm(true) < (0.07 if fp8 else 0.02)
        shared = d**-0.5 * np.einsum("shd,hd->hs", exact_q[i], keys_shared[i])
        assert np.abs(lse[i] + shared - (top + np.log(weights.sum(-1, keepdims=True)))[..., 0]).max() < 0.03


@pytest.mark.parametrize(
    "capability, scores, sums", [(80, "s8.s8", "f16.f16"), (89, "s8.s8", "e4m3.e4m3"), (90, "s8.s8", "e4m3.e4m3")]
)
def test_it_compiles_to_tensor_cores(capability, scores, sums, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fp8, d = capability >= 89, 128
    constants = triton_sage.constants(32_760, 32_760, 12, d, fp8)
    types = "*i8 *fp32 *i8 *fp32".split() + ["*fp8e4nv" if fp8 else "*fp16", "*fp32", "*i32", "*bf16", "*fp32"]
    signature = dict(zip(forward.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=forward, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": d // 16, "num_stages": 3})
    for types in ("s8.s8", sums):
        assert re.search(rf"mma[^;]*\.{types}", made.asm["ptx"])
    assert made.asm["cubin"] and made.metadata.shared < 99 * 1024  # what Ada has


def test_what_it_does_not_serve(monkeypatch):
    q = jnp.ones((1, 5, 2, 64), jnp.bfloat16)
    with pytest.raises(Unsupported, match="8.0 or more, not"):
        ATTENTION["triton_sage"](q, q, q)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", compute_capability="8.6", device_kind="A10")])
    monkeypatch.setattr(triton_sage.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unsupported, match="jax-triton"):
        ATTENTION["triton_sage"](q, q, q)
    monkeypatch.setattr(triton_sage.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(Unsupported, match="64 or 128, not 32"):
        ATTENTION["triton_sage"](q[..., :32], q[..., :32], q[..., :32])
    with pytest.raises(Unsupported, match="not float32"):
        ATTENTION["triton_sage"](q.astype(jnp.float32), q, q)
