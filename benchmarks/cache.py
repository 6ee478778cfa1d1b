"""What caches cost in likeness: every policy and what it must beat, against the model's own full run.

    python benchmarks/cache.py                                        256 prompts, 50 steps, on a GPU
    python benchmarks/cache.py --prompts 4 --ratios 0.5 --tiny        anywhere, to see that it runs

The prompts are none of the calibration's. Every entry computes as many steps as `auto` does at that ratio. Likeness is PSNR and
SSIM to the full run of the same prompt and seed, and retrieval: the share of clips that are nearer to their own full run than
to any other prompt's. Intervals are 95 % by bootstrap over prompts; `margin` is auto's PSNR over an entry's, prompt by prompt.

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

import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402
from benchmarks.plot import line_plot  # noqa: E402
from smartdiff_jax.cache import POLICIES  # noqa: E402
from smartdiff_jax.cache.auto import Recorded  # noqa: E402
from smartdiff_jax.cache.planned import Planned  # noqa: E402
from smartdiff_jax.cache.planner import between, make_plan  # noqa: E402
from smartdiff_jax.config.request import GenerateParams  # noqa: E402
from smartdiff_jax.engine.caching import executed_letters, skipped_share  # noqa: E402
from smartdiff_jax.engine.comparison import psnr, ssim  # noqa: E402
from smartdiff_jax.engine.pipeline import Inputs, Pipeline  # noqa: E402
from smartdiff_jax.errors import InvalidRequest  # noqa: E402
from smartdiff_jax.samplers.base import MAX_STEPS, Schedule  # noqa: E402
from smartdiff_jax.stages.base import Progress  # noqa: E402
from smartdiff_jax.stages.denoise import denoise  # noqa: E402

PARAMS: dict[str, dict[str, Any]] = {"dbcache": {"first_blocks": 2}}
"""For a model of six blocks."""
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
GROUNDS = "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black", "gray", "white"
FIRST_SEED = 10_000
MOST_DB = 100.0
RESAMPLES = 2000


def prompts_for(count: int) -> list[str]:
    """Subjects the bundled models know, each once, with motions and backgrounds in a fixed random order."""
    file = resources.files("smartdiff_jax.training.data") / "held_out.json"
    subjects = sorted(json.loads(file.read_text())["background"])
    rng = np.random.RandomState(7)
    chosen = rng.permutation(subjects)[:count]
    return [f"{subject} {rng.choice(MOTIONS)} on a {rng.choice(GROUNDS)} background" for subject in chosen]


@dataclasses.dataclass
class Clip:
    frames: np.ndarray
    letters: str
    seconds: float


class Bench:
    """Prompts encoded once, and runs of them under any policy and schedule."""

    def __init__(self, pipe: Pipeline, prompts: list[str], steps: int, settings: dict[str, Any]):
        self.pipe, self.prompts, self.steps, self.settings = pipe, prompts, steps, settings
        self.inputs = []
        for index, prompt in enumerate(prompts):
            params, _ = pipe._prepare(self.request(prompt=prompt, seed=FIRST_SEED + index))
            shape = pipe._model.latent_shape(params.width, params.height, params.num_frames)
            grid = pipe._model.patches.grid(shape)
            branches = pipe._branches(params, pipe._encode(params, Inputs()), grid)
            self.inputs.append((pipe._noise(params.seed, shape, [0]), branches, grid))

    def request(self, **fields: Any) -> GenerateParams:
        return GenerateParams.create(**{"prompt": "", "num_inference_steps": self.steps, "seed": 0} | self.settings | fields)

    def course(self, **fields: Any) -> tuple[Any, Any]:
        return self.pipe._prepare(self.request(**fields))

    def run(self, params: Any, course: Any, index: int) -> Clip:
        noise, branches, grid = self.inputs[index]
        tokens = self.pipe._pack(noise)
        steps = int(course.schedule.num_steps)
        scales = self.pipe._scales(params, course)
        began = time.perf_counter()
        for event in denoise(
            self.pipe._loop, course.experts, tokens, branches, course.schedule, scales, course.policy, course.sampler,
            chunk=MAX_STEPS,
        ):  # fmt: skip
            carry = event
        assert not isinstance(carry, Progress)
        seconds = time.perf_counter() - began
        frames = self.pipe._decode(self.pipe._unpack(carry.tokens, grid=grid))
        return Clip(np.asarray(frames)[0], executed_letters(np.asarray(carry.executed), steps, scales), seconds)

    def all(self, params: Any, course: Any) -> list[Clip]:
        self.run(params, course, 0)  # compiles
        return [self.run(params, course, index) for index in range(len(self.prompts))]


def entries(bench: Bench, ratio: float, names: list[str]) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """By name, what makes (parameters, course) of it."""
    params, auto = bench.course(cache="auto", cache_ratio=ratio)
    budget = max(1, round((1 - ratio) * bench.steps))
    named: dict[str, Callable[[], tuple[Any, Any]]] = {
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

    def with_policy(policy: Planned) -> Callable[[], tuple[Any, Any]]:
        return lambda: (params, dataclasses.replace(auto, policy=policy))

    none_params, none = bench.course()
    baselines = {
        "fewer-steps": lambda: bench.course(num_inference_steps=budget),
        "same-steps": lambda: (none_params, dataclasses.replace(none, schedule=subset(auto.schedule, fresh))),
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


def judge(clips: list[Clip], full: list[Clip], pool: ThreadPoolExecutor) -> dict[str, Any]:
    pairs = [(one.frames, other.frames) for one, other in zip(full, clips, strict=True)]
    db = np.minimum(np.array([psnr(*pair) for pair in pairs]), MOST_DB)
    likeness = np.array(list(pool.map(lambda pair: ssim(*pair), pairs)))
    own = np.stack([features(clip.frames) for clip in full])
    nearest = [int(np.argmin(np.linalg.norm(own - features(clip.frames), axis=1))) for clip in clips]
    return {
        "skipped": skipped_share([clip.letters for clip in clips]),
        "seconds": round(float(np.median([clip.seconds for clip in clips])), 4),
        "psnr": interval(db),
        "ssim": interval(likeness),
        "retrieval": round(float(np.mean(np.array(nearest) == np.arange(len(full)))), 4),
        "steps": clips[0].letters,
        "psnr_by_prompt": [round(float(value), 3) for value in db],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-video")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ratios", default="0.3,0.5,0.67,0.8")
    parser.add_argument("--policies", default=",".join(name for name in POLICIES if name != "none"))
    parser.add_argument("--tiny", action="store_true", help="small frames and few steps; writes nothing")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    settings = {"size": (32, 32), "num_frames": 5} if arguments.tiny else {}
    steps = 12 if arguments.tiny else arguments.steps
    bench = Bench(Pipeline.from_pretrained(arguments.model), prompts_for(arguments.prompts), steps, settings)
    names = list(dict.fromkeys(["auto", *arguments.policies.split(",")]))

    full = bench.all(*bench.course())
    full_seconds = float(np.median([clip.seconds for clip in full]))
    print(f"full runs: {full_seconds:.3f} s", flush=True)
    results: dict[str, Any] = {
        "stamp": stamp(arguments.commit),
        "params": bench.course()[0].model_dump(),
        "prompts": bench.prompts,
        "full_seconds": round(full_seconds, 4),
        "rows": [],
    }
    with ThreadPoolExecutor() as pool:
        for ratio in map(float, arguments.ratios.split(",")):
            auto_db = None
            for name, make in entries(bench, ratio, names).items():
                row: dict[str, Any] = {"name": name, "ratio": ratio}
                try:
                    params, course = make()
                except InvalidRequest as refusal:
                    results["rows"].append(row | {"refused": str(refusal)})
                    print(f"{ratio:5.2f} {name:14} {refusal}", flush=True)
                    continue
                row |= judge(bench.all(params, course), full, pool)
                row["speed_up"] = round(full_seconds / row["seconds"], 3)
                if auto_db is None:
                    auto_db = np.array(row["psnr_by_prompt"])
                row["margin"] = interval(auto_db - np.array(row["psnr_by_prompt"]))
                results["rows"].append(row)
                print(
                    f"{ratio:5.2f} {name:14} skipped {row['skipped']:.3f} {row['speed_up']:6.2f}x  "
                    f"PSNR {row['psnr']['mean']:6.2f} [{row['psnr']['low']:.2f}, {row['psnr']['high']:.2f}]  "
                    f"SSIM {row['ssim']['mean']:.4f}  retrieval {row['retrieval']:.3f}  margin {row['margin']['mean']:+.2f} "
                    f"[{row['margin']['low']:+.2f}, {row['margin']['high']:+.2f}]  {row['steps']}",
                    flush=True,
                )
                if not arguments.tiny:
                    publish(arguments.model, results, steps)


def publish(model: str, results: dict[str, Any], steps: int) -> None:
    """The result file and the plot, of what is measured so far: a run that is cut off leaves what it has."""
    measured = [row for row in results["rows"] if "psnr" in row]
    lines = {
        name: [(row["ratio"], *(row["psnr"][key] for key in ("mean", "low", "high"))) for row in group]
        for name, group in itertools.groupby(sorted(measured, key=lambda row: row["name"]), key=lambda row: row["name"])
    }
    title = f"{model}, {steps} steps, {len(results['prompts'])} prompts: likeness to the full run"
    line_plot(ROOT / "docs" / f"cache-{model}.svg", lines, title, "share of steps skipped", "PSNR, dB")
    write(f"cache-{model}", results)


if __name__ == "__main__":
    main()
