"""One model on several hosts: the leader's requests run in all processes, chunk by chunk.

    leader      load, request, step, step, …, close      each sent before it does the same itself
    follower    does what it is sent

A chunk runs everywhere or nowhere, so a request that is cancelled on the leader ends between two chunks on all hosts.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.system import HostsConfig, SystemConfig
from smartdiff_jax.engine.loading import LoadedModel, load_model
from smartdiff_jax.errors import HostLost, SmartdiffError
from smartdiff_jax.sharding.multihost import Follower, Leader

if TYPE_CHECKING:
    from smartdiff_jax.engine.pipeline import Inputs

Event = TypeVar("Event")
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
        self._leader.send({"kind": "load", "pipe": self._pipe, "system": fields, **places})
        return self._leader.run(lambda: load_model(model, weights, system))

    def stream(self, events: Iterator[Event], request: GenerateParams, inputs: "Inputs", output_type: str) -> Iterator[Event]:
        """`events`, a request's own on this host, while the followers run the same. Raises HostLost."""
        stream = next(_numbers)
        arrays = {name: np.asarray(value) for name, value in vars(inputs).items() if value is not None}
        params = request.model_dump(mode="json")
        command = {"kind": "request", "pipe": self._pipe, "stream": stream, "params": params, "output_type": output_type}
        self._leader.send(command, arrays)
        try:
            while True:
                self._leader.send({"kind": "step", "stream": stream})
                event = self._leader.run(lambda: next(events, None))
                if event is None:
                    return
                yield event
        finally:
            with contextlib.suppress(HostLost):
                self._leader.send({"kind": "close", "stream": stream})


def follow(hosts: HostsConfig, number: int, cache_dir: Path) -> None:
    """Be host `number` until the leader stops. Ends the process, with 2, when the leader is lost or this host fails."""
    from smartdiff_jax.engine.pipeline import Inputs, Pipeline

    follower = Follower(hosts, number)
    pipes: dict[int, Pipeline] = {}
    streams: dict[int, Iterator[Any]] = {}
    for command, arrays in follower.commands():
        try:
            match command["kind"]:
                case "load":
                    system = SystemConfig.create(**command["system"], cache_dir=cache_dir)
                    model = load_model(command["model"], command["weights"], system)
                    pipes[command["pipe"]] = Pipeline(model, system)
                case "request":
                    params = GenerateParams.create(**command["params"])
                    pipe = pipes[command["pipe"]]
                    streams[command["stream"]] = pipe.events(params, Inputs(**arrays), command["output_type"])
                case "step":
                    # What a request is refused for it is refused for on all hosts, and the leader says so.
                    with contextlib.suppress(SmartdiffError):
                        next(streams[command["stream"]], None)
                case "close":
                    del streams[command["stream"]]
        except Exception as error:
            follower.fail(error)
