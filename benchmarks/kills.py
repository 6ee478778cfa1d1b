"""Kill a service under load, again and again, and count what became of what it had accepted.

    python benchmarks/kills.py                100 kills, about a quarter of an hour on two cores
    python benchmarks/kills.py --kills 5

Two `smartdiff serve` processes share a store. Submitters send small pictures and short clips, each with an Idempotency-Key of
its own that they repeat until they are answered. Every few seconds one process, whatever it is doing, is killed (SIGKILL, or
every fourth time SIGTERM or SIGINT) and started again. At the end every accepted job must have succeeded, once, with the bytes
that the pipeline gives in this process without any interruption; and no more of what a server had denoised may be done again
than a checkpoint interval and a chunk. Writes benchmarks/results/kills-<device>.json.
"""

import argparse
import collections
import contextlib
import hashlib
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, write  # noqa: E402
from benchmarks.servers import COUNTED, address, launch, taken_up  # noqa: E402

MODELS = "pocket-image", "pocket-video"
PICTURE = dict(model="pocket-image", prompt="a dog", num_inference_steps=4, output_format="png")
CLIP = dict(model="pocket-video", prompt="a dog moving left", num_inference_steps=20, num_frames=5, output_format="webp")
KINDS: tuple[dict[str, Any], ...] = (
    *(PICTURE | {"seed": seed} for seed in range(6)),
    *(CLIP | {"seed": seed} for seed in range(3)),
)
FINAL = "succeeded", "failed", "cancelled"
CHECKPOINT_SECONDS = 0.5
CONFIG = f"service:\n  max_queued: 24\n  checkpoint_seconds: {CHECKPOINT_SECONDS}\n"


class Process:
    """A server that is started again whenever it was stopped."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.url = folder, number, ""
        self.start()

    def start(self) -> None:
        self.log = self.folder / f"log-{self.number}.txt"
        self.process = launch(self.folder, self.log, MODELS, before=COUNTED)
        self.url = ""

    def find(self) -> str:
        """Where it listens; empty while it does not yet."""
        self.url = self.url or address(self.log)
        return self.url

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=120)


def ask(servers: list[Process], method: str, path: str, **options: Any) -> httpx2.Response | None:
    """By any that answers and is not starting still (503)."""
    for server in random.sample(servers, len(servers)):
        if url := server.find():
            with contextlib.suppress(httpx2.TransportError):
                answer = httpx2.request(method, f"{url}{path}", timeout=20, **options)
                if answer.status_code != 503:
                    return answer
    return None


def submit_until(stop: threading.Event, servers: list[Process], accepted: dict[str, int], counts: collections.Counter) -> None:
    number = 0
    while not stop.is_set():
        key, kind = f"{threading.get_ident()}-{number}", number % len(KINDS)
        while True:
            answer = ask(servers, "POST", "/v1/jobs", json=KINDS[kind], headers={"Idempotency-Key": key})
            counts["no answer" if answer is None else answer.status_code] += 1
            if answer is not None and answer.status_code in (200, 202):
                accepted[answer.json()["id"]] = kind
                break
            if stop.is_set():
                return
            time.sleep(0.3)
        number += 1
        time.sleep(0.5)


def wait_for(servers: list[Process], accepted: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What became of every job, for ten minutes at most."""
    ended: dict[str, dict[str, Any]] = {}
    waiting, until = set(accepted), time.perf_counter() + 600
    while waiting and time.perf_counter() < until:
        for job in list(waiting):
            answer = ask(servers, "GET", f"/v1/jobs/{job}")
            if answer is not None and answer.status_code != 200:
                ended[job] = {"state": f"lost: {answer.status_code}"}
            elif answer is not None and answer.json()["state"] in FINAL:
                ended[job] = answer.json()
        waiting -= ended.keys()
        time.sleep(1.0)
    return ended


