"""Limits and keys of a service change with their files, and only to what can be taken."""

import pytest

from smartdiff_jax.config.service import Limits, ServiceConfig, hash_key
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.serve.settings import Settings


def entry(name, more=""):
    return f"- name: {name}\n  sha256: {hash_key(name)}\n{more}"


@pytest.fixture
def files(tmp_path):
    keys, system = tmp_path / "keys.yaml", tmp_path / "system.yaml"
    keys.write_text(entry("ann"))
    system.write_text("service: {max_queued: 7, port: 8001}\n")
    return keys, system


@pytest.fixture
def settings(files):
    keys, system = files
    return Settings(ServiceConfig.create(**SystemConfig.from_file(system).service.model_dump() | {"keys": keys}), system)


def named(settings):
    return {key.name: key.max_queued for key in settings.keys.values()}


def test_files_are_read_anew_once_they_stand_still(settings, files):
    keys, system = files
    assert not settings.look() and named(settings) == {"ann": 256} and settings.limits.max_queued == 7
    keys.write_text(entry("bob", "  max_queued: 3\n"))
    assert not settings.look()  # it may be half written
    keys.write_text(entry("bob", "  max_queued: 3\n") + entry("eve"))
    assert not settings.look()
    assert settings.look() and named(settings) == {"bob": 3, "eve": 256}
    system.write_text("dtype: float32\nservice: {max_queued: 9, port: 8002, keep_hours: 1}\n")
    assert [settings.look(), settings.look(), settings.look()] == [False, True, False]
    assert (settings.limits.max_queued, settings.limits.keep_hours) == (9, 1) and settings.need_restart == ["dtype", "port"]
    assert settings.refused == {"keys": None, "config": None}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"- name: [", "YAML"),
        (b"\xff\xfe\x00", "YAML"),
        (b"", "must be a list"),
        (b"- {1: 2}", "keys should be strings"),
        (entry("ann").encode() + b"  max_queued: 0\n", "max_queued=0"),
        (2 * entry("ann").encode(), "twice"),
        (None, "No such file"),
    ],
)
def test_keys_that_cannot_be_taken_leave_what_was(settings, files, content, words, caplog):
    keys, _ = files
    good = keys.read_bytes()
    keys.unlink()
    if content is not None:
        keys.write_bytes(content)
    assert [settings.look(), settings.look()] == [False, True] and named(settings) == {"ann": 256}
    assert words in settings.refused["keys"] and words in caplog.text and settings.refused["config"] is None
    keys.write_bytes(good + entry("bob").encode())
    assert [settings.look(), settings.look()] == [False, True] and set(named(settings)) == {"ann", "bob"}
    assert settings.refused["keys"] is None


@pytest.mark.parametrize("content, words", [("service: {max_queued: no}", "service.max_queued"), ("1: 2", "must hold fields")])
def test_limits_that_cannot_be_taken_leave_what_was(settings, files, content, words):
    _, system = files
    system.write_text(content)
    assert [settings.look(), settings.look()] == [False, True] and settings.limits.max_queued == 7
    assert words in settings.refused["config"] and settings.need_restart == []


def test_what_cannot_be_taken_at_the_start_is_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Settings(ServiceConfig.create(keys=tmp_path / "none.yaml"), None)
    assert Settings(ServiceConfig.create(max_queued=3), None).limits.max_queued == 3
    assert set(Limits.model_fields) == {"max_queued", "max_megapixels", "keep_hours", "checkpoint_seconds"}
