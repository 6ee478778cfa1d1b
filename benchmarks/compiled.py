"""What a denoising step compiles to for H100s, on a machine without one: memory, kernels, and the bytes that they move.

    python benchmarks/compiled.py --model flux1-dev                          needs jax[cuda13], as smartdiff_jax[cuda] brings it
    python benchmarks/compiled.py --model wan2.1-t2v-14b --size 1280x720x81 --mesh examples/mesh-4gpu.yaml
    python benchmarks/compiled.py --model flux1-dev --xla xla_gpu_enable_triton_gemm=True

XLA and ptxas are those of a GPU. Only what XLA chooses by measuring is not chosen, which of cuBLAS' algorithms a product takes.
So nothing here is a time. A kernel's bytes over the memory's bandwidth are the least time that it can take, and show where a
step reads and writes more than it must.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory."""

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

ITEM_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1}
FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "while", "conditional", "call"}


@dataclasses.dataclass
class Kernels:
    """Those of one name, source and shape."""

    name: str
    source: str
    shape: str
    count: int = 0
    bytes: int = 0


def kernels_of(hlo: str) -> tuple[list[Kernels], collections.Counter[str]]:
    """Of the computation that launches most of them (the blocks' loop, or a step where blocks lie apart): kernels, most bytes
    first, and how many products have which epilogue. hlo: an optimised module's text."""
    bodies = re.findall(r"^(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    launches = max(bodies, key=lambda body: len(re.findall(r" (?:fusion|custom-call|copy)\(", body)))
    shapes: dict[str, str] = {}
    found: dict[tuple[str, str, str], Kernels] = {}
    epilogues: collections.Counter[str] = collections.Counter()
    for line in launches.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if instruction is None:
            continue
        name, shape, operation, rest = instruction.groups()
        shapes[name] = shape
        if operation in FREE:
            continue
        epilogues.update(re.findall(r'"epilogue":"(\w+)"', line))
        called = re.search(r'custom_call_target="([^"]+)"', line)
        source = re.search(r'op_name="([^"]*)"', line)
        key = (
            called[1] if called else re.sub(r"[.\d]+$", "", name),
            source[1].rsplit("/", 1)[-1] if source else "",
            re.sub(r"\{[\d,]*\}", "", shape),
        )
        row = found.setdefault(key, Kernels(*key))
        row.count += 1
        row.bytes += sum(map(_bytes, [shape, *(shapes.get(operand, "") for operand in re.findall(r"%([\w.\-]+)", rest))]))
    return sorted(found.values(), key=lambda row: -row.bytes), epilogues


def _bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        number = ITEM_BYTES.get(dtype, 0)
        for size in sizes.split(",") if sizes else ():
            number *= int(size)
        total += number
    return total


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What asks for the device's kind is told of an H100. JAX itself wants a GPU before it compiles for one
    (jax-ml/jax issue 23971), which is why this reaches into it."""
    import jax
    from jax._src import xla_bridge

    from smartdiff_jax.kernels import hopper

    name_of = xla_bridge.canonicalize_platform

    def canonical(platform: str) -> str:
        return "cuda" if platform in ("gpu", "cuda") else name_of(platform)

    with (
        mock.patch.object(xla_bridge, "canonicalize_platform", canonical),
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(hopper, "_is_hopper", lambda: True),
    ):
        yield


def compile_step(model_name: str, size: str | None, system: Any, options: dict[str, Any]) -> Any:
    """One denoising step of a known model with its sampler and no cache, compiled for as many H100s as the mesh has."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from smartdiff_jax.cache import POLICIES
    from smartdiff_jax.engine.announced import sparse_kernel
    from smartdiff_jax.engine.loading import _lie_apart, _placement
    from smartdiff_jax.engine.planning import _conditioning, outline, workload
    from smartdiff_jax.kernels import ATTENTION
    from smartdiff_jax.models.family import Conditioning
    from smartdiff_jax.samplers import SAMPLERS
    from smartdiff_jax.samplers.base import MAX_STEPS
    from smartdiff_jax.sharding.context_parallel import wrap
    from smartdiff_jax.sharding.layout import Layout
    from smartdiff_jax.sharding.mesh import make_mesh
    from smartdiff_jax.sharding.weights import is_stacked
    from smartdiff_jax.stages.base import COMPILER_OPTIONS
    from smartdiff_jax.stages.denoise import DenoiseLoop
    from smartdiff_jax.stages.guidance import GUIDANCE, combine_for
    from smartdiff_jax.weights.fp8 import are_fused, to_fp8
    from smartdiff_jax.weights.stream import dotted

    jax.devices("cpu")  # plugins are registered with the first backend
    number = system.mesh.num_devices
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x{number}x1")
    mesh = make_mesh(system.mesh, list(topology.devices))
    layout, model = Layout(mesh), outline(model_name, jnp.bfloat16)
    work = workload(model, size)

    graphdef, weights = model.denoiser_graph, model.denoisers[0]
    if system.precision == "fp8":
        graphdef, weights = to_fp8(graphdef, weights, fused=are_fused(mesh))
    place, apart = _placement("transformer", mesh, system.mesh), _lie_apart(model.family, system)

    def placed(path: tuple, variable: Any) -> Any:
        leaf, name = variable.get_value(), dotted(path)
        sharding = place(name, leaf.shape)
        if not (apart and is_stacked(name)):
            return variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
        of_block = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        block = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=of_block)
        return variable.replace((block,) * leaf.shape[0])

    weights = nnx.from_flat_state([(path, placed(path, variable)) for path, variable in nnx.to_flat_state(weights)])

    def whole(leaf: Any, sharding: Any = layout.replicated) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    fields = _conditioning(model, model.patches.grid(work.latent_shape))
    fields = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((work.branches, *leaf.shape), leaf.dtype), fields)
    split = NamedSharding(mesh, PartitionSpec(None, None, ("ring", "ulysses")))
    padded = work.tokens + layout.padding(work.tokens)
    rope = tuple(
        jax.ShapeDtypeStruct((*half.shape[:2], padded, *half.shape[3:]), half.dtype, sharding=split)
        for half in fields.pop("rope")
    )
    branches = Conditioning(rope=rope, **jax.tree.map(whole, fields))
    tokens = jax.ShapeDtypeStruct((1, padded, work.features), jnp.float32, sharding=layout.tokens)

    sampling = model.spec.sampling
    sparse = sparse_kernel(system, model.dtype)
    attend = wrap(ATTENTION[system.attention], mesh, batch=layout.batch_axes, sparse=sparse)
    guidance = GUIDANCE["batched" if system.mesh.cfg > 1 else system.guidance](layout.as_branches)
    loop = DenoiseLoop(graphdef, attend, guidance, combine_for(sampling), model.dtype, layout)
    sampler, policy = SAMPLERS[sampling.sampler], POLICIES["none"]()
    schedule = sampler.schedule(50, 3.0)
    scales = np.full(MAX_STEPS, 5.0, np.float32)
    bounds = np.int32(0), np.int32(1), np.int32(0)
    num_tokens = np.int32(work.tokens) if layout.padding(work.tokens) else None
    sparsity = None if sparse is None else np.float32(0.5)
    carry = jax.eval_shape(loop._start, weights, tokens, branches, policy, sampler)
    placements = layout.carry(carry, padded)
    carry = jax.tree.map(whole, carry, placements)
    run = jax.jit(loop._run, donate_argnums=1, out_shardings=placements, compiler_options=COMPILER_OPTIONS | options)
    rest = jax.tree.map(
        lambda leaf: whole(np.asarray(leaf)), (schedule, scales, policy, sampler, *bounds, num_tokens, sparsity)
    )
    # Kernels in Pallas ask the mesh in context which GPU they are for; an explicit one would be asked about every array.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = run.lower(weights, carry, branches, *rest)
    return lowered.compile()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a known name")
    parser.add_argument("--size", help="832x480x81, 1024x1024; the model's default if not given")
    parser.add_argument("--mesh", type=Path, help="YAML file of system parameters")
    parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE", help="an option of XLA's")
    parser.add_argument("--rows", type=int, default=20, help="of the table")
    parser.add_argument("--hlo", type=Path, help="where the optimised module's text goes")
    told = parser.parse_args(arguments)
    options = dict(option.split("=", 1) for option in told.xla)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise SystemExit("compiled needs JAX's plugin for CUDA, no GPU: install smartdiff_jax[cuda]")
    with tempfile.TemporaryDirectory() as dumped:
        # Read by XLA and by Mosaic when they are loaded.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        os.environ |= {"MOSAIC_GPU_DUMP_TO": dumped, "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
        from smartdiff_jax.config.system import SystemConfig

        system = SystemConfig.create() if told.mesh is None else SystemConfig.from_file(told.mesh)
        with as_on_a_gpu():
            compiled = compile_step(told.model, told.size, system, options)
        assembled = [file.read_text() for file in Path(dumped).glob("*.ptxas")]
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if told.hlo is not None:
        told.hlo.write_text(text)
    above = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"on each device: arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, above them {above / 1e9:.2f} GB")
    for told_of_kernel in assembled:
        print("Mosaic kernel:", *re.findall(r"Used \d+ registers|\d+ bytes spill \w+|C75\d\d.*", told_of_kernel), sep=", ")
    rows, epilogues = kernels_of(text)
    print(f"{sum(row.count for row in rows)} kernels; epilogues of products: {dict(epilogues) or 'none by cuBLAS'}")
    for row in rows[: told.rows]:
        print(
            f"{row.count:4} x {row.bytes / row.count / 1e6:9.2f} MB {row.bytes / BANDWIDTH * 1e3:8.3f} ms  "
            f"{row.name[:28]:28} {row.source[:26]:26} {row.shape[:60]}"
        )


if __name__ == "__main__":
    main()
