"""From the start of a service to the first picture: what it answers while it loads and warms."""

import shutil
import threading
import time

import numpy as np
import pytest
import tiny
from running import SMALL
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from smartdiff_jax.config.service import Limits, ServiceConfig
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.serve.app import create_app


@pytest.fixture
def steps():
    """load, warm: set to let the service go on to it."""
    return {"load": threading.Event(), "warm": threading.Event()}


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "tiny-wan")


@pytest.fixture
def app(folder, config, tmp_path, steps):
    class Stepwise(Engine):
        def warm(self, on_progress):
            assert steps["warm"].wait(120)
            yield from super().warm(on_progress)

    def load():
        assert steps["load"].wait(120)
        pipe = Pipeline.from_pretrained(folder, system=SystemConfig.from_file(config))
        pipe.spec = tiny.with_default(pipe.spec, 32, 32, 1)
        store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
        return Stepwise({"tiny-wan": pipe}, store, Artifacts(str(tmp_path / "artifacts")), Limits())

    return create_app(ServiceConfig(), load)


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def reason(http):
    answer = http.get("/readyz")
    assert answer.status_code == 503 and answer.headers["retry-after"] and http.get("/healthz").status_code == 200
    return answer.json()["error"]["message"]


def test_ready_is_said_when_all_is_warm_and_jobs_are_taken_before(app, steps):
    with TestClient(app) as http:
        assert "loaded" in reason(http) and http.post("/v1/jobs", json={"prompt": "a", **SMALL}).status_code == 503
        steps["load"].set()
        until(lambda: "tiny-wan: being warmed" in reason(http))
        taken = http.post("/v1/jobs", json={"prompt": "a", **SMALL})
        job = taken.json()["id"]
        assert taken.status_code == 202 and http.get(f"/v1/jobs/{job}").json()["state"] == "queued"
        steps["warm"].set()
        until(lambda: http.get("/readyz").status_code == 200)
        until(lambda: http.get(f"/v1/jobs/{job}").json()["state"] == "succeeded")


def test_who_leaves_while_it_warms_does_not_wait_for_it(app, steps):
    failures = []
    app.state.service.on_start = failures.append
    with TestClient(app) as http:
        steps["load"].set()
        until(lambda: "being warmed" in reason(http))
        threading.Timer(0.5, steps["warm"].set).start()
    assert app.state.service.started.is_set() and failures == [] and app.state.service._cold == ["tiny-wan"]


def test_a_model_that_cannot_be_warmed_is_told_as_one_that_cannot_be_loaded(app, steps, folder):
    failures = []
    app.state.service.on_start = failures.append
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * np.float32("nan") for key, value in load_file(file).items()}, file)
    with TestClient(app) as http:
        steps["load"].set(), steps["warm"].set()
        until(lambda: http.get("/healthz").status_code == 503)
        assert "hold no numbers" in http.get("/readyz").json()["error"]["message"]
    assert "weights='tiny-wan'" in str(failures[0])
