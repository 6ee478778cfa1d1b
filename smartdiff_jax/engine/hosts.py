"""One model on several hosts: the leader's requests run in all processes, chunk by chunk.

    leader      load, request, step, step, checkpoint, step, preview, …, close      each sent before it does the same itself
    follower    does what it is sent

A chunk runs everywhere or nowhere, so a request that is cancelled on the leader ends between two chunks on all hosts.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.system import HostsConfig, SystemConfig
from smartdiff_jax.engine.loading import LoadedModel, load_model
from smartdiff_jax.errors import HostLost, SmartdiffError
from smartdiff_jax.sharding.multihost import Follower, Leader
from smartdiff_jax.stages.checkpoint import Checkpoint

if TYPE_CHECKING:
    from smartdiff_jax.engine.pipeline import Inputs

Event = TypeVar("Event")
RESUME = "resume"
_numbers = itertools.count()
_leader: Leader | None = None


class Lead:
    """One pipeline's place on the followers."""

    def __init__(self, hosts: HostsConfig):
        global _leader
        if _leader is None or _leader.hosts != hosts:
            _leader = Leader(hosts)
        self._leader, self._pipe = _leader, next(_numbers)

    def load(self, model: str | Path, weights: str | Path | None, system: SystemConfig) -> LoadedModel:
        """On all hosts; `model` and `weights` mean on each what they mean here, and caches are each host's own."""
        fields = system.model_dump(mode="json", exclude={"cache_dir", "hosts"})
        places = {"model": str(model), "weights": None if weights is None else str(weights)}
        command = {"kind": "load", "pipe": self._pipe, "system": fields, **places}
        return self._leader.run(lambda: load_model(model, weights, system), command)

    def stream(
        self,
        events: Iterator[Event],
        request: GenerateParams,
        inputs: "Inputs",
        output_type: str,
        resume: Checkpoint | None,
        stops: Collection[int],
    ) -> Iterator[Event]:
        """`events`, a request's own on this host, while the followers run the same. Raises HostLost."""
        stream = next(_numbers)
        arrays = {name: np.asarray(value) for name, value in vars(inputs).items() if value is not None}
        if resume is not None:
            arrays[RESUME] = np.frombuffer(resume.to_bytes(RESUME), np.uint8)
        told = {"params": request.model_dump(mode="json"), "output_type": output_type, "stops": sorted(stops)}
        self._leader.send({"kind": "request", "pipe": self._pipe, "stream": stream, **told}, arrays)
        try:
            while True:
                event = self._leader.run(lambda: next(events, None), {"kind": "step", "stream": stream})
                if event is None:
                    return
                yield self._together(event, stream)
        finally:
            with contextlib.suppress(HostLost):
                self._leader.send({"kind": "close", "stream": stream})

    def _together(self, event: Any, stream: int) -> Any:
        """What a pause can be asked for takes all hosts."""
        from smartdiff_jax.engine.pipeline import Pause

        if not isinstance(event, Pause):
            return event
        run, alone = self._leader.run, event.preview

        def preview(to_uint8: bool = True) -> np.ndarray:
            assert alone is not None
            made = functools.partial(alone, to_uint8)
            return run(made, {"kind": "preview", "stream": stream, "to_uint8": to_uint8})

        return dataclasses.replace(
            event,
            checkpoint=lambda: run(event.checkpoint, {"kind": "checkpoint", "stream": stream}),
            preview=None if alone is None else preview,
        )


def connect(hosts: HostsConfig) -> None:
    """Be host 0, before anything asks for devices. Waits for the others. Raises HostLost, InvalidConfig."""
    Lead(hosts)


def follow(hosts: HostsConfig, number: int, cache_dir: Path) -> None:
    """Be host `number` until the leader stops. Ends the process, with 2, when the leader is lost or this host fails."""
    from smartdiff_jax.engine.pipeline import Inputs, Pipeline

    follower = Follower(hosts, number)
    pipes: dict[int, Pipeline] = {}
    streams: dict[int, Iterator[Any]] = {}
    newest: dict[int, Any] = {}
    for command, arrays in follower.commands():
        try:
            match command["kind"]:
                case "load":
                    system = SystemConfig.create(**command["system"], cache_dir=cache_dir)
                    model = load_model(command["model"], command["weights"], system)
                    pipes[command["pipe"]] = Pipeline(model, system)
                case "request":
                    params = GenerateParams.create(**command["params"])
                    pipe, resume = pipes[command["pipe"]], _checkpoint(arrays.pop(RESUME, None))
                    told = command["output_type"], resume, command["stops"]
                    streams[command["stream"]] = pipe.events(params, Inputs(**arrays), *told)
                case "step":
                    # What a request is refused for it is refused for on all hosts, and the leader says so.
                    with contextlib.suppress(SmartdiffError):
                        newest[command["stream"]] = next(streams[command["stream"]], None)
                case "checkpoint":
                    newest[command["stream"]].checkpoint()
                case "preview":
                    newest[command["stream"]].preview(command["to_uint8"])
                case "close":
                    del streams[command["stream"]]
                    newest.pop(command["stream"], None)
        except Exception as error:
            follower.fail(error)


def _checkpoint(data: np.ndarray | None) -> Checkpoint | None:
    if data is None:
        return None
    with tempfile.NamedTemporaryFile() as file:
        file.write(data.tobytes())
        file.flush()
        return Checkpoint.from_file(file.name, RESUME)
