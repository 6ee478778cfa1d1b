"""What the service promises when it is hurt: nothing accepted is lost, nothing is done twice, the bits are the same."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import faults
import httpx2
import pytest
import running
from faults import Fault
from running import CLIP, COMMAND, SMALL

from benchmarks.servers import COUNTED, taken_up
from smartdiff_jax import cli
from smartdiff_jax.client import ServiceError

CHECKPOINT_SECONDS = 0.05
"""As conftest.py's config has it."""


def wait(client, job, *states, seconds=300):
    until = time.monotonic() + seconds
    while (now := client.get(job.id)).state not in (states or ("succeeded", "failed", "cancelled")):
        assert time.monotonic() < until, now
        time.sleep(0.1)
    return now


def test_a_killed_video_goes_on_and_ends_in_the_same_bytes(model, config, server, tmp_path):
    """Killed in the middle of denoising, after at least one checkpoint, with others waiting behind it."""
    video, picture = CLIP | dict(seed=5), SMALL
    first = running.start(model, config, tmp_path, before=COUNTED)
    with first.client() as client:
        job = client.submit("a red fox", **video)
        checkpoint = tmp_path / "artifacts" / job.id / "checkpoint.safetensors"
        until = time.monotonic() + 300
        while not (checkpoint.exists() and 0.2 < client.get(job.id).progress < 1):
            assert time.monotonic() < until, client.get(job.id)
            time.sleep(0.01)
        behind = [client.submit("a dog", **picture | dict(seed=seed)) for seed in range(3)]
        assert first.kill(signal.SIGKILL) is not None
    first.outlive_leases()
    second = running.start(model, config, tmp_path, before=COUNTED)
    with second.client() as client, server.client() as undisturbed:
        ended = [wait(client, each) for each in (job, *behind)]
        assert [each.state for each in ended] == ["succeeded"] * 4, ended
        assert len(client.jobs()) == 4
        metrics = httpx2.get(f"{second.url}/metrics").text
        assert re.findall(r'^smartdiff_resumed_jobs_total\{model="tiny-wan"\} (\d+)', metrics, re.MULTILINE) == ["1"]
        whole = undisturbed.generate("a red fox", **video)
        assert [client.read(url) for url in ended[0].files] == [undisturbed.read(url) for url in whole.files]
        assert ended[0].report["steps"] == whole.report["steps"] == ["F" * 200]
        assert not checkpoint.exists()
    again = next(each for each in taken_up(tmp_path) if each.job == job.id)
    assert again.seconds <= CHECKPOINT_SECONDS + 2 * again.chunk, again  # one of which while the checkpoint is written
    second.kill(signal.SIGINT)  # at rest
    assert "Traceback" not in first.log.read_text() + second.log.read_text()


def test_jobs_outlive_whatever_ends_a_server_in_whatever_stage(model, config, server, tmp_path):
    """Four of the pairs of signals and stages; `python tests/serve/faults.py` runs all. Each server finds what others left."""
    pairs = [
        Fault(signal.SIGINT, "queued"),
        Fault(signal.SIGTERM, "denoising"),
        Fault(signal.SIGKILL, "decoding"),
        Fault(signal.SIGKILL, "writing"),
    ]
    jobs = faults.hurt_one_after_another(pairs, model, config, tmp_path)
    last = running.start(model, config, tmp_path)
    with server.client() as undisturbed:
        faults.check_all_are_made_once(last, jobs, undisturbed)
    last.kill(signal.SIGTERM)  # at rest
    assert "Traceback" not in last.log.read_text()


def test_a_full_queue_says_when_to_come_again_and_a_key_what_it_may(model, config, tmp_path):
    made = [subprocess.run([*COMMAND, "key", name], capture_output=True, text=True, check=True) for name in ("ann", "bob")]
    ann, bob = (done.stderr.strip() for done in made)
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"{made[0].stdout}  max_queued: 2\n  max_running: 1\n{made[1].stdout}  max_work: 0.01\n")
    assert ann not in keys.read_text()
    server = running.start(model, config, tmp_path, "--keys", "keys.yaml", "--host", "0.0.0.0")
    try:
        for key in (None, "wrong"):
            with server.client(api_key=key) as client, pytest.raises(ServiceError) as raised:
                client.jobs()
            assert raised.value.status == 401 and raised.value.code == "invalid_api_key"
        assert httpx2.get(f"{server.url}/healthz").status_code == 200
        with server.client(api_key=ann) as client, server.client(api_key=bob) as other:
            long = client.submit("a", **CLIP | dict(num_outputs=64))
            wait(client, long, "running")
            waiting = [client.submit("a", **SMALL) for _ in range(2)]
            with pytest.raises(ServiceError) as raised:
                client.submit("a", **SMALL)
            assert raised.value.status == 429 and raised.value.code == "queue_full" and raised.value.retry_after >= 1
            assert {client.get(job.id).state for job in waiting} == {"queued"}  # one at a time
            with pytest.raises(ServiceError) as raised:
                other.get(long.id)
            assert raised.value.status == 404 and other.jobs() == []
            with pytest.raises(ServiceError, match="megapixel-steps"):
                other.submit("a", **CLIP)
            for method in ("GET", "POST"):
                refused = httpx2.request(
                    method, f"{server.url}/admin/models/tiny-wan", headers={"Authorization": f"Bearer {ann}"}
                )
                assert refused.status_code == 403 and refused.json()["error"]["code"] == "admin_only"
            assert other.generate("a", **SMALL).state == "succeeded"  # the other's turn comes within a chunk
            for job in (long, *waiting):
                client.cancel(job.id)
        change_while_it_serves(server, keys, ann, bob)
    finally:
        server.stop()


def change_while_it_serves(server, keys, ann, bob):
    """ann's key is taken out and bob becomes an admin; then the file is spoilt, and all stays as it was."""

    def ask(key):
        return httpx2.get(f"{server.url}/admin/limits", headers={"Authorization": f"Bearer {key}"})

    def until(condition):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.05)

    assert (ask(ann).status_code, ask(bob).status_code) == (403, 403)
    keys.write_text(keys.read_text().partition("- name: bob")[2].join(["- name: bob", "  admin: true\n"]))
    until(lambda: ask(bob).status_code == 200)
    assert ask(ann).status_code == 401
    limits = ask(bob).json()
    assert limits["keys"] == ["bob"] and limits["max_megapixels"] == 0.35
    assert limits["refused"] == {"keys": None, "config": None} and limits["need_restart"] == []
    keys.write_text("- name: [")
    until(lambda: ask(bob).json()["refused"]["keys"])
    assert ask(bob).json()["keys"] == ["bob"] and "what was in force stays: keys=" in server.log.read_text()
    metrics = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {bob}"}).text
    assert 'smartdiff_settings_refused{file="keys"} 1.0' in metrics


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host", "0.0.0.0"], "host='0.0.0.0': others can reach this address: give --keys"),
        (["--model", "no-such-model"], "model='no-such-model'"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    done = subprocess.run(
        [*COMMAND, "serve", "--port", "0", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("option, value", [("store", "nonsense"), ("artifacts", "/proc/none"), ("keys", "none.yaml")])
def test_other_options_that_cannot_be_served(tmp_path, monkeypatch, capsys, option, value):
    """As above, without a process for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smartdiff", "serve", "--port", "0", f"--{option}", value])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option}='{value}'" in told and "Traceback" not in told, told


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [*COMMAND, "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"}
        )
    assert done.returncode == 2 and "port=" in done.stderr and "in use" in done.stderr, done.stderr
