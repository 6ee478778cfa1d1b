"""Scores a model: what it makes of prompts that say everything they are checked on, held against them by its world's checkers.

The checkers know neither the model nor its latents. `subject_top5` is the share of subjects asked for that are among the five
most alike of all subjects of the atlas; the others are shares of right answers, among the prompts that ask.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8

from smartdiff_jax.training.checkers import Gallery
from smartdiff_jax.training.worlds import World

PROMPT_SEED = 1234
Prompts = Sequence[tuple[str, Any]]


def scoring_prompts(world: World, n: int, held_out: bool = False) -> Prompts:
    """The fixed list of prompts that scores are reported on."""
    return world.captioner.prompts_for_scoring(n, PROMPT_SEED, held_out)


class Scorer:
    """Scores batches of clips in background threads, so that training need not wait for it."""

    def __init__(self, world: World):
        self._world = world
        self._workers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="score")
        self._front = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._gallery = self._front.submit(Gallery, world.captioner.atlas)
        self._pending: list[Future[object]] = []

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what was submitted, and raises what went wrong in it."""
        self._front.shutdown()
        self._workers.shutdown()
        for future in self._pending:
            future.result()

    def score(self, clips: UInt8[np.ndarray, "n f h w 3"], prompts: Prompts) -> list[dict[str, Any]]:
        """One row of results a clip, see the world's `score`; the prompt is added."""
        gallery = self._gallery.result()
        asked = [attributes for _, attributes in prompts]
        rows = self._workers.map(lambda clip, attributes: dict(self._world.score(clip, attributes, gallery)), clips, asked)
        return [{"prompt": prompt, **row} for (prompt, _), row in zip(prompts, rows, strict=True)]

    def submit(
        self, clips: UInt8[np.ndarray, "n f h w 3"], prompts: Prompts, then: Callable[[dict[str, int | float | None]], object]
    ) -> None:
        """Score in the background, and hand the summary to `then` on a thread of its own."""
        self._pending.append(self._front.submit(lambda: then(self.summary(self.score(clips, prompts)))))

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int | float | None]:
        """Shares that are right, each in 0..1; None where no prompt asks."""
        ranks = np.concatenate([np.atleast_1d(row["subject_rank"]) for row in rows])
        shares = {"subject_top1": _share(ranks <= 1), "subject_top5": _share(ranks <= 5)}
        for name in self._world.shares:
            shares[name] = _share([row[f"{name}_ok"] for row in rows if row[f"{name}_ok"] is not None])
        return {"prompts": len(rows), **shares}


def _share(right: Sequence[bool] | np.ndarray) -> float | None:
    return round(float(np.mean(right)), 3) if len(right) else None


def evaluate(
    generate: Callable[[Sequence[str]], UInt8[np.ndarray, "n f h w 3"]], world: World, scorer: Scorer, n: int
) -> dict[str, Any]:
    """Scores on `n` prompts in the wording of training, and on `n` in held-out wordings and pairs, with all rows."""
    report: dict[str, Any] = {}
    for name, held_out in (("trained", False), ("held_out", True)):
        prompts = scoring_prompts(world, n, held_out)
        rows = scorer.score(generate([prompt for prompt, _ in prompts]), prompts)
        report[name] = scorer.summary(rows)
        report[f"{name}_rows"] = rows
    return report
