"""The service on a Ray cluster: what is wrong is told before anything starts, and a real one is upgraded under load."""

import collections
import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import running
from running import CLIP, COMMAND, SMALL
from starlette.testclient import TestClient

from smartdiff_jax.cli_ray import serve_on_ray
from smartdiff_jax.cli_serve import serve
from smartdiff_jax.client import Client
from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.errors import InvalidConfig, SmartdiffError
from smartdiff_jax.serve.app import create_app
from smartdiff_jax.serve.scaling import BEGUN, WAITING, QueueTime

REPLICAS = 2
SECONDS = 300


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SmartdiffError, match=r"--ray needs Ray Serve .*pip install 'smartdiff_jax\[ray\]'"):
        serve_on_ray(["pocket-image"], SystemConfig.create(), ServiceConfig.create())


@pytest.mark.parametrize("file", ["store", "keys"])
def test_what_replicas_would_fail_by_is_told_before_there_are_any(file, tmp_path):
    pytest.importorskip("ray.serve")
    fields = {"store": f"sqlite:///{tmp_path}/jobs.db"} | {file: {"store": "sqlite:////no/jobs.db", "keys": tmp_path}[file]}
    with pytest.raises(InvalidConfig, match=f"{file}="):
        serve_on_ray(["pocket-image"], SystemConfig.create(), ServiceConfig.create(**fields))


def test_an_address_where_nobody_listens_is_told_at_once(tmp_path):
    pytest.importorskip("ray.serve")
    address = f"127.0.0.1:{running.free_port()}"
    service = ServiceConfig.create(store=f"sqlite:///{tmp_path}/jobs.db")
    with pytest.raises(InvalidConfig, match=rf"ray\.address='{address}': no cluster answers .*refused.*ray start --head"):
        serve_on_ray(["pocket-image"], SystemConfig.create(ray={"address": address}), service)


def test_one_file_tells_all(tmp_path):
    with pytest.raises(InvalidConfig, match="--ray gives a file of system parameters too"):
        serve(config=tmp_path / "a.yaml", ray=tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("hosts: {coordinator: 'a:1', count: 2}")
    with pytest.raises(InvalidConfig, match=r"hosts=.*ray\.hosts"):
        serve(ray=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "waiting, begun, wanted",
    [
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, 0.0),
        ({"a": 90.0, "b": 100.0}, {"a": 15.0, "b": 5.0}, 2.0),  # what waits is the same for all, what is begun is not
        ({}, {}, 3),  # nobody has told anything yet
    ],
)
def test_there_are_as_many_as_finish_in_time(waiting, begun, wanted):
    context = SimpleNamespace(aggregated_metrics={WAITING: waiting, BEGUN: begun}, target_num_replicas=3)
    assert QueueTime(60.0)(context) == (wanted, {})


def test_one_of_several_is_not_upgraded_alone_and_leaves_names_to_the_proxy(model, config, tmp_path):
    def load():
        store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
        return Engine.of([str(model)], SystemConfig.from_file(config), store, Artifacts(str(tmp_path)), ServiceConfig())

    app = create_app(ServiceConfig(max_megapixels=1e-6), load, alone=False)
    with TestClient(app) as http:
        app.state.service.started.wait()
        answer = http.post("/admin/models/tiny-wan")
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "one_of_several"
        assert "x-request-id" not in answer.headers
        assert app.state.service.engine.queue.backlogs() == (0.0, 0.0)


@pytest.fixture
def on_ray():
    return pytest.importorskip("smartdiff_jax.serve.on_ray")


