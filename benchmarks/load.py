"""How long it takes to load a denoiser from a local folder of safetensors, against just reading the bytes.

    python benchmarks/load.py --folder /somewhere/with/room            24 GB of random bfloat16 weights, written once
    python benchmarks/load.py --folder /tmp/load --tiny                anywhere, to see that it runs

The folder holds Qwen-Image's transformer with as many blocks as fill `--gb`, in shards as publishers cut them. Both are
measured with the files' pages dropped from memory before (cold), and right after (warm). Writes
benchmarks/results/load-<device>.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402

SHARD_BYTES = 5_000_000_000
BUFFER_BYTES = 64 << 20
GB = 1e9
TINY = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}


def keys_and_shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, block by block, as publishers order them."""
    import jax

    from smartdiff_jax.models.qwen_image import ARCHITECTURE
    from smartdiff_jax.training.export import rule_for
    from smartdiff_jax.training.state import Component

    shapes = jax.eval_shape(lambda: Component.create(ARCHITECTURE, config, "float32").init(0))
    rules = {path: rule_for(ARCHITECTURE, path)[1] for path in shapes}
    stacked = {path for path, key in rules.items() if "{layer}" in key}
    for layer in range(-1, config.num_layers):
        for path, leaf in shapes.items():
            if (path in stacked) == (layer >= 0):
                shape = leaf.shape[1:] if layer >= 0 else leaf.shape
                yield rules[path].format(layer=layer), shape[::-1] if path.endswith(".kernel") else shape


def write_folder(folder: Path, gb: float, tiny: bool) -> None:
    """The folder, if it is not there yet: config, shards and their index."""
    from smartdiff_jax.models.qwen_image import QwenImageConfig
    from smartdiff_jax.weights.tensor_file import write as write_tensors

    target = folder / "transformer"
    if (target / "config.json").is_file():
        return
    config = QwenImageConfig(**TINY) if tiny else QwenImageConfig()
    block = 2 * 36 * config.dim**2
    numbers = TINY if tiny else {"num_layers": max(1, round(gb * GB / block))}
    config = QwenImageConfig(**numbers)
    target.mkdir(parents=True, exist_ok=True)
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, shape in keys_and_shapes(config):
        size = int(np.prod(shape))
        tensor = pool[:size].reshape(shape) if size <= pool.size else np.resize(pool, shape)
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            write_tensors(_shard(target, len(shards)), shards[-1])
            shards[-1] = {name: t[:0] for name, t in shards[-1].items()}  # their names, for the index
            shards.append({})
        shards[-1][key] = tensor
    write_tensors(_shard(target, len(shards)), shards[-1])
    index = {key: _shard(target, n + 1).name for n, shard in enumerate(shards) for key in shard}
    about = {"metadata": {"total_size": sum(f.stat().st_size for f in target.glob("*.safetensors"))}}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(about | {"weight_map": index}))
    described = {"_class_name": "QwenImageTransformer2DModel", **config.model_dump(mode="json")}
    (target / "config.json").write_text(json.dumps(described))
    index_of_folder = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", described["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index_of_folder))


def _shard(target: Path, number: int) -> Path:
    return target / f"diffusion_pytorch_model-{number:05d}.safetensors"


def forget(files: list[Path]) -> None:
    """Drop the files' pages from memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> float:
    """Seconds to read every byte into one buffer."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - began


def load_all(folder: Path) -> float:
    """Seconds to have every weight on the device, as the pipeline loads it without a store."""
    import jax

    from smartdiff_jax.config.system import MeshConfig
    from smartdiff_jax.engine.loading import read_config, resolve_dtype
    from smartdiff_jax.models.qwen_image import ARCHITECTURE
    from smartdiff_jax.sharding.mesh import make_mesh, replicated
    from smartdiff_jax.weights.folder import open_folder
    from smartdiff_jax.weights.stream import load

    place = replicated(make_mesh(MeshConfig()))
    began = time.perf_counter()
    component = open_folder(folder).require("transformer")
    config = read_config(ARCHITECTURE, component)
    weights = load(ARCHITECTURE, config, component.tensors(), resolve_dtype("auto"), lambda path, shape: place)
    jax.block_until_ready(weights)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the weights go; kept for the next call")
    parser.add_argument("--gb", type=float, default=24.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    began = time.perf_counter()
    write_folder(arguments.folder, arguments.gb, arguments.tiny)
    files = sorted((arguments.folder / "transformer").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / GB
    print(f"{len(files)} files, {size:.2f} GB, written in {time.perf_counter() - began:.1f} s", flush=True)
    results: dict = {"stamp": stamp(arguments.commit), "gigabytes": size, "files": len(files), "runs": []}
    for _ in range(arguments.repeats):
        row = {}
        for name, measure in (("read", lambda: read(files)), ("load", lambda: load_all(arguments.folder))):
            forget(files)
            row[f"{name}_cold_s"], row[f"{name}_warm_s"] = measure(), measure()
        row["cold_ratio"], row["warm_ratio"] = (row[f"load_{t}_s"] / row[f"read_{t}_s"] for t in ("cold", "warm"))
        print({key: round(value, 2) for key, value in row.items()}, flush=True)
        results["runs"].append(row)
    print(write("load-tiny" if arguments.tiny else "load", results))


if __name__ == "__main__":
    main()
