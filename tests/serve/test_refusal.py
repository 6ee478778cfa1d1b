"""A full queue: what is refused costs the store nothing, and who was promised a job keeps it. The engine here runs nothing."""

import asyncio
import contextlib

import httpx2
import pytest
import sqlalchemy
from running import SMALL

from smartdiff_jax.config.service import ServiceConfig, hash_key
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.serve import refusal
from smartdiff_jax.serve.app import create_app

BODY = {"prompt": "a", **SMALL}


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline.from_pretrained(model)


@pytest.fixture
def service(pipe, tmp_path):
    """A context of a client and the statements that the store has run since it came."""

    @contextlib.asynccontextmanager
    async def serve(**config):
        settings = ServiceConfig.create(**config)
        store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
        statements = []

        def load():
            engine = Engine({"tiny-wan": pipe}, store, Artifacts(str(tmp_path / "artifacts")), settings)
            engine.warm, engine.start = lambda on_progress: iter(()), lambda: None
            return engine

        app = create_app(settings, load)
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(app.state.service.started.wait)
            sqlalchemy.event.listen(store._db, "before_cursor_execute", lambda *a: statements.append(a[2]))
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
                yield http, statements

    return serve


def test_a_full_queue_is_told_without_the_store_and_in_the_same_words(service, monkeypatch):
    async def run():
        async with service(max_queued=2) as (http, statements):
            made = [(await http.post("/v1/jobs", json=BODY)).json()["id"] for _ in range(2)]
            assert any(statement.startswith("INSERT") for statement in statements)
            statements.clear()
            for path in refusal.PATHS:
                refused = await http.post(path, json=BODY)
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.headers["x-request-id"].startswith("req_")
            assert statements == []
            error = refused.json()["error"]
            assert error["code"] == "queue_full" and error["type"] == "rate_limit_error" and error["param"] is None
            assert error["message"].startswith("2 jobs are waiting already; they are done in about ")
            assert "smartdiff_rejections_total" + '{reason="queue_full"} 3.0' in (await http.get("/metrics")).text
            with monkeypatch.context() as patched:
                patched.setattr(refusal, "refuse_if_full", lambda engine, key: None)
                by_store = await http.post("/v1/jobs", json=BODY)
            assert statements and not any(statement.startswith("INSERT") for statement in statements)
            assert (by_store.status_code, by_store.json()) == (429, refused.json())
            assert by_store.headers["retry-after"] == refused.headers["retry-after"]
            # Whoever gives a place back may have it at once.
            assert (await http.post(f"/v1/jobs/{made[0]}/cancel")).json()["state"] == "cancelled"
            assert (await http.post("/v1/jobs", json=BODY)).status_code == 202
            assert (await http.delete(f"/v1/jobs/{made[1]}")).status_code == 200
            assert (await http.post("/v1/jobs", json=BODY)).status_code == 202
            assert (await http.post("/v1/jobs", json=BODY)).status_code == 429

    asyncio.run(run())


def test_a_repeat_gets_its_job_from_a_full_queue(service):
    async def run():
        async with service(max_queued=1) as (http, statements):
            first = await http.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"})
            again = await http.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"})
            assert (first.status_code, again.status_code) == (202, 200) and again.json()["id"] == first.json()["id"]
            other = await http.post("/v1/jobs", json=BODY | {"seed": 4}, headers={"Idempotency-Key": "once"})
            assert other.status_code == 409
            statements.clear()
            unknown = await http.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "another"})
            assert unknown.status_code == 429
            assert [statement.split()[0] for statement in statements] == ["BEGIN", "SELECT"], statements
            assert statements[0] == "BEGIN"  # and not IMMEDIATE: nothing is locked

    asyncio.run(run())


def test_one_keys_full_queue_is_not_anothers(service, tmp_path):
    keys = tmp_path / "keys.yaml"
    entries = [f"- name: {name}\n  sha256: {hash_key(name)}\n  max_queued: {most}\n" for name, most in (("ann", 1), ("bob", 9))]
    keys.write_text("".join(entries))

    async def run():
        async with service(max_queued=3, keys=keys) as (http, statements):

            async def post(name):
                return await http.post("/v1/jobs", json=BODY, headers={"Authorization": f"Bearer {name}"})

            assert (await post("ann")).status_code == 202
            statements.clear()
            refused = await post("ann")
            assert refused.status_code == 429 and refused.json()["error"]["message"].startswith("1 jobs of yours are waiting")
            assert statements == []
            assert [(await post("bob")).status_code for _ in range(3)] == [202, 202, 429]
            assert (await post("ann")).json()["error"]["message"].startswith("3 jobs are waiting already")
            assert (await post("nobody")).status_code == 401

    asyncio.run(run())
