"""What caches cost in likeness: every policy and what it must beat, against the model's own full run.

    python benchmarks/cache.py --model pocket-image                   256 prompts, 50 steps, on a GPU
    python benchmarks/cache.py --prompts 4 --ratios 0.5 --tiny        anywhere, to see that it runs
    python benchmarks/cache.py --calibration 16                       other prompts, a line each, for `calibrate --prompts`

The prompts are none of the calibration's. Every entry computes as many steps as `auto` does at that ratio. Likeness is PSNR and
SSIM to the full run of the same prompt and seed, and retrieval: the share of clips that are nearer to their own full run than
to any other prompt's. Intervals are 95 % by bootstrap over prompts; `margin` is auto's PSNR over an entry's, prompt by prompt.
All in float32, where likeness above 50 dB is not rounding. Prompts run side by side, each with its own decisions, which takes
equally long whatever is skipped: what caches gain is for `cache_speed.py` to measure.

The baselines: `fewer-steps` (the sampler with that many steps), `same-steps` (the sampler on the noise levels that auto
computes), `hold-even` and `hold-planned` (the last velocity, at evenly spread steps and at auto's), `shuffled` (auto's
predictions at steps chosen at random). Writes benchmarks/results/cache-<model>-<device>.json and docs/cache-<model>.svg.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402
from smartdiff_jax.cache import POLICIES  # noqa: E402
from smartdiff_jax.cache.auto import Recorded  # noqa: E402
from smartdiff_jax.cache.planned import Planned  # noqa: E402
from smartdiff_jax.cache.planner import between, make_plan  # noqa: E402
from smartdiff_jax.config.model import known_models  # noqa: E402
from smartdiff_jax.config.request import GenerateParams  # noqa: E402
from smartdiff_jax.engine.caching import executed_letters, skipped_share  # noqa: E402
from smartdiff_jax.engine.pipeline import Inputs, Pipeline  # noqa: E402
from smartdiff_jax.errors import InvalidRequest  # noqa: E402
from smartdiff_jax.evaluation.metrics import psnr, ssim  # noqa: E402
from smartdiff_jax.evaluation.plot import line_plot  # noqa: E402
from smartdiff_jax.samplers.base import MAX_STEPS, Schedule  # noqa: E402
from smartdiff_jax.stages.base import jit_in  # noqa: E402

PARAMS: dict[str, dict[str, Any]] = {"dbcache": {"first_blocks": 2}}
"""For models of six and eight blocks."""
MOTIONS = (
    "moving left",
    "moving right",
    "rising",
    "falling",
    "spinning clockwise",
    "growing",
    "shrinking",
    "bouncing",
    "swaying",
)
RELATIONS = "left of", "right of", "above", "below"
GROUNDS = "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black", "gray", "white"
FIRST_SEED = 10_000
MOST_DB = 100.0
RESAMPLES = 2000
SIDE_BY_SIDE, THREADS = 64, 8
"""Prompts in one call, and entries compiled and judged at once."""


def prompts_for(task: str, count: int, first: int = 0) -> list[str]:
    """Subjects the bundled models know, each once, in a fixed random order. Clips move, every other picture shows two."""
    file = resources.files("smartdiff_jax.training.data") / "held_out.json"
    subjects = np.random.RandomState(7).permutation(sorted(json.loads(file.read_text())["background"]))
    rng = np.random.RandomState([7, first])
    prompts = []
    for index, subject in enumerate(subjects[first : first + count]):
        if task == "t2v":
            shown = f"{subject} {rng.choice(MOTIONS)}"
        else:
            shown = f"{subject} {rng.choice(RELATIONS)} {rng.choice(subjects)}" if index % 2 else subject
        prompts.append(f"{shown} on a {rng.choice(GROUNDS)} background")
    return prompts


@dataclasses.dataclass
class Clips:
    """One of each prompt."""

    frames: np.ndarray
    letters: list[str]


class Bench:
    """Prompts encoded once, and runs of them under any policy and schedule."""

    def __init__(self, pipe: Pipeline, prompts: list[str], steps: int, settings: dict[str, Any]):
        self.pipe, self.prompts, self.steps, self.settings = pipe, prompts, steps, settings
        inputs = []
        for index, prompt in enumerate(prompts):
            params, _ = pipe._prepare(self.request(prompt=prompt, seed=FIRST_SEED + index))
            shape = pipe._model.latent_shape(params.width, params.height, params.num_frames)
            self.grid = pipe._model.patches.grid(shape)
            branches = pipe._branches(params, pipe._encode(params, Inputs()), self.grid)
            inputs.append((pipe._pack(pipe._noise(params.seed, shape, [0])), branches))
        groups = [inputs[start : start + SIDE_BY_SIDE] for start in range(0, len(inputs), SIDE_BY_SIDE)]
        self.groups = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *group) for group in groups]
        in_axes = (None, 0, 0, None, None, None, None)
        self.side_by_side = jit_in(pipe._model.dtype, jax.vmap(self.whole_run, in_axes=in_axes))

    def request(self, **fields: Any) -> GenerateParams:
        return GenerateParams.create(**{"prompt": "", "num_inference_steps": self.steps, "seed": 0} | self.settings | fields)

    def course(self, **fields: Any) -> Any:
        return self.pipe._prepare(self.request(**fields))[1]

    def whole_run(self, weights, tokens, branches, schedule, scales, policy, sampler):
        loop, begin = self.pipe._loop, jnp.int32(0)
        carry = loop._start(weights, tokens, branches, policy, sampler)
        carry = loop._run(weights, carry, branches, schedule, scales, policy, sampler, begin, schedule.num_steps, begin)
        return carry.tokens, carry.executed

    def all(self, course: Any) -> Clips:
        steps = int(course.schedule.num_steps)
        frames, letters = [], []
        with course.experts[0].weights.use() as weights:
            for tokens, branches in self.groups:
                result, executed = self.side_by_side(
                    weights, tokens, branches, course.schedule, course.scales, course.policy, course.sampler
                )
                letters += [executed_letters(one, steps, course.scales) for one in np.asarray(executed)]
                frames.append(np.asarray(self.pipe._decode(self.pipe._unpack(result[:, 0], grid=self.grid))))
        return Clips(np.concatenate(frames), letters)


def entries(bench: Bench, ratio: float, names: list[str]) -> dict[str, Callable[[], Any]]:
    """By name, what makes its course."""
    auto = bench.course(cache="auto", cache_ratio=ratio)
    budget = max(1, round((1 - ratio) * bench.steps))
    named: dict[str, Callable[[], Any]] = {
        name: lambda name=name: bench.course(cache=name, cache_ratio=ratio, cache_params=PARAMS.get(name, {})) for name in names
    }
    if not isinstance(auto.policy, Planned):
        return named
    fresh = np.asarray(auto.policy.fresh)[: bench.steps]
    even = np.zeros(bench.steps, bool)
    even[np.arange(budget) * bench.steps // budget] = True
    hold = np.zeros((bench.steps, 2))
    hold[:, 0] = 1.0
    chosen = np.random.RandomState(round(1000 * ratio)).permutation(np.arange(1, bench.steps))[: budget - 1]
    shuffled = plan_of(bench, auto, chosen.tolist(), budget)

    def with_policy(policy: Planned) -> Callable[[], Any]:
        return lambda: dataclasses.replace(auto, policy=policy)

    none = bench.course()
    baselines = {
        "fewer-steps": lambda: bench.course(num_inference_steps=budget),
        "same-steps": lambda: dataclasses.replace(none, schedule=subset(auto.schedule, fresh)),
        "hold-even": with_policy(Planned.of(even, hold)),
        "hold-planned": with_policy(Planned.of(fresh, hold)),
        "shuffled": with_policy(Planned.of(shuffled.fresh, shuffled.weights)),
    }
    return {"auto": named["auto"]} | baselines | named


def plan_of(bench: Bench, auto: Any, computed: list[int], budget: int) -> Any:
    """auto's predictions where the computed steps are given."""
    runs = [Recorded(**run) for run in bench.pipe._model.cache_numbers["auto"]["runs"]]
    run = min(runs, key=lambda run: abs(np.log(len(run.sigmas) / bench.steps)))
    sigmas = np.asarray(auto.schedule.sigmas, np.float64)[: bench.steps + 1]
    carry = between(np.asarray(run.sigmas), sigmas[:-1])
    return make_plan(carry @ run.matrix() @ carry.T, sigmas, budget, fresh=computed, max_gap=bench.steps)


