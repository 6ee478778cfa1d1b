"""Models replaced while their service goes on: new weights are loaded and tried beside the old, and take over between two jobs.

loading    from where the model was loaded at the start, whatever lies there now
warming    the newest request, in two steps: it compiles what is not there yet, and shows that pictures come out
draining   the new weights serve; jobs that the old ones began are finished by the old
done       the old weights are freed
failed     the old ones stay, as if nothing had been asked
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from smartdiff_jax.engine import deliver
from smartdiff_jax.engine.garbage import settle
from smartdiff_jax.engine.job import UpgradeState
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.warming import warm
from smartdiff_jax.errors import Cancelled, Conflict, InvalidConfig
from smartdiff_jax.stages.base import Progress

if TYPE_CHECKING:
    from smartdiff_jax.engine.engine import Engine

POLL_SECONDS = 0.05

UNDER_WAY = ("loading", "warming", "draining")

log = logging.getLogger("smartdiff")


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """The newest upgrade of a model. error: why it failed. Times are seconds since the epoch."""

    model: str
    state: UpgradeState = "idle"
    error: str | None = None
    began_at: float | None = None
    ended_at: float | None = None


class Upgrades:
    """Those of one engine. loaders: by model, what makes its pipeline anew."""

    def __init__(self, engine: "Engine", loaders: Mapping[str, Callable[[], Pipeline]]):
        self._engine, self._loaders = engine, dict(loaders)
        self._newest: dict[str, Upgrade] = {}
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []

    def of(self, model: str) -> Upgrade:
        return self._newest.get(model, Upgrade(model))

    def begin(self, model: str) -> Upgrade:
        """Start one, on a thread of its own. Raises Conflict while another is under way: there is room for two at most."""
        if model not in self._loaders:
            raise InvalidConfig("model", model, "nothing tells where it was loaded from; start the service anew")
        with self._lock:
            busy = next((upgrade for upgrade in self._newest.values() if upgrade.state in UNDER_WAY), None)
            if busy is not None:
                raise Conflict(f"{busy.model} is being upgraded ({busy.state}); ask again when that has ended")
            begun = self._newest[model] = Upgrade(model, "loading", began_at=time.time())
        thread = threading.Thread(target=self._run, args=(model,), name="upgrade", daemon=True)
        self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
        thread.start()
        return begun

    def leave(self) -> None:
        """Give up what has not taken over yet."""
        self._leaving.set()

    def join(self) -> None:
        """Wait until all have ended; one that is loading cannot be stopped before it has loaded."""
        for thread in self._threads:
            thread.join()

    def _run(self, model: str) -> None:
        try:
            pipe = self._loaders[model]()
            if pipe.spec.name != model:
                raise InvalidConfig("model", pipe.spec.name, f"is what lies now where {model} was loaded from")
            self._set(model, state="warming")
            newest = self._engine.newest.get(model)
            if newest is not None:
                self._engine.shapes.remember(pipe, pipe.check(warm(pipe, newest, self._unless_leaving)))
            self._set(model, state="draining")
            if self._drain(self._engine.replace(model, pipe)):
                settle()  # weights hang in cycles with the functions that were compiled for them
                self._set(model, state="done", ended_at=time.time())
                log.info("%s: new weights serve, the old are freed", model)
        except Exception as error:
            told = deliver.told(error)
            known = told["code"] != "internal_error"
            log.error("%s stays as it was: %s", model, error, exc_info=None if known else error)
            message = told["message"] if known else f"{type(error).__name__}: {error}"
            self._set(model, state="failed", error=message, ended_at=time.time())
            pipe = None
            settle()

    def _set(self, model: str, **changes) -> None:
        self._newest[model] = dataclasses.replace(self._newest[model], **changes)

    def _unless_leaving(self, progress: Progress) -> None:
        if self._leaving.is_set():
            raise Cancelled("the service is stopping")

    def _drain(self, old: Pipeline | None) -> bool:
        """Wait for the jobs that it began. False if the service stops before."""
        while old is not None and self._engine.uses(old):
            if self._leaving.wait(POLL_SECONDS):
                return False
        return True
