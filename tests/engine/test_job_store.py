"""What jobs survive: two engines at one store, silence, ids used twice, time."""

import dataclasses
import sqlite3
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smartdiff_jax.engine.artifacts import Artifacts, StorageFailed
from smartdiff_jax.engine.job import FINAL, TRANSITIONS, Job, new_id
from smartdiff_jax.engine.store import LEASE_SECONDS, MAX_ATTEMPTS, IdempotencyConflict, JobStore, QueueFull
from smartdiff_jax.errors import InvalidConfig


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return request.getfixturevalue("postgres").url


@pytest.fixture
def store(url, clock):
    store = JobStore(url, ttl=60.0, clock=clock)
    yield store
    store.close()


def a_job(clock, **changes):
    fields = dict(owner="ann", api="jobs", model="m", params={"prompt": "fox"}, output_format="png", previews=0, cost=1.0)
    return Job(**fields | dict(id=new_id(), priority="normal", created_at=clock()) | changes)


def submit(store, clock, **changes):
    return store.submit(a_job(clock, **changes))[0]


def test_a_job_comes_back_as_it_was_put(store, clock, url):
    job = submit(store, clock, params={"prompt": "\N{FOX FACE}\n'"}, idempotency_key="k")
    assert store.get(job.id) == job
    again = JobStore(url, clock=clock)
    assert again.get(job.id) == job
    again.close()


def test_its_way_to_success(store, clock):
    job = submit(store, clock)
    assert [waiting.id for waiting in store.waiting()] == [job.id]
    claimed = store.claim(job.id, "one")
    assert (claimed.state, claimed.engine, claimed.attempts, claimed.started_at) == ("running", "one", 1, 1000.0)
    assert store.waiting() == [] and store.claim(job.id, "two") is None
    assert store.progress(job.id, "one", stage="denoise", done=2, total=4, device_seconds=0.5)
    assert store.get(job.id).fraction == 0.5
    clock.now += 5
    assert store.finish(job.id, "one", "succeeded", files=("a.png",), report={"seed": 1})
    done = store.get(job.id)
    assert (done.state, done.files, done.report, done.finished_at, done.engine) == (
        "succeeded", ("a.png",), {"seed": 1}, 1005.0, None,
    )  # fmt: skip
    assert not store.finish(job.id, "one", "failed") and store.cancel(job.id).state == "succeeded"


