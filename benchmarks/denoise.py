"""The denoiser at true Wan2.1-1.3B size, random weights, 832x480x81: forward pass, denoise step, compilation, second start.

    python benchmarks/denoise.py            on a GPU; diffusers beside it where torch and diffusers are installed
    python benchmarks/denoise.py --tiny     anywhere, to see that it runs

Prints a table and writes benchmarks/results/denoise-<device>.json, whose name tells the settings that are not the defaults.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.measure import stamp, time_call, write  # noqa: E402
from smartdiff_jax.cache import POLICIES  # noqa: E402
from smartdiff_jax.config.model import known_models  # noqa: E402
from smartdiff_jax.config.system import MeshConfig  # noqa: E402
from smartdiff_jax.engine.compilation import keep_executables  # noqa: E402
from smartdiff_jax.kernels import ATTENTION  # noqa: E402
from smartdiff_jax.kernels.hopper import import_ahead  # noqa: E402
from smartdiff_jax.models import wan  # noqa: E402
from smartdiff_jax.models.family import Conditioning  # noqa: E402
from smartdiff_jax.samplers import SAMPLERS  # noqa: E402
from smartdiff_jax.samplers.base import MAX_STEPS  # noqa: E402
from smartdiff_jax.sharding.context_parallel import LocalAttend, wrap  # noqa: E402
from smartdiff_jax.sharding.layout import Layout  # noqa: E402
from smartdiff_jax.sharding.mesh import make_mesh, replicated  # noqa: E402
from smartdiff_jax.stages.base import jit_in  # noqa: E402
from smartdiff_jax.stages.denoise import DenoiseLoop  # noqa: E402
from smartdiff_jax.stages.guidance import GUIDANCE, combine_plain  # noqa: E402
from smartdiff_jax.weights.fp8 import are_fused, to_fp8  # noqa: E402
from smartdiff_jax.weights.random_init import random_state  # noqa: E402

TEXT_LENGTH = 512
PEER = ROOT / "benchmarks" / "peers" / "diffusers_denoise.py"


def problem(tiny: bool) -> tuple[wan.WanConfig, tuple[int, int, int]]:
    """The model's numbers and its grid of tokens (frames, rows, columns)."""
    numbers = known_models()["wan2.1-t2v-1.3b"].components["transformer"]
    if tiny:
        return wan.WanConfig(**numbers | dict(num_layers=2, num_attention_heads=2, ffn_dim=128, text_dim=64)), (2, 4, 6)
    return wan.WanConfig(**numbers), (21, 30, 52)


class Bench:
    """Random weights and inputs in place, ready to run."""

    def __init__(self, tiny: bool, attention: str, precision: str):
        self.config, grid = problem(tiny)
        self.imported_s = time.perf_counter() - STARTED
        jax.devices()
        self.device_s = time.perf_counter() - STARTED - self.imported_s
        import_ahead()
        mesh = make_mesh(MeshConfig())
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        self.weights_dtype, self.layout = dtype, Layout(mesh)
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: wan.ARCHITECTURE.build(self.config, nnx.Rngs(0))))
        self.weights = random_state(wan.ARCHITECTURE, self.config, dtype, 0, lambda path, shape: replicated(mesh))
        if precision == "fp8":
            self.graphdef, self.weights = to_fp8(self.graphdef, self.weights, fused=are_fused(mesh))
        jax.block_until_ready(self.weights)
        self.weights_s = time.perf_counter() - STARTED - self.imported_s - self.device_s
        self.attend = wrap(ATTENTION[attention], mesh)
        tokens = int(np.prod(grid))
        width = int(np.prod(self.config.patch_size)) * self.config.in_channels
        rope = [np.broadcast_to(table, (2, 1, *table.shape)) for table in wan.rope(self.config, grid)[0]]
        text = jax.random.normal(jax.random.key(1), (2, 1, TEXT_LENGTH, self.config.text_dim)).astype(dtype)
        self.branches = jax.device_put(Conditioning(text=text, rope=tuple(rope)), replicated(mesh))
        self.tokens = jax.random.normal(jax.random.key(2), (1, tokens, width), jnp.float32)

    def forward(self, attend):
        """One evaluation of the model, compiled: (weights, tokens, conditioning of one branch) to velocity."""

        def run(weights, tokens, conditioning):
            model = nnx.merge(self.graphdef, weights)
            hidden, context = model.embed(tokens, jnp.float32(500), conditioning)
            return model.head(model.run_blocks(hidden, context, attend, 0, model.num_blocks), context)

        return jit_in(self.weights_dtype, run), (self.weights, self.tokens, jax.tree.map(lambda leaf: leaf[0], self.branches))

    def first_steps(self, count: int = 1) -> dict[str, float]:
        """Seconds to compile the loop and run its first chunk, and to run `count` steps afterwards."""
        guide = GUIDANCE["sequential"](self.layout.as_branches)
        loop = DenoiseLoop(self.graphdef, self.attend, guide, combine_plain, self.weights_dtype, self.layout)
        sampler, policy = SAMPLERS["flow_unipc"], POLICIES["none"]()
        schedule = sampler.schedule(50, 8.0)
        guidance = np.full(MAX_STEPS, 6.0, np.float32)
        began = time.perf_counter()
        start, step = loop.functions(self.weights, self.tokens, self.branches, policy, sampler)
        carry = start(self.weights, self.tokens, self.branches, policy, sampler)

        def run(carry, lo, hi):
            bounds = np.int32(lo), np.int32(hi), np.int32(0)
            carry = step(self.weights, carry, self.branches, schedule, guidance, policy, sampler, *bounds)
            return jax.block_until_ready(carry)

        carry = run(carry, 0, 0)
        compiled = time.perf_counter()
        carry = run(carry, 0, 1)
        first = time.perf_counter()
        carry = run(carry, 1, 1 + count)
        return {
            "imports_s": self.imported_s,
            "device_s": self.device_s,
            "weights_s": self.weights_s,
            "compile_s": compiled - began,
            "first_step_s": first - compiled,
            "step_s": (time.perf_counter() - first) / count,
            "process_to_first_step_s": first - STARTED,
        }


