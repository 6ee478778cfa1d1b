"""The peer: diffusers' pipelines with cache-dit, whole, blocks compiled, as many steps skipped as ours. Prints a line of JSON.

Told what to run by `benchmarks/end_to_end.py`, as `diffusers_end_to_end.py` is. Its own threshold would decide by the changes
of random activations; so the steps are given to it, evenly spread, the first and the last computed, with one first block
(Fn 1).
"""

import argparse
import json

import cache_dit
import torch
from diffusers_end_to_end import Bench
from diffusers_images import CUDA


def mask(steps: int, ratio: float) -> list[int]:
    """1 where a step is computed: round((1 - ratio) * steps) of them."""
    computed = max(2, round((1 - ratio) * steps))
    chosen = {round(index * (steps - 1) / (computed - 1)) for index in range(computed)}
    return [int(step in chosen) for step in range(steps)]


def setting(bench: Bench, ratio: float, repeats: int) -> dict:
    steps = bench.task["sampling"]["num_inference_steps"]
    computed = mask(steps, ratio)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=1e9,
        num_inference_steps=steps, steps_computation_mask=computed, steps_computation_policy="static",
    )  # fmt: skip
    cache_dit.enable_cache(bench.pipe, cache_config=config)
    row = bench.setting(repeats, whole_warmup=True)
    told = [part.cached_steps for part in cache_dit.summary(bench.pipe, logging=False)]
    cache_dit.disable_cache(bench.pipe)
    skipped = max(map(len, told), default=0)
    if skipped != steps - sum(computed):
        raise RuntimeError(f"cache-dit skipped {skipped} of {steps} steps, asked for {steps - sum(computed)}")
    return row | {"skipped": skipped / steps}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=json.loads)
    parser.add_argument("--cache-ratio", type=float, nargs="+", default=[0.5])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(arguments.task)
    results: dict = {"versions": {module.__name__: module.__version__ for module in (torch, cache_dit)}, "settings": {}}
    if CUDA:
        results["compile_s"] = bench.compile_blocks()
    for ratio in arguments.cache_ratio:
        name = ("compiled" if CUDA else "eager") + f", cache_ratio {ratio:g}"
        results["settings"][name] = setting(bench, ratio, arguments.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
