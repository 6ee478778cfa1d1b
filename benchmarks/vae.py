"""The VAE of Wan2.1 at true size, random bfloat16 weights, latents 1x16x21x60x104 to 81 frames of 832x480.

    python benchmarks/vae.py                 on a GPU; diffusers beside it where torch and diffusers are installed
    python benchmarks/vae.py --tiny          anywhere, to see that it runs
    python benchmarks/vae.py --convolutions  every convolution of the decoder by itself, in each layout

Each layout of the causal convolution is measured in a process of its own, so that compilation is cold and the peak of memory
is its own. Prints a table and writes benchmarks/results/vae-<device>.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import child, stamp, time_call, write  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "diffusers_vae.py"
LAYOUTS = ("taps", "sum", "ndhwc", "ncdhw")
TINY = dict(base_dim=16, z_dim=16, num_res_blocks=1)
GB = 1e9


def problem(tiny: bool) -> tuple[dict, tuple[int, ...]]:
    """Numbers of the model that are not Wan2.1's own, and the shape of the latents."""
    return (TINY, (1, 16, 3, 6, 10)) if tiny else ({}, (1, 16, 21, 60, 104))


def convolutions() -> dict:
    """Ways to compute the causal convolution [b t h w i] x [kh kw kt i o]; the first is the package's."""
    import jax.numpy as jnp
    from jax import lax

    from smartdiff_jax.models.vae import causal_conv

    def one_a_tap(x, kernel):
        """One 2-D convolution a tap in time, added up."""
        kt = kernel.shape[2]
        b, t = x.shape[0], x.shape[1] - kt + 1
        frames = [x[:, n : n + t].reshape(b * t, *x.shape[2:]) for n in range(kt)]
        out = sum(causal_conv.conv2d(frames[n], kernel[:, :, n]) for n in range(kt))
        return out.reshape(b, t, *out.shape[1:])

    def three_d(layout):
        def convolve(x, kernel):
            kh, kw, _, _, _ = kernel.shape
            if layout == "NCDHW":
                x = jnp.moveaxis(x, -1, 1)
            padding = ((kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))  # JAX counts the axes as the kernel has them
            x = lax.conv_general_dilated(x, kernel, (1, 1, 1), padding, dimension_numbers=(layout, "HWDIO", layout))
            return jnp.moveaxis(x, 1, -1) if layout == "NCDHW" else x

        return convolve

    ways = (causal_conv.convolve, one_a_tap, three_d("NDHWC"), three_d("NCDHW"))
    return dict(zip(LAYOUTS, ways, strict=True))


