"""Equal requests one after another, and as one batch: what it would bring to run jobs of one shape together.

    python benchmarks/batching.py                                   the bundled models, on a CPU about five minutes
    python benchmarks/batching.py --models flux1-dev --size 512x512 known ones with random weights, on a GPU

A batch is `num_outputs` of one request, which goes through the loop as jobs of one shape would if they were put together: each
has noise of its own, and the text is encoded once. Seconds are of denoising and decoding, for one output, medians over rounds
that take all sizes of batches in turn. Writes benchmarks/results/batching-<device>.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402

MODELS = "pocket-image", "pocket-video"
BATCHES = 1, 2, 4


def pipeline(name: str, tiny: bool) -> Any:
    from smartdiff_jax.config.model import known_models
    from smartdiff_jax.config.system import SystemConfig
    from smartdiff_jax.engine.pipeline import Pipeline

    system = SystemConfig.create()
    if known_models()[name].bundled and not tiny:
        return Pipeline.from_pretrained(name, system=system)
    from benchmarks.random_model import problem, random_model

    return Pipeline(random_model(problem(name, tiny), system), system)


def measure(name: str, size: str | None, steps: int, rounds: int, tiny: bool) -> dict[str, Any]:
    """Seconds of one output by the number of outputs in a batch, and how much sooner a batch is done than one by one."""
    pipe = pipeline(name, tiny)
    request: dict[str, Any] = {"prompt": "word", "size": size, "num_inference_steps": steps, "seed": 1}
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
    for number in range(rounds + 1):
        for batch, rows in found.items():
            seconds = pipe(**request, num_outputs=batch).report.seconds
            if number > 0:  # the first compiles
                rows.append({stage: seconds[stage] / batch for stage in ("denoise", "decode")})
    medians = {
        batch: {stage: float(np.median([row[stage] for row in rows])) for stage in ("denoise", "decode")}
        for batch, rows in found.items()
    }
    one = medians[1]["denoise"]
    params = pipe(**request).report.params
    return {
        "size": f"{params['width']}x{params['height']}x{params['num_frames']}",
        "steps": steps,
        "seconds_an_output": medians,
        "denoise_as_fast_as_one_by_one": {batch: round(one / row["denoise"], 3) for batch, row in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", help="WIDTHxHEIGHT; each model's default if not given")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small numbers of each model, to see that it runs")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"stamp": stamp(arguments.commit), "models": {}}
    for name in arguments.models:
        size = "64x64" if arguments.tiny and arguments.size is None else arguments.size
        results["models"][name] = measure(name, size, arguments.steps, arguments.rounds, arguments.tiny)
        print(name, results["models"][name], flush=True)
        file = write("batching-tiny" if arguments.tiny else "batching", results)
    print(file)


if __name__ == "__main__":
    main()