def has_bytes(servers: list[Process], job: dict[str, Any], expected: str) -> bool:
    file = None
    while job["state"] == "succeeded" and (file := ask(servers, "GET", job["files"][0])) is None:
        time.sleep(0.5)
    return file is not None and hashlib.sha256(file.content).hexdigest() == expected


def list_all(servers: list[Process]) -> list[dict[str, Any]]:
    """Every job in the store, by pages."""
    found: list[dict[str, Any]] = []
    while True:
        after = {"after": found[-1]["id"]} if found else {}
        page = ask(servers, "GET", "/v1/jobs", params={"limit": 100} | after)
        if page is None:
            time.sleep(0.5)
            continue
        found += page.json()["data"]
        if not page.json()["has_more"]:
            return found


def references() -> list[str]:
    """Hashes of the files that each kind of job ends with."""
    from smartdiff_jax.engine.pipeline import Pipeline

    pipes = {model: Pipeline.from_pretrained(model) for model in MODELS}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            fields = {name: value for name, value in kind.items() if name not in ("model", "output_format")}
            (file,) = pipes[kind["model"]](**fields).save(Path(folder) / f"out.{kind['output_format']}")
            found.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--between", type=float, nargs=2, default=(2.0, 9.0), metavar=("LEAST", "MOST"),
                        help="seconds; where a start takes longer than both, nothing is ever made")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="where the tree has no history")
    arguments = parser.parse_args()
    expected, rng = references(), random.Random(arguments.seed)
    accepted: dict[str, int] = {}
    answers: collections.Counter = collections.Counter()
    signals: collections.Counter = collections.Counter()
    stop = threading.Event()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "service.yaml").write_text(CONFIG)
        servers = [Process(folder, number) for number in range(2)]
        submitters = [threading.Thread(target=submit_until, args=(stop, servers, accepted, answers)) for _ in range(2)]
        for thread in submitters:
            thread.start()
        try:
            for index in range(arguments.kills):
                time.sleep(rng.uniform(*arguments.between))
                number = signal.SIGKILL if index % 4 else rng.choice((signal.SIGTERM, signal.SIGINT))
                victim = rng.choice(servers)
                victim.end(number)
                signals[number.name] += 1
                victim.start()
                seconds = time.perf_counter() - began
                print(f"{seconds:6.0f} s  kill {index + 1}: {number.name}  {len(accepted)} accepted", flush=True)
            stop.set()
            for thread in submitters:
                thread.join()
            jobs = wait_for(servers, accepted)
            wrong = [
                {"job": job, "kind": accepted[job], "state": fields["state"], "error": fields.get("error")}
                for job, fields in jobs.items()
                if not has_bytes(servers, fields, expected[accepted[job]])
            ]
            listed = list_all(servers)
        finally:
            stop.set()
            for server in servers:
                server.end(signal.SIGTERM)
        again = taken_up(folder)
    results = {
        "stamp": stamp(arguments.commit),
        "kills": dict(signals),
        "seconds": round(time.perf_counter() - began),
        "answers": {str(status): count for status, count in answers.items()},
        "accepted": len(accepted),
        "in_the_store": len(listed),
        "states": dict(collections.Counter(fields["state"] for fields in jobs.values())),
        "never_ended": len(accepted) - len(jobs),
        "attempts": dict(collections.Counter(str(fields.get("attempts")) for fields in jobs.values())),
        "wrong": wrong,
        "taken_up": {
            "times": len(again),
            "steps_done_again": sum(each.steps for each in again),
            "seconds_done_again": {"most": max(each.seconds for each in again), "sum": sum(each.seconds for each in again)},
            "longest_chunk_seconds": max(each.chunk for each in again),
            "more_than_an_interval_and_a_chunk": sum(each.seconds > CHECKPOINT_SECONDS + each.chunk for each in again),
        },
    }
    print({name: value for name, value in results.items() if name != "stamp"})
    print(write("kills", results))


if __name__ == "__main__":
    main()
