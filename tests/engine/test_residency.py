"""Components that leave the devices between their uses: the same bits, no second compilation, and the memory that was planned."""

import jax
import numpy as np
import pytest
import tiny_images

from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.engine.planning import outline, workload
from smartdiff_jax.sharding.plan import plan_mesh
from smartdiff_jax.weights.residency import DEVICE, HOST, Room, Staged

MESH = MeshConfig(ring=2, ulysses=2, fsdp=True)


def on_devices() -> int:
    """Bytes of all arrays that lie in the memory of the devices."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum(data.nbytes for data in shards if data.sharding.memory_kind == DEVICE)


def measured(pipe, request):
    """The output, and the bytes on the devices at the end of each stage, over those before the request."""
    seen = {}

    def look(progress):
        seen[progress.stage] = on_devices()

    return pipe("a red fox", output_type="np", on_progress=look, **request), seen


@pytest.mark.parametrize("case", ["experts", "flux1"])
def test_a_stage_has_its_own_weights_and_no_others(case, request, system, tmp_path, compiles):
    """The bytes on the devices differ from those with everything there by the components that the plan says are away."""
    if case == "experts":
        folder, sizes = request.getfixturevalue("experts_folder"), dict(size=(48, 32), num_frames=5, num_inference_steps=4)
    else:
        folder = tiny_images.write_with_four_heads(tmp_path / case, case)
        sizes = dict(size=(112, 80), num_inference_steps=2)
    mesh = MESH if case == "flux1" else MeshConfig(ring=2)
    sizes |= dict(seed=1)
    plan = plan_mesh(workload(outline(folder, "float32")), mesh, residency="stage")
    all_there = Pipeline.from_pretrained(folder, system=system, mesh=mesh)
    expected, with_all = measured(all_there, sizes)
    del all_there
    before = on_devices()
    staged = Pipeline.from_pretrained(folder, system=SystemConfig.create(**system.model_dump() | {"residency": "stage"}), mesh=mesh)
    assert on_devices() == before  # loading touches the devices' memory for nothing
    out, with_stage = measured(staged, sizes)
    np.testing.assert_array_equal(out.frames, expected.frames)
    np.testing.assert_array_equal(out.latents, expected.latents)
    whole = sum(plan.weights.values())
    last = {"text": "text_encoder", "denoise": "transformer_2" if case == "experts" else "transformer", "decode": "vae"}
    away = {stage: with_all[stage] - with_stage[stage] for stage in last}
    assert away == {stage: mesh.num_devices * (whole - plan.weights[there]) for stage, there in last.items()}
    compiled = compiles.count
    again, _ = measured(staged, sizes | dict(seed=2))
    assert compiles.count == compiled and not np.array_equal(again.frames, out.frames)


def test_a_room_holds_one_tenant():
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    room = Room()
    one, two = (Staged(room, {"kernel": jax.device_put(np.full((4, 4), n, np.float32), home)}) for n in (1, 2))
    with one.use() as weights:
        first = weights["kernel"]
        assert first.sharding.memory_kind == DEVICE and first[0, 0] == 1
        with one.use() as same:
            assert same is weights
    with one.use() as weights:
        assert weights["kernel"] is first  # stays until another comes
    with two.use() as weights:
        assert weights["kernel"][0, 0] == 2 and first.is_deleted()
    assert one.kept["kernel"].sharding.memory_kind == HOST and not one.kept["kernel"].is_deleted()
    room.clear()
    with one.use() as weights:
        assert weights["kernel"][0, 0] == 1