def measure_model(arguments: argparse.Namespace) -> dict:
    """One layout: compilation, seconds and memory of decode and encode."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from smartdiff_jax.models.vae import causal_conv
    from smartdiff_jax.models.vae.wan_vae import WanVAE, WanVAEConfig

    causal_conv.convolve = convolutions()[arguments.layout]
    numbers, shape = problem(arguments.tiny)
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(WanVAEConfig(**numbers), nnx.Rngs(0))))
    random = np.random.default_rng(0)

    def weight(leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(random.standard_normal(leaf.shape, np.float32) * scale, dtype)

    weights = jax.tree.map(weight, state)
    latents = jnp.asarray(random.standard_normal(shape, np.float32), dtype)
    pixels = jnp.zeros((1, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4], 3), dtype)
    jax.block_until_ready((weights, latents, pixels))

    def bytes_in_use(name: str) -> int:
        stats = device.memory_stats()
        return stats[name] if stats else 0

    results: dict = {"stamp": stamp(arguments.commit), "dtype": dtype.__name__}
    for name, x in (("decode", latents), ("encode", pixels)):
        run = jax.jit(lambda weights, x, name=name: getattr(nnx.merge(graphdef, weights), name)(x, chunk=arguments.chunk))
        before = bytes_in_use("bytes_in_use")
        began = time.perf_counter()
        lowered = run.lower(weights, x)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        memory = compiled.memory_analysis()
        results[name] = {
            "trace_s": traced - began,
            "compile_s": done - traced,
            "seconds": time_call(compiled, weights, x, warmup=2, repeats=arguments.repeats),
            # Of the whole process so far, so encode's is at least decode's; with what tuning took while compiling.
            "peak_above_weights_gb": (bytes_in_use("peak_bytes_in_use") - before) / GB,
            "executable_gb": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / GB,
        }
    return results


def measure_convolutions(arguments: argparse.Namespace) -> dict:
    """Every distinct causal convolution of one chunk of the decoder as it stands there: norm, SiLU, the cached frames before
    it, the bias and the residual behind it. TFLOP/s of the convolution's own arithmetic, by layout."""
    import jax
    import jax.numpy as jnp

    from smartdiff_jax.models.vae.causal_conv import RMSNorm

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    h, w, c = (6, 10, 16) if arguments.tiny else (60, 104, 96)
    shapes = [(1, h, w, 4 * c, 4 * c), (2, 2 * h, 2 * w, 2 * c, 4 * c), (2, 2 * h, 2 * w, 4 * c, 4 * c)]
    shapes += [(4, 4 * h, 4 * w, 2 * c, 2 * c), (4, 8 * h, 8 * w, c, c), (4, 8 * h, 8 * w, c, 3)]
    results: dict = {"stamp": stamp(arguments.commit)}
    for t, h, w, i, o in shapes:
        row = {}
        for layout, convolve in convolutions().items():

            def run(x, cache, kernel, bias, shortcut, i=i, convolve=convolve):
                x = jnp.concatenate([cache, RMSNorm(i)(x, silu=True)], axis=1)
                return convolve(x, kernel) + bias + shortcut, x[:, -2:]

            arrays = [(1, t, h, w, i), (1, 2, h, w, i), (3, 3, 3, i, o), (o,), (1, t, h, w, o)]
            inputs = [jnp.full(shape, 0.01, dtype) for shape in arrays]
            began = time.perf_counter()
            compiled = jax.jit(run).lower(*inputs).compile()
            compile_s = time.perf_counter() - began
            seconds = time_call(compiled, *inputs, warmup=3, repeats=arguments.repeats)
            row[layout] = {"compile_s": compile_s, "seconds": seconds, "tflops": 54e-12 * t * h * w * i * o / seconds["median"]}
        results[f"{t}x{h}x{w} {i}->{o}"] = row
        cells = "  ".join(f"{k} {1e3 * v['seconds']['median']:8.2f} ms {v['tflops']:4.0f} TFLOP/s" for k, v in row.items())
        print(f"{t}x{h}x{w} {i}->{o}".ljust(24), cells, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--layout", choices=LAYOUTS, help="measure this one here and print JSON")
    parser.add_argument("--convolutions", action="store_true")
    parser.add_argument("--chunk", type=int, default=1, help="latent frames a step of the scan")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    suffix = "-tiny" if arguments.tiny else ""
    if arguments.layout:
        print(json.dumps(measure_model(arguments)))
        return
    if arguments.convolutions:
        print(write(f"vae-convolutions{suffix}", measure_convolutions(arguments)))
        return

    shared = ["--tiny"] * arguments.tiny + ["--repeats", str(arguments.repeats)]
    own = ["--chunk", str(arguments.chunk)] + (["--commit", arguments.commit] if arguments.commit else [])
    results: dict = {"stamp": None, "latents": problem(arguments.tiny)[1], "chunk": arguments.chunk, "layouts": {}}
    for layout in arguments.layouts:
        row = child([__file__, "--layout", layout, *shared, *own])
        results["stamp"] = row.pop("stamp", None) or results["stamp"]
        results["layouts"][layout] = row
        if "error" in row:
            print(layout, row["error"], flush=True)
            continue
        for name in ("decode", "encode"):
            r = row[name]
            print(
                f"{layout:6} {name}  {1e3 * r['seconds']['median']:8.1f} ms  compile {r['compile_s']:6.1f} s"
                f"  peak {r['peak_above_weights_gb']:5.2f} GB  executable {r['executable_gb']:5.2f} GB",
                flush=True,
            )
    if not arguments.no_peer:
        results["diffusers"] = child([str(PEER), *shared])
        print("diffusers", json.dumps(results["diffusers"]), flush=True)
    if results["stamp"] is None:
        raise SystemExit("no layout ran")
    print(write(f"vae{suffix}", results))


if __name__ == "__main__":
    main()
