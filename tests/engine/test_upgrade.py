"""Weights replaced while jobs go on: what is begun ends as it began, what comes later has the new ones, the old are freed."""

import gc
import shutil
import threading
import time
import weakref

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import EVERYONE, ServiceConfig
from smartdiff_jax.engine.admission import Submission, admit
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.run import Lap, Run
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.errors import Conflict, InvalidConfig

SMALL = dict(prompt="a red fox", size="32x32", num_frames=5, num_inference_steps=4, seed=3)  # the shape other tests compile
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def tune(folder, change, weights=WEIGHTS):
    """Other weights in the place of those that lie there, put there at once."""
    tensors = {key: change(value) for key, value in load_file(folder / weights).items()}
    save_file(tensors, folder / "new.safetensors", metadata={"format": "pt"})
    (folder / "new.safetensors").rename(folder / weights)


class Bench:
    def __init__(self, path, system):
        self.folder = tiny.write_folder(path / "tiny-wan")
        self.load = lambda: Pipeline.from_pretrained(self.folder, system=system)
        self.store, self.artifacts = JobStore(f"sqlite:///{path}/jobs.db"), Artifacts(str(path / "artifacts"))
        self.config = ServiceConfig.create(checkpoint_seconds=0.0)
        self.pipelines = {"tiny-wan": self.load()}
        self.path = path
        self.engine = Engine(self.pipelines, self.store, self.artifacts, self.config, loaders={"tiny-wan": lambda: self.load()})

    def submit(self, priority="normal", **params):
        submission = Submission(GenerateParams.create(**SMALL | params), output_format="png", priority=priority)
        return admit(self.engine, EVERYONE, submission)[0]

    def picture(self, job):
        until(lambda: self.store.get(job.id).state in ("succeeded", "failed"))
        assert self.store.get(job.id).state == "succeeded", self.store.get(job.id)
        with Image.open(self.path / "artifacts" / job.id / "output.png") as picture:
            return np.asarray(picture)

    def state(self):
        return self.engine.upgrades.of("tiny-wan").state


@pytest.fixture
def bench(tmp_path, system):
    bench = Bench(tmp_path, system)
    bench.engine.start()
    yield bench
    bench.engine.stop()
    bench.store.close()


def test_new_weights_take_over_between_two_jobs(bench, system, monkeypatch):
    old = weakref.ref(bench.pipelines.pop("tiny-wan"))
    expected = old()(**SMALL | dict(num_inference_steps=20, num_frames=1)).frames[0, 0]
    first_id = old().weights_id
    release, gate = threading.Event(), threading.Event()
    advance = Run.advance

    def held(run):
        """The first job, 20 steps, stands still behind its first chunk until it is let go."""
        if run.work.steps == 20 and run.progress.done and not release.is_set():
            gate.set()
            time.sleep(0.01)
            return Lap(run.progress, 0, False)
        return advance(run)

    monkeypatch.setattr(Run, "advance", held)
    begun = bench.submit(num_inference_steps=20, num_frames=1)
    assert gate.wait(180)
    tune(bench.folder, lambda value: value * np.float32(1.1))
    assert bench.engine.upgrades.begin("tiny-wan").state == "loading"
    with pytest.raises(Conflict, match="tiny-wan is being upgraded"):
        bench.engine.upgrades.begin("tiny-wan")
    until(lambda: bench.state() == "draining")
    later = bench.picture(bench.submit("high", num_frames=1))  # on the new weights, while the first goes on on the old
    assert bench.state() == "draining" and bench.engine.uses(old())
    release.set()
    np.testing.assert_array_equal(bench.picture(begun), expected)
    until(lambda: bench.state() == "done")
    fresh = bench.load()
    np.testing.assert_array_equal(later, fresh(**SMALL | dict(num_frames=1)).frames[0, 0])
    assert bench.engine.pipelines["tiny-wan"].weights_id == fresh.weights_id != first_id
    monkeypatch.undo()
    until(lambda: (gc.collect(), old() is None)[1], 10)  # and with it all it held


@pytest.mark.parametrize("fault", ["gone", "misfit", "nan", "nan decoder", "another"])
def test_where_it_fails_the_old_weights_stay(bench, fault):
    before = bench.picture(bench.submit(num_frames=1))
    kept = bench.engine.pipelines["tiny-wan"]
    if fault == "gone":
        shutil.rmtree(bench.folder / "transformer")
    elif fault == "misfit":
        tune(bench.folder, lambda value: value[..., :-1].copy())
    elif fault == "nan":
        tune(bench.folder, lambda value: value * np.float32("nan"))
    elif fault == "nan decoder":
        tune(bench.folder, lambda value: value * np.float32("nan"), VAE)
    else:
        bench.folder.rename(bench.folder.parent / "other-name")
        bench.folder = bench.folder.parent / "other-name"
    bench.engine.upgrades.begin("tiny-wan")
    until(lambda: bench.state() in ("failed", "done"))
    failed = bench.engine.upgrades.of("tiny-wan")
    words = {"gone": "transformer", "misfit": "mis-shaped", "another": "other-name"}.get(fault, "no numbers")
    assert failed.state == "failed" and words in failed.error, failed
    assert bench.engine.pipelines["tiny-wan"] is kept
    np.testing.assert_array_equal(bench.picture(bench.submit(num_frames=1)), before)


def test_a_model_of_unknown_origin(bench):
    with pytest.raises(InvalidConfig, match="nothing tells"):
        bench.engine.upgrades.begin("pocket-video")


def test_weights_are_told_apart_and_copies_are_not(tmp_path, system):
    folder = tiny.write_folder(tmp_path / "one")
    one = Pipeline.from_pretrained(folder, system=system).weights_id
    shutil.copytree(folder, tmp_path / "moved" / "one")
    assert Pipeline.from_pretrained(tmp_path / "moved" / "one", system=system).weights_id == one
    tune(folder, lambda value: value + np.float32(1e-3))
    assert Pipeline.from_pretrained(folder, system=system).weights_id != one
