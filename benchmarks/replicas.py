"""Replicas on a Ray cluster: what a second machine adds, and what an upgrade costs those who use the service meanwhile.

    python benchmarks/replicas.py                 both, about ten minutes on two cores
    python benchmarks/replicas.py --only upgrade

    scale      seconds for a full queue of pictures by one replica on one core, and by two, each on a core of its own
    upgrade    pictures waited for, streams of events and lists of jobs, asked without a pause while both replicas are replaced

The cluster has machines of one core: raylets that are bound to it, with all they start. Ray's head and this client run on the
same two cores beside them. Writes benchmarks/results/replicas-<device>.json.
"""

import argparse
import collections
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import result_file, stamp, write  # noqa: E402
from smartdiff_jax.client import Client  # noqa: E402

MODEL = "pocket-image"
PICTURE: dict[str, Any] = dict(num_inference_steps=20, seed=1)
QUEUE = 40
SHORT = dict(prompt="a dog", num_inference_steps=4, response_format="url")
COMMAND = [sys.executable, "-c", "from smartdiff_jax.cli import main; main()"]


class Service:
    """A Ray cluster of so many machines of one core, and a replica on each."""

    def __init__(self, folder: Path, machines: int):
        from ray.cluster_utils import Cluster

        self._folder, self._machines = folder, machines
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cores = sorted(os.sched_getaffinity(0))
        for core in cores[:machines]:
            os.sched_setaffinity(0, {core})  # who is started from here on is bound to it
            try:
                self._cluster.add_node(num_cpus=1)
            finally:
                os.sched_setaffinity(0, cores)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(self) -> None:
        """Also once more, which replaces all replicas."""
        ray = {"address": self._cluster.address, "replicas": self._machines, "gpus": 0}
        config = self._folder / "ray.yaml"
        config.write_text(json.dumps({"service": {"port": self._port}, "ray": ray}))
        subprocess.run([*COMMAND, "serve", "--ray", str(config), "--model", MODEL], cwd=self._folder, check=True)

    def stop(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def service(machines: int) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as folder:
        running = Service(Path(folder), machines)
        try:
            running.deploy()
            yield running
        finally:
            running.stop()


def made(url: str, jobs: list[str]) -> list[dict[str, Any]]:
    """The jobs, when all have ended."""
    with httpx2.Client(base_url=url, timeout=60) as http:
        while True:
            found = {job["id"]: job for job in http.get("/v1/jobs", params={"limit": 100}).json()["data"]}
            if all(found[job]["finished_at"] is not None for job in jobs):
                return [found[job] for job in jobs]
            time.sleep(1.0)


def processor_seconds() -> tuple[float, float]:
    """Of all programs since the machine was started, and of this one and its descendants, which still run."""
    busy = sum(int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4])
    ticks, children = {}, collections.defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, (*_, rest) = int(file.parent.name), file.read_text().rsplit(")", 1)
            fields = rest.split()
            ticks[pid] = int(fields[11]) + int(fields[12])
            children[int(fields[1])].append(pid)
    own, found = 0, [os.getpid()]
    while found:
        pid = found.pop()
        own += ticks.get(pid, 0)
        found += children[pid]
    second = os.sysconf("SC_CLK_TCK")
    return busy / second, own / second


@contextlib.contextmanager
def shared(row: dict[str, Any]) -> Iterator[None]:
    """Adds which share of its processors this machine's other programs took meanwhile."""
    began, (all_before, own_before) = time.perf_counter(), processor_seconds()
    yield
    all_after, own_after = processor_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    row["taken_by_others"] = round(others / (time.perf_counter() - began) / len(os.sched_getaffinity(0)), 3)


def fill(machines: int) -> dict[str, Any]:
    """From when the first job is begun until the last has ended."""
    row: dict[str, Any] = {"jobs": QUEUE}
    with service(machines) as running, Client(running.url) as client:
        for _ in range(3):
            made(running.url, [client.submit("a dog", **PICTURE).id for _ in range(2 * machines)])
        with shared(row):
            jobs = made(running.url, [client.submit(f"a dog {index}", **PICTURE).id for index in range(QUEUE)])
    assert all(job["state"] == "succeeded" for job in jobs), jobs
    seconds = max(job["finished_at"] for job in jobs) - min(job["started_at"] for job in jobs)
    return row | {"seconds": round(seconds, 2)}


def scale(repeats: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"one": [], "two": []}
    for _ in range(repeats):
        for machines, found in enumerate(rows.values(), 1):
            found.append(fill(machines))
            print(machines, found[-1], flush=True)
    one, two = (float(np.median([row["seconds"] for row in found])) for found in rows.values())
    return rows | {"ratio": round(one / two, 3)}


class Users:
    """Those who use a service without a pause, each a thread, until they are told that it is over."""

    def __init__(self, url: str):
        self._url, self._over = url, threading.Event()
        self.answers: collections.Counter = collections.Counter()
        self.errors: list[str] = []
        self.longest: dict[str, float] = {}
        kinds = [self._picture, self._picture, self._stream, self._list]
        self._threads = [threading.Thread(target=self._use, args=(kind, number)) for number, kind in enumerate(kinds)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _use(self, kind: Any, user: int) -> None:
        name = kind.__name__.strip("_")
        with httpx2.Client(base_url=self._url, timeout=300) as http, Client(self._url) as client:
            for number in range(10**9):
                if self._over.is_set():
                    return
                began = time.perf_counter()
                try:
                    kind(http, client, 1000 * user + number)
                    self.answers[name] += 1
                except Exception as error:
                    self.errors.append(f"{name}: {error!r}")
                self.longest[name] = max(self.longest.get(name, 0.0), time.perf_counter() - began)

    def _picture(self, http: httpx2.Client, client: Client, seed: int) -> None:
        http.post("/v1/images/generations", json=SHORT | {"seed": seed}).raise_for_status()

    def _stream(self, http: httpx2.Client, client: Client, seed: int) -> None:
        client.generate("a dog", num_inference_steps=40, seed=seed)

    def _list(self, http: httpx2.Client, client: Client, seed: int) -> None:
        http.get("/v1/jobs").raise_for_status()
        time.sleep(0.05)


def upgrade(repeats: int) -> dict[str, Any]:
    runs = []
    for _ in range(repeats):
        with service(2) as running:
            row: dict[str, Any] = {}
            users = Users(running.url)
            with shared(row):
                time.sleep(5.0)
                began = time.perf_counter()
                running.deploy()
                seconds = time.perf_counter() - began
                time.sleep(5.0)
            users.leave()
            with Client(running.url) as client:
                unmade = [job.id for job in client.jobs(limit=100) if job.state != "succeeded"]
        longest = {name: round(value, 2) for name, value in users.longest.items()}
        runs.append(
            row
            | {
                "seconds": round(seconds, 1),
                "answers": dict(users.answers),
                "errors": users.errors,
                "jobs_not_made": len(unmade),
                "longest_seconds": longest,
            }
        )
        print(runs[-1], flush=True)
    return {"runs": runs}


PARTS = {"scale": scale, "upgrade": upgrade}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    # Who connects to a cluster by its address shows that it may.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    found = {name: PARTS[name](arguments.repeats) for name in arguments.only}
    now = stamp(arguments.commit)  # last, for it starts JAX here, and Ray forks
    file = result_file("replicas", now)
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found = {name: rows | {"commit": now["commit"]} for name, rows in found.items()}
    print(write("replicas", before | {"stamp": now} | found, file))


if __name__ == "__main__":
    main()
