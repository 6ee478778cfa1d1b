"""A prompt to a file: every model whole, text encoders included, at true size with random weights, and diffusers beside it.

    python benchmarks/end_to_end.py                                           the models of MODELS, on a GPU
    python benchmarks/end_to_end.py --models wan2.1-t2v-1.3b --steps 20       one of them, fewer steps than its default
    python benchmarks/end_to_end.py --kernels auto pallas_sage+fp8            each, without a cache and with one
    python benchmarks/end_to_end.py --tiny                                    anywhere, to see that it runs

`smartdiff bench end-to-end` is the same. Size, guidance and sampler are each model's defaults. Kernels are attention's by name,
and with +fp8 the blocks' products are in 8 bits too (SystemConfig: attention, precision). Of each, without a cache and at every
--cache-ratio: seconds from the prompt to the file and of each stage, and the share of a product of large matrices, measured
in the same process, that denoising reaches by the model's own arithmetic. Where a step's time goes, by its kernels. The
first picture of a fresh process, once with nothing compiled and once with all of it on disk.
diffusers, where torch, diffusers and transformers are, runs in a process of its own before: the same size, steps, guidance,
dtype and lengths of text, eager and with its blocks compiled, to pixels on the host. Where cache-dit is too, diffusers once
more with it, at every --cache-ratio, which skips as many steps as ours.

Pictures of random weights mean nothing and take the same time; a clip's file takes longer to write, as noise does.
Writes benchmarks/results/end-to-end-<device>.json after every model; those measured before on that device are kept.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import child, result_file, stamp, time_calls, write  # noqa: E402
from benchmarks.random_model import problem, prompt_of, random_model  # noqa: E402

PEERS = ROOT / "benchmarks" / "peers"
MODELS = ("wan2.1-t2v-1.3b", "flux1-dev", "flux2-klein-4b", "qwen-image", "z-image")
TRACED = 4
"""Steps that are traced, after one that is not."""

MEMORY_SHARE = "0.94"
"""Of the card, that JAX may use: its own three quarters are too few for Qwen-Image with its text encoder."""


class Bench:
    """One model in place, and what is measured of it."""

    def __init__(self, task: dict[str, Any], arguments: argparse.Namespace):
        import jax

        from smartdiff_jax.config.system import SystemConfig

        self.task, self.repeats, self.folder = task, arguments.repeats, Path(arguments.cache)
        self.system = SystemConfig.create(cache_dir=self.folder, **fields_of(arguments.kernels[0]))
        imported = time.perf_counter()
        jax.devices()
        device = time.perf_counter()
        self.model = random_model(task, self.system)
        ready = time.perf_counter()
        self.prompt = prompt_of(self.model, task)
        self.starts = {"imports_s": imported - STARTED, "device_s": device - imported, "weights_s": ready - device}

    def pipeline(self, kernels: str) -> Any:
        """With these kernels. The denoiser is made anew where its weights are others: both would not fit."""
        from smartdiff_jax.engine.pipeline import Pipeline

        system = self.system.model_copy(update=fields_of(kernels))
        if system.precision != self.system.precision:
            self.model = dataclasses.replace(self.model, denoisers=[])
            made = random_model(self.task, system, only=("transformer", "transformer_2"))
            self.model = dataclasses.replace(self.model, denoiser_graph=made.denoiser_graph, denoisers=made.denoisers)
        self.system = system
        return Pipeline(self.model, system)

    def request(self, **more: Any) -> Any:
        from smartdiff_jax.config.request import GenerateParams

        fields = {"prompt": self.prompt, "negative_prompt": f"not {self.prompt}"} if self.task["branches"] == 2 else {}
        fields |= {"prompt": self.prompt, "size": [self.task["sampling"][side] for side in ("width", "height")]}
        fields |= {name: self.task["sampling"][name] for name in ("num_frames", "num_inference_steps")}
        return GenerateParams.create(**fields | {"seed": 0} | more)

    def once(self, pipe: Any, request: Any) -> tuple[dict[str, float], Any]:
        """Seconds of a request until its file is written, in all and by stage; and its report."""
        pipe.forget_prompts()
        began = time.perf_counter()
        *_, output = pipe.stream(request)
        made = time.perf_counter()
        output.save(self.folder / ("clip.mp4" if self.task["task"] == "t2v" else "picture.png"))
        done = time.perf_counter()
        stages = output.report.seconds | {"media": done - made}
        whole = {"total": done - began, "pixels": made - began}
        return whole | {name: stages[name] for name in ("text", "denoise", "decode", "media")}, output.report

    def first_picture(self) -> dict[str, Any]:
        """From the start of the process."""
        stages, _ = self.once(self.pipeline(name_of(self.system)), self.request())
        return self.starts | {"request_s": stages, "process_to_first_picture_s": time.perf_counter() - STARTED}

    def setting(self, pipe: Any, ratio: float | None) -> dict[str, Any]:
        """Of one kernel, without a cache or at a ratio."""
        import jax

        request = self.request() if ratio is None else self.request(cache="auto", cache_ratio=ratio)
        for event in pipe.stream(request, output_type="latent"):
            if getattr(event, "stage", "") == "denoise":
                break  # the first chunk compiles
        runs = [self.once(pipe, request) for _ in range(self.repeats)]
        report = runs[-1][1]
        stages = {name: _spread([seconds[name] for seconds, _ in runs]) for name in runs[0][0]}
        flop = self.flop * (1 - report.cache["ratio"])
        return {
            **{name: {"seconds": stages.pop(name)} for name in ("total", "pixels")},
            "stages": {name: {"seconds": seconds} for name, seconds in stages.items()},
            "policy": report.cache["policy"],
            "skipped": report.cache["ratio"],
            "tflops": flop / stages["denoise"]["median"] / 1e12,
            "denoiser_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.denoisers)) / 1e9,
            "peak_gb": report.peak_memory / 1e9,
        }

    def step(self, pipe: Any) -> dict[str, Any]:
        """Milliseconds a step by kind of kernel, from a trace."""
        import jax

        from smartdiff_jax.engine.profiling import by_kind, kernels_of, options, written_in_memory

        steps = 1 + TRACED
        with tempfile.TemporaryDirectory() as folder:
            for event in pipe.stream(self.request(num_inference_steps=steps), output_type="latent"):
                if getattr(event, "stage", "") == "denoise" and event.done == 1:
                    jax.profiler.start_trace(folder, profiler_options=options())
                if getattr(event, "stage", "") == "denoise" and event.done == steps:
                    jax.profiler.stop_trace()
            (kinds,) = by_kind(kernels_of(Path(folder), written_in_memory())).values()
        return {kind: milliseconds / TRACED for kind, milliseconds in kinds.items()}

    def run(self, kernels: Sequence[str], ratios: Sequence[float], commit: str | None) -> dict[str, Any]:
        """Everything, and the first picture on the way. A kernel that does not serve the model says why."""
        import jax

        from smartdiff_jax.cache.auto import FEW_STEPS
        from smartdiff_jax.errors import InvalidConfig, Unsupported

        if self.task["sampling"]["num_inference_steps"] <= FEW_STEPS:
            ratios = ()  # of so few `auto` skips none
        found: dict[str, Any] = {"stamp": stamp(commit), "dtype": self.model.dtype.name, "first": self.first_picture()}
        found |= self.work()
        found["settings"] = {}
        for kernel in kernels:
            pipe = None  # its weights are let go before others are made
            try:
                pipe = self.pipeline(kernel)
                *_, _ = pipe.stream(self.request(num_inference_steps=2))  # compiles
                for ratio in (None, *ratios):
                    name = kernel if ratio is None else f"{kernel}, cache_ratio {ratio:g}"
                    row = found["settings"][name] = self.setting(pipe, ratio)
                    row["of_product"] = row["tflops"] / found["product"]["tflops"]
                    print(name, json.dumps(row), file=sys.stderr, flush=True)
                found["settings"][kernel]["step_ms"] = self.step(pipe)
            except (Unsupported, InvalidConfig) as error:
                found["settings"][kernel] = {"unsupported": str(error)}
            except jax.errors.JaxRuntimeError as error:  # out of memory, say: the others are told still
                found["settings"].setdefault(kernel, {})["error"] = str(error)[:500]
        stats = jax.devices()[0].memory_stats() or {}
        return found | {"peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9}

    def work(self) -> dict[str, Any]:
        """The model's arithmetic and weights, and what a product of large matrices reaches here."""
        import jax
        import jax.numpy as jnp

        from smartdiff_jax.config.system import MeshConfig
        from smartdiff_jax.engine.planning import workload
        from smartdiff_jax.sharding.plan import attention_flop

        # Stacks again, as shapes: weights that lie apart are not counted.
        sampling = self.task["sampling"]
        size = "x".join(str(sampling[name]) for name in ("width", "height", "num_frames")[: 3 - (self.task["task"] == "t2i")])
        work = workload(self.shapes(), size)
        attention = attention_flop(work, MeshConfig())
        products = work.matmul_per_token * work.tokens + work.matmul_fixed
        evaluations = sampling["num_inference_steps"] * self.task["branches"]
        self.flop = evaluations * (attention + products)
        side = 8192 if jax.default_backend() == "gpu" else 512
        a, b = (jax.random.normal(jax.random.key(n), (side, side)).astype(self.model.dtype) for n in range(2))
        seconds = time_calls(jax.jit(jnp.matmul), a, b)
        return {
            "tokens": work.tokens,
            "flop_of_an_evaluation": {"attention": attention, "matmuls": products},
            "weights_gb": {
                name: sum(leaf.size * leaf.itemsize for leaf in leaves) / 1e9 for name, leaves in work.parameters.items()
            },
            "product": {"side": side, "seconds": seconds, "tflops": 2 * side**3 / seconds["median"] / 1e12},
        }

    def shapes(self) -> Any:
        """The model without weights, told how much text it has."""
        model = random_model(self.task, self.system.model_copy(update={"precision": "full"}), only=("none",))
        lengths = {source.tokenizer: self.task["text"][source.encoder] for source in model.family.text}
        return dataclasses.replace(model, max_text_lengths=lengths)


