"""The picture models at true size, random weights: one forward pass, a step of both branches, memory, and the VAE's decode.

    python benchmarks/images.py                    on a GPU; diffusers beside it where torch and diffusers are installed
    python benchmarks/images.py --models z-image   one of them
    python benchmarks/images.py --tiny             anywhere, to see that it runs

FLUX.1-dev, FLUX.2-klein-4B and Z-Image at 1024x1024, Qwen-Image at 1328x1328, batch 1, no text encoder. Calls in a row are
waited for together, ours and the peer's, as steps of a chunk are. Every model is measured
in a process of its own, the peer's first, so that each has the device's memory to itself. Writes
benchmarks/results/images-<device>.json after every model; models measured before on the same device are kept, each with its
stamp.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import IN_A_ROW, child, result_file, stamp, time_calls, write  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "diffusers_images.py"
MODELS = ("flux1-dev", "flux2-klein-4b", "qwen-image", "z-image")
TEXT_LENGTHS = {"flux1-dev": 512, "flux2-klein-4b": 512, "qwen-image": 128, "z-image": 128}
KL = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
SMALL = {
    "flux1-dev": (
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64,
         "pooled_projection_dim": 32},
        KL,
    ),
    "flux2-klein-4b": (
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}, KL,
    ),
    "qwen-image": (
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}, {"base_dim": 16, "num_res_blocks": 1},
    ),
    "z-image": (
        {"dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64}, KL,
    ),
}  # fmt: skip
GB = 1e9


def problem(name: str, tiny: bool) -> dict[str, Any]:
    """What is to be run, as the peer is told it too: the components' numbers and the sizes of the inputs."""
    from smartdiff_jax.config.model import known_models
    from smartdiff_jax.models.families import FAMILIES

    spec = known_models()[name]
    family = FAMILIES[spec.family]
    transformer, vae = (dict(spec.components[part]) for part in ("transformer", "vae"))
    width, height = spec.sampling.width, spec.sampling.height
    if tiny:
        transformer, vae = transformer | SMALL[name][0], vae | SMALL[name][1]
        width, height = 96, 64
    vae_config = family.architectures["vae"].config(**vae)
    stride = vae_config.spatial_stride
    return {
        "name": name,
        "transformer": transformer,
        "vae": vae,
        "size": [width, height],
        "latents": [1, vae_config.z_dim, 1, height // stride, width // stride],
        "text_length": 32 if tiny else TEXT_LENGTHS[name],
        "branches": 2 if spec.sampling.guidance == "cfg" else 1,
    }


class Bench:
    """One model's weights and inputs in place."""

    def __init__(self, task: dict[str, Any], attention: str, precision: str):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from smartdiff_jax.config.model import known_models
        from smartdiff_jax.config.system import MeshConfig
        from smartdiff_jax.engine.loading import resolve_dtype
        from smartdiff_jax.kernels import ATTENTION
        from smartdiff_jax.models.families import FAMILIES
        from smartdiff_jax.models.family import Conditioning
        from smartdiff_jax.sharding.context_parallel import wrap
        from smartdiff_jax.sharding.mesh import make_mesh, replicated
        from smartdiff_jax.weights.apart import apart
        from smartdiff_jax.weights.fp8 import are_fused, to_fp8

        self.settings = {"attention": attention, "precision": precision}
        self.task, self.spec = task, known_models()[task["name"]]
        self.family = FAMILIES[self.spec.family]
        self.mesh, self.dtype = make_mesh(MeshConfig()), resolve_dtype("auto")
        self.place = replicated(self.mesh)
        self.attend = wrap(ATTENTION[attention], self.mesh)
        self.graphdef, self.config, stacked = self._component("transformer")
        if precision == "fp8":
            self.graphdef, stacked = to_fp8(self.graphdef, stacked, fused=are_fused(self.mesh))
        self.weights = apart(stacked)
        patches = self.family.patches(self.config)
        grid, length, branches = patches.grid(tuple(task["latents"])), task["text_length"], task["branches"]
        width = self.config.joint_attention_dim if hasattr(self.config, "joint_attention_dim") else self.config.cap_feat_dim

        def tables(pair: Any) -> Any:
            return None if pair is None else tuple(np.broadcast_to(table, (branches, 1, *table.shape)) for table in pair)

        rope, text_rope = self.family.rope(self.config, grid, length, length)
        pooled = getattr(self.config, "pooled_projection_dim", None) if self.family.name == "flux1" else None
        told = self.family.text[0].buckets  # these models are told how much of their text counts
        key = jax.random.key(1)
        self.branches = jax.device_put(
            Conditioning(
                text=jax.random.normal(key, (branches, 1, length, width), jnp.float32).astype(self.dtype),
                rope=tables(rope),
                text_rope=tables(text_rope),
                text_length=np.full((branches, 1), length, np.int32) if told else None,
                pooled=jnp.ones((branches, 1, pooled), self.dtype) if pooled else None,
                guidance=np.full((branches, 1), 3.5, np.float32) if self.spec.sampling.guidance == "embedded" else None,
            ),
            self.place,
        )
        self.tokens = patches.pack(jax.random.normal(jax.random.key(2), tuple(task["latents"]), jnp.float32))

    def _component(self, name: str) -> tuple[Any, Any, Any]:
        """(graphdef, config, random weights) of a component."""
        import jax
        from flax import nnx

        from smartdiff_jax.weights.random_init import random_state

        architecture = self.family.architectures[name]
        config = architecture.config.model_validate(self.task[name])
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: architecture.build(config, nnx.Rngs(0))))
        weights = random_state(architecture, config, self.dtype, 0, lambda path, shape: self.place)
        return graphdef, config, jax.block_until_ready(weights)

    def evaluate(self, weights: Any, tokens: Any, conditioning: Any) -> Any:
        """One branch's velocity."""
        import jax.numpy as jnp
        from flax import nnx

        model = nnx.merge(self.graphdef, weights)
        hidden, context = model.embed(tokens, jnp.float32(500), conditioning)
        return model.head(model.run_blocks(hidden, context, self.attend, 0, model.num_blocks), context)

    def forward(self, weights: Any, tokens: Any, branches: Any) -> Any:
        """The first branch alone."""
        import jax

        return self.evaluate(weights, tokens, jax.tree.map(lambda leaf: leaf[0], branches))

    def guided(self, weights: Any, tokens: Any, branches: Any) -> Any:
        """Both branches, as the denoise loop runs and combines them."""
        import jax.numpy as jnp

        from smartdiff_jax.stages.guidance import Sequential, combine_for

        def evaluate(tokens: Any, conditioning: Any, state: Any) -> Any:
            return self.evaluate(weights, tokens, conditioning), state, jnp.bool_(True)

        return Sequential()(evaluate, combine_for(self.spec.sampling), tokens, branches, jnp.float32(4.0), ())[0]

    def decode(self, weights: Any, latents: Any) -> Any:
        """Latents to pixels."""
        from flax import nnx

        return nnx.merge(self.vae_graph, weights).decode(latents, chunk=1)

    def run(self, repeats: int, commit: str | None) -> dict[str, Any]:
        """Everything that is measured of this model."""
        import jax
        import jax.numpy as jnp

        device = jax.devices()[0]
        inputs = self.weights, self.tokens, self.branches
        results: dict[str, Any] = {
            "stamp": stamp(commit),
            "settings": self.settings,
            "dtype": self.dtype.name,
            "tokens": self.tokens.shape[1],
        }
        results["forward"] = self._measured(self.forward, inputs, repeats)
        if self.task["branches"] == 2:
            results["both_branches"] = self._measured(self.guided, inputs, repeats)
        stats = device.memory_stats() or {}
        results["peak_gb"] = stats.get("peak_bytes_in_use", 0) / GB
        self.weights = inputs = None  # the decoder's peak is its own
        self.vae_graph, _, vae = self._component("vae")
        latents = jax.random.normal(jax.random.key(3), tuple(self.task["latents"]), jnp.float32).astype(self.dtype)
        results["vae_decode"] = self._measured(self.decode, (vae, latents), repeats)
        return results

    def _measured(self, fn: Any, inputs: Any, repeats: int) -> dict[str, Any]:
        """Seconds of a compiled function, of compiling it, and the memory that the executable takes with its arguments."""
        from smartdiff_jax.stages.base import jit_in

        began = time.perf_counter()
        compiled = jit_in(self.dtype, fn).lower(*inputs).compile()
        seconds_to_compile = time.perf_counter() - began
        memory = compiled.memory_analysis()
        return {
            "seconds": time_calls(compiled, *inputs, seconds=IN_A_ROW, repeats=repeats),
            "compile_s": seconds_to_compile,
            "arguments_gb": memory.argument_size_in_bytes / GB,
            "above_arguments_gb": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / GB,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--model", choices=MODELS, help="measure this one here and print JSON")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--precision", choices=("full", "fp8"), default="full")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable, help="where torch and diffusers are, if elsewhere")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    if arguments.model:
        bench = Bench(problem(arguments.model, arguments.tiny), arguments.attention, arguments.precision)
        print(json.dumps(bench.run(arguments.repeats, arguments.commit)))
        return

    name = "images-tiny" if arguments.tiny else "images"
    results: dict[str, Any] = {"stamp": None, "models": {}}
    for model in arguments.models:
        row: dict[str, Any] = {"problem": problem(model, arguments.tiny)}
        if not arguments.no_peer:
            told = [json.dumps(row["problem"]), "--repeats", str(arguments.repeats)]
            row["diffusers"] = child([str(PEER), *told], arguments.peer_python)
        shared = ["--repeats", str(arguments.repeats), "--attention", arguments.attention]
        shared += ["--precision", arguments.precision]
        shared += ["--tiny"] * arguments.tiny + (["--commit", arguments.commit] if arguments.commit else [])
        row["ours"] = child([__file__, "--model", model, *shared])
        row["stamp"] = row["ours"].pop("stamp", None)
        results["stamp"] = row["stamp"] or results["stamp"]
        results["models"][model] = row
        print(model, *_lines(row), sep="\n    ", flush=True)
        if results["stamp"] is not None:
            file = result_file(name, results["stamp"])
            earlier = json.loads(file.read_text())["models"] if file.is_file() else {}
            print(write(name, results | {"models": earlier | results["models"]}), flush=True)


def _lines(row: dict[str, Any]) -> list[str]:
    """What a person wants to see of it."""
    lines = []
    for who in ("ours", "diffusers"):
        for what, found in row.get(who, {}).items():
            if what == "error":
                lines.append(f"{who}: {found}")
            elif isinstance(found, dict) and "seconds" in found:
                memory = found.get("peak_gb", found.get("arguments_gb", 0) + found.get("above_arguments_gb", 0))
                lines.append(f"{who:9} {what:22} {1e3 * found['seconds']['median']:9.2f} ms  {memory:6.2f} GB")
    return lines


if __name__ == "__main__":
    main()
