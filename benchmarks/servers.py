"""`smartdiff serve` in a process of its own, for benchmarks of the service; and what its end costs the jobs it had begun."""

import collections
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(folder: Path, log: Path, models: Sequence[str], before: str = "") -> subprocess.Popen:
    """Start one in `folder`, where service.yaml, its store and its files are. before: Python that it runs first."""
    code = before + "from smartdiff_jax.cli import main; main()"
    options = [word for model in models for word in ("--model", model)]
    command = [sys.executable, "-c", code, "serve", *options, "--port", "0", "--config", str(folder / "service.yaml")]
    # Where Python is told to write no bytecode, every start would parse all of JAX again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment)


def address(log: Path) -> str:
    """Where it listens; empty while it does not yet."""
    found = re.search(r"listening on (\S+)", log.read_text())
    return "" if found is None else found[1]


# Run by a server first: each chunk of denoising is written down, with the steps done since the job began, where it ends.
COUNTED = """
import os, time
from smartdiff_jax.engine import run

def counted(self, plain=run.Run._next):
    began = time.perf_counter()
    event = plain(self)
    if getattr(event, "stage", None) == "denoise":
        line = f"{self.job.id} {os.getpid()} {event.done} {time.perf_counter() - began}\\n"
        with open("chunks.txt", "a") as file:
            file.write(line)
    return event

run.Run._next = counted
"""


@dataclasses.dataclass(frozen=True)
class TakenUp:
    """A job that was begun by one server and went on at another.

    steps, seconds: that the first had done and the second did again. chunk: seconds of the first one's longest chunk; less than
    that is lost besides, of the chunk that it did not end.
    """

    job: str
    steps: int
    seconds: float
    chunk: float


def taken_up(folder: Path) -> list[TakenUp]:
    """What the servers of a folder have written down. Of those that stopped gently nothing is done again."""
    chunks: dict[str, list[tuple[str, int, float]]] = collections.defaultdict(list)
    for line in (folder / "chunks.txt").read_text().splitlines():
        job, process, done, seconds = line.split()
        chunks[job].append((process, int(done), float(seconds)))
    found = []
    for job, rows in chunks.items():
        turns: list[list[tuple[int, float]]] = []
        for index, (process, done, seconds) in enumerate(rows):
            if index == 0 or process != rows[index - 1][0]:
                turns.append([])
            turns[-1].append((done, seconds))
        for before, after in zip(turns, turns[1:], strict=False):
            start, reached = after[0][0], before[-1][0]
            again = [seconds for done, seconds in before[1:] if done > start]
            longest = max((seconds for _, seconds in before[1:]), default=0.0)
            found.append(TakenUp(job, max(reached - start, 0), sum(again), longest))
    return found
