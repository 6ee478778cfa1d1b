"""From the start of a service to the first picture: what it answers while it loads and warms."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from running import SMALL
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from smartdiff_jax.config.service import Limits, ServiceConfig
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.announced import announce
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.serve.app import create_app


@pytest.fixture
def steps():
    """take, load, warm: set to let the service go on to it."""
    return {"take": threading.Event(), "load": threading.Event(), "warm": threading.Event()}


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "tiny-wan")


@pytest.fixture
def app(folder, config, tmp_path, steps):
    class Stepwise(Engine):
        def warm(self, on_progress):
            assert steps["warm"].wait(60)
            yield from super().warm(on_progress)

    system = SystemConfig.from_file(config)

    def load():
        assert steps["load"].wait(60)
        pipe = Pipeline.from_pretrained(folder, system=system)
        pipe.spec = tiny.with_default(pipe.spec, 32, 32, 1)
        return pipe

    def take():
        assert steps["take"].wait(60)
        known = announce(folder, system)
        known.spec = tiny.with_default(known.spec, 32, 32, 1)
        store, files = JobStore(f"sqlite:///{tmp_path}/jobs.db"), Artifacts(str(tmp_path / "artifacts"))
        return Stepwise({}, store, files, Limits(), loaders={"tiny-wan": load}, announced={"tiny-wan": known})

    return create_app(ServiceConfig(), take)


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def reason(http):
    answer = http.get("/readyz")
    assert answer.status_code == 503 and answer.headers["retry-after"] and http.get("/healthz").status_code == 200
    return answer.json()["error"]["message"]


def test_jobs_are_taken_before_a_model_is_loaded_and_ready_is_said_when_all_is_warm(app, steps):
    def ask(**fields):
        return http.post("/v1/jobs", json={"prompt": "a", "seed": 3, "num_inference_steps": 4, **fields})

    def state(answer):
        return http.get(f"/v1/jobs/{answer.json()['id']}").json()["state"]

    with TestClient(app) as http, ThreadPoolExecutor() as others:
        assert "starting" in reason(http) and http.get("/v1/models").status_code == 503
        early = others.submit(ask)
        time.sleep(0.1)
        assert not early.done()
        steps["take"].set()
        taken = [early.result(60)]
        assert "tiny-wan: being loaded; jobs wait" in reason(http)
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny-wan"]
        taken.append(ask(size="32x32", num_frames=1))
        assert taken[0].json()["params"]["size"] == [32, 32]  # the model's default is known by its files
        refused = [ask(model="none"), ask(size="33x32"), ask(cache="blockdance", cache_params={"block": 99})]
        assert [answer.status_code for answer in refused] == [400, 400, 400]
        assert "the model has 2 blocks" in refused[2].json()["error"]["message"]
        assert http.post("/admin/models/tiny-wan").status_code == 503
        steps["load"].set()
        until(lambda: "tiny-wan: being warmed" in reason(http))
        taken.append(ask())
        assert [answer.status_code for answer in taken] == [202] * 3 and {state(job) for job in taken} == {"queued"}
        steps["warm"].set()
        until(lambda: http.get("/readyz").status_code == 200)
        until(lambda: [state(job) for job in taken] == ["succeeded"] * 3)


def test_who_waits_for_a_service_that_is_asked_to_stop_is_told_at_once(app, steps):
    with TestClient(app) as http, ThreadPoolExecutor() as others:
        early = others.submit(http.post, "/v1/jobs", json={"prompt": "a", **SMALL})
        time.sleep(0.1)
        assert not early.done()
        app.state.service.is_leaving = lambda: True
        assert early.result(10).status_code == 503
        steps["take"].set(), steps["load"].set(), steps["warm"].set()


def test_who_leaves_while_it_warms_does_not_wait_for_it(app, steps):
    failures = []
    app.state.service.on_start = failures.append
    with TestClient(app) as http:
        steps["take"].set(), steps["load"].set()
        until(lambda: "being warmed" in reason(http))
        threading.Timer(0.5, steps["warm"].set).start()
    assert app.state.service.started.is_set() and failures == [] and app.state.service._cold == ["tiny-wan"]


def test_a_model_that_cannot_be_warmed_is_told_as_one_that_cannot_be_loaded(app, steps, folder):
    failures = []
    app.state.service.on_start = failures.append
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * np.float32("nan") for key, value in load_file(file).items()}, file)
    with TestClient(app) as http:
        steps["take"].set()
        until(lambda: "being loaded" in reason(http))
        job = {"prompt": "a", **SMALL}
        assert http.post("/v1/jobs", json=job).status_code == 202
        steps["load"].set(), steps["warm"].set()
        until(lambda: http.get("/healthz").status_code == 503)
        assert http.post("/v1/jobs", json=job).status_code == 503
        assert "hold no numbers" in http.get("/readyz").json()["error"]["message"]
    assert "weights='tiny-wan'" in str(failures[0])