def subset(schedule: Schedule, fresh: np.ndarray) -> Schedule:
    """The schedule that knows of these steps only."""
    kept = np.flatnonzero(fresh)
    sigmas, timesteps = np.zeros(MAX_STEPS + 1, np.float32), np.zeros(MAX_STEPS, np.float32)
    sigmas[: len(kept)] = np.asarray(schedule.sigmas)[kept]
    timesteps[: len(kept)] = np.asarray(schedule.timesteps)[kept]
    return Schedule(jnp.asarray(sigmas), jnp.asarray(timesteps), jnp.int32(len(kept)))


def features(frames: np.ndarray) -> np.ndarray:
    """A clip in small, for telling clips apart."""
    count, height, width, _ = frames.shape
    side = max(1, height // 12)
    cut = frames[:, : height // side * side, : width // side * side].astype(np.float32)
    return cut.reshape(count, height // side, side, width // side, side, 3).mean(axis=(2, 4)).ravel()


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % interval."""
    rng = np.random.RandomState(0)
    means = values[rng.randint(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {name: round(float(value), 4) for name, value in (("mean", values.mean()), ("low", low), ("high", high))}


def judge(clips: Clips, full: Clips) -> dict[str, Any]:
    pairs = list(zip(full.frames, clips.frames, strict=True))
    db, likeness = np.minimum([psnr(*pair) for pair in pairs], MOST_DB), np.array([ssim(*pair) for pair in pairs])
    own = np.stack([features(frames) for frames in full.frames])
    nearest = [int(np.argmin(np.linalg.norm(own - features(frames), axis=1))) for frames in clips.frames]
    return {
        "skipped": skipped_share(clips.letters),
        "psnr": interval(db),
        "ssim": interval(likeness),
        "retrieval": round(float(np.mean(np.array(nearest) == np.arange(len(nearest)))), 4),
        "steps": clips.letters[0],
        "psnr_by_prompt": [round(float(value), 1) for value in db],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-video")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ratios", default="0.3,0.5,0.67,0.8")
    parser.add_argument("--policies", default=",".join(name for name in POLICIES if name not in ("none", "ditango")))
    parser.add_argument("--calibration", type=int, metavar="N", help="only print N prompts that are not measured with")
    parser.add_argument("--tiny", action="store_true", help="small frames and few steps; writes nothing")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    task = known_models()[arguments.model].task
    if arguments.calibration:
        print("\n".join(prompts_for(task, arguments.calibration, first=arguments.prompts)))
        return
    tiny = {"size": (32, 32)} | ({"num_frames": 5} if task == "t2v" else {})
    steps = 12 if arguments.tiny else arguments.steps
    pipe = Pipeline.from_pretrained(arguments.model, dtype="float32")
    bench = Bench(pipe, prompts_for(task, arguments.prompts), steps, tiny if arguments.tiny else {})
    names = list(dict.fromkeys(["auto", *arguments.policies.split(",")]))

    full = bench.all(bench.course())
    results: dict[str, Any] = {
        "stamp": stamp(arguments.commit),
        "params": pipe.check(bench.request()).model_dump(),
        "prompts": bench.prompts,
        "rows": [],
    }

    def row_of(name: str, ratio: float, make: Callable[[], Any]) -> dict[str, Any]:
        row = {"name": name, "ratio": ratio}
        try:
            course = make()
        except InvalidRequest as refusal:
            print(f"{ratio:5.2f} {name:14} {refusal}", flush=True)
            return row | {"refused": str(refusal)}
        row |= judge(bench.all(course), full)
        print(
            f"{time.strftime('%X')} {ratio:5.2f} {name:14} skipped {row['skipped']:.3f}  "
            f"PSNR {row['psnr']['mean']:6.2f} [{row['psnr']['low']:.2f}, {row['psnr']['high']:.2f}]  "
            f"SSIM {row['ssim']['mean']:.4f}  retrieval {row['retrieval']:.3f}  {row['steps']}",
            flush=True,
        )
        return row

    with ThreadPoolExecutor(THREADS) as pool:
        for ratio in map(float, arguments.ratios.split(",")):
            named = entries(bench, ratio, names)
            auto_db = None
            for row in pool.map(row_of, named, itertools.repeat(ratio), named.values()):
                if auto_db is None:
                    auto_db = np.array(row["psnr_by_prompt"])
                if "refused" not in row:
                    row["margin"] = interval(auto_db - np.array(row["psnr_by_prompt"]))
                results["rows"].append(row)
                if not arguments.tiny:  # after every row: a run that is cut off leaves what it has
                    publish(arguments.model, results, steps)


def publish(model: str, results: dict[str, Any], steps: int) -> None:
    """The result file and the plot, of what is measured so far."""
    measured = [row for row in results["rows"] if "psnr" in row]
    lines = {
        name: [(row["ratio"], *(row["psnr"][key] for key in ("mean", "low", "high"))) for row in group]
        for name, group in itertools.groupby(sorted(measured, key=lambda row: row["name"]), key=lambda row: row["name"])
    }
    title = f"{model}, {steps} steps, {len(results['prompts'])} prompts: likeness to the full run"
    file = ROOT / "docs" / f"cache-{model}.svg"
    line_plot(file, lines, title, "share of steps skipped", "PSNR, dB", dashed=set(lines) - set(POLICIES))
    write(f"cache-{model}", results)


if __name__ == "__main__":
    main()
