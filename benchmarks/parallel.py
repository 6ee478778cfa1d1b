"""Meshes at true size, random weights: Wan2.1-1.3B 832x480x81 and FLUX.1-dev 1024x1024 on one GPU and on several, in one run.

    python benchmarks/parallel.py --model wan             on 2 or more GPUs; every mesh of all of them (--devices: of the first)
    python benchmarks/parallel.py --model flux
    python benchmarks/parallel.py --model wan --tiny      anywhere, on 4 virtual devices, to see that it runs

Of each mesh a denoising step: seconds, speed-up, peak memory, and what the plan predicts. Where the missing part goes: a step
without attention, one attention on the mesh, its kernel alone on one device's share, and its messages alone, and with
--profile the kernels of a step. The links alone, and the decoder on one device and on all, with how far their pixels are
apart. Peaks of memory are of the process so far; a call of its own (--only MESH) measures the peak of one mesh; --only decoder
is the decoder alone.
Writes benchmarks/results/parallel-<model>-<device>.json after every measurement.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import Mesh, PartitionSpec  # noqa: E402

from benchmarks.measure import stamp, time_call, write  # noqa: E402
from smartdiff_jax.cache import POLICIES  # noqa: E402
from smartdiff_jax.config.system import MeshConfig, SystemConfig  # noqa: E402
from smartdiff_jax.engine.loading import LoadedModel, _lie_apart, _placement  # noqa: E402
from smartdiff_jax.engine.planning import _conditioning, _shapes, outline, workload  # noqa: E402
from smartdiff_jax.engine.profiling import by_kind, kernels_of, options  # noqa: E402
from smartdiff_jax.kernels import ATTENTION  # noqa: E402
from smartdiff_jax.kernels.base import QKV  # noqa: E402
from smartdiff_jax.models.family import Conditioning  # noqa: E402
from smartdiff_jax.samplers import SAMPLERS  # noqa: E402
from smartdiff_jax.samplers.base import MAX_STEPS  # noqa: E402
from smartdiff_jax.sharding.context_parallel import SEQUENCE, factorise, padded_length, ring_mode, wrap  # noqa: E402
from smartdiff_jax.sharding.layout import Layout  # noqa: E402
from smartdiff_jax.sharding.mesh import make_mesh  # noqa: E402
from smartdiff_jax.sharding.plan import plan_mesh  # noqa: E402
from smartdiff_jax.sharding.ulysses import split_heads, split_sequence  # noqa: E402
from smartdiff_jax.sharding.workload import Workload, mesh_of_numbers  # noqa: E402
from smartdiff_jax.stages.decode import Decode  # noqa: E402
from smartdiff_jax.stages.denoise import DenoiseLoop, steps_of_chunk  # noqa: E402
from smartdiff_jax.stages.guidance import GUIDANCE, combine_for  # noqa: E402
from smartdiff_jax.weights.apart import apart  # noqa: E402
from smartdiff_jax.weights.random_init import random_state  # noqa: E402
from smartdiff_jax.weights.residency import Resident  # noqa: E402

MODELS = {"wan": ("wan2.1-t2v-1.3b", "832x480x81"), "flux": ("flux1-dev", "1024x1024")}
TINY_VAE: dict[str, dict[str, Any]] = {
    "wan": dict(base_dim=8, num_res_blocks=1),
    "flux": dict(block_out_channels=(32,) * 4, layers_per_block=1),
}
TINY_DENOISER: dict[str, dict[str, Any]] = {
    "wan": dict(num_layers=2, num_attention_heads=4, ffn_dim=128),
    "flux": dict(num_layers=1, num_single_layers=1, num_attention_heads=4),
}
TINY_SIZE = {"wan": "64x64x5", "flux": "64x64"}


CHAIN = 8
"""Calls in a row, where one alone is so short that starting it would count."""


class WithoutAttention:
    """`Attend` that hands queries back: what is left of a step."""

    def pieces(self, picture, text):
        return None

    def fuse(self, place, *lengths):
        return None

    def for_length(self, num_tokens):
        return self

    def leaving_out(self, sparsity):
        return self

    def self_attention(self, tokens):
        return tokens.q

    def cross_attention(self, q, k, v, *, text_length=None):
        return q

    def text_attention(self, text, *, text_length=None, picture=0):
        return text.q

    def joint_attention(self, tokens, text, *, text_length=None):
        return tokens.q, text.q


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh to measure. ring: how keys and values get along the ring axis (MeshAttend), if not as is usual."""

    name: str
    mesh: MeshConfig
    ring: Any = None

    @property
    def gathers(self) -> bool:
        return self.mesh.ring > 1 and ring_mode(self.mesh.ring, self.ring) == "gather"


