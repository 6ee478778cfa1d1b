"""What can never fit a device is refused before it is queued, and nothing else is."""

import dataclasses

import jax
import numpy as np
import pytest

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.service import EVERYONE, Limits
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine import memory
from smartdiff_jax.engine.admission import Submission, admit
from smartdiff_jax.engine.announced import Announced, announce
from smartdiff_jax.engine.artifacts import Artifacts
from smartdiff_jax.engine.engine import Engine
from smartdiff_jax.engine.memory import check_memory, least_bytes
from smartdiff_jax.engine.store import JobStore
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.weights.apart import apart

CLIP = GenerateParams.create(prompt="a", size="64x32", num_frames=9, seed=3)


def device_of(monkeypatch, size):
    monkeypatch.setattr(memory, "device_memory", lambda: {"in_use": 0, "peak": 0, "limit": size})


def test_a_plan_is_the_same_before_and_after_the_weights_are_there(folder, pipe, system):
    known = announce(folder, system)
    assert known.plan(known.check(CLIP)) == pipe.plan(pipe.check(CLIP)) and known.weight_bytes == pipe.weight_bytes
    copy = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), leaf.sharding), pipe._model.denoisers[0])
    model = dataclasses.replace(pipe._model, denoisers=[apart(copy)])
    params = pipe.check(CLIP)  # blocks lie apart where a picture is made on a GPU
    assert Announced(model, system).plan(params) == pipe.plan(params)


def test_what_is_refused_needs_more_by_half_the_estimate(pipe, monkeypatch):
    models, params = {"tiny": pipe}, pipe.check(CLIP)
    plan, alone = pipe.plan(params), least_bytes({"tiny": pipe}, "tiny", params)
    assert sum(plan.weights.values()) == pipe.weight_bytes < alone < plan.peak - plan.reserved
    assert least_bytes(models | {"other": pipe}, "tiny", params) == alone + pipe.weight_bytes
    check_memory(models, "tiny", params)  # a CPU does not tell what it has
    device_of(monkeypatch, alone)
    check_memory(models, "tiny", params)
    device_of(monkeypatch, alone - 1)
    with pytest.raises(InvalidRequest, match="size='64x32': needs at least .* with 9 frames .* smaller size or fewer frames"):
        check_memory(models, "tiny", params)


def test_one_component_at_a_time_needs_less(folder, system, pipe):
    staged = announce(folder, SystemConfig.create(**system.model_dump() | {"residency": "stage"}))
    params = pipe.check(CLIP)
    alone = least_bytes({"tiny": staged}, "tiny", params)
    assert alone < least_bytes({"tiny": pipe}, "tiny", params)
    assert least_bytes({"tiny": staged, "other": staged}, "tiny", params) == alone


def test_what_a_card_cannot_hold_of_a_known_model_is_refused(tmp_path, monkeypatch):
    """Figures that anybody can check: Wan2.1-1.3B comes with a text encoder of 11.4 GB, and runs on a card of 24."""
    model = announce("wan2.1-t2v-1.3b", SystemConfig.create(cache_dir=tmp_path, dtype="bfloat16"))
    params = model.check(GenerateParams.create(prompt="a"))
    device_of(monkeypatch, 12 * 2**30)
    with pytest.raises(InvalidRequest, match=r"size='832x480': needs at least 1[67]\.\d GB with 81 frames on a device of 12.9"):
        check_memory({"wan": model}, "wan", params)
    device_of(monkeypatch, 24 * 2**30)
    check_memory({"wan": model}, "wan", params)


def test_admission_refuses_it_unless_it_was_made_on_such_devices_before(pipe, monkeypatch, tmp_path, caplog):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    engine = Engine({"tiny": pipe}, store, Artifacts(str(tmp_path / "artifacts")), Limits())
    device_of(monkeypatch, 1000)
    with pytest.raises(InvalidRequest, match="needs at least"):
        admit(engine, EVERYONE, Submission(CLIP))
    assert store.count() == {}
    assert engine.metrics.registry.get_sample_value("smartdiff_rejections_total", {"reason": "memory"}) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Announced, "plan", lambda *args: 1 / 0)
        assert admit(engine, EVERYONE, Submission(CLIP))[1] and "cannot be planned" in caplog.text
    work = engine.work_of("tiny", pipe.check(CLIP))
    engine.costs.observe(work, "denoise", 1.0), engine.costs.observe(work, "decode", 1.0)
    assert admit(engine, EVERYONE, Submission(CLIP))[1]
    store.close()
