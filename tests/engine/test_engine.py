"""The engine with a tiny model: order, overlap, cancelling, failing alone, resuming, leases."""

import contextlib
import sqlite3
import threading
import time

import numpy as np
import pytest
from PIL import Image
from sqlalchemy.exc import OperationalError

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import EVERYONE, ServiceConfig
from smartdiff_jax.engine import deliver, pipeline
from smartdiff_jax.engine import store as stores
from smartdiff_jax.engine.admission import Submission, admit
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pause
from smartdiff_jax.engine.run import CHECKPOINT, Run
from smartdiff_jax.engine.store import JobStore, QueueFull
from smartdiff_jax.errors import HostLost, InvalidRequest

SMALL = dict(prompt="a red fox", size="32x32", num_frames=5, num_inference_steps=4, seed=3)  # the shape other tests compile


class Bench:
    """A store and a folder, and engines over them."""

    def __init__(self, folder, pipe, url=None):
        self.folder, self.pipe, self.engines = folder, pipe, []
        self.store = JobStore(url or f"sqlite:///{folder}/jobs.db")
        self.artifacts = Artifacts(str(folder / "artifacts"))

    def engine(self, **config):
        config = ServiceConfig.create(checkpoint_seconds=0.0, **config)
        engine = Engine({"tiny": self.pipe}, self.store, self.artifacts, config)
        self.engines.append(engine)
        return engine

    def submit(self, params=SMALL, engine=None, key=EVERYONE, **fields):
        return admit(engine or self.engines[-1], key, Submission(GenerateParams.create(**params), **fields))[0]

    def wait(self, job, *states, seconds=180.0):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = self.store.get(job.id)
            if now.state in (states or ("succeeded", "failed", "cancelled")):
                return now
            time.sleep(0.01)
        raise AssertionError(f"{now} after {seconds} s")

    def close(self):
        for engine in self.engines:
            engine.stop()
        self.store.close()

    def wait_for(self, condition, seconds=180.0):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.005)


@pytest.fixture
def bench(tmp_path, pipe):
    bench = Bench(tmp_path, pipe)
    yield bench
    bench.close()


def test_a_job_ends_in_the_pictures_the_pipeline_makes(bench, pipe, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_BATCH_TOKENS", 1)
    bench.engine().start()
    done = bench.wait(bench.submit(SMALL | dict(num_outputs=2), previews=2, output_format="png"))
    assert done.state == "succeeded" and done.files == ("output-0.png", "output-1.png"), done
    assert done.report["params"]["seed"] == 3 and done.device_seconds > 0 and done.previews_made == 2
    expected = pipe(**SMALL | dict(num_outputs=2)).frames
    for name, frames in zip(done.files, expected, strict=True):
        path = bench.folder / "artifacts" / done.id / name
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), frames[0])
    names = {path.name for path in (bench.folder / "artifacts" / done.id).iterdir()}
    assert names == {"output-0.png", "output-1.png", "preview-1.webp", "preview-2.webp", "thumbnail.webp"}


