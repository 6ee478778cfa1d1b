"""The service as its users meet it: real `smartdiff serve` processes on this machine's CPU, the bundled models, HTTP.

    python benchmarks/serve.py                       all of it, about seven minutes on two cores
    python benchmarks/serve.py --only ready mixed    some of it

    ready      seconds from the start of the process until /readyz; from the second start on with a warm compilation cache
    overhead   what a job takes over its stages (text, denoise, decode, media), one at a time; of which a POST
    burst      1,000 submissions in 10 s, and a status call's p99 meanwhile: each is accepted or 429, none is lost
    mixed      four long clips, then a picture a second, 20 of them: latencies under the scheduler and first come first served
    idle       the share of the time that the device waits between jobs while the queue is full

First come first served is the same server with its scheduler's choice replaced. Writes benchmarks/results/serve-<device>.json.
"""

import argparse
import asyncio
import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import result_file, stamp, write  # noqa: E402
from benchmarks.servers import address, launch  # noqa: E402
from smartdiff_jax.client import AsyncClient, Client, JobStatus  # noqa: E402

FIFO = """
from smartdiff_jax.engine.scheduler import Scheduler

def pick(self, among=None):
    entries = self._entries.values() if among is None else [self._entries[job] for job in among]
    first = min(entries, key=lambda entry: (entry.created_at, entry.id), default=None)
    return None if first is None else first.id

Scheduler.pick = pick
"""
MODELS = "pocket-image", "pocket-video"
PICTURE: dict[str, Any] = dict(model="pocket-image", num_inference_steps=4, seed=1)
CLIP: dict[str, Any] = dict(model="pocket-video", num_inference_steps=100, num_outputs=4, seed=1)
QUEUE = "service:\n  max_queued: 256\n"


class Server:
    """One process with its own store and files; `url` once it listens."""

    def __init__(self, folder: Path, fifo: bool, models: Sequence[str]):
        (folder / "service.yaml").write_text(QUEUE)
        self.log = folder / "log.txt"
        self.began = time.perf_counter()
        self.process = launch(folder, self.log, models, before=FIFO if fifo else "")
        self.url = ""
        while not self._is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-2000:])
            time.sleep(0.02)
        self.ready_seconds = time.perf_counter() - self.began

    def _is_ready(self) -> bool:
        self.url = self.url or address(self.log)
        if not self.url:
            return False
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/readyz").status_code == 200
        return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


@contextlib.contextmanager
def server(fifo: bool = False, models: Sequence[str] = MODELS) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(Path(folder), fifo, models)
        try:
            yield running
        finally:
            running.stop()


def quantiles(seconds: list[float]) -> dict[str, float]:
    values = {"median": np.median(seconds), "p95": np.percentile(seconds, 95), "p99": np.percentile(seconds, 99)}
    return {name: round(float(value), 4) for name, value in values.items()}


def metric(url: str, name: str) -> float:
    """One number of /metrics."""
    found = re.search(rf"^smartdiff_{re.escape(name)} (\S+)$", httpx2.get(f"{url}/metrics").text, re.M)
    assert found is not None, name
    return float(found[1])


def warm(client: Client) -> None:
    """Every shape that is measured, once."""
    client.generate("a dog", **PICTURE)
    two_steps: dict[str, Any] = CLIP | {"num_inference_steps": 2}
    client.generate("a dog moving left", **two_steps)


def ready(starts: int = 4, kinds: Sequence[str] = ("default", "both_models")) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in kinds:
        models, found[name] = (MODELS if name == "both_models" else ()), []
        for _ in range(starts):  # the first may compile
            with server(models=models) as running:
                found[name].append(round(running.ready_seconds, 2))
    return found


def overhead() -> dict[str, Any]:
    with server() as running, Client(running.url) as client:
        warm(client)
        over, posts, written = [], [], metric(running.url, 'stage_seconds_sum{model="pocket-image",stage="media"}')
        for index in range(40):
            began = time.perf_counter()
            job = client.submit(f"a dog {index}", **PICTURE)
            posts.append(time.perf_counter() - began)
            for last in client.events(job.id):
                job = last
            waited = time.perf_counter() - began
            assert job.report is not None
            over.append(waited - sum(job.report["seconds"].values()))
        media = (metric(running.url, 'stage_seconds_sum{model="pocket-image",stage="media"}') - written) / len(over)
    over = [seconds - media for seconds in over]
    return {"post_seconds": quantiles(posts), "media_seconds": round(media, 4), "over_stages_seconds": quantiles(over)}


