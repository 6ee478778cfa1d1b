import huggingface_hub
import pytest
from huggingface_hub import errors

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.hub import fetch


class Hub:
    """Stands in for snapshot_download."""

    def __init__(self, folder, error=None, has_index=True):
        self.folder, self.error, self.has_index, self.asked = folder, error, has_index, []

    def __call__(self, repo_id, *, cache_dir, allow_patterns):
        self.asked.append((repo_id, cache_dir, allow_patterns))
        if self.error:
            raise self.error
        if self.has_index:
            (self.folder / "model_index.json").write_text("{}")
        return str(self.folder)


def http_error(kind):
    """These errors want an HTTP response, which no test has."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert fetch("owner/name", tmp_path / "cache") == tmp_path
    assert [asked[:2] for asked in hub.asked] == [("owner/name", tmp_path / "cache")] * 2
    assert hub.asked[0][2] == ["model_index.json"]
    assert "*.safetensors" in hub.asked[1][2] and not any("bin" in p or "pth" in p for p in hub.asked[1][2])


def test_another_layout_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    hub = Hub(tmp_path, has_index=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(CheckpointError, match="owner/name: no model_index.json.*smartdiff convert"):
        fetch("owner/name")
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    "error, remedy",
    [
        (http_error(errors.GatedRepoError), "accept its terms"),
        (http_error(errors.RepositoryNotFoundError), "check the name"),
        (errors.HFValidationError("no slash"), "check the name"),
        (errors.LocalEntryNotFoundError("no network"), "check the network"),
        (errors.OfflineModeIsEnabled("offline"), "check the network"),
        (http_error(errors.HfHubHTTPError), "check the network"),
        (ConnectionError("reset"), "check the network"),
        (OSError(28, "No space left on device"), "check the network and the disk"),
    ],
)
def test_each_error_says_what_to_do(tmp_path, monkeypatch, error, remedy):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, error))
    with pytest.raises(CheckpointError, match=f"owner/name: .*{remedy}"):
        fetch("owner/name")