def test_a_picture_behind_a_video_is_done_first_and_cancel_ends_the_video(bench, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_BATCH_TOKENS", 1)  # so that its 64 outputs go one by one, for many seconds
    engine = bench.engine()
    engine.start()
    video = bench.submit(SMALL | dict(num_inference_steps=200, num_outputs=64))
    bench.wait(video, "running")
    pictures = [bench.submit() for _ in range(3)]
    for picture in pictures:
        assert bench.wait(picture).state == "succeeded"
    assert bench.store.get(video.id).state == "running"
    began = time.monotonic()
    bench.store.cancel(video.id)
    engine.notice()
    assert bench.wait(video).state == "cancelled" and time.monotonic() - began < 2.0
    bench.wait_for(lambda: not engine.queue.runs)
    assert engine.queue.backlog() == 0.0


def test_a_shape_that_is_new_is_compiled_while_others_are_served(bench, monkeypatch):
    """The device goes on; an error of compiling is the job's own."""
    engine = bench.engine()
    let_go, compiled = threading.Event(), []

    def compile(run, original=Run.compile):
        compiled.append(run.job.id)
        assert let_go.wait(60)
        original(run)

    monkeypatch.setattr(Run, "compile", compile)
    let_go.set()
    engine.start()
    assert bench.wait(bench.submit()).state == "succeeded"
    let_go.clear()
    new = [bench.submit(SMALL | dict(size=size)) for size in ("48x32", "32x48")]
    bench.wait_for(lambda: len(compiled) == 2)
    known = [bench.submit() for _ in range(3)]
    for job in known:
        assert bench.wait(job).state == "succeeded"
    assert {bench.store.get(job.id).state for job in new} == {"running"} and compiled[1:] == [new[0].id]
    assert engine.live(bench.store.get(new[0].id))[0].stage == "compile"
    bench.store.cancel(new[1].id)
    engine.notice()
    bench.wait_for(lambda: engine.queue.runs[new[1].id].cancelled)
    monkeypatch.setattr(pipeline.Pipeline, "compile_decoder", lambda *_: 1 / 0)
    let_go.set()
    failed = bench.wait(new[0])
    assert failed.state == "failed" and failed.error["code"] == "internal_error"
    assert bench.wait(new[1]).state == "cancelled" and new[1].id not in compiled
    monkeypatch.undo()
    again = bench.submit(SMALL | dict(size="48x32"))
    assert bench.wait(again).state == "succeeded"


def test_a_stopped_engine_saves_and_another_ends_in_the_same_bits(bench, pipe):
    one = bench.engine()
    one.start()
    params = SMALL | dict(num_inference_steps=60)
    job = bench.submit(params)
    bench.wait_for(lambda: (run := one.queue.runs.get(job.id)) is not None and run.progress.done >= 3)
    one.stop()
    left = bench.store.get(job.id)
    assert left.state == "queued" and (bench.folder / "artifacts" / job.id / CHECKPOINT).exists()
    two = bench.engine()
    two.start()
    assert bench.wait(job).state == "succeeded"
    assert two.metrics.registry.get_sample_value("smartdiff_resumed_jobs_total", {"model": "tiny"}) == 1
    done = bench.store.get(job.id)
    assert done.report["seconds"]["denoise"] > 0
    bench.wait_for(lambda: not (bench.folder / "artifacts" / job.id / CHECKPOINT).exists())  # after the job is told to be done
    expected = bench.folder / "whole.mp4"
    pipe(**params).save(expected)
    assert (bench.folder / "artifacts" / job.id / "output.mp4").read_bytes() == expected.read_bytes()


def test_a_job_saved_after_its_last_step_goes_on_with_its_decoding(bench, pipe):
    """In an engine that has not compiled its shape yet."""
    engine, job = bench.engine(), bench.submit()
    run = Run(job, pipe)
    run.open(None)
    last = next(event for event in run._stream if isinstance(event, Pause) and event.done == event.total)
    bench.artifacts.write(job.id, CHECKPOINT, last.checkpoint().to_bytes(run.fingerprint))
    engine.start()
    assert bench.wait(job).state == "succeeded"
    assert engine.metrics.registry.get_sample_value("smartdiff_resumed_jobs_total", {"model": "tiny"}) == 1


def test_a_checkpoint_that_cannot_be_read_is_done_without(bench):
    engine = bench.engine()
    job = bench.submit()
    bench.artifacts.write(job.id, CHECKPOINT, b"nonsense")
    engine.start()
    assert bench.wait(job).state == "succeeded"


def test_a_dead_engines_job_is_taken_up(bench, monkeypatch):
    monkeypatch.setattr(stores, "LEASE_SECONDS", 1.0)
    engine = bench.engine()
    job = bench.submit()
    assert bench.store.claim(job.id, "dead")
    engine.start()
    assert bench.wait(job).state == "succeeded"


def test_a_poisoned_job_fails_alone(bench, pipe, monkeypatch):
    stream = type(pipe).stream

    def poisoned(self, request, **options):
        for event in stream(self, request, **options):
            if request.prompt == "oom" and event.stage == "denoise":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 GB")
            if request.prompt == "text":
                raise KeyError("secret")
            yield event

    monkeypatch.setattr(type(pipe), "stream", poisoned)
    engine = bench.engine()
    engine.start()
    jobs = [bench.submit(SMALL | dict(prompt=prompt)) for prompt in ("fox", "oom", "text", "fox")]
    ended = [bench.wait(job) for job in jobs]
    assert [job.state for job in ended] == ["succeeded", "failed", "failed", "succeeded"]
    assert ended[1].error["code"] == "out_of_memory" and "smaller" in ended[1].error["message"]
    assert ended[2].error["code"] == "internal_error" and "secret" not in ended[2].error["message"]
    bench.wait_for(lambda: not engine.queue.runs)
    assert engine.is_alive


def test_a_lost_host_ends_the_engine_and_no_job(bench, pipe, monkeypatch):
    stream = type(pipe).stream

    def losing(self, request, **options):
        for event in stream(self, request, **options):
            if event.stage == "denoise":
                raise HostLost("host 1 is lost: its process ended")
            yield event

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe), "stream", losing)
        engine = bench.engine()
        engine.start()
        jobs = [bench.submit(), bench.submit()]
        bench.wait_for(lambda: not engine.is_alive)
        assert {bench.store.get(job.id).state for job in jobs} <= {"queued", "running"}
        engine.stop()  # as whoever sees that it has died stops it
        bench.engines.remove(engine)
    assert [bench.store.get(job.id).state for job in jobs] == ["queued", "queued"]
    bench.engine().start()
    assert [bench.wait(job).state for job in jobs] == ["succeeded", "succeeded"]