def burst() -> dict[str, Any]:
    async def run(url: str) -> dict[str, Any]:
        counts: dict[str, int] = {}
        accepted: list[str] = []
        posts: list[float] = []
        status: list[float] = []
        over = asyncio.Event()

        async with httpx2.AsyncClient(base_url=url, timeout=30.0) as http:

            async def post(index: int) -> None:
                began = time.perf_counter()
                response = await http.post("/v1/jobs", json={"prompt": f"a dog {index}", **PICTURE})
                posts.append(time.perf_counter() - began)
                counts[str(response.status_code)] = counts.get(str(response.status_code), 0) + 1
                if response.status_code == 202:
                    accepted.append(response.json()["id"])

            async def ask() -> None:
                while not over.is_set():
                    if accepted:
                        began = time.perf_counter()
                        response = await http.get(f"/v1/jobs/{accepted[len(status) * 7 % len(accepted)]}")
                        status.append(time.perf_counter() - began)
                        assert response.status_code == 200
                    await asyncio.sleep(0.05)

            asking = asyncio.create_task(ask())
            began, posting = time.perf_counter(), []
            for index in range(1000):
                await asyncio.sleep(max(0.0, began + index * 0.01 - time.perf_counter()))
                posting.append(asyncio.create_task(post(index)))
            await asyncio.gather(*posting)
            seconds = time.perf_counter() - began
            over.set()
            await asking
            found = [(await http.get(f"/v1/jobs/{job}")).json()["state"] for job in accepted]
            for job in accepted:
                await http.post(f"/v1/jobs/{job}/cancel")
        return {
            "answers": counts,
            "lost": sum(state not in ("queued", "running", "succeeded") for state in found),
            "seconds": round(seconds, 2),
            "post_seconds": quantiles(posts),
            "status_seconds": quantiles(status),
            "status_calls": len(status),
        }

    with server() as running:
        with Client(running.url) as client:
            warm(client)
        return asyncio.run(run(running.url))


def mixed() -> dict[str, Any]:
    async def run(url: str) -> dict[str, Any]:
        async with AsyncClient(url) as client:

            async def one(prompt: str, fields: dict[str, Any], after: float) -> tuple[float, JobStatus]:
                await asyncio.sleep(after)
                began = time.perf_counter()
                job = await client.generate(prompt, **fields)
                return time.perf_counter() - began, job

            began = time.perf_counter()
            clip = one("a dog moving left", CLIP, 0.0)
            pictures = [one(f"a dog {index}", PICTURE, 1.0 + index) for index in range(20)]
            (clip_seconds, _), *done = await asyncio.gather(clip, *pictures)
            total = time.perf_counter() - began
        latencies = [seconds for seconds, _ in done]
        return {
            "total_seconds": round(total, 2),
            "clip_seconds": round(clip_seconds, 2),
            "picture_seconds": quantiles(latencies),
        }

    rows: dict[str, list[dict[str, Any]]] = {"fair": [], "first_come": []}
    for _ in range(2):
        for name, found in rows.items():
            with server(fifo=name == "first_come") as running:
                with Client(running.url) as client:
                    warm(client)
                found.append(asyncio.run(run(running.url)))
                print(name, found[-1], flush=True)
    p95, total = (
        {name: float(np.mean([pick(row) for row in found])) for name, found in rows.items()}
        for pick in (lambda row: row["picture_seconds"]["p95"], lambda row: row["total_seconds"])
    )
    return rows | {"p95_ratio": p95["first_come"] / p95["fair"], "total_ratio": total["fair"] / total["first_come"]}


def idle() -> dict[str, Any]:
    busy = 'device_seconds_total{model="pocket-image"}'
    with server() as running, Client(running.url) as client:
        warm(client)
        jobs = [client.submit(f"a dog {index}", **PICTURE).id for index in range(60)]
        while client.get(jobs[4]).state != "succeeded":
            time.sleep(0.05)
        began, before = time.perf_counter(), metric(running.url, busy)
        while client.get(jobs[54]).state != "succeeded":
            time.sleep(0.2)
        seconds, worked = time.perf_counter() - began, metric(running.url, busy) - before
    return {"seconds": round(seconds, 2), "busy_seconds": round(worked, 2), "idle_share": round(1 - worked / seconds, 4)}


PARTS = {"ready": ready, "overhead": overhead, "burst": burst, "mixed": mixed, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="one start of the default model, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the result goes instead")
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    now = stamp(arguments.commit)
    file = arguments.output or result_file("serve-tiny" if arguments.tiny else "serve", now)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if arguments.tiny:
        arguments.only, PARTS["ready"] = ["ready"], lambda: ready(1, ("default",))
    for name in arguments.only:
        results |= {"stamp": now, name: PARTS[name]() | {"commit": now["commit"]}}
        print(name, results[name], flush=True)
        write("serve", results, file)
    print(file)


if __name__ == "__main__":
    main()