def fields_of(kernels: str) -> dict[str, str]:
    """Of SystemConfig."""
    attention, _, precision = kernels.partition("+")
    return {"attention": attention, "precision": precision or "full"}


def name_of(system: Any) -> str:
    return system.attention + ("" if system.precision == "full" else f"+{system.precision}")


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def measured(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model in processes of its own: the peer, ours, and ours once more with all compiled."""
    from smartdiff_jax.cache.auto import FEW_STEPS

    task = problem(model, arguments.tiny, arguments.steps)
    row: dict[str, Any] = {"problem": task}
    if not arguments.no_peer:
        told, no_eager = [json.dumps(task), "--repeats", str(arguments.repeats)], ["--no-eager"] * arguments.no_eager
        peers = {"diffusers": (PEERS / "diffusers_end_to_end.py", no_eager)}
        can_skip = bool(arguments.cache_ratio) and task["sampling"]["num_inference_steps"] > FEW_STEPS
        if can_skip and _has(arguments.peer_python, "cache_dit"):
            ratios = ["--cache-ratio", *map(str, arguments.cache_ratio)]
            peers["cache-dit"] = PEERS / "cache_dit_end_to_end.py", ratios
        for peer, (file, more) in peers.items():
            row[peer] = child([str(file), *told, *more], arguments.peer_python)
            _tell(model, peer, row[peer])
    shared = ["--model", model, "--repeats", str(arguments.repeats)] + ["--tiny"] * arguments.tiny
    shared += ["--kernels", *arguments.kernels]
    shared += [word for ratio in arguments.cache_ratio for word in ("--cache-ratio", str(ratio))]
    given = {"--steps": arguments.steps, "--commit": arguments.commit}
    shared += [str(word) for name, value in given.items() if value for word in (name, value)]
    with tempfile.TemporaryDirectory() as cache:
        row["ours"] = child([__file__, *shared, "--cache", cache])
        row["stamp"], row["cold_start"] = (row["ours"].pop(name, None) for name in ("stamp", "first"))
        _tell(model, "ours", row["ours"])
        if row["stamp"] is not None:
            row["second_start"] = child([__file__, *shared, "--cache", cache, "--start-only"])
            for name in ("cold_start", "second_start"):
                print(model, name, json.dumps(row[name]), flush=True)
    return row


def _has(python: str, module: str) -> bool:
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", found]).returncode == 0


def _tell(model: str, who: str, found: dict[str, Any]) -> None:
    """What a person wants to see of it."""
    print(model, who, found["error"] if "error" in found else "", flush=True)
    for name, row in found.get("settings", {}).items():
        if "total" not in row:
            print(f"    {name:28} {row}")
            continue
        stages = "  ".join(f"{stage} {one['seconds']['median']:.3f}" for stage, one in row["stages"].items())
        print(f"    {name:28} {row['total']['seconds']['median']:9.3f} s  {stages}  {row['peak_gb']:.1f} GB", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="any known model that is not bundled")
    parser.add_argument("--model", help="measure this one here and print JSON")
    parser.add_argument("--steps", type=int, help="each model's default, if not given")
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="attention by name, +fp8 for products in 8 bits too")
    parser.add_argument("--cache-ratio", type=float, action="append", help="0.5, if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small models, ten steps")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-eager", action="store_true", help="of the peer its compiled blocks alone, to save time")
    parser.add_argument("--peer-python", default=sys.executable, help="where torch and diffusers are, if elsewhere")
    parser.add_argument("--cache", help="folder of compiled programs, of a --model")
    parser.add_argument("--start-only", action="store_true", help="of a --model: the first picture alone")
    parser.add_argument("--output", type=Path, help="where the result goes instead")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args(given)
    arguments.cache_ratio = [0.5] if arguments.cache_ratio is None else arguments.cache_ratio
    arguments.steps = arguments.steps or (10 if arguments.tiny else None)
    if arguments.model:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
        bench = Bench(problem(arguments.model, arguments.tiny, arguments.steps), arguments)
        if arguments.start_only:
            print(json.dumps(bench.first_picture()))
        else:
            print(json.dumps(bench.run(arguments.kernels, arguments.cache_ratio, arguments.commit)))
        return

    name = "end-to-end-tiny" if arguments.tiny else "end-to-end"
    results: dict[str, Any] = {"stamp": None, "models": {}}
    for model in arguments.models:
        row = results["models"][model] = measured(model, arguments)
        if row["stamp"] is not None:
            results["stamp"] = row["stamp"]
            file = arguments.output or result_file(name, results["stamp"])
            earlier = json.loads(file.read_text())["models"] if file.is_file() else {}
            print(write(name, results | {"models": earlier | results["models"]}, file), flush=True)


if __name__ == "__main__":
    main()
