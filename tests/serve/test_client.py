"""The client, and the commands that use it."""

import asyncio
import subprocess

import pytest
from running import CLIP, COMMAND, SMALL

from smartdiff_jax import AsyncClient, Client
from smartdiff_jax.client import ServiceError
from smartdiff_jax.errors import Cancelled, SmartdiffError

ENDLESS = CLIP | dict(num_outputs=64)


def test_generate_with_progress_and_save(client, tmp_path):
    seen = []
    job = client.generate("a red fox", on_progress=seen.append, previews=1, **SMALL)
    assert job.state == "succeeded" and seen[-1] == job and seen[0].state in ("queued", "running")
    (path,) = client.save(job, tmp_path / "new" / "fox.png")
    assert path.read_bytes().startswith(b"\x89PNG") and client.read(job.preview).startswith(b"RIFF")
    assert client.get(job.id) == job and job in client.jobs(state="succeeded")
    client.delete(job.id)
    with pytest.raises(ServiceError) as raised:
        client.get(job.id)
    assert raised.value.status == 404 and raised.value.code == "job_not_found"


def test_an_exception_out_of_progress_cancels(client):
    ids = []

    def stop(job):
        ids.append(job.id)
        if job.stage == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.generate("a", on_progress=stop, **ENDLESS)
    for job in client.events(ids[0]):
        last = job
    assert last.state == "cancelled"


def test_what_stopped_it_is_raised_even_where_cancelling_fails(client, monkeypatch):
    def gone(job_id):
        ids.append(job_id)
        raise ServiceError(503, "no more requests", "unavailable", None, None)

    def stop(job):
        raise KeyboardInterrupt

    ids = []
    with monkeypatch.context() as patch:
        patch.setattr(client, "cancel", gone)
        with pytest.raises(KeyboardInterrupt) as raised:
            client.generate("a", on_progress=stop, **ENDLESS)
    client.cancel(ids[0])
    assert any(ids[0] in note and "no more requests" in note for note in raised.value.__notes__)


def test_cancelled_by_another_is_said(client):
    with pytest.raises(Cancelled):
        client.generate("a", on_progress=lambda job: client.cancel(job.id), **ENDLESS)


def test_the_same_in_asyncio(server, tmp_path):
    async def main():
        async with AsyncClient(server.url) as client:
            job, other = await asyncio.gather(
                client.generate("a", **SMALL), client.generate("b", **SMALL | dict(num_outputs=2))
            )
            assert (job.state, other.state) == ("succeeded", "succeeded")
            paths = await client.save(other, tmp_path / "b.png")
            assert [path.name for path in paths] == ["b-0.png", "b-1.png"]
            task = asyncio.create_task(client.generate("a", **ENDLESS))
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            newest = (await client.jobs(limit=1))[0]
            assert [job.state async for job in client.events(newest.id)][-1] == "cancelled"
            assert (await client.models())[0]["id"] == "tiny-wan"
            with pytest.raises(ServiceError, match="size"):
                await client.submit("a", size="33x32")
            await client.delete(job.id)

    asyncio.run(main())


def run(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.strip(), done.stderr


def test_commands(server, client, tmp_path):
    options = ["--url", server.url]
    picture = tmp_path / "fox.png"
    small = ["--size", "32x32", "--num-frames", "1", "--steps", "4", "--seed", "3"]
    code, out, err = run("submit", "a red fox", "-o", picture, *small, *options)
    assert code == 0 and out == str(picture) and picture.exists(), err
    assert "queued" in err or "denoise" in err
    code, job, err = run("submit", "a dog", "--size", "32x32", "--num-frames", "5", "--steps", "200", *options)
    assert code == 0 and job.startswith("job_"), err
    assert run("cancel", job, *options)[:2] == (0, job)
    code, out, err = run("jobs", *options)
    assert code == 0 and job in out and "a red fox" in out, err
    code, out, err = run("submit", "a dog", "--size", "33x32", *options)
    assert code == 2 and out == "" and "32x32" in err and "Traceback" not in err
    code, out, err = run("jobs", "--url", "http://127.0.0.1:1")
    assert code == 2 and "no service answers" in err and "Traceback" not in err


def test_the_client_does_not_load_jax():
    code = "import sys; from smartdiff_jax import Client; Client().close(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([COMMAND[0], "-c", code], timeout=300).returncode == 0
    assert issubclass(ServiceError, SmartdiffError) and Client
