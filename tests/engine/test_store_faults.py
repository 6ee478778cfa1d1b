"""A store that is locked, full, restarted, or whose clock jumps, while jobs are made: none is lost, none is made twice."""

import contextlib
import sqlite3
import threading
import time

import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError
from test_engine import SMALL, Bench

from smartdiff_jax.engine import deliver
from smartdiff_jax.engine import store as stores
from smartdiff_jax.engine.run import Run


@contextlib.contextmanager
def locked(bench):
    """By a program that does not know that others write too."""
    with contextlib.closing(sqlite3.connect(bench.folder / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield "database is locked"
        other.execute("ROLLBACK")


@contextlib.contextmanager
def full(bench):
    """A disk that has no page more."""

    def limit(connection):
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages if limited else 2**31 - 2}")

    limited = True
    sqlalchemy.event.listen(bench.store._db, "begin", limit)
    yield "database or disk is full"
    limited = False


@pytest.fixture
def files(monkeypatch):
    """Set to let files be written."""
    go, write = threading.Event(), deliver.write_results

    def held(*args):
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(deliver, "write_results", held)
    return go


def succeeded(*engines):
    value = "smartdiff_jobs_total", {"model": "tiny", "state": "succeeded"}
    return sum(engine.metrics.registry.get_sample_value(*value) or 0 for engine in engines)


@pytest.mark.parametrize("fault", [locked, full])
def test_what_ends_while_nothing_can_be_written_ends_when_it_can(fault, tmp_path, pipe, monkeypatch, files, caplog):
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.1)
    with contextlib.closing(Bench(tmp_path, pipe)) as bench:
        engine = bench.engine()
        engine.start()
        job = bench.submit()
        bench.wait_for(lambda: (run := engine.queue.runs.get(job.id)) is not None and run.progress.stage == "media")
        with fault(bench) as words:
            with pytest.raises(OperationalError, match=words):
                for _ in range(100):  # the last page has room for some
                    bench.submit()
            accepted = bench.store.count()
            files.set()
            bench.wait_for(lambda: "the store is away" in caplog.text and words in caplog.text)
            assert bench.store.get(job.id).state == "running"
        assert bench.wait(job).attempts == 1 and bench.store.get(job.id).state == "succeeded"
        bench.wait_for(lambda: bench.store.count() == {"succeeded": sum(accepted.values())})
        assert bench.wait(bench.submit()).state == "succeeded" and engine.is_alive


def test_postgresql_is_restarted_and_no_job_is_lost(postgres, tmp_path, pipe, files, caplog):
    with contextlib.closing(Bench(tmp_path, pipe, postgres.url)) as bench:
        engine = bench.engine()
        engine.start()
        running = bench.submit()
        bench.wait_for(lambda: (run := engine.queue.runs.get(running.id)) is not None and run.progress.stage == "media")
        waiting = [bench.submit(SMALL | dict(seed=seed)) for seed in range(3)]
        postgres.stop()
        try:
            with pytest.raises(OperationalError):
                bench.submit()
            files.set()
            bench.wait_for(lambda: "the store is away" in caplog.text)
        finally:
            postgres.start()
        jobs = [bench.wait(job) for job in (running, *waiting, bench.submit())]
        assert [job.state for job in jobs] == ["succeeded"] * 5 and {job.attempts for job in jobs} == {1}
        assert len(bench.store.page()) == 5
        bench.wait_for(lambda: succeeded(engine) == 5)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_makes_no_job_twice(tmp_path, pipe, monkeypatch, jump):
    """Two engines on one host: to the other, the first may seem dead."""
    advance, offset = Run.advance, 0.0

    def slow(run):
        time.sleep(0.02)
        return advance(run)

    monkeypatch.setattr(Run, "advance", slow)
    with contextlib.closing(Bench(tmp_path, pipe)) as bench:
        monkeypatch.setattr(bench.store, "_clock", lambda: time.time() + offset)
        engines = [bench.engine(), bench.engine()]
        jobs = [bench.submit(SMALL | dict(num_inference_steps=60, seed=seed)) for seed in range(3)]
        for engine in engines:
            engine.start()
        bench.wait(jobs[0], "running")
        offset = jump
        assert [bench.wait(job).state for job in jobs] == ["succeeded"] * 3
        bench.wait_for(lambda: succeeded(*engines) == 3)  # an engine counts when the store has it
        whole = bench.folder / "whole.mp4"
        pipe(**SMALL | dict(num_inference_steps=60, seed=0)).save(whole)
        assert (bench.folder / "artifacts" / jobs[0].id / "output.mp4").read_bytes() == whole.read_bytes()
        assert succeeded(*engines) == 3
