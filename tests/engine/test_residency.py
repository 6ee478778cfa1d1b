"""Components that leave the devices between their uses: the same bits, nothing compiled again, the memory that was planned."""

import gc
import math

import jax
import numpy as np

from smartdiff_jax.config.system import MeshConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.planning import outline, workload
from smartdiff_jax.sharding.mesh import make_mesh
from smartdiff_jax.sharding.plan import plan_mesh
from smartdiff_jax.sharding.weights import weight_sharding
from smartdiff_jax.weights.residency import DEVICE, HOST, Room, Staged, at_rest


def on_devices() -> int:
    """Bytes of all arrays that lie in the memory of the devices."""
    gc.collect()
    there = [array for array in jax.live_arrays() if array.sharding.memory_kind == DEVICE]
    # From shapes alone: to look at a shard makes another array of it.
    shards = [(array.sharding.shard_shape(array.shape), len(array.sharding.addressable_devices)) for array in there]
    return sum(math.prod(shape) * count * array.itemsize for array, (shape, count) in zip(there, shards, strict=True))


def measured(pipe, request):
    """The output, and the bytes on the devices at the end of each stage, over those before the request."""
    seen = {}

    def look(progress):
        if progress.done == progress.total:
            seen[progress.stage] = on_devices()

    return pipe("a red fox", output_type="np", on_progress=look, **request), seen


def test_a_stage_has_its_own_weights_and_no_others(experts_folder, experts_pipe, system, compiles):
    """The bytes on the devices differ from those with everything there by the components that the plan says are away."""
    request = dict(size=(32, 32), num_frames=5, num_inference_steps=4, seed=1)
    plan = plan_mesh(workload(outline(experts_folder, "float32")), MeshConfig(), residency="stage")
    expected, with_all = measured(experts_pipe, request)
    before = on_devices()
    staged = Pipeline.from_pretrained(experts_folder, system=system.model_copy(update={"residency": "stage"}))
    assert on_devices() == before  # loading leaves the devices' memory alone
    out, with_stage = measured(staged, request)
    np.testing.assert_array_equal(out.frames, expected.frames)
    np.testing.assert_array_equal(out.latents, expected.latents)
    there = {"text": "text_encoder", "denoise": "transformer_2", "decode": "vae"}
    # The first pipeline's weights are there all the time, so the second only adds those in use.
    more = {with_stage[stage] - with_all[stage] - plan.weights[component] for stage, component in there.items()}
    # JAX 0.10 may keep what the first request gave back until the second has run: as much at every stage.
    assert len(more) == 1 and 0 <= min(more) <= 2 * (expected.frames.nbytes + expected.latents.nbytes), more
    compiled = compiles.count
    again, _ = measured(staged, request | dict(seed=2, num_inference_steps=6))
    assert compiles.count == compiled and not np.array_equal(again.frames, out.frames)


def test_a_room_holds_one_tenant():
    home = at_rest(weight_sharding(make_mesh(MeshConfig(ring=2, tensor=2))), "stage")("blocks.q.kernel", (1, 4, 4))
    room = Room()
    one, two = (Staged(room, {"kernel": jax.device_put(np.full((1, 4, 4), n, np.float32), home)}) for n in (1, 2))
    with one.use() as weights:
        first = weights["kernel"]
        assert first.sharding == home.with_memory_kind(DEVICE) and first[0, 0, 0] == 1
        with one.use() as same:
            assert same is weights
    with one.use() as weights:
        assert weights["kernel"] is first  # stays until another comes
    with two.use() as weights:
        assert weights["kernel"][0, 0, 0] == 2 and first.is_deleted()
    assert one.kept["kernel"].sharding.memory_kind == HOST and not one.kept["kernel"].is_deleted()
    room.clear()
    with one.use() as weights:
        assert weights["kernel"][0, 0, 0] == 1