def cases(devices: int, heads: int, guided: bool) -> list[Case]:
    """On all devices, least memory first, then one device."""
    ring, ulysses = factorise(devices, heads)[0]
    other = "permute" if ring_mode(devices) == "gather" else "gather"
    most = f"ulysses={ulysses}" if ring == 1 else f"ring={ring} ulysses={ulysses}"
    found = [
        Case(f"{most} fsdp", MeshConfig(ring=ring, ulysses=ulysses, fsdp=True)),
        Case(most, MeshConfig(ring=ring, ulysses=ulysses)),
        Case(f"ring={devices}", MeshConfig(ring=devices)),
        Case(f"ring={devices} {other}", MeshConfig(ring=devices), other),
    ]
    if guided and devices % 2 == 0:
        ring, ulysses = factorise(devices // 2, heads)[0]
        name = " ".join(f"{axis}={size}" for axis, size in (("cfg", 2), ("ring", ring), ("ulysses", ulysses)) if size > 1)
        found.append(Case(name, MeshConfig(cfg=2, ring=ring, ulysses=ulysses)))
    return [*found, Case("one", MeshConfig())]


class Bench:
    """One model: its numbers and its work at one size."""

    def __init__(self, name: str, tiny: bool, attention: str, repeats: int, profile: Path | None):
        self.dtype = jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)
        known, self.size = MODELS[name]
        model = outline(known, self.dtype)
        if tiny:
            self.size = TINY_SIZE[name]
            model = shrunk(model, {"transformer": TINY_DENOISER[name], "vae": TINY_VAE[name]}, self.dtype)
        self.model, self.attention, self.repeats, self.profile = model, attention, repeats, profile
        self.work: Workload = workload(model, self.size)
        self.guided = self.work.branches > 1
        self.pixels: list[np.ndarray] = []

    def step(self, case: Case, attend: Any = None, trace: bool = False) -> dict[str, Any]:
        """Seconds of one denoising step, all branches of guidance, with the sampler, in chunks as long as the service's.
        call_s: of a chunk of no steps. peak_before_gb: of making the weights."""
        model, mesh = self.model, make_mesh(case.mesh)
        layout = Layout(mesh)
        if attend is None:
            attend = wrap(ATTENTION[self.attention], mesh, ring=case.ring, batch=layout.batch_axes)
        architecture = model.family.architectures["transformer"]
        place = _placement("transformer", mesh, case.mesh)
        weights = random_state(architecture, model.configs["transformer"], self.dtype, 0, place)
        if _lie_apart(model.family, SystemConfig.create(mesh=case.mesh)):
            weights = apart(weights)
        guidance = GUIDANCE["batched" if case.mesh.cfg > 1 else "sequential"](layout.as_branches)
        combine = combine_for(model.spec.sampling)
        loop = DenoiseLoop(model.denoiser_graph, attend, guidance, combine, self.dtype, layout)
        branches, tokens = self.inputs(layout)
        sampler, policy = SAMPLERS[model.spec.sampling.sampler], POLICIES["none"]()
        schedule = sampler.schedule(50, 3.0)
        scales = np.full(MAX_STEPS, 5.0 if self.guided else 1.0, np.float32)
        num_tokens = np.int32(self.work.tokens) if layout.padding(self.work.tokens) else None
        start, run = loop.functions(weights, tokens, branches, policy, sampler)
        carry = start(weights, tokens, branches, policy, sampler)

        def steps(count, carry):
            began = time.perf_counter()
            bounds = np.int32(0), np.int32(count), np.int32(0)
            carry = run(weights, carry, branches, schedule, scales, policy, sampler, *bounds, num_tokens)
            jax.block_until_ready(carry)
            return (time.perf_counter() - began) / max(count, 1), carry

        before, known = peak_gb(mesh), set(map(id, mesh.devices.flat[0].client.live_executables()))
        first, carry = steps(1, carry)
        second, carry = steps(1, carry)
        chunk = steps_of_chunk(second)
        seconds, empty = [], []
        for _ in range(self.repeats):
            of_one, carry = steps(chunk, carry)
            seconds.append(of_one)
            of_none, carry = steps(0, carry)
            empty.append(of_none)
        traced = {}
        if trace and self.profile:
            folder = self.profile / case.name.replace("=", "").replace(" ", "-")
            with jax.profiler.trace(str(folder), profiler_options=options()):
                _, carry = steps(1, carry)
            traced = {"kernels_ms": by_kind(kernels_of(folder))}
        return {
            "compile_and_first_s": first,
            "chunk": chunk,
            "call_s": float(np.median(empty)),
            "median": float(np.median(seconds)),
            "min": min(seconds),
            "max": max(seconds),
            "peak_gb": peak_gb(mesh),
            "peak_before_gb": before,
            "program_gb": program_gb(mesh, known),
        } | traced

    def inputs(self, layout: Layout) -> tuple[Conditioning, jax.Array]:
        count = 2 if self.guided else 1
        random = np.random.default_rng(0)

        def fill(leaf):
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                return np.full((count, *leaf.shape), self.work.text or 512, leaf.dtype)
            return random.standard_normal((count, *leaf.shape), np.float32).astype(leaf.dtype)

        shapes = _conditioning(self.model, self.model.patches.grid(self.work.latent_shape))
        fields = {name: jax.tree.map(fill, shape) for name, shape in shapes.items()}
        rope = layout.place_rope(tuple(np.asarray(half) for half in fields.pop("rope")))
        branches = Conditioning(rope=rope, **jax.device_put(fields, layout.replicated))
        tokens = random.standard_normal((1, self.work.tokens, self.work.features), np.float32)
        return branches, jax.device_put(np.asarray(layout.pad_tokens(tokens)), layout.tokens)

    def attention_parts(self, case: Case) -> dict[str, Any]:
        """Seconds of one attention: on the mesh; the kernel on a device's share alone; the messages alone."""
        calls, mesh = self.work.split_attention[0], make_mesh(case.mesh)
        pieces = case.mesh.ring * case.mesh.ulysses
        length = padded_length(self.work.tokens + calls.text, mesh)
        attend = wrap(ATTENTION[self.attention], mesh, ring=case.ring)
        kernel = ATTENTION[self.attention]
        heads, queries = calls.heads // case.mesh.ulysses, length // case.mesh.ring
        keys = length if case.gathers else queries
        q, k, v = (self.normal(1, rows, heads, calls.head_dim) for rows in (queries, keys, keys))
        turns = 1 if case.gathers else case.mesh.ring
        placed = jax.NamedSharding(mesh, PartitionSpec(None, SEQUENCE))
        whole = [jax.device_put(self.normal(1, length, calls.heads, calls.head_dim), placed) for _ in range(3)]
        return {
            "attention": self.chained(lambda q, k, v: attend.self_attention(QKV(q, k, v)), *whole),
            "kernel": {
                name: turns * value
                for name, value in self.chained(lambda q, k, v: kernel(q, k, v, with_lse=turns > 1)[0], q, k, v).items()
            },
            "messages": self.chained(messages(mesh, case), *whole),
            "calls": sum(calls.count for calls in self.work.split_attention) * self.work.branches,
            "pieces": pieces,
        }

    def links(self, devices: int) -> dict[str, Any]:
        """Seconds of one collective over all devices, by its kind and the bytes that a device sends."""
        mesh = make_mesh(MeshConfig(ulysses=devices))
        onward = [(device, (device + 1) % devices) for device in range(devices)]
        kinds = {
            "permute": lambda x: lax.ppermute(x, "ulysses", onward),
            "all_to_all": lambda x: lax.all_to_all(x, "ulysses", split_axis=0, concat_axis=0, tiled=True),
        }
        spec, found = PartitionSpec("ulysses"), {}
        for kind, local in kinds.items():
            run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
            for megabytes in (1, 8, 64):
                rows = devices * (devices if kind == "all_to_all" else 1)
                sent = megabytes << 20
                row = sent // (devices - 1) if kind == "all_to_all" else sent
                x = jax.device_put(self.normal(rows, row // self.dtype.itemsize), jax.NamedSharding(mesh, spec))
                found[f"{kind} {sent}"] = self.chained(run, x)
        return found

    def normal(self, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, self.dtype)

    def chained(self, fn: Any, *args: Any) -> dict[str, float]:
        """Seconds of fn(*args) where it is not waited for: one of CHAIN calls in a row, on the same arguments."""

        def body(_, carry):
            args, _ = carry
            # The next call waits for this one, at no cost.
            return lax.optimization_barrier((args, fn(*args)))

        def run(*args):
            return lax.fori_loop(0, CHAIN, body, (args, fn(*args)))[1]

        found = time_call(jax.jit(run), *args, warmup=1, repeats=self.repeats)
        return {name: value / (1 + CHAIN) for name, value in found.items()}

    def decode(self, devices: int) -> dict[str, Any]:
        config = MeshConfig(ring=devices)
        mesh = make_mesh(config)
        place = _placement("vae", mesh, config)
        architecture = self.model.family.architectures["vae"]
        weights = random_state(architecture, self.model.configs["vae"], self.dtype, 0, place)
        stage = Decode(self.model.vae[0], Resident(weights), self.dtype, Layout(mesh))
        latents = np.random.default_rng(0).standard_normal(self.work.latent_shape, np.float32)
        row = time_call(stage, latents, repeats=self.repeats) | {"peak_gb": peak_gb(mesh)}
        self.pixels.append(np.asarray(stage(latents), np.float64))
        return row

    def psnr(self) -> float | None:
        """Decibels between the last two decoded outputs, of 255 levels; None where they are equal."""
        error = float(np.mean(np.square(self.pixels[-1] - self.pixels[-2])))
        return float(10 * np.log10(255**2 / error)) if error else None


def messages(mesh: Mesh, case: Case) -> Any:
    """What one attention sends, and nothing else: Ulysses there and back, keys and values around the ring or gathered."""
    ring, ulysses = case.mesh.ring, case.mesh.ulysses

    def local(q, k, v):
        def along_ring(stream):
            out, *kv = stream
            if case.gathers:
                kv = [lax.all_gather(x, "ring", axis=1, tiled=True)[:, : out.shape[1]] for x in kv]
            else:
                for _ in range(ring - 1):
                    kv = [lax.ppermute(x, "ring", [(device, (device + 1) % ring) for device in range(ring)]) for x in kv]
            # Only looked at, so that nothing is left out and nothing else is computed.
            return out + kv[0] + kv[1]

        stream = QKV(q, k, v)
        if ulysses == 1:
            return along_ring(stream)
        return split_sequence(along_ring(QKV(*(split_heads(x, "ulysses") for x in stream))), "ulysses")

    spec = PartitionSpec(None, SEQUENCE)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def shrunk(model: LoadedModel, changes: dict[str, dict[str, Any]], dtype: Any) -> LoadedModel:
    """The same architecture with other numbers."""
    configs = model.configs | {name: model.configs[name].model_copy(update=fields) for name, fields in changes.items()}
    nowhere = mesh_of_numbers(MeshConfig())
    parts = {name: _shapes(model.family.architectures[name], configs[name], dtype, nowhere) for name in changes}
    graph, weights = parts["transformer"]
    return dataclasses.replace(model, configs=configs, denoiser_graph=graph, denoisers=[weights], vae=parts["vae"])


def peak_gb(mesh: Mesh) -> list[float] | None:
    """Of each device, of the process so far; None where devices do not tell."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    return [entry["peak_bytes_in_use"] / 1e9 for entry in stats] if all(stats) else None


def program_gb(mesh: Mesh, known: set[int]) -> dict[str, float]:
    """What the largest executable needs of a device by its own account, of those that are not `known` by their ids."""
    found = [each for each in mesh.devices.flat[0].client.live_executables() if id(each) not in known]
    stats = [each.get_compiled_memory_stats() for each in found]
    largest = max(stats, key=lambda each: each.temp_size_in_bytes)
    results = largest.output_size_in_bytes - largest.alias_size_in_bytes
    return {"arguments": largest.argument_size_in_bytes / 1e9, "besides": (largest.temp_size_in_bytes + results) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--devices", type=int, help="use the first so many; all")
    parser.add_argument("--only", nargs="+", metavar="MESH", help="steps on these alone; on one, for its peak memory")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", type=Path, help="write a trace of a step of every mesh into this folder")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    if arguments.tiny:
        jax.config.update("jax_num_cpu_devices", 4)
    devices = arguments.devices or jax.device_count()
    bench = Bench(arguments.model, arguments.tiny, arguments.attention, arguments.repeats, arguments.profile)
    name = "-".join(["parallel", arguments.model, *(["tiny"] if arguments.tiny else [])])
    if arguments.only:
        name += "".join(f"-{only.replace('=', '').replace(' ', '-')}" for only in arguments.only)
    results: dict[str, Any] = {
        "stamp": stamp(arguments.commit),
        "model": bench.work.model,
        "size": bench.size,
        "devices": devices,
        "dtype": bench.dtype.name,
        "meshes": {},
    }

    def note(what: str, row: dict[str, Any]) -> None:
        print(what, json.dumps(row), flush=True)
        write(name, results)

    found = cases(devices, bench.work.num_heads, bench.guided) if devices > 1 else [Case("one", MeshConfig())]
    known = [*(case.name for case in found), "decoder"]
    for only in arguments.only or ():
        if only not in known:
            raise SystemExit(f"--only {only!r}: choose of {', '.join(known)}")
    for case in [case for case in found if case.name in (arguments.only or known)]:
        plan = plan_mesh(bench.work, case.mesh)
        row: dict[str, Any] = {
            "step": bench.step(case, trace=True),
            "predicted_s": plan.step(),
            "predicted_gb": plan.peak / 1e9,
        }
        row |= {"predicted_parts_s": plan.seconds, "predicted_bytes": plan.traffic}
        results["meshes"][case.name] = row
        note(case.name, row)
        if not case.mesh.fsdp and not arguments.only:
            # The same on every mesh that splits tokens.
            if case.mesh.ring == 1:
                row["without_attention"] = bench.step(case, WithoutAttention())
            if case.mesh.cfg == 1 and case.mesh.num_devices > 1:
                row["attention"] = bench.attention_parts(case)
            note(f"{case.name}, parts", {part: row[part] for part in ("without_attention", "attention") if part in row})
    if "one" in results["meshes"]:
        single = results["meshes"]["one"]["step"]["median"]
        for row in results["meshes"].values():
            row["speed_up"] = single / row["step"]["median"]
        note("speed-up", {name: row["speed_up"] for name, row in results["meshes"].items()})
    if "decoder" not in (arguments.only or known):
        return
    if devices > 1 and not arguments.only:
        results["links"] = bench.links(devices)
        note("links", results["links"])
    results["decode"] = {str(count): bench.decode(count) for count in sorted({1, devices}, reverse=True)}
    results["decode"]["speed_up"] = results["decode"]["1"]["median"] / results["decode"][str(devices)]["median"]
    results["decode"]["psnr_db"] = bench.psnr() if devices > 1 else None
    note("decode", results["decode"])


if __name__ == "__main__":
    main()
