"""Real servers, each a process of its own, over a tiny model; compiled executables are shared by all of them."""

import contextlib
import dataclasses
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import httpx2

from smartdiff_jax.client import Client

COMMAND = [sys.executable, "-c", "from smartdiff_jax.cli import main; main()"]
SMALL = dict(size="32x32", num_frames=1, num_inference_steps=4, seed=3)
CLIP = dict(size="32x32", num_frames=5, num_inference_steps=200, seed=3)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def ray_secret():
    """The environment of whoever may connect to a cluster of its own; without one given, Ray would leave one at home."""
    return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@dataclasses.dataclass
class Server:
    """A running `smartdiff serve`."""

    process: subprocess.Popen
    url: str
    folder: object
    log: object

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def stop(self):
        if self.process.poll() is None:
            self.kill(signal.SIGTERM)

    def outlive_leases(self):
        """After a kill: as if the seconds had passed for which the jobs stay a dead engine's (test_job_store has those)."""
        with contextlib.closing(sqlite3.connect(self.folder / "jobs.db")) as store, store:
            store.execute("UPDATE jobs SET lease_until = 0 WHERE state = 'running'")

    def client(self, **options):
        return Client(self.url, **options)


def start(model, config, folder, *arguments, ready=True, before=""):
    """Start one in `folder`, where its store and its files are; wait until it runs jobs. before: Python that it runs first."""
    log = folder / f"log-{time.monotonic_ns()}.txt"
    python, option, code = COMMAND  # noqa
    command = [
        python,
        option,
        before + code,
        "serve",
        "--model",
        str(model),
        "--port",
        "0",
        "--config",
        str(config),
        *arguments,
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stderr=out, stdout=out)
    server = Server(process, "", folder, log)
    until = time.monotonic() + 300
    # One client for all questions: each that is made reads the certificates of the world, which takes 40 ms of a core.
    with httpx2.Client() as http:
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()
            if found := re.search(r"listening on (\S+)", log.read_text()):
                server.url = found[1]
                with contextlib.suppress(httpx2.TransportError):
                    if not ready or http.get(f"{server.url}/readyz").status_code == 200:
                        return server
            time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError(log.read_text())
