"""What a service on a Ray cluster is told, and what its machines could not share."""

import pytest

from smartdiff_jax.config.ray import RayConfig, settled
from smartdiff_jax.config.service import ServiceConfig
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.errors import InvalidConfig


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(replica=2), r"ray\.replica=2: unknown field"),
        (dict(replicas=0), r"ray\.replicas=0: .*greater than or equal to 1"),
        (dict(replicas=3, max_replicas=2), r"max_replicas=2 is less than replicas=3"),
        (dict(queue_seconds=0), r"ray\.queue_seconds=0"),
        (dict(gpus=-1), r"ray\.gpus=-1"),
    ],
)
def test_a_wrong_field_is_one_error(tmp_path, fields, told):
    (tmp_path / "system.yaml").write_text(f"ray: {fields}")
    with pytest.raises(InvalidConfig, match=told):
        SystemConfig.from_file(tmp_path / "system.yaml")


def test_a_replica_takes_a_gpu_for_each_device_of_its_mesh():
    assert RayConfig().gpus_of_a_host(8) == 8 and RayConfig(gpus=0).gpus_of_a_host(8) == 0
    assert RayConfig(hosts=2).gpus_of_a_host(8) == 4
    with pytest.raises(InvalidConfig, match=r"ray\.hosts=3: must divide the mesh's 8 devices"):
        RayConfig(hosts=3).gpus_of_a_host(8)


def test_paths_mean_this_folder_wherever_replicas_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = settled(ServiceConfig.create(keys="keys.yaml"))
    assert (whole.store, whole.artifacts) == (f"sqlite:///{tmp_path}/jobs.db", f"{tmp_path}/artifacts")
    assert whole.keys == tmp_path / "keys.yaml"
    elsewhere = dict(store="postgresql+psycopg://me@db/jobs", artifacts="s3://bucket/jobs")
    assert settled(ServiceConfig.create(**elsewhere)) == ServiceConfig.create(**elsewhere)
    assert settled(whole) == whole
    driver = settled(ServiceConfig.create(store="sqlite+pysqlite:///a.db?timeout=3"))
    assert driver.store == f"sqlite+pysqlite:///{tmp_path}/a.db?timeout=3"


@pytest.mark.parametrize("field, value", [("store", "sqlite://"), ("store", "sqlite:///:memory:"), ("port", 0)])
def test_what_replicas_cannot_share_is_refused(field, value):
    with pytest.raises(InvalidConfig, match=f"{field}="):
        settled(ServiceConfig.create(**{field: value}))
