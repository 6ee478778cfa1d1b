"""Files written by write_media, decoded again."""

import os

import av
import numpy as np
import pytest
from PIL import Image

from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.stages import media
from smartdiff_jax.stages.media import check_output, write_media


def moving_square(num_frames=7, height=48, width=64):
    """A red square walking over a blue-green gradient."""
    rows, columns = np.mgrid[0:height, 0:width]
    background = np.stack([np.full_like(rows, 40), 60 + 2 * columns, 200 - 2 * rows], axis=-1)
    frames = np.repeat(background[None], num_frames, axis=0).astype(np.uint8)
    for index, frame in enumerate(frames):
        frame[16:32, 4 * index : 4 * index + 16] = (230, 30, 20)
    return frames


def read_mp4(path):
    """-> frames, what the file says of itself"""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        return frames, {
            "fps": float(stream.average_rate),
            "seconds": float(stream.duration * stream.time_base),
            "colours": (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range),
        }


def read_pillow(path):
    """-> frames, duration of each in ms"""
    with Image.open(path) as image:
        frames, durations = [], []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            image.load()
            durations.append(image.info.get("duration", 0))
        return np.stack(frames), durations


def mean_error(decoded, frames):
    return np.abs(decoded.astype(float) - frames).mean()


@pytest.mark.parametrize("fps", [1.0, 16, 23.976, 30.0])
def test_mp4(tmp_path, fps):
    frames = moving_square()
    path = write_media(tmp_path / "a.mp4", frames, fps)
    decoded, said = read_mp4(path)
    assert decoded.shape == frames.shape
    assert said["fps"] == pytest.approx(fps, rel=1e-4)
    assert said["seconds"] == pytest.approx(len(frames) / fps, rel=1e-3)
    assert mean_error(decoded, frames) < 3
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 90, 200)])
def test_mp4_keeps_flat_colours_and_says_its_matrix(tmp_path, colour):
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    decoded, said = read_mp4(write_media(tmp_path / "a.mp4", frames, 8.0))
    assert said["colours"] == (1, 1, 1, 1)
    assert np.abs(decoded.astype(int) - frames).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (31, 35), (1, 1)])
def test_mp4_pads_odd_sizes_at_the_edge(tmp_path, height, width):
    frames = moving_square(3, height, width)
    decoded, _ = read_mp4(write_media(tmp_path / "a.mp4", frames, 8.0))
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert decoded.shape == padded.shape
    assert mean_error(decoded, padded) < 5


def test_mp4_of_one_frame(tmp_path):
    decoded, _ = read_mp4(write_media(tmp_path / "a.mp4", moving_square(1), 8.0))
    assert decoded.shape == (1, 48, 64, 3)


def test_the_same_frames_are_the_same_mp4(tmp_path):
    """libx264 with B-frames made several files of these, by what had been written before."""

    def texture(seed, side):
        random = np.random.default_rng(seed)
        coarse = random.normal(size=(1, side // 8, side // 8, 3)) + 0.3 * random.normal(size=(5, side // 8, side // 8, 3))
        frames = 128 + 60 * coarse.repeat(8, axis=1).repeat(8, axis=2) + 10 * random.normal(size=(5, side, side, 3))
        return np.clip(frames, 0, 255).astype(np.uint8)

    made = set()
    for other in range(8):
        write_media(tmp_path / "b.mp4", texture(other, 32 + 16 * (other % 4)), 8.0)
        made.add(write_media(tmp_path / "a.mp4", texture(1, 64), 8.0).read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize(("suffix", "tolerance"), [(".webp", 4), (".gif", 4), (".png", 0), (".PNG", 0)])
def test_animations(tmp_path, suffix, tolerance):
    frames = moving_square()
    decoded, durations = read_pillow(write_media(tmp_path / f"a{suffix}", frames, 16.0))
    assert decoded.shape == frames.shape
    assert mean_error(decoded, frames) <= tolerance
    assert sum(durations) == pytest.approx(1000 * len(frames) / 16, abs=5)
    assert max(durations) - min(durations) <= 10


@pytest.mark.parametrize(("suffix", "tolerance"), [(".webp", 4), (".gif", 4), (".png", 0), (".jpg", 4), (".jpeg", 4)])
def test_stills(tmp_path, suffix, tolerance):
    frames = moving_square(1, 33, 47)
    decoded, _ = read_pillow(write_media(tmp_path / f"a{suffix}", frames, 16.0))
    assert decoded.shape == frames.shape
    assert mean_error(decoded, frames) <= tolerance


def test_frames_that_stand_still_keep_their_time(tmp_path):
    frames = np.repeat(moving_square(2), 5, axis=0)
    for suffix in (".webp", ".gif", ".png"):
        _, durations = read_pillow(write_media(tmp_path / f"a{suffix}", frames, 10.0))
        assert sum(durations) == pytest.approx(1000, abs=1)


def test_makes_folders_overwrites_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "deep" / "a.png"
    write_media(str(path), moving_square(2), 8.0)
    assert write_media(path, moving_square(1), 8.0) == path
    assert read_pillow(path)[0].shape == (1, 48, 64, 3)
    assert os.listdir(path.parent) == ["a.png"]


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    path = write_media(tmp_path / "a.png", moving_square(1), 8.0)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stop):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def stopped(file, frames, fps):
        file.write_bytes(b"half")
        raise stop

    monkeypatch.setitem(media.WRITERS, ".mp4", stopped)
    with pytest.raises((KeyboardInterrupt, InvalidRequest)):
        write_media(path, moving_square(2), 8.0)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.avi", "a", "mp4", "a.mp4.txt", ".mp4"])
def test_an_unknown_suffix_is_one_clear_error(tmp_path, name):
    with pytest.raises(InvalidRequest, match=r"output=.*use one of \.mp4 \.webp \.gif \.png"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), 51.0])
def test_a_wrong_frame_rate_is_one_clear_error(tmp_path, fps):
    with pytest.raises(InvalidRequest, match=r"fps=.*up to 50 for \.gif"):
        check_output(tmp_path / "a.gif", num_frames=2, fps=fps)


def test_a_place_that_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidRequest, match="it is a folder"):
        check_output(tmp_path / "folder.png")
    with pytest.raises(InvalidRequest, match="Not a directory"):
        check_output(tmp_path / "file" / "a.png")
    with pytest.raises(InvalidRequest, match="cannot be written.*another place"):
        check_output("/proc/nowhere/a.png")
    with pytest.raises(InvalidRequest, match="too long"):
        check_output(tmp_path / ("a" * 300 + ".png"))
    with pytest.raises(InvalidRequest, match=r"\.jpg holds one picture, not 5 frames"):
        check_output(tmp_path / "a.jpg", num_frames=5)


def test_the_check_changes_nothing(tmp_path):
    assert check_output(str(tmp_path / "new" / "a.mp4")) == tmp_path / "new" / "a.mp4"
    assert os.listdir(tmp_path) == []
