"""What is warm compiles nothing more for a user, whatever he asks for at that size."""

import pytest
import tiny

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import EVERYONE, Limits
from smartdiff_jax.engine import pipeline
from smartdiff_jax.engine.admission import Submission, admit
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.shapes import Shapes
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.engine.warming import warm_defaults
from smartdiff_jax.errors import Cancelled


@pytest.fixture
def cold(folder, system):
    """A pipeline that has compiled nothing, of a model whose default is small."""
    pipe = Pipeline.from_pretrained(folder, system=system)
    pipe.spec = tiny.with_default(pipe.spec, 32, 32, 5)
    return pipe


def test_jobs_wait_while_it_warms_and_then_compile_nothing(cold, compiles, tmp_path):
    store, progress = JobStore(f"sqlite:///{tmp_path}/jobs.db"), []
    engine = Engine({"tiny": cold}, store, Artifacts(str(tmp_path / "artifacts")), Limits())
    asked = dict(prompt="a red fox", num_inference_steps=7, seed=3, guidance_scale=2.5)
    none, warming = compiles.count, engine.warm(progress.append)
    job, _ = admit(engine, EVERYONE, Submission(GenerateParams.create(**asked), previews=2))
    assert list(warming) == ["tiny"] and {event.stage for event in progress} == {"text", "denoise", "decode"}
    assert store.get(job.id).state == "queued" and engine.is_alive
    assert compiles.count > none
    before = compiles.count
    engine.start()
    try:
        while not (ended := store.get(job.id)).is_final:
            pass
    finally:
        engine.stop()
    assert ended.state == "succeeded" and ended.previews_made == 2, ended
    assert compiles.count == before


def test_a_default_that_may_not_be_asked_for_or_has_no_room_is_not_made(cold, monkeypatch, caplog):
    def no_room(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 GB")

    def never(progress):
        raise AssertionError(progress)

    caplog.set_level("INFO", "smartdiff")
    assert list(warm_defaults({"tiny": cold}, Limits(max_megapixels=0.001), Shapes(), never)) == ["tiny"]
    assert "larger than max_megapixels" in caplog.text
    monkeypatch.setattr(pipeline, "denoise", no_room)
    assert list(warm_defaults({"tiny": cold}, Limits(), Shapes(), lambda progress: None)) == ["tiny"]
    assert "not enough memory for its default" in caplog.text


def test_it_is_given_up_where_the_service_leaves(cold):
    def leaving(progress):
        raise Cancelled("the service is stopping")

    with pytest.raises(Cancelled):
        list(warm_defaults({"tiny": cold}, Limits(), Shapes(), leaving))
