import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import ARCHITECTURE, Config, checkpoint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights import store as store_module
from smartdiff_jax.weights.store import MANIFEST, WeightStore, store_key
from smartdiff_jax.weights.stream import abstract, load
from smartdiff_jax.weights.tensor_file import read_header, write


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "x.safetensors", checkpoint())
    return tmp_path / "x.safetensors"


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store")


def split_over(axis):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    return lambda path, shape: NamedSharding(mesh, P(*axis) if path == "blocks.kernel" else P())


def get(store, source, axis=(None, "model"), dtype=jnp.bfloat16):
    """The state, and how often it was converted."""
    calls = []

    def make():
        calls.append(1)
        return load(ARCHITECTURE, Config(), read_header(source)[0], dtype, split_over(axis))

    _, target = abstract(ARCHITECTURE, Config(), dtype, split_over(axis))
    state = store.get_or_convert(store_key(ARCHITECTURE, Config(), [source], dtype), target, make)
    return state, len(calls)


def equal(left, right):
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), left, right)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(jax.tree.leaves(same))


def test_the_second_load_converts_nothing(store, source):
    first, made = get(store, source)
    second, made_again = get(store, source)
    assert (made, made_again) == (1, 0)
    assert equal(first, second)
    assert len(list(store.root.iterdir())) == 1


def test_an_entry_is_restored_into_the_sharding_asked_for(store, source):
    first, _ = get(store, source, axis=(None, "model"))
    second, made = get(store, source, axis=(None, None, "model"))
    kernel = second["blocks"]["kernel"].get_value()
    assert made == 0 and kernel.sharding.spec == P(None, None, "model")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 8, 2)}
    assert equal(first, second)


def test_the_key_follows_the_source(source):
    key = store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16)
    assert key == store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16)
    stamp = source.stat().st_mtime_ns
    others = {
        store_key(ARCHITECTURE, Config(), [source], jnp.float32),
        store_key(ARCHITECTURE, Config(num_layers=4), [source], jnp.bfloat16),
        store_key(type(ARCHITECTURE)(Config, ARCHITECTURE.build, ()), Config(), [source], jnp.bfloat16),
    }
    os.utime(source, ns=(stamp + 1, stamp + 1))
    others.add(store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16))
    write(source, {"other": np.ones(3)})
    os.utime(source, ns=(stamp, stamp))
    others.add(store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16))
    assert len(others | {key}) == 6


def test_the_key_of_a_damaged_source(source):
    source.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="download it again"):
        store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16)


def damage_flip(entry):
    file = max((f for f in entry.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_truncate(entry):
    file = max((f for f in entry.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-5])


def damage_remove(entry):
    next(f for f in entry.rglob("*") if f.is_file() and f.name != MANIFEST).unlink()


def damage_manifest(entry):
    (entry / MANIFEST).write_text("{")


def damage_empty(entry):
    shutil.rmtree(entry)
    entry.mkdir()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_empty])
def test_a_damaged_entry_is_made_again(store, source, caplog, damage):
    first, _ = get(store, source)
    (entry,) = store.root.iterdir()
    damage(entry)
    second, made = get(store, source)
    assert made == 1 and equal(first, second)
    assert "damaged" in caplog.text and str(entry) in caplog.text
    assert get(store, source)[1] == 0


@pytest.mark.parametrize("moment", ["_checksums", "_leaves"])
def test_ctrl_c_leaves_no_entry_and_no_work_behind(store, source, monkeypatch, moment):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(store, source)
    assert list(store.root.iterdir()) == []
    assert get(store, source)[1] == 1 and get(store, source)[1] == 0


def test_two_processes_that_convert_at_once(store, source):
    inner = []

    def make():
        inner.append(get(store, source))  # the other process finishes first
        return inner[0][0]

    _, target = abstract(ARCHITECTURE, Config(), jnp.bfloat16, split_over((None, "model")))
    state = store.get_or_convert(store_key(ARCHITECTURE, Config(), [source], jnp.bfloat16), target, make)
    assert equal(state, inner[0][0]) and len(list(store.root.iterdir())) == 1
    assert get(store, source)[1] == 0


def test_work_of_a_killed_process_is_removed(store, source):
    for name, age in (("old", 2 * store_module.STALE_AFTER), ("new", 60)):
        work = store.root / f"{store_module.WORK_PREFIX}{name}"
        work.mkdir(parents=True)
        stamp = work.stat().st_mtime - age
        os.utime(work, (stamp, stamp))
    get(store, source)
    assert [w.name for w in store.root.glob(f"{store_module.WORK_PREFIX}*")] == [f"{store_module.WORK_PREFIX}new"]


def test_a_full_disk_costs_the_entry_and_not_the_run(store, source, monkeypatch, caplog):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    _, made = get(store, source)
    assert made == 1 and list(store.root.iterdir()) == [] and "not stored" in caplog.text


def test_a_failed_conversion_stores_nothing(store, source):
    write(source, {"other": np.ones(3)})
    with pytest.raises(CheckpointError):
        get(store, source)
    assert not store.root.exists()
