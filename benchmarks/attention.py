"""Every attention kernel on the shapes of workloads.py: TFLOP/s, error against float64, memory; and a check of all of them.

    python benchmarks/attention.py            on a GPU; FlashAttention-3 beside it where torch and fa3-fwd are installed
    python benchmarks/attention.py --check    errors at odd lengths, batches, outliers, and on what bundled models make; exits
                                              with 1 where a bound is broken
    python benchmarks/attention.py --sparsity 0.5    also with half of the keys left out, their choice included
    python benchmarks/attention.py --tiny     anywhere, to see that it runs

`smartdiff bench attention` is the same. Time is that of calls in a row, of which the device is the slower part; that of
8-bit kernels includes the making of 8 bits. TFLOP/s where keys are left out count all keys, so that they compare. Prints a
table and writes benchmarks/results/attention-<device>.json.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import Array  # noqa: E402

from benchmarks.measure import child, stamp, table, time_calls, write  # noqa: E402
from benchmarks.recorded import PROMPTS, record  # noqa: E402
from benchmarks.workloads import ATTENTION_SHAPES, TINY_SHAPES, AttentionShape  # noqa: E402
from smartdiff_jax.errors import Unsupported  # noqa: E402
from smartdiff_jax.kernels import ATTENTION, SPARSE  # noqa: E402
from smartdiff_jax.kernels.base import AttentionFn  # noqa: E402
from smartdiff_jax.kernels.sparse import Blocks, choose_blocks  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "fa3_attention.py"
CHECKED_QUERIES, CHECKED_HEADS = 256, 2
"""Of the result, what is held against float64: the first and the last queries of some heads."""

SHARES = 4
"""Of the cases of a check, each in a process of its own."""

LENGTHS = (1, 63, 64, 65, 4_095, 9_450, 32_760)
EIGHT_BITS = ("pallas_sage",)
LSE_BOUND = 1e-3
LSE_BOUND_8, RECORDED_LSE_BOUND_8 = 0.03, 0.1
"""With few keys the rounding of a single logit is seen: 0.02. With thousands 0.002. Logits of models are larger, and so is what
127 steps lose of them: 0.065."""

COSINE_BOUND, RECORDED_COSINE_BOUND = 0.999, 0.9995
"""Of 8-bit kernels, on random numbers, where weights and values both keep three bits of mantissa: 0.9993; on recorded ones."""

SPARSITY = 0.5
"""Of what is checked with lists."""

RECORDED = 5
"""One recorded case of so many is taken; no model's number of blocks divides by it, so that each block is among them."""


def draw(shape: AttentionShape, seed: int = 0, outliers: float = 0.0) -> list[Array]:
    """q, k, v in bfloat16, drawn in float32: JAX draws bfloat16 from some 200 numbers. outliers: a mean of k."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (shape.queries, shape.keys, shape.keys)
    q, k, v = (
        jax.random.normal(key, (shape.batch, size, shape.heads, shape.head_dim))
        for key, size in zip(keys[:3], sizes, strict=True)
    )
    k = k + outliers * (jax.random.uniform(keys[3], (shape.head_dim,)) < 0.05)
    return [x.astype(jnp.bfloat16) for x in (q, k, v)]


def exact(q: Array, k: Array, v: Array, lengths: Array, blocks: Blocks | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of CHECKED queries and heads: out and lse in float64."""
    listed = True if blocks is None else _listed(blocks, q.shape[1], k.shape[1])
    with jax.enable_x64(True):
        out, lse = _exact(_ends(q), k, v, lengths, listed)
        return np.asarray(out), np.asarray(lse)


@jax.jit
def _exact(q: Array, k: Array, v: Array, lengths: Array, listed: Array | bool) -> tuple[Array, Array]:
    q, k, v = (x[:, :, :CHECKED_HEADS].astype(jnp.float64) for x in (q, k, v))
    logits = jnp.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
    logits = jnp.where((jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None] & listed, logits, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, axis=-1), v), jax.nn.logsumexp(logits, axis=-1)


def _ends(x: Array) -> Array:
    """The first and last queries: the last are in the block that may not be full."""
    half = CHECKED_QUERIES // 2
    return x if x.shape[1] <= CHECKED_QUERIES else jnp.concatenate([x[:, :half], x[:, -half:]], axis=1)


