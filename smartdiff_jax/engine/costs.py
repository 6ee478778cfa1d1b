"""How long a request will keep the device busy: measured by shape, kept in the store, so that a restart knows it still."""

import dataclasses
import threading

from smartdiff_jax.config.request import ResolvedParams

MEMORY = 20
"""Measurements a mean remembers."""
GUESS_PER_TOKEN = 1e-4
"""Seconds a token, of a step or of decoding, where nothing was ever measured."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a request is made of, as far as its time depends on it.

    tokens: of one output. kind: all else that the seconds of a step depend on.
    """

    place: str
    tokens: int
    kind: str
    steps: int
    outputs: int

    @classmethod
    def of(cls, place: str, params: ResolvedParams, tokens: int, guided: bool) -> "Work":
        """place: the model and the devices. guided: two evaluations a step."""
        kind = f"{params.sampler} {params.cache} {2 if guided else 1}"
        if params.attention_sparsity > 0:
            kind += f" {params.attention_sparsity:.1f}"
        return cls(place, tokens, kind, params.num_inference_steps, params.num_outputs)

    def bucket(self, stage: str) -> str:
        """What measurements of this stage are kept under: all shapes alike share a prefix, and the tokens come last."""
        return f"{self.place}|{stage}|{self.kind if stage == 'denoise' else ''}|{self.tokens}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Device seconds. step: of one denoise step of one output. decode: of one output. measured: none of it is a guess."""

    step: float
    decode: float
    total: float
    measured: bool


class Costs:
    """Means of measured seconds by bucket. Threads may share it."""

    def __init__(self, rates: dict[str, tuple[float, int]] | None = None):
        self._rates, self._changed = dict(rates or {}), set[str]()
        self._lock = threading.Lock()

    def observe(self, work: Work, stage: str, seconds: float) -> None:
        """One more measurement: of one step, or of decoding one output."""
        bucket = work.bucket(stage)
        with self._lock:
            mean, count = self._rates.get(bucket, (0.0, 0))
            count = min(count + 1, MEMORY)
            self._rates[bucket] = mean + (seconds - mean) / count, count
            self._changed.add(bucket)

    def estimate(self, work: Work) -> Estimate:
        step, one = self._seconds(work, "denoise")
        decode, two = self._seconds(work, "decode")
        return Estimate(step, decode, work.outputs * (work.steps * step + decode), one and two)

    def left(self, work: Work, stage: str, done: float) -> float:
        """Device seconds to go for a request that has done a fraction of "denoise" or "decode"."""
        found = self.estimate(work)
        if stage == "decode":
            return work.outputs * (1.0 - done) * found.decode
        return work.outputs * ((1.0 - done) * work.steps * found.step + found.decode)

    def changes(self) -> dict[str, tuple[float, int]]:
        """What was measured since the last call."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return {bucket: self._rates[bucket] for bucket in changed}

    def _seconds(self, work: Work, stage: str) -> tuple[float, bool]:
        bucket = work.bucket(stage)
        with self._lock:
            if bucket in self._rates:
                return self._rates[bucket][0], True
            prefix = bucket.rpartition("|")[0] + "|"
            known = {int(name.removeprefix(prefix)): mean for name, (mean, _) in self._rates.items() if name.startswith(prefix)}
        if not known:
            return GUESS_PER_TOKEN * work.tokens, False
        nearest = min(known, key=lambda tokens: max(tokens / work.tokens, work.tokens / tokens))
        return known[nearest] * work.tokens / nearest, False
