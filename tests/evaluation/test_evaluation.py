"""Metrics against scikit-image and piqa, and folders of results held against each other by the command."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smartdiff_jax import cli
from smartdiff_jax.errors import InvalidRequest
from smartdiff_jax.evaluation.compare import contact_sheet, evaluate
from smartdiff_jax.evaluation.files import read_media
from smartdiff_jax.evaluation.metrics import flicker, ms_ssim, psnr, ssim
from smartdiff_jax.stages.media import write_media

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_metrics", GOLDEN / "make_metrics.py")
make_metrics = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_metrics)
EXPECTED = json.loads((GOLDEN / "metrics.json").read_text())


@pytest.mark.parametrize("case, expected", list(zip(make_metrics.CASES, EXPECTED, strict=True)), ids=str)
def test_parity(case, expected):
    a, b = (picture[None] for picture in make_metrics.pair(*case))
    found = {"psnr": psnr(a, b), "ssim": ssim(a, b)} | ({"ms_ssim": ms_ssim(a, b)} if "ms_ssim" in expected else {})
    assert found == pytest.approx(expected, abs=1e-4)
    # A clip is the mean of its frames.
    assert ssim(np.concatenate([a, b]), np.concatenate([b, b])) == pytest.approx((found["ssim"] + 1) / 2, abs=1e-5)


def test_what_metrics_refuse():
    a = np.zeros((1, 32, 175, 3), np.uint8)
    for metric, words in ((ms_ssim, "ms_ssim='175x32': needs at least 176"), (lambda x, y: ssim(x, y[:, :10]), "shape")):
        with pytest.raises(InvalidRequest, match=words):
            metric(a, a)
    with pytest.raises(InvalidRequest, match="ssim='175x10': needs at least 11"):
        ssim(a[:, :10], a[:, :10])


def test_flicker_by_hand():
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1] = 51  # up a fifth, and down again
    assert flicker(clip) == pytest.approx(0.2) and flicker(clip[:1]) == 0


@pytest.fixture
def results(tmp_path):
    """Three folders of pictures: the reference, a little noise, much of it."""
    places = []
    for name, noise in (("full", 0), ("near", 2), ("far", 30)):
        folder = tmp_path / name
        folder.mkdir()
        for seed in range(3):
            picture = make_metrics.pair(seed, 48, 40, 0)[0]
            noisy = picture + noise * np.random.RandomState(seed).standard_normal(picture.shape)
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"prompt-{seed}.png")
        places.append(folder)
    return places


def test_folders_pair_by_pair(results):
    full, near, far = results
    found = evaluate(full, [near, far, full])
    assert [len(setting.pairs) for setting in found] == [3, 3, 3]
    true, other = (read_media(place / "prompt-1.png") for place in (full, near))
    assert found[0].pairs["prompt-1"] == {"psnr": psnr(true, other), "ssim": ssim(true, other)}
    means = [setting.means["psnr"] for setting in found]
    assert means[0].low <= means[0].mean <= means[0].high and means[0].low > means[1].high
    assert means[2].mean == np.inf and found[2].means["ssim"].low == pytest.approx(1)
    sheet = contact_sheet(full, [near, far])
    assert sheet.shape == (16 + 3 * (48 + 16), 3 * 40, 3)
    assert np.array_equal(sheet[32:80, 40:80], read_media(near / "prompt-0.png")[0])


def test_clips_and_single_files(tmp_path):
    """Two clips in .mp4, as `generate` writes them: the second is brighter in every other frame."""
    a = np.stack([np.roll(make_metrics.pair(0, 48, 40, 0)[0], shift, axis=1) for shift in range(4)])
    b = a.copy()
    b[1::2] = np.clip(b[1::2] + 20.0, 0, 255).astype(np.uint8)
    files = [write_media(tmp_path / name, clip, 8) for name, clip in (("a.mp4", a), ("b.mp4", b))]
    (setting,) = evaluate(files[0], [files[1]])
    assert list(setting.pairs) == ["b"]
    row = setting.pairs["b"]
    assert row.keys() == {"psnr", "ssim", "flicker", "flicker_change"} and 20 < row["psnr"] < 30
    assert row["flicker_change"] == pytest.approx(flicker(read_media(files[1])) - flicker(read_media(files[0])))
    assert row["flicker_change"] > 0


def test_the_command(results, tmp_path, monkeypatch, capsys):
    full, near, far = results
    out, sheet = tmp_path / "eval.json", tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["smartdiff", "eval", *map(str, (full, near, far)), "-o", str(out), "--sheet", str(sheet)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = json.loads(out.read_text())
    assert [setting["place"] for setting in told] == [str(near), str(far)] and told[0]["means"]["psnr"]["count"] == 3
    assert read_media(sheet).shape[3] == 3 and "near" in capsys.readouterr().out


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda full, near: (near / "prompt-0.png").unlink(), "1 results are in only one of it"),
        (lambda full, near: (near / "prompt-0.png").write_bytes(b"nothing"), "cannot be read"),
        (lambda full, near: (near / "prompt-0.mp4").write_bytes(b""), "has the same name"),
        (
            lambda full, near: Image.new("RGB", (8, 8)).save(near / "prompt-0.png"),
            "has 1 frames of 8x8, its reference 1 frames of 40x48",
        ),
        (lambda full, near: [path.unlink() for path in near.iterdir()], "holds no .mp4"),
        (lambda full, near: [path.unlink() for path in near.iterdir()] and near.rmdir(), "no such file or folder"),
    ],
)
def test_wrong_results_are_one_line(results, monkeypatch, capsys, break_it, words):
    full, near, _ = results
    break_it(full, near)
    monkeypatch.setattr("sys.argv", ["smartdiff", "eval", str(full), str(near)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