def test_a_full_disk_fails_the_job_and_not_the_engine(bench, monkeypatch):
    engine = bench.engine()
    engine.start()
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(28, "No space left on device")

        patch.setattr(bench.artifacts._fs, "pipe_file", full)
        failed = bench.wait(bench.submit())
        assert failed.state == "failed" and failed.error["code"] == "storage_failed"
    assert bench.wait(bench.submit()).state == "succeeded"


def test_a_store_that_is_away_for_a_while_loses_nothing(bench, monkeypatch, caplog):
    engine, tried = bench.engine(), []
    finish = JobStore.finish

    def unreachable(*args, **kwargs):
        tried.append(time.monotonic())
        if len(tried) < 4:
            raise OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("database is locked"))
        return finish(*args, **kwargs)

    monkeypatch.setattr(JobStore, "finish", unreachable)
    engine.start()
    assert bench.wait(bench.submit()).state == "succeeded" and len(tried) == 4
    assert caplog.text.count("the store is away") == 1 and "database is locked" in caplog.text


def test_what_the_store_can_never_keep_ends_the_job_at_once(bench, monkeypatch, caplog):
    engine = bench.engine()
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(deliver, "report_of", lambda output: {"params": output})
        failed = bench.wait(bench.submit(), seconds=deliver.PATIENCE)
    assert failed.state == "failed" and failed.error["code"] == "internal_error" and failed.attempts == 1
    assert "cannot end as succeeded" in caplog.text and "the store is away" not in caplog.text
    assert bench.wait(bench.submit()).state == "succeeded"
    bench.wait_for(lambda: not engine.queue.runs)


def test_two_engines_share_the_work_and_do_each_job_once(bench):
    engines = [bench.engine(), bench.engine()]
    jobs = [bench.submit(SMALL | dict(seed=seed)) for seed in range(8)]
    for engine in engines:
        engine.start()
    assert {bench.wait(job).state for job in jobs} == {"succeeded"}
    value = "smartdiff_jobs_total", {"model": "tiny", "state": "succeeded"}
    counts = [engine.metrics.registry.get_sample_value(*value) or 0 for engine in engines]
    assert sum(counts) == 8, counts


