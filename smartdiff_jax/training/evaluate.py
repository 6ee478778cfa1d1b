"""Scores a model: videos of prompts that say everything they are checked on, held against the prompts by `checkers`.

The checkers know neither the model nor its latents. `subject_top5` is the share of videos whose asked subject is among the five
most alike of all subjects of the atlas; the others are shares of right answers.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8

from smartdiff_jax.training.checkers import Gallery, score
from smartdiff_jax.training.data.atlas import Atlas
from smartdiff_jax.training.data.captions import Captioner
from smartdiff_jax.training.data.wording import Attributes

PROMPT_SEED = 1234
Prompts = Sequence[tuple[str, Attributes]]


def scoring_prompts(captioner: Captioner, n: int, held_out: bool = False) -> Prompts:
    """The fixed list of prompts that scores are reported on."""
    return captioner.prompts_for_scoring(n, PROMPT_SEED, held_out)


SHARES = ("background", "gradient_order", "motion", "style", "colour")


class Scorer:
    """Scores batches of clips in background threads, so that training need not wait for it."""

    def __init__(self, atlas: Atlas):
        self._workers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="score")
        self._front = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._gallery = self._front.submit(Gallery, atlas)
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
        """One row of results a clip, see `checkers.score`; the prompt is added."""
        gallery = self._gallery.result()
        asked = [attributes for _, attributes in prompts]
        rows = self._workers.map(lambda clip, attributes: dict(score(clip, attributes, gallery)), clips, asked)
        return [{"prompt": prompt, **row} for (prompt, _), row in zip(prompts, rows, strict=True)]

    def submit(
        self, clips: UInt8[np.ndarray, "n f h w 3"], prompts: Prompts, then: Callable[[dict[str, int | float]], object]
    ) -> None:
        """Score in the background, and hand the summary to `then` on a thread of its own."""
        self._pending.append(self._front.submit(lambda: then(summary(self.score(clips, prompts)))))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | float]:
    """Shares of clips that are right, each in 0..1."""
    ranks = np.array([row["subject_rank"] for row in rows])
    shares = {"subject_top1": np.mean(ranks <= 1), "subject_top5": np.mean(ranks <= 5)}
    shares |= {name: np.mean([row[f"{name}_ok"] for row in rows]) for name in SHARES}
    return {"prompts": len(rows), **{name: round(float(share), 3) for name, share in shares.items()}}


def evaluate(
    generate: Callable[[Sequence[str]], UInt8[np.ndarray, "n f h w 3"]], captioner: Captioner, scorer: Scorer, n: int
) -> dict[str, Any]:
    """Scores on `n` prompts in the wording of training, and on `n` in held-out wordings and pairs, with all rows."""
    report: dict[str, Any] = {}
    for name, held_out in (("trained", False), ("held_out", True)):
        prompts = scoring_prompts(captioner, n, held_out)
        rows = scorer.score(generate([prompt for prompt, _ in prompts]), prompts)
        report[name] = summary(rows)
        report[f"{name}_rows"] = rows
    return report
