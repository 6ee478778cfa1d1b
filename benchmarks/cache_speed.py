"""What caches gain: true sizes, random weights, the whole denoise loop under policies that skip a known share of the steps.

    python benchmarks/cache_speed.py --model wan2.1-t2v-1.3b      832x480, 81 frames, on a GPU
    python benchmarks/cache_speed.py --model flux1-dev            1024x1024
    python benchmarks/cache_speed.py --tiny                       anywhere, to see that it runs

For every policy and ratio: seconds of the run, over those without a cache times 1 / (1 - ratio), the ideal; the overhead of
never skipping (ratio 0); R^2 of seconds over the number of computed steps; what the policy remembers, and the device's peak.
The run without a cache is measured anew beside every policy: a card's clock falls by 1 % as it gets warm.
Random weights make velocities that mean nothing, which costs the same time.
Writes benchmarks/results/cache-speed-<model>-<device>.json.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402
from smartdiff_jax.cache import POLICIES  # noqa: E402
from smartdiff_jax.cache.base import CachePolicy, Outlook  # noqa: E402
from smartdiff_jax.cache.planned import Planned  # noqa: E402
from smartdiff_jax.cache.published import published_numbers  # noqa: E402
from smartdiff_jax.config.model import known_models  # noqa: E402
from smartdiff_jax.config.system import MeshConfig  # noqa: E402
from smartdiff_jax.engine.caching import memory_bytes  # noqa: E402
from smartdiff_jax.errors import InvalidRequest  # noqa: E402
from smartdiff_jax.kernels import ATTENTION  # noqa: E402
from smartdiff_jax.models.families import FAMILIES  # noqa: E402
from smartdiff_jax.models.family import Conditioning  # noqa: E402
from smartdiff_jax.samplers import SAMPLERS  # noqa: E402
from smartdiff_jax.samplers.base import MAX_STEPS, Spacing  # noqa: E402
from smartdiff_jax.sharding.context_parallel import wrap  # noqa: E402
from smartdiff_jax.sharding.layout import Layout  # noqa: E402
from smartdiff_jax.sharding.mesh import make_mesh, replicated  # noqa: E402
from smartdiff_jax.stages.denoise import DenoiseLoop, Expert, denoise  # noqa: E402
from smartdiff_jax.stages.guidance import GUIDANCE, combine_for  # noqa: E402
from smartdiff_jax.weights.apart import apart  # noqa: E402
from smartdiff_jax.weights.random_init import random_state  # noqa: E402
from smartdiff_jax.weights.residency import Resident  # noqa: E402

TEXT_LENGTH = 512
GRIDS = {"wan2.1-t2v-1.3b": (21, 30, 52), "flux1-dev": (1, 64, 64)}
TINY = {
    "wan2.1-t2v-1.3b": dict(num_layers=3, num_attention_heads=2, ffn_dim=128, text_dim=64),
    "flux1-dev": dict(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32
    ),
}
PARAMS: dict[str, dict[str, Any]] = {"dbcache": {"first_blocks": 1}}


class Bench:
    """Random weights and inputs in place."""

    def __init__(self, model: str, tiny: bool, attention: str):
        self.spec = known_models()[model]
        family = FAMILIES[self.spec.family]
        architecture = family.architectures["transformer"]
        config = architecture.config(**self.spec.components["transformer"] | (TINY[model] if tiny else {}))
        grid = (1, 4, 6) if tiny else GRIDS[model]
        layout = Layout(make_mesh(MeshConfig()))
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: architecture.build(config, nnx.Rngs(0))))
        weights = random_state(architecture, config, dtype, 0, lambda path, shape: replicated(layout.mesh))
        self.weights = Resident(apart(weights) if family.task == "t2i" else weights)
        attend = wrap(ATTENTION[attention], layout.mesh)
        guidance = GUIDANCE["sequential"](layout.as_branches)
        self.loop = DenoiseLoop(graphdef, attend, guidance, combine_for(self.spec.sampling), dtype, layout)
        branches = 2 if self.spec.sampling.guidance == "cfg" else 1
        text_length = 16 if tiny else TEXT_LENGTH
        rope, _ = family.rope(config, grid, text_length, text_length)
        keys = iter(jax.random.split(jax.random.key(1), 3))

        def noise(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape)

        width = {"wan": lambda: config.text_dim, "flux1": lambda: config.joint_attention_dim}[self.spec.family]()
        embedded = self.spec.sampling.guidance == "embedded"
        self.branches = jax.device_put(
            Conditioning(
                text=noise(branches, 1, text_length, width).astype(dtype),
                rope=tuple(np.broadcast_to(table, (branches, 1, *table.shape)) for table in rope),
                pooled=noise(1, 1, config.pooled_projection_dim).astype(dtype) if embedded else None,
                guidance=np.full((1, 1), 3.5, np.float32) if embedded else None,
            ),
            layout.replicated,
        )
        channels = config.in_channels * (int(np.prod(config.patch_size)) if self.spec.family == "wan" else 1)
        self.tokens = noise(1, int(np.prod(grid)), channels).astype(jnp.float32)
        self.sampler = SAMPLERS[self.spec.sampling.sampler]

    def policy(self, name: str, steps: int, ratio: float | None) -> CachePolicy:
        if name == "planned":
            fresh = np.zeros(steps, bool)
            budget = steps if ratio is None else max(1, round((1 - ratio) * steps))
            fresh[np.arange(budget) * steps // budget] = True
            return Planned.of(fresh, np.tile([1.0, 0.0], (steps, 1)))
        outlook = Outlook(steps, np.linspace(1.0, 0.0, steps + 1), (), ratio)
        return POLICIES[name].create(steps, published_numbers(self.spec.name), **PARAMS.get(name, {})).within(outlook)[0]

    def run(self, policy: CachePolicy, steps: int) -> dict[str, Any]:
        schedule = self.sampler.schedule(steps, self.spec.sampling.shift, Spacing(self.spec.sampling.from_one, None))
        scales = np.full(MAX_STEPS, self.spec.sampling.guidance_scale, np.float32)
        began = time.perf_counter()
        *_, carry = denoise(
            self.loop, [Expert(self.weights, 0, steps)], jnp.copy(self.tokens), self.branches, schedule, scales, policy,
            self.sampler, chunk=MAX_STEPS,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        executed = np.asarray(carry.executed)[:steps]
        return {"seconds": seconds, "computed": float(executed.mean() * steps), "bytes": memory_bytes(carry.cache_state)}


def straight(x: np.ndarray, y: np.ndarray) -> float:
    """R^2 of a line."""
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - np.sum(left**2) / np.sum((y - y.mean()) ** 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(GRIDS), default="wan2.1-t2v-1.3b")
    parser.add_argument("--tiny", action="store_true", help="a few small blocks; writes nothing")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ratios", default="0,0.3,0.5,0.67,0.8")
    parser.add_argument("--policies", default="planned,easycache,fbcache,teacache,taylorseer")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.tiny, arguments.attention)
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]

    def measure(policy: CachePolicy) -> dict[str, Any]:
        runs = [bench.run(policy, arguments.steps) for _ in range(arguments.repeats)]
        return min(runs, key=lambda run: run["seconds"])

    def peak() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    bench.run(POLICIES["none"](), 2)  # compiles
    bench.run(POLICIES["none"](), arguments.steps)  # warms the card
    rows, lines = [], {}
    for name in arguments.policies.split(","):
        bench.run(bench.policy(name, 2, None), 2)
        base = measure(POLICIES["none"]())
        print(f"without a cache: {base['seconds']:.3f} s", flush=True)
        group = []
        for ratio in ratios:
            row: dict[str, Any] = {"name": name, "ratio": ratio}
            try:
                policy = bench.policy(name, arguments.steps, ratio)
            except InvalidRequest as refusal:
                rows.append(row | {"refused": str(refusal)})
                print(f"{name:12} ratio {ratio:4.2f}: {refusal}", flush=True)
                continue
            row |= measure(policy)
            speed_up = base["seconds"] / row["seconds"]
            row |= {"speed_up": speed_up, "of_ideal": speed_up * row["computed"] / arguments.steps, "peak_bytes": peak()}
            group.append(row)
            print(
                f"{name:12} ratio {ratio:4.2f}: {row['computed']:5.1f} of {arguments.steps} computed, {row['seconds']:8.3f} s, "
                f"{speed_up:5.2f}x, {row['of_ideal']:.3f} of ideal, remembers {row['bytes'] / 1e6:.1f} MB",
                flush=True,
            )
        computed, seconds = (np.array([row[key] for row in group]) for key in ("computed", "seconds"))
        lines[name] = {"without": base, "r2": straight(computed, seconds) if len(group) > 2 else None}
        never = [row for row in group if row["computed"] == arguments.steps]
        lines[name]["overhead"] = never[0]["seconds"] / base["seconds"] - 1 if never else None
        print(f"{name:12} {lines[name]}", flush=True)
        rows += group
        if not arguments.tiny:  # after every policy: a run that is cut off leaves what it has
            shape = {"model": arguments.model, "grid": GRIDS[arguments.model], "steps": arguments.steps}
            results = {"stamp": stamp(arguments.commit), **shape, "rows": rows, "lines": lines}
            write(f"cache-speed-{arguments.model}", results)


if __name__ == "__main__":
    main()