def test_what_is_measured_is_kept_and_told(bench):
    engine = bench.engine()
    engine.start()
    work = engine.work_of("tiny", bench.pipe.check(GenerateParams.create(**SMALL)))
    for seed in range(3):
        bench.wait(bench.submit(SMALL | dict(seed=seed, num_inference_steps=20)))
    estimate = engine.costs.estimate(work)
    assert estimate.measured and 0 < estimate.step < 1
    engine.stop()
    assert bench.engine().costs.estimate(work) == estimate


def test_admission_refuses_what_cannot_be_served(bench):
    engine = bench.engine(max_queued=2, max_megapixels=0.01)
    for params, fields, words in [
        (SMALL | dict(size="512x512"), {}, "megapixels"),
        (SMALL, dict(model="none"), "model='none'"),
        (SMALL, dict(output_format="avi"), "output_format='avi'"),
        (SMALL, dict(output_format="jpg"), "5 frames"),
        (SMALL, dict(previews=9), "previews=9"),
        (SMALL | dict(size="33x32"), {}, "size"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            bench.submit(params, engine, **fields)
    with pytest.raises(InvalidRequest, match="megapixel-steps"):
        bench.submit(SMALL, engine, key=EVERYONE.model_copy(update={"max_work": 1e-6}))
    bench.submit(), bench.submit()
    with pytest.raises(QueueFull):
        bench.submit()
    with contextlib.suppress(QueueFull):
        engine.start()


def test_a_key_runs_no_more_jobs_at_once_than_it_may(bench):
    key = EVERYONE.model_copy(update={"name": "ann", "max_running": 1})
    engine = bench.engine()
    engine.adopt(engine.limits, [key])
    most = []
    engine.listeners.append(lambda job: most.append(len(engine.queue.runs)))
    jobs = [bench.submit(SMALL | dict(seed=seed), key=key) for seed in range(4)]
    engine.start()
    assert {bench.wait(job).state for job in jobs} == {"succeeded"} and max(most) == 1


def test_a_job_that_other_weights_refuse_by_now_fails_alone(bench, pipe, experts_pipe):
    """It came while a model with two experts served, which one with a single expert has taken the place of."""
    engine = bench.engine()
    engine.replace("tiny", experts_pipe)
    refused = bench.submit(SMALL | dict(guidance_scale_2=3.0))
    assert refused.params["size"] == [32, 32] and refused.params["fps"] == 16  # it waits as what was priced
    engine.replace("tiny", pipe)
    taken = bench.submit()
    engine.start()
    failed = bench.wait(refused)
    assert failed.state == "failed" and failed.error["code"] == "invalid_request", failed
    assert all(words in failed.error["message"] for words in ("guidance_scale_2=3.0", "use guidance_scale"))
    assert bench.wait(taken).state == "succeeded"
    bench.wait_for(lambda: not engine.queue.runs)
    assert engine.queue.backlog() == 0.0


def test_other_limits_and_keys_hold_at_once_and_stop_nothing(bench):
    engine, ann = bench.engine(), EVERYONE.model_copy(update={"name": "ann"})
    engine.start()
    endless = [bench.submit(SMALL | dict(num_inference_steps=200, num_outputs=64), key=ann) for _ in range(2)]
    for job in endless:
        bench.wait(job, "running")
    held = ann.model_copy(update={"max_running": 1, "share": 100.0})
    engine.adopt(ServiceConfig.create(max_queued=1, keep_hours=1), [held])
    waiting = bench.submit(key=ann)
    with pytest.raises(QueueFull, match="1 jobs are waiting"):
        bench.submit()
    assert [bench.store.get(job.id).state for job in (*endless, waiting)] == ["running", "running", "queued"]
    assert {entry.share for entry in engine.queue._scheduler._entries.values()} == {100.0}
    engine.adopt(ServiceConfig.create(), [])
    assert bench.wait(waiting).expires_at == pytest.approx(time.time() + 24 * 3600, abs=60)
    for job in endless:
        bench.store.cancel(job.id)