def child(arguments: argparse.Namespace, cache: str) -> dict:
    """The same start in a process of its own, with a persistent compilation cache."""
    command = [sys.executable, __file__, "--start-only", "--cache", cache, "--attention", arguments.attention]
    command += ["--precision", arguments.precision]
    run = subprocess.run(command + ["--tiny"] * arguments.tiny, capture_output=True, text=True, cwd=ROOT)
    if run.returncode:
        return {"error": run.stderr[-2000:]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--precision", choices=("full", "fp8"), default="full")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--start-only", action="store_true", help="compile, run one step, print seconds as JSON")
    parser.add_argument("--cache", help="folder of the persistent compilation cache")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    if arguments.cache:
        keep_executables(Path(arguments.cache))
    if arguments.start_only:
        print(json.dumps(Bench(arguments.tiny, arguments.attention, arguments.precision).first_steps()))
        return

    results: dict = {
        "stamp": stamp(arguments.commit),
        "settings": {"attention": arguments.attention, "precision": arguments.precision},
        "shape": "tiny" if arguments.tiny else "wan2.1-t2v-1.3b 832x480x81, batch 1",
    }
    # Starts first: they need the device's memory to themselves.
    with tempfile.TemporaryDirectory() as cache:
        results["cold_start"] = child(arguments, cache)
        results["second_start"] = child(arguments, cache)
    print(json.dumps({key: results[key] for key in ("cold_start", "second_start")}, indent=1), flush=True)
    if not arguments.no_peer:
        peer = subprocess.run(
            [sys.executable, str(PEER), "--repeats", str(arguments.repeats)] + ["--tiny"] * arguments.tiny,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        results["diffusers"] = (
            json.loads(peer.stdout.strip().splitlines()[-1]) if peer.returncode == 0 else {"error": peer.stderr[-2000:]}
        )
        print("diffusers", results["diffusers"], flush=True)

    bench = Bench(arguments.tiny, arguments.attention, arguments.precision)
    forward, inputs = bench.forward(bench.attend)
    results["forward_s"] = time_call(forward, *inputs, warmup=2, repeats=arguments.repeats)
    print("forward", results["forward_s"], flush=True)
    # Everything but attention, to know where the time goes.
    rest, inputs = bench.forward(LocalAttend(lambda q, k, v, **options: (q, None)))
    results["forward_without_attention_s"] = time_call(rest, *inputs, warmup=2, repeats=arguments.repeats)
    print("without attention", results["forward_without_attention_s"], flush=True)
    results["denoise"] = bench.first_steps(count=4)
    print("denoise", results["denoise"], flush=True)
    told = (arguments.attention, arguments.precision, "no-peer" if arguments.no_peer else "")
    words = ["denoise", "tiny" if arguments.tiny else "", *told]
    print(write("-".join(word for word in words if word not in ("auto", "full", "")).replace("_", "-"), results))


if __name__ == "__main__":
    main()
