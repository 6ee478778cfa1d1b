"""The host's side of training: batches made ahead in a thread, several steps a call, progress, checkpoints, reports.

    while the budget lasts:   rate = schedule(fraction spent);  state, loss = call(state, rate, batch)

A call runs `steps_per_call` steps on the device. The loss of a call is read when the next one is already under way, so the
device never waits for the host.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import jax
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from smartdiff_jax.errors import SmartdiffError
from smartdiff_jax.training.checkpoints import Checkpoints
from smartdiff_jax.training.devices import one
from smartdiff_jax.training.state import Budget, TrainState, learning_rate

T = TypeVar("T")
PROGRESS_SECONDS = 10.0


class StageSettings(BaseModel):
    """What every stage of training is told.

    minutes: of training, over all runs of the stage, compiling not counted; the learning rate follows the share spent.
    steps: count steps instead of minutes (for tests).
    learning_rate: its peak; warmup: share of the budget before the peak.
    weight_decay, gamma: see `state.Optimizer`.
    save_minutes, report_minutes: how often a checkpoint, and a contact sheet, is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt
    steps_per_call: PositiveInt
    minutes: PositiveFloat
    steps: PositiveInt | None = None
    learning_rate: PositiveFloat
    warmup: float = Field(0.03, gt=0, lt=1)
    weight_decay: NonNegativeFloat = 0.01
    gamma: PositiveFloat = 12.0
    save_minutes: PositiveFloat = 3.0
    report_minutes: PositiveFloat = 3.0


class Log:
    """Lines to the terminal and to a file, each with the seconds since the start."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._began = file, time.monotonic()

    def __call__(self, line: str) -> None:
        line = f"[{time.monotonic() - self._began:7.1f} s] {line}"
        print(line, flush=True)
        with self._file.open("a") as file:
            file.write(line + "\n")


class Prefetch(Generic[T]):
    """make(start), make(start + 1), … computed in a thread, at most `ahead` before they are asked for."""

    def __init__(self, make: Callable[[int], T], start: int = 0, ahead: int = 2):
        self._made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, make: Callable[[int], T], index: int) -> None:
        while not self._stop.is_set():
            try:
                item: tuple[T | None, BaseException | None] = (make(index), None)
            except BaseException as error:  # handed to the thread that asks  # noqa: BLE001
                item = (None, error)
            while not self._stop.is_set():
                try:
                    self._made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            index += 1

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> T:
        """The next one; raises what `make` raised."""
        item, error = self._made.get()
        if error is not None:
            raise error
        return item  # pyright: ignore[reportReturnType]


def run(
    name: str,
    call: Callable[[TrainState, float], tuple[TrainState, jax.Array]],
    state: TrainState,
    settings: StageSettings,
    budget: Budget,
    checkpoints: Checkpoints,
    log: Log,
    report: Callable[[TrainState], object],
) -> tuple[TrainState, bool]:
    """Train until the budget is spent or the process has to stop; returns the state and whether the schedule is over.

    call: `steps_per_call` steps at one learning rate; takes the state over (donation). Returns its mean loss.
    report: called every `report_minutes` and at the end, with one device's copy of the state.
    Raises SmartdiffError if the loss is no longer finite; the last checkpoint is then still good.
    """
    step, last = int(state.step), None
    seen, told, saved, reported = step, time.monotonic(), budget.spent, budget.spent
    running = math.nan

    def save() -> None:
        checkpoints.save(one(state), {"spent": budget.spent})

    while budget.fraction(step) < 1 and not budget.stop():
        rate = learning_rate(budget.fraction(step), settings.learning_rate, settings.warmup)
        began = time.monotonic()
        state, loss = call(state, rate)
        step += settings.steps_per_call
        if last is None:
            jax.block_until_ready(loss)
            log(f"{name}: first call at step {step}, loss {float(loss):.4f}, {time.monotonic() - began:.1f} s with compiling")
            budget.start()
            seen, told = step, time.monotonic()
        value = float(last if last is not None else loss)
        last = loss
        if not math.isfinite(value):
            raise SmartdiffError(f"{name}: loss={value} at step {step}; lower learning_rate and go on from the checkpoint")
        running = value if math.isnan(running) else running + 0.1 * (value - running)
        now = time.monotonic()
        if now - told >= PROGRESS_SECONDS:
            pace = (step - seen) / (now - told)
            log(
                f"{name}: step {step}, loss {running:.4f}, rate {rate:.1e}, {pace:.2f} it/s, "
                f"{pace * settings.batch_size:.0f} samples/s, {budget.spent:.0f} s, {100 * budget.fraction(step):.0f} %"
            )
            seen, told = step, now
        if budget.spent - saved > 60 * settings.save_minutes:
            save()
            saved = budget.spent
        if budget.spent - reported > 60 * settings.report_minutes:
            report(one(state))
            reported = budget.spent
            seen, told = step, time.monotonic()
    over = budget.fraction(step) >= 1
    save()
    report(one(state))
    log(f"{name}: {'done' if over else 'stopped, to be continued'} at step {step}, loss {running:.4f}")
    return state, over