def _listed(blocks: Blocks, queries: int, keys: int) -> Array:
    """Of CHECKED queries and heads, whether a key is in their list."""
    tiles = _ends(jnp.arange(queries)[None] // blocks.size.queries)[0]
    count, index = (x[:, :CHECKED_HEADS][:, :, tiles] for x in (blocks.count, blocks.index))
    mask = dataclasses.replace(blocks, count=count, index=index).mask()
    return jnp.repeat(mask, blocks.size.keys, axis=-1)[..., :keys]


def errors(out: Array, lse: Array | None, true: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Relative error (norms), relative L1, cosine, and the largest error of lse."""
    x, y = np.asarray(_ends(out)[:, :, :CHECKED_HEADS], np.float64), true[0]
    found = {
        "relative": float(np.linalg.norm(x - y) / np.linalg.norm(y)),
        "l1": float(np.abs(x - y).sum() / np.abs(y).sum()),
        "cosine": float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)),
    }
    if lse is not None:
        ends = jnp.moveaxis(_ends(jnp.moveaxis(lse, 2, 1)), 1, 2)[:, :CHECKED_HEADS]
        found["lse"] = float(np.abs(np.asarray(ends, np.float64) - true[1]).max())
    return found


def kernels(names: Sequence[str]) -> dict[str, AttentionFn]:
    return {name: ATTENTION[name] for name in names or [name for name in ATTENTION if name != "auto"]}


def measure(shape: AttentionShape, names: Sequence[str], sparsity: float | None = None) -> dict[str, dict]:
    """Of every kernel: seconds of a call, TFLOP/s, errors, bytes besides its arguments; or why it does not serve.

    sparsity: those that can are measured with this share of the keys left out as well, and the choice of these alone.
    """
    q, k, v = draw(shape)
    lengths = jnp.full((shape.batch,), shape.keys, jnp.int32)
    all_keys, share = exact(q, k, v, lengths), jnp.float32(sparsity or 0.0)

    def true(blocks: Blocks | None) -> tuple[np.ndarray, np.ndarray]:
        return all_keys if blocks is None else exact(q, k, v, lengths, blocks)

    found = {}
    for name, kernel in kernels(names).items():
        if name == "xla" and shape.flops > 2e13:
            continue  # half a minute, to learn nothing
        try:
            found[name] = _measured(shape, lambda q, k, v, kernel=kernel: (kernel(q, k, v)[0], None), (q, k, v), true)
        except Unsupported as error:
            found[name] = {"unsupported": str(error)}
            continue
        if sparsity is None or name not in SPARSE:
            continue
        choose, attend = _sparse(name)
        row = _measured(shape, attend, (q, k, v, share), true)
        found[f"{name} {sparsity}"] = row | {"choice_seconds": time_calls(jax.jit(choose), q, k, share)}
    return found


def _measured(shape: AttentionShape, run: Callable, operands: tuple[Array, ...], true: Callable) -> dict:
    """run gives out, and the lists it went by. true: of these, what it should give."""
    compiled = jax.jit(run).lower(*operands).compile()
    out, blocks = compiled(*operands)
    row = errors(out, None, true(blocks))
    seconds = time_calls(compiled, *operands)
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds,
        "tflops": shape.flops / seconds["median"] / 1e12,
        "temporary_mb": memory.temp_size_in_bytes / 2**20 if memory else None,
        **row,
    }


def _sparse(name: str) -> tuple[Callable[..., Blocks], Callable[..., tuple[Array, Blocks]]]:
    """What chooses for a kernel, and both together."""
    kernel, size = SPARSE[name]

    def choose(q, k, share):
        return choose_blocks(q, k, share, size)

    def attend(q, k, v, share):
        blocks = choose(q, k, share)
        return kernel(q, k, v, blocks=blocks)[0], blocks

    return choose, attend


def check(
    names: Sequence[str], lengths: Sequence[int], heads: int = 3, *, recorded: bool = True, share: int | None = None
) -> list[dict]:
    """Every kernel on every case, or on one of the SHARES of them."""
    cases = islice(_cases(lengths, heads, recorded), share, None, 1 if share is None else SHARES)
    return [row | where for where, operands in cases for row in _check_one(names, *operands)]


def check_at_once(names: Sequence[str]) -> tuple[list[dict], list[str]]:
    """The same rows from processes of their own, a kernel and a share of the cases each, and what ended in an error: compiling
    takes most of the time."""
    shares = [(name, share) for share in range(SHARES) for name in kernels(names)]
    at_once = min(len(shares), os.cpu_count() or 1)
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    }
    with mock.patch.dict(os.environ, environment), ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(_check_share, *zip(*shares, strict=True)))
    failed = [
        f"{name}, share {share}: {part['error'].strip().splitlines()[-1]}"
        for (name, share), part in zip(shares, found, strict=True)
        if "error" in part
    ]
    return [row for part in found for row in part.get("rows", ())], failed


def _check_share(name: str, share: int) -> dict:
    return child([str(Path(__file__)), "--check", "--kernel", name, "--share", str(share)])


def _cases(lengths: Sequence[int], heads: int, recorded: bool) -> Iterator[tuple[dict, tuple[Array, Array, Array, Array]]]:
    """What tells a case apart; queries, keys, values and how many keys count. Fresh numbers at odd lengths, in batches of one
    and two with ragged keys, with outliers in the keys; and recorded ones."""
    for seed, queries in enumerate(lengths):
        for batch, head_dim, outliers in ((1, 128, 0.0), (2, 64, 0.0), (1, 128, 20.0)):
            keys = lengths[(seed + batch) % len(lengths)]
            q, k, v = draw(AttentionShape("check", queries, keys, heads, head_dim, batch), seed, outliers)
            ragged = jnp.array([keys, max(keys - 37, 1)][:batch], jnp.int32)
            where = {"queries": queries, "keys": keys, "batch": batch, "head_dim": head_dim, "outliers": outliers}
            yield where, (q, k, v, ragged)
    for model in PROMPTS if recorded else ():
        for case, qkv in enumerate(record(model)[::RECORDED]):
            q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv)
            yield {"recorded": model, "case": case}, (q, k, v, jnp.array([k.shape[1]], jnp.int32))


def _check_one(names: Sequence[str], q: Array, k: Array, v: Array, lengths: Array) -> list[dict]:
    """Errors of every kernel, or why it does not serve."""
    true, rows = exact(q, k, v, lengths), []
    for name, kernel in kernels(names).items():
        try:
            run = jax.jit(lambda q, k, v, n, kernel=kernel: kernel(q, k, v, kv_length=n, with_lse=True))
            poison = [jnp.full((64, 2**20), jnp.nan) for _ in range(2)]
            jax.block_until_ready(poison)
            del poison  # results are written over it: what is left unwritten shows
            found = run(q, k, v, lengths)
            rows.append({"kernel": name, **errors(*found, true)})
            if name in SPARSE:
                rows.append({"kernel": name, "sparsity": SPARSITY, **_check_lists(name, q, k, v, lengths, found)})
        except Unsupported as error:
            rows.append({"kernel": name, "unsupported": str(error)})
    return rows


def _check_lists(name: str, q: Array, k: Array, v: Array, lengths: Array, dense: tuple[Array, Array | None]) -> dict:
    """Errors with a share of the keys left out; and whether lists of all blocks give what no lists give, to the bit."""
    kernel, size = SPARSE[name]
    choose = jax.jit(lambda q, k, share, n: choose_blocks(q, k, share, size, kv_length=n))
    run = jax.jit(lambda q, k, v, n, blocks: kernel(q, k, v, kv_length=n, with_lse=True, blocks=blocks))
    some, every = (choose(q, k, jnp.float32(share), lengths) for share in (SPARSITY, 0.0))
    pairs = zip(run(q, k, v, lengths, every), dense, strict=True)
    same = all(bool(jnp.all(with_lists == without)) for with_lists, without in pairs)
    return errors(*run(q, k, v, lengths, some), exact(q, k, v, lengths, some)) | {"same": same}


def _broken(rows: Sequence[dict]) -> list[str]:
    """bfloat16: at most 1.2 times cuDNN's error, and LSE_BOUND. 8 bits: COSINE_BOUND, LSE_BOUND_8. XLA's is what it is."""
    fields = "queries", "keys", "batch", "outliers", "recorded", "case", "sparsity"
    at = lambda row: tuple(row.get(name) for name in fields)  # noqa: E731
    best = {at(row): row["relative"] for row in rows if row["kernel"] == "cudnn" and "relative" in row}
    broken = []
    for row in rows:
        if "unsupported" in row or row["kernel"] == "xla":
            continue
        eight = row["kernel"] in EIGHT_BITS
        right = row["lse"] <= ((RECORDED_LSE_BOUND_8 if "recorded" in row else LSE_BOUND_8) if eight else LSE_BOUND)
        least = RECORDED_COSINE_BOUND if "recorded" in row else COSINE_BOUND
        right &= row["cosine"] >= least if eight else row["relative"] <= 1.2 * best.get(at(row), 0.004)
        right &= row.get("same", True)
        if not right:
            broken.append(str(row))
    return broken


def show(shape: AttentionShape, found: dict[str, dict]) -> None:
    print(f"\n{shape.name}: {shape.batch} x {shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}")
    for name, row in found.items():
        if "unsupported" in row:
            print(f"  {name:14} {row['unsupported']}")
            continue
        print(
            f"  {name:14} {row['seconds']['median'] * 1e3:9.3f} ms {row['tflops']:7.1f} TFLOP/s  error {row['relative']:.1e}"
            f"  L1 {row['l1']:.4f}  cosine {row['cosine']:.6f}  {row['temporary_mb'] or 0:.0f} MiB besides"
            + (f", {row['choice_seconds']['median'] * 1e3:.3f} ms of it the choice" if "choice_seconds" in row else ""),
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", default=[], choices=[*ATTENTION], help="of these alone")
    parser.add_argument("--check", action="store_true", help="errors at odd lengths in the place of speed")
    parser.add_argument("--share", type=int, choices=range(SHARES), help="of a check, as JSON")
    parser.add_argument("--sparsity", type=float, help="0 to 1: with this share of the keys left out as well")
    parser.add_argument("--tiny", action="store_true", help="small shapes; nothing is written unless to --output")
    parser.add_argument("--output", type=Path, help="where the result goes instead")
    parser.add_argument("--commit", help="of a copy of the tree without its history")
    options = parser.parse_args(arguments)
    if options.check:
        if options.share is not None:
            print(json.dumps({"rows": check(options.kernel, LENGTHS, share=options.share)}))
            return
        tiny = options.tiny
        rows, failed = (check(options.kernel, LENGTHS[:3], recorded=False), []) if tiny else check_at_once(options.kernel)
        broken = _broken(rows) + failed
        if not tiny:
            write("attention-check", {"stamp": stamp(options.commit), "rows": table(rows), "broken": broken}, options.output)
        for name in sorted({row["kernel"] for row in rows}):
            served = [row for row in rows if row["kernel"] == name and "unsupported" not in row]
            worst = {key: max(row[key] for row in served) for key in ("relative", "l1", "lse")} if served else {}
            least = f"least cosine {min(row['cosine'] for row in served):.6f}" if served else "serves nothing here"
            print(f"{name:14} {len(served):3} cases  " + "  ".join(f"{k} {v:.1e}" for k, v in worst.items()), least)
        if broken:
            raise SystemExit("out of bounds:\n" + "\n".join(broken))
        return
    shapes = TINY_SHAPES if options.tiny else ATTENTION_SHAPES
    peers = {} if options.tiny else child([str(PEER)])
    results = {"stamp": stamp(options.commit), "peers": peers, "shapes": {}}
    for shape in shapes:
        results["shapes"][shape.name] = measure(shape, options.kernel, options.sparsity)
        show(shape, results["shapes"][shape.name])
        for name, row in peers.get(shape.name, {}).items():
            print(f"  {name:14} {row['seconds'] * 1e3:9.3f} ms {row['tflops']:7.1f} TFLOP/s  peer")
        if options.output or not options.tiny:
            write("attention", results, options.output)
    if "error" in peers:
        print("\nno peer:", peers["error"].strip().splitlines()[-1])


if __name__ == "__main__":
    main()