def test_one_of_many_claims_wins(store, clock):
    job, won, barrier = submit(store, clock), [], threading.Barrier(8)

    def claim(name):
        barrier.wait()
        if store.claim(job.id, name) is not None:
            won.append(name)

    threads = [threading.Thread(target=claim, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.get(job.id).engine == won[0]


def test_a_silent_engine_loses_its_jobs_and_a_living_one_keeps_them(store, clock):
    dead, alive = submit(store, clock), submit(store, clock)
    store.claim(dead.id, "dead"), store.claim(alive.id, "alive")
    clock.now += LEASE_SECONDS * 0.7
    assert store.heartbeat("alive", [alive.id, dead.id]) == {alive.id: (False, "normal")}
    clock.now += LEASE_SECONDS * 0.7
    assert [job.id for job in store.waiting()] == [dead.id]
    assert store.claim(dead.id, "alive").attempts == 2
    # what the silent one says when it wakes up counts no more
    assert store.heartbeat("dead", [dead.id]) == {} and not store.progress(dead.id, "dead", done=4)
    assert not store.finish(dead.id, "dead", "succeeded") and not store.release(dead.id, "dead")
    assert store.finish(dead.id, "alive", "succeeded")


def test_leases_from_before_a_clock_was_set_back_hold_nobody_up(store, clock):
    dead, alive = submit(store, clock), submit(store, clock)
    store.claim(dead.id, "dead"), store.claim(alive.id, "alive")
    clock.now -= 5  # what the clocks of two hosts may differ by
    assert store.waiting() == []
    clock.now -= 3600
    assert store.heartbeat("alive", [alive.id]) == {alive.id: (False, "normal")}
    assert [job.id for job in store.waiting()] == [dead.id] and store.claim(dead.id, "alive").attempts == 2
    assert store.waiting() == [] and store.finish(dead.id, "alive", "succeeded")


def test_a_job_that_kills_its_engines_ends_and_progress_forgives(store, clock):
    poison, long = submit(store, clock), submit(store, clock)
    for _ in range(MAX_ATTEMPTS):
        for job in (poison, long):
            assert store.claim(job.id, "one") is not None
        assert store.progress(long.id, "one", got_further=True)
        clock.now += LEASE_SECONDS + 1
    assert store.claim(poison.id, "one") is None and store.claim(long.id, "one") is not None
    assert store.get(poison.id).state == "failed" and store.get(poison.id).error["code"] == "engine_died"


def test_cancel_reaches_each_state(store, clock):
    queued, running, orphan = (submit(store, clock) for _ in range(3))
    assert store.cancel(queued.id).state == "cancelled"
    store.claim(running.id, "one")
    assert store.cancel(running.id).state == "running" and store.heartbeat("one", [running.id]) == {
        running.id: (True, "normal")
    }
    assert store.finish(running.id, "one", "cancelled")
    store.claim(orphan.id, "dead"), store.cancel(orphan.id)
    clock.now += LEASE_SECONDS + 1
    assert store.claim(orphan.id, "one") is None and store.get(orphan.id).state == "cancelled"
    assert store.cancel("job_none") is None


def test_a_released_job_is_queued_again(store, clock):
    job = submit(store, clock)
    store.claim(job.id, "one")
    assert store.release(job.id, "one") and store.get(job.id).state == "queued"
    assert store.claim(job.id, "two").attempts == 1


def test_an_idempotency_key_names_one_job_of_one_owner(store, clock):
    first, new = store.submit(a_job(clock, idempotency_key="k"), "hash")
    again, newer = store.submit(a_job(clock, idempotency_key="k"), "hash")
    assert new and not newer and again.id == first.id
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.submit(a_job(clock, idempotency_key="k"), "another hash")
    assert store.submit(a_job(clock, owner="bob", idempotency_key="k"), "hash")[1]
    assert store.submit(a_job(clock), "hash")[1] and store.submit(a_job(clock), "hash")[1]


def test_the_queue_is_bounded_as_a_whole_and_for_each_owner(store, clock):
    for _ in range(2):
        store.submit(a_job(clock), max_queued=3, max_of_owner=2)
    with pytest.raises(QueueFull, match="2 jobs of yours"):
        store.submit(a_job(clock), max_queued=3, max_of_owner=2)
    store.submit(a_job(clock, owner="bob"), max_queued=3, max_of_owner=2)
    with pytest.raises(QueueFull, match="3 jobs are waiting"):
        store.submit(a_job(clock, owner="cid"), max_queued=3, max_of_owner=2)
    assert store.count() == {"queued": 3} and store.count("ann") == {"queued": 2}


def test_time_removes_what_is_finished_and_nothing_else(store, clock):
    done, running, queued = (submit(store, clock) for _ in range(3))
    store.claim(done.id, "one"), store.claim(running.id, "one")
    store.finish(done.id, "one", "succeeded")
    clock.now += 59
    assert store.expired() == [] and store.get(done.id)
    clock.now += 2
    assert store.expired() == [done.id] and store.get(done.id) is None
    store.remove(done.id)
    assert store.expired() == [] and {job.id for job in store.page()} == {running.id, queued.id}


def test_a_forgotten_job_is_gone_at_once_and_swept_when_it_has_ended(store, clock):
    job = submit(store, clock)
    store.claim(job.id, "one")
    store.forget(job.id)
    assert (
        store.get(job.id) is None and store.expired() == [] and store.heartbeat("one", [job.id]) == {job.id: (True, "normal")}
    )
    store.finish(job.id, "one", "cancelled")
    assert store.expired() == [job.id]


def test_pages_cover_all_jobs_once(store, clock):
    made = []
    for number in range(7):
        clock.now += number % 2  # some come in the same instant
        made.append(submit(store, clock, owner="ann" if number != 3 else "bob").id)
    for newest in (True, False):
        seen, after = [], None
        while page := store.page(limit=2, after=after, newest_first=newest):
            seen += [job.id for job in page]
            after = page[-1].id
        assert sorted(seen) == sorted(made)
        times = [store.get(job).created_at for job in seen]
        assert times == sorted(times, reverse=newest)
    assert len(store.page(owner="bob")) == 1 and store.page(api="videos") == [] and store.page(after="job_x") == []
    assert len(store.page(states=("queued",))) == 7 and store.page(states=FINAL) == []


def test_rates_are_kept(store):
    store.save_rates({"a": (0.5, 3)})
    store.save_rates({"a": (0.4, 4), "b": (1.0, 1)})
    assert store.load_rates() == {"a": (0.4, 4), "b": (1.0, 1)}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["claim", "silence", "finish", "fail", "release", "cancel"]), st.sampled_from("ab"))))
