"""Servers that are hurt in a stage of their choice, one after another at one store, each by a signal.

test_faults.py runs some of all pairs. All of them, and a job that kills every server, in some minutes:

    python tests/serve/faults.py
"""

import contextlib
import dataclasses
import itertools
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import running

from smartdiff_jax.client import ServiceError

STAGES = "queued", "denoising", "decoding", "writing", "idle"
NUMBERS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
JOB = dict(prompt="a red fox", size="32x32", num_frames=5, num_inference_steps=20)

# Run by the server first: at the stage it waits until it is armed, and then hurts itself, once.
HOOK = """
import os, time
from smartdiff_jax.engine import deliver, engine, run
from smartdiff_jax.stages import decode

def hurt(owner, name, when=lambda *args: True):
    original = getattr(owner, name)
    def hooked(*args, **kwargs):
        if when(*args) and not os.path.exists("hurt"):
            while not os.path.exists("armed"):
                time.sleep(0.01)
            os.rename("armed", "hurt")
            os.kill(os.getpid(), {number})
        return original(*args, **kwargs)
    setattr(owner, name, hooked)

match "{stage}":
    case "queued": hurt(engine.Engine, "load")
    case "denoising": hurt(run.Run, "advance", lambda run: run.progress.stage == "denoise" and run.progress.done)
    case "decoding": hurt(decode.Decode, "__call__")
    case "writing": hurt(deliver, "write_picture")
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    number: signal.Signals
    stage: str

    @property
    def hook(self):
        return HOOK.format(number=int(self.number), stage=self.stage)


def hurt_one_after_another(faults, model, config, folder):
    """A job for each fault, which the next servers go on with. Returns the jobs."""
    jobs = []
    for seed, fault in enumerate(faults):
        (folder / "hurt").unlink(missing_ok=True)
        server = running.start(model, config, folder, ready=fault.stage == "idle", before=fault.hook)
        with server.client() as client:
            if fault.stage == "idle":
                wait_for(client, jobs)
                server.kill(fault.number)
            else:
                jobs.append(client.submit(**JOB, seed=seed))
                (folder / "armed").touch()
                server.process.wait(timeout=120)
                assert (folder / "hurt").exists(), f"{fault}: it ended before\n{server.log.read_text()}"
        assert "Traceback" not in server.log.read_text(), server.log.read_text()
        if fault.stage == "denoising" and fault.number != signal.SIGKILL:
            assert list(folder.glob("artifacts/*/checkpoint.safetensors")), "who is asked to stop saves what it has begun"
        server.outlive_leases()
    return jobs


def ask_what_kills_every_server(model, config, folder):
    """Returns how many servers it killed before it was given up, and the last, which lives, made another job."""
    job = None
    for number in range(10):
        (folder / "hurt").unlink(missing_ok=True)
        (folder / "armed").touch()
        server = running.start(model, config, folder, ready=False, before=Fault(signal.SIGKILL, "decoding").hook)
        with server.client() as client:
            job = job or client.submit(**JOB, seed=0)
            while server.process.poll() is None:
                with contextlib.suppress(httpx2.TransportError, ServiceError):
                    if (now := client.get(job.id)).is_final:
                        assert (now.state, now.error["code"]) == ("failed", "engine_died"), now
                        (folder / "armed").rename(folder / "hurt")
                        assert client.generate(**JOB, seed=1).state == "succeeded"
                        server.stop()
                        return number
                time.sleep(0.05)
        server.outlive_leases()
    raise AssertionError("it was never given up")


def wait_for(client, jobs, seconds=300):
    """What became of them."""
    until = time.monotonic() + seconds
    while not all((now := client.get(job.id)).is_final for job in jobs):
        assert time.monotonic() < until, now
        time.sleep(0.1)
    return [client.get(job.id) for job in jobs]


def check_all_are_made_once(server, jobs, undisturbed):
    """By the last server. undisturbed: a client of one that nobody hurt."""
    with server.client() as client:
        ended = wait_for(client, jobs)
        assert [job.state for job in ended] == ["succeeded"] * len(jobs), ended
        assert {job.id for job in client.jobs(limit=100)} == {job.id for job in jobs}
        for seed, job in enumerate(ended):
            whole = undisturbed.generate(**JOB, seed=seed)
            assert [client.read(url) for url in job.files] == [undisturbed.read(url) for url in whole.files], job
            assert job.report["steps"] == whole.report["steps"]


def main():
    import json

    import tiny

    with tempfile.TemporaryDirectory() as name:
        folder, other = Path(name) / "hurt", Path(name) / "whole"
        folder.mkdir(), other.mkdir()
        model, config = tiny.write_folder(Path(name) / "tiny-wan"), Path(name) / "system.yaml"
        limits = {"checkpoint_seconds": 0.05, "max_megapixels": 0.35}
        config.write_text(json.dumps({"cache_dir": f"{name}/cache", "dtype": "float32", "service": limits}))
        killed = ask_what_kills_every_server(model, config, other)
        print(f"a job that kills every server was given up after {killed} of them")
        pairs = [Fault(number, stage) for stage, number in itertools.product(STAGES, NUMBERS)]
        jobs = hurt_one_after_another(pairs, model, config, folder)
        last, whole = running.start(model, config, folder), running.start(model, config, other)
        with whole.client() as undisturbed:
            check_all_are_made_once(last, jobs, undisturbed)
        last.stop(), whole.stop()
        print(f"{len(pairs)} pairs, {len(jobs)} jobs, each made once with the bytes of a server that nobody hurt")


if __name__ == "__main__":
    main()