def test_a_file_of_another_machine_is_no_store(on_ray):
    made_of = on_ray.Deployment(("pocket-image",), SystemConfig.create(), ServiceConfig(), "192.0.2.1")
    made_of.check("192.0.2.1")
    with pytest.raises(InvalidConfig, match=r"store=.*lies on 192\.0\.2\.1, and 192\.0\.2\.7 cannot share it"):
        made_of.check("192.0.2.7")


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(), r"ray\.gpus=1: no machine of the cluster has more than 0"),
        (dict(gpus=0, cpus=9), r"ray\.cpus=9: no machine of the cluster has more than 4"),
        (dict(gpus=0, cpus=2, replicas=3), r"ray\.replicas=3: this machine has 4 CPUs"),
        (dict(gpus=0, cpus=2, replicas=3, address="auto"), None),
        (dict(gpus=0, hosts=2), r"ray\.hosts=2: must divide the mesh's 1 devices"),
        (dict(gpus=0, hosts=1), None),
    ],
)
def test_what_ray_would_wait_for_in_vain_is_refused(on_ray, monkeypatch, fields, told):
    monkeypatch.setattr(on_ray.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    with pytest.raises(InvalidConfig, match=told) if told else contextlib.nullcontext():
        on_ray.check_room(SystemConfig.create(ray=fields))


def test_of_rays_traceback_the_cause_is_told(on_ray):
    message = "Failed.\n  File x, line 3\nsmartdiff_jax.errors.SmartdiffError: model='x': is no folder\n"
    assert on_ray._cause(message) == "model='x': is no folder"


class Cluster:
    """A `smartdiff serve --ray` with a cluster of its own; all its processes end with it."""

    def __init__(self, model, config, folder):
        port = running.free_port()
        fields = json.loads(config.read_text())
        fields["service"] |= {"port": port}
        self.fields = fields | {"ray": {"replicas": REPLICAS, "gpus": 0}}
        self.url, self.model, self.folder = f"http://127.0.0.1:{port}", model, folder
        self.secret = running.ray_secret()
        self.log = folder / "log.txt"
        with self.log.open("w") as out:
            self.process = self.start("first.yaml", stdout=out, stderr=out, start_new_session=True)

    def start(self, name, address=None, below=(), **options):
        """below: the start of a command line that the command follows."""
        file = self.folder / name
        file.write_text(json.dumps(self.fields | {"ray": self.fields["ray"] | {"address": address}}))
        command = [*COMMAND, "serve", "--ray", str(file), "--model", str(self.model)]
        return subprocess.Popen([*below, *command], cwd=self.folder, env=self.secret, **options)

    def wait_for(self, pattern):
        until = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)
        return found

    def engines(self):
        """Those that run jobs at present."""
        with contextlib.closing(sqlite3.connect(self.folder / "jobs.db")) as store:
            return {name for (name,) in store.execute("SELECT DISTINCT engine FROM jobs WHERE state = 'running'")}

    def both_engines(self):
        until = time.monotonic() + SECONDS
        while len(found := self.engines()) < REPLICAS:
            assert time.monotonic() < until, found
            time.sleep(0.05)
        return found

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def cluster(model, config, tmp_path):
    pytest.importorskip("ray.serve")
    cluster = Cluster(model, config, tmp_path)
    yield cluster
    cluster.kill()


def test_two_replicas_share_a_store_and_are_upgraded_under_load(cluster, server):
    cluster.wait_for("ready after")
    counts, errors, over = collections.Counter(), [], threading.Event()

    def ask(method, path, **options):
        with httpx2.Client(base_url=cluster.url, timeout=SECONDS) as http:
            while not over.is_set():
                answer = http.request(method, path, **options)
                counts[path] += 1
                if answer.status_code != 200:
                    errors.append((path, answer.status_code, answer.text))
                time.sleep(0.1)

    def watched(function, *arguments, **options):
        def body():
            try:
                function(*arguments, **options)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    picture = {"prompt": "a dog", "size": "32x32", "num_inference_steps": 4, "response_format": "url"}
    with Client(cluster.url) as client, server.client() as undisturbed:
        clips = [client.submit("a red fox", **CLIP | dict(seed=seed)) for seed in range(6)]
        first = cluster.both_engines()
        asking = [
            watched(ask, "GET", "/v1/jobs"),
            watched(ask, "POST", "/v1/images/generations", json=picture),
            watched(lambda: client.generate("a dog", **SMALL)),  # a stream of events
        ]
        address = cluster.wait_for(r"address is (\S+)")[1]
        # Ray asks what its ancestors are called: as below `uv run`, though these processes have nothing of uv's.
        (cluster.folder / "run").write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
        below = dict(below=["uv", "run"], executable=sys.executable)
        upgrade = cluster.start("second.yaml", address, **below, stderr=subprocess.PIPE, text=True)
        said = upgrade.communicate(timeout=SECONDS)[1]
        assert upgrade.returncode == 0 and "ready after" in said, said
        clips += [client.submit("a red fox", **CLIP | dict(seed=seed)) for seed in range(6, 12)]
        assert not cluster.both_engines() & first
        over.set()
        for thread in asking:
            thread.join()
        assert not errors and all(counts[path] >= 3 for path in ("/v1/jobs", "/v1/images/generations")), (errors, counts)
        until = time.monotonic() + SECONDS
        while not all((now := client.get(clip.id)).is_final for clip in clips):
            assert time.monotonic() < until, now
            time.sleep(0.1)
        ended = [client.get(clip.id) for clip in clips]
        assert [clip.state for clip in ended] == ["succeeded"] * len(clips), ended
        whole = undisturbed.generate("a red fox", **CLIP | dict(seed=1))
        assert [client.read(url) for url in ended[1].files] == [undisturbed.read(url) for url in whole.files]
        assert httpx2.get(f"{cluster.url}/readyz", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(timeout=SECONDS) == 0, cluster.log.read_text()
    assert "Traceback" not in cluster.log.read_text() + said
