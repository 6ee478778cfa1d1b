"""The text encoders at true size, random weights: seconds of a prompt through all that a model has, compilation, memory.

    python benchmarks/encode.py          on a GPU; transformers beside them where torch and it are installed
    python benchmarks/encode.py --tiny   anywhere, to see that it runs

Every model in a process of its own, the peer's first. Writes benchmarks/results/encode-<device>.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import IN_A_ROW, child, stamp, time_calls, write  # noqa: E402
from benchmarks.random_model import problem, prompt_of, random_model  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "transformers_encode.py"
MODELS = ("wan2.1-t2v-1.3b", "flux1-dev", "flux2-klein-4b", "qwen-image", "z-image")


def measure(task: dict[str, Any], repeats: int, commit: str | None) -> dict[str, Any]:
    """One model's encoders, through the stage that the pipeline runs."""
    import dataclasses

    import jax

    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.stages.text import Branch, PromptEncoder, TextEncode
    from smartdiff_jax.weights.residency import Resident

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(task, SystemConfig.create(cache_dir=Path(folder)), only=tuple(task["text"]))
        encoders = []
        for source in model.family.text:
            graphdef, weights = model.text_encoders[source.encoder]
            known = dataclasses.replace(source, max_length=model.max_text_lengths[source.tokenizer])
            encoders.append(PromptEncoder(known, *model.tokenizers[source.tokenizer], graphdef, Resident(weights), model.dtype))
        stage = TextEncode(encoders, model.dtype)
        branches = [Branch("prompt", prompt_of(model, task))]

        def encode() -> Any:
            stage.forget()
            found = stage(branches)
            return found.text, found.pooled

        began = time.perf_counter()
        states, _ = jax.block_until_ready(encode())
        found = {"stamp": stamp(commit), "dtype": model.dtype.name, "states": states.shape}
        found |= {
            "compile_s": time.perf_counter() - began,
            "encode": {"seconds": time_calls(encode, seconds=IN_A_ROW, repeats=repeats)},
        }
        weights = jax.tree.leaves([weights for _, weights in model.text_encoders.values()])
        found["weights_gb"] = sum(leaf.nbytes for leaf in weights) / 1e9
        stats = jax.devices()[0].memory_stats() or {}
        return found | {"peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--model", help="measure this one here and print JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable, help="where torch and diffusers are, if elsewhere")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args(given)
    if arguments.model:
        print(json.dumps(measure(problem(arguments.model, arguments.tiny), arguments.repeats, arguments.commit)))
        return
    results: dict[str, Any] = {"stamp": None, "models": {}}
    for model in arguments.models:
        task = problem(model, arguments.tiny)
        row = results["models"][model] = {"problem": {name: task[name] for name in ("name", "text")}}
        shared = ["--repeats", str(arguments.repeats)]
        if not arguments.no_peer:
            row["transformers"] = child([str(PEER), json.dumps(task), *shared], arguments.peer_python)
        shared += ["--tiny"] * arguments.tiny + (["--commit", arguments.commit] if arguments.commit else [])
        row["ours"] = child([__file__, "--model", model, *shared])
        results["stamp"] = row["ours"].pop("stamp", None) or results["stamp"]
        for who in ("ours", "transformers"):
            if who in row:
                found = row[who]
                told = found.get("error") or f"{1e3 * found['encode']['seconds']['median']:9.2f} ms"
                print(f"{model:18} {who:13} {told}", flush=True)
        if results["stamp"] is not None:
            write("encode-tiny" if arguments.tiny else "encode", results)


if __name__ == "__main__":
    main()
