"""`smartdiff serve --ray`: the service on a Ray cluster."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartdiff_jax.errors import InvalidConfig, SmartdiffError

if TYPE_CHECKING:
    from smartdiff_jax.config.service import ServiceConfig
    from smartdiff_jax.config.system import SystemConfig

log = logging.getLogger("smartdiff")

KNOCK_SECONDS = 10.0


def serve_on_ray(models: list[str], system: "SystemConfig", service: "ServiceConfig") -> None:
    """Deploy to a cluster and return; or where none is named start one here, and serve until asked to stop."""
    from smartdiff_jax.config.ray import settled
    from smartdiff_jax.engine.store import JobStore
    from smartdiff_jax.serve.settings import Settings

    # Else Ray, below `uv run`, sends this folder to all machines and builds an environment of it for each process there.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    try:
        importlib.import_module("ray.serve")
    except ImportError as error:
        raise SmartdiffError(f"--ray needs Ray Serve ({error}); pip install 'smartdiff_jax[ray]'") from None
    from smartdiff_jax.serve.on_ray import check_room, deploy, withdraw

    began = time.perf_counter()
    service = settled(service)
    # What is wrong with them is told here, and replicas find the store's tables made.
    Settings(service, None)
    JobStore(service.store).close()
    whole = [str(Path(model).resolve()) if Path(model).is_dir() else model for model in models]
    with _connected(system.ray.address), contextlib.suppress(KeyboardInterrupt):
        check_room(system)
        try:
            deploy(whole, system, service)
            log.info("ready after %.1f s at http://%s:%d", time.perf_counter() - began, service.host, service.port)
            while system.ray.address is None:
                time.sleep(1.0)
        finally:
            if system.ray.address is None:
                log.info("stopping, when the answers under way are given; asked once more, at once")
                withdraw()


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """To a cluster; one that is started here ends here. What asks the command to stop raises KeyboardInterrupt inside."""
    import ray

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options: dict[str, Any] = {} if address is not None else {"include_dashboard": False}
    try:
        _knock(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError) as error:
        remedy = f"no cluster answers ({error}); start one with `ray start --head`, or leave it out"
        raise InvalidConfig("ray.address", address, remedy) from None

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    if address is None:
        log.info("a Ray cluster is started, whose address is %s", ray.get_runtime_context().gcs_address)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises OSError where nobody listens; Ray would try for a quarter of an hour."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
