"""The same app as the ingress of Ray Serve: each replica has an engine of its own, and all engines pull from one store.

Ray routes requests to any replica and starts, replaces and counts replicas; who makes which job is the store's business, as it
is among processes without Ray. So a replica may go at any time: its jobs are taken up by others, and those who wait for an
answer of another replica hear of them through the store.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import socket
import time
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from smartdiff_jax.config.ray import is_sqlite
from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.config.system import HostsConfig, SystemConfig
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.errors import InvalidConfig, SmartdiffError
from smartdiff_jax.serve.app import create_app
from smartdiff_jax.serve.scaling import BEGUN, WAITING, QueueTime

log = logging.getLogger("smartdiff")

NAME = "smartdiff"
MANY = 10_000
"""Requests that a replica answers at once; most only wait for something, and what is too much the service itself refuses."""
TRIES = 3
"""How often a replica may fail to start before a deployment is given up."""
HEALTH_SECONDS = 5.0
LOOK_SECONDS = 0.5
QUIET = {"log_level": "WARNING", "enable_access_log": False}
SCALE_UP_SECONDS, SCALE_DOWN_SECONDS = 10.0, 300.0
"""How long more, or fewer, replicas must be wanted before there are: to start one costs its loading and warming."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What each replica is made of. machine: the address of the one that the paths were settled on."""

    models: tuple[str, ...]
    system: SystemConfig
    service: ServiceConfig
    machine: str

    def check(self, here: str) -> None:
        """Raises InvalidConfig where a replica that is started on the machine `here` would have a store of its own."""
        if is_sqlite(self.service.store) and here != self.machine:
            remedy = f"lies on {self.machine}, and {here} cannot share it; use PostgreSQL for several machines"
            raise InvalidConfig("store", self.service.store, remedy)


@serve.ingress()
class Replica:
    """One engine and the app over it."""

    def __init__(self, deployment: Deployment):
        log.setLevel(logging.INFO)
        log.handlers = logging.getLogger("ray.serve").handlers  # where Ray keeps what a replica tells
        deployment.check(ray.util.get_node_ip_address())
        self._deployment = deployment

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._deployment.service
        store = JobStore(config.store, ttl=config.keep_hours * 3600)
        files = Artifacts(config.artifacts)

        def load() -> Any:
            from smartdiff_jax.engine.engine import Engine

            system = self._deployment.system
            if system.ray.hosts > 1:
                system = _lead(system)
            return Engine.of(self._deployment.models, system, store, files, config)

        app = create_app(config, load, alone=False)
        self._service = app.state.service
        return app

    async def check_health(self) -> None:
        """Ray asks it before the first request, so that a replica counts when its models are warm, and all the time after."""
        await asyncio.to_thread(self._service.started.wait)
        if (failure := self._service.failure) is not None:
            raise SmartdiffError(failure)

    def record_autoscaling_stats(self) -> dict[str, float]:
        waiting, begun = self._service.engine.queue.backlogs()
        return {WAITING: waiting, BEGUN: begun}


def _follow(system: SystemConfig, number: int) -> None:
    """Be any other host of a replica whose mesh reaches over several, in a process that ends with the one that leads."""
    from smartdiff_jax.engine.hosts import follow

    assert system.hosts is not None
    follow(system.hosts, number, system.cache_dir)


def _lead(system: SystemConfig) -> SystemConfig:
    """Start the other hosts, each in its bundle of the group that this replica was placed with, and connect to them.

    Returns what this replica runs by, with `hosts`.
    """
    from smartdiff_jax.engine.hosts import connect

    config, here = system.ray, ray.util.get_node_ip_address()
    hosts = HostsConfig(coordinator=f"{here}:{two_free_ports()}", count=config.hosts)
    system = system.model_copy(update={"hosts": hosts})
    group = ray.util.get_current_placement_group()
    assert group is not None, "deploy places a replica of several hosts in one"
    once = ray.remote(max_calls=1, max_retries=0)(_follow)  # JAX connects a process to hosts once
    for number in range(1, config.hosts):
        place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=number)
        once.options(scheduling_strategy=place, **_needs(system)).remote(system, number)
    connect(hosts)
    return system


def _needs(system: SystemConfig) -> dict[str, Any]:
    """Of each host of a replica."""
    return {"num_cpus": system.ray.cpus, "num_gpus": system.ray.gpus_of_a_host(system.mesh.num_devices)}


def deploy(models: list[str], system: SystemConfig, service: ServiceConfig) -> None:
    """Put these replicas in the place of those that are there, one after another, on the cluster this process is connected to.

    Returns when all run. Raises SmartdiffError with what they failed by; those that were there and not yet replaced go on.
    """
    config, needed = system.ray, _needs(system)
    number: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        policy = AutoscalingPolicy(policy_function=QueueTime, policy_kwargs={"queue_seconds": config.queue_seconds})
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=config.max_replicas,
                upscale_delay_s=SCALE_UP_SECONDS,
                downscale_delay_s=SCALE_DOWN_SECONDS,
                policy=policy,
            )
        }
    if config.hosts > 1:
        bundle = {"CPU": needed["num_cpus"]} | ({"GPU": needed["num_gpus"]} if needed["num_gpus"] else {})
        number |= {"placement_group_bundles": [bundle] * config.hosts, "placement_group_strategy": "STRICT_SPREAD"}
    deployment = serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=needed,
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=config.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=TRIES,
        logging_config=QUIET,
        **number,
    )
    serve.start(proxy_location="EveryNode", http_options={"host": service.host, "port": service.port}, logging_config=QUIET)
    made_of = Deployment(tuple(models), system, service, ray.util.get_node_ip_address())
    try:
        serve.run(deployment.bind(made_of), name=NAME, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications[NAME].deployments.get(NAME)
        raise SmartdiffError(_cause(str(error) if found is None else found.message)) from None


def withdraw() -> None:
    """Take all replicas away, after they have given the answers they are giving and saved the jobs they have begun."""
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications:
        time.sleep(LOOK_SECONDS)


def check_room(system: SystemConfig) -> None:
    """Raises InvalidConfig where a replica could never be placed; Ray would wait for machines that can hold it.

    Others may be added to a cluster that was there before. One that is started here has this machine alone.
    """
    config, needed = system.ray, _needs(system)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for field, resource, remedy in (("gpus", "GPU", "0 computes on CPUs"), ("cpus", "CPU", "a replica needs one at least")):
        one = needed[f"num_{resource.lower()}s"]
        most = int(max(machine.get(resource, 0) for machine in machines))
        if one > most:
            raise InvalidConfig(f"ray.{field}", one, f"no machine of the cluster has more than {most} to give; {remedy}")
        if config.address is None and one * config.replicas > most:
            told = f"this machine has {most} {resource}s, and each takes {one}; have fewer, or name a cluster (ray.address)"
            raise InvalidConfig("ray.replicas", config.replicas, told)
    if config.address is None and config.hosts > 1:
        raise InvalidConfig("ray.hosts", config.hosts, "this machine is one; name a cluster of as many (ray.address)")


def _cause(message: str) -> str:
    """The last line of the traceback that Ray tells, which says what went wrong, without the exception's class."""
    lines = message.strip().splitlines()
    return re.sub(r"^[a-z_.]+[A-Z]\w+: ", "", lines[-1]) if lines else "Ray's controller tells why in its log"


def two_free_ports() -> int:
    """The first of two in a row."""
    while True:
        with socket.create_server(("", 0)) as one:
            port = one.getsockname()[1]
            with contextlib.suppress(OSError), socket.create_server(("", port + 1)):
                return port