def test_only_allowed_transitions_ever_happen(store, clock, moves):
    job = submit(store, clock)
    for move, engine in moves:
        before = store.get(job.id)
        match move:
            case "claim":
                store.claim(job.id, engine)
            case "silence":
                clock.now += LEASE_SECONDS + 1
            case "finish" | "fail":
                store.finish(job.id, engine, "succeeded" if move == "finish" else "failed")
            case "release":
                store.release(job.id, engine)
            case "cancel":
                store.cancel(job.id)
        after = store.get(job.id)
        if after is None:
            assert before.is_final
            break
        assert after.state == before.state or after.state in TRANSITIONS[before.state]
        assert (after.engine is None) == (after.state != "running")
        if before.is_final:
            assert dataclasses.replace(after) == before


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all/jobs.db", "oracle+none://x"])
def test_a_store_that_cannot_be_opened_is_one_error(url):
    with pytest.raises(InvalidConfig, match="store="):
        JobStore(url)


def test_a_store_of_another_version_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "old.db") as old:
        old.execute("CREATE TABLE jobs (id TEXT)")
    old.close()
    with pytest.raises(InvalidConfig, match="another version"):
        JobStore(f"sqlite:///{tmp_path}/old.db")


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(str(tmp_path / "artifacts"))


def test_files_of_a_job(artifacts, tmp_path):
    artifacts.write("job_1", "a.png", b"one")
    artifacts.write("job_1", "a.png", b"two")
    assert artifacts.read("job_1", "a.png") == b"two"
    with artifacts.fetched("job_1", "a.png") as path:
        assert path.read_bytes() == b"two"
    assert not path.exists()
    with artifacts.fetched("job_1", "b.png") as path:
        assert path is None
    artifacts.remove("job_1", "a.png"), artifacts.remove("job_1", "a.png")
    with pytest.raises(FileNotFoundError):
        artifacts.read("job_1", "a.png")
    artifacts.write("job_1", "b.png", b"")
    artifacts.remove("job_1"), artifacts.remove("job_1")
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.parametrize("name", ["../job_2/a.png", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "x" * 200])
def test_no_name_leaves_the_folder(artifacts, name):
    artifacts.write("job_2", "a.png", b"secret")
    for job, file in ((name, "a.png"), ("job_1", name)):
        with pytest.raises(FileNotFoundError):
            artifacts.read(job, file)
        with pytest.raises(FileNotFoundError):
            artifacts.write(job, file, b"")


def test_a_full_disk_is_one_error_and_leaves_nothing(artifacts, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts._fs, "pipe_file", full)
    with pytest.raises(StorageFailed, match="a.png cannot be written: No space"):
        artifacts.write("job_1", "a.png", b"one")
    assert [file.name for file in (tmp_path / "artifacts").rglob("*")] == ["job_1"]


def test_any_filesystem_of_fsspec_serves():
    artifacts = Artifacts("memory://bucket/prefix")
    artifacts.write("job_1", "a.png", b"one")
    assert artifacts.read("job_1", "a.png") == b"one"
    artifacts.remove("job_1")
    with pytest.raises(FileNotFoundError):
        artifacts.read("job_1", "a.png")


def test_an_unknown_filesystem_is_one_error():
    with pytest.raises(InvalidConfig, match="artifacts="):
        Artifacts("nosuch://bucket")
