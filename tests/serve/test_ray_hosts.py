"""A replica whose mesh reaches over two machines of a Ray cluster, one of which is lost while it makes a job."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import postgres
import pytest
import running
from PIL import Image
from running import CLIP, COMMAND, SMALL

from smartdiff_jax.client import Client, ServiceError

SECONDS = 300
MACHINES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster():
    """Its address, and what shows that one may connect to it."""
    pytest.importorskip("ray.serve")
    secret = running.ray_secret()
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, "-c", MACHINES], env=secret, start_new_session=True, **options) as process:
        try:
            yield process.stdout.readline().strip(), secret
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def store(request):
    """What machines can share, where it is installed."""
    if postgres.programs() is None:
        return {}
    return {"store": request.getfixturevalue("postgres").url}


def follower():
    """The process of the one that follows, which Ray names after what it does."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if file.read_bytes().startswith(b"ray::_follow"):
                return int(file.parent.name)
    raise AssertionError("nobody follows")


def test_two_machines_are_one_mesh_and_a_job_outlives_the_loss_of_one(cluster, store, server, model, config, tmp_path):
    address, secret = cluster
    port = running.free_port()
    fields = json.loads(config.read_text()) | {"mesh": {"ring": 2}}
    fields["service"] |= {"port": port} | store
    fields["ray"] = {"address": address, "hosts": 2, "gpus": 0}
    (tmp_path / "ray.yaml").write_text(json.dumps(fields))
    command = [*COMMAND, "serve", "--ray", "ray.yaml", "--model", str(model)]
    done = subprocess.run(command, cwd=tmp_path, env=secret, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    with server.client() as one:
        undisturbed = one.generate("a red fox", **SMALL, output_format="png")
        alone = np.asarray(Image.open(io.BytesIO(one.read(undisturbed.files[0]))))
    with Client(f"http://127.0.0.1:{port}") as client:
        made = client.generate("a red fox", **SMALL, previews=1, output_format="png")
        assert client.read(made.preview)
        with Image.open(io.BytesIO(client.read(made.files[0]))) as picture:
            assert np.abs(np.asarray(picture).astype(int) - alone).max() <= 1
        job = client.submit("a red fox", **CLIP)
        until = time.monotonic() + SECONDS
        while not list(tmp_path.glob(f"artifacts/{job.id}/checkpoint.safetensors")):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert client.get(job.id).state == "running"
        os.kill(follower(), signal.SIGKILL)
        now = job
        while not now.is_final:
            assert time.monotonic() < until, now
            with contextlib.suppress(httpx2.TransportError, ServiceError):  # while nobody is there
                now = client.get(job.id)
            time.sleep(0.1)
        assert now.state == "succeeded" and now.report["steps"] == ["F" * 200], now
