"""The page of measurements is what the script makes of the committed results, and what is not there is said to be missing."""

import json
from xml.etree import ElementTree

import pytest
from test_compare import ROOT, load, seconds

report = load("report")


def test_the_committed_page_is_the_one_that_is_made(tmp_path):
    page = report.render(report.Results(report.RESULTS, report.DEVICE), tmp_path)
    made, plots = page.read_text(), sorted(file.name for file in tmp_path.glob("*.svg"))
    assert made == (ROOT / "docs" / "performance.md").read_text(), "run python benchmarks/report.py"
    assert plots == sorted(file.name for file in (ROOT / "docs").glob("performance-*.svg"))
    for name in plots:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text() and f"]({name})" in made


def setting(denoise, **more):
    stages = {"text": 0.1, "denoise": denoise, "decode": 0.4, "media": 0.2}
    found, whole = (
        {name: {"seconds": seconds(value, value, value)} for name, value in parts.items()}
        for parts in (stages, {"total": denoise + 0.7, "pixels": denoise + 0.5})
    )
    return whole | {"stages": found, "skipped": 0.0, "of_product": 0.7, "peak_gb": 20.0} | more


def test_a_run_fills_its_rows(tmp_path):
    sampling = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50}
    peer = {name: {"total": whole, "stages": {}, "peak_gb": 30.0} for name, whole in (("compiled", seconds(10.0, 9, 11)),)}
    step = {"attention": 60.0, "matmuls": 30.0, "convolutions": 1.0, "other": 8.0, "idle": 1.0, "span": 100.0}
    ours = {"auto": setting(4.5, step_ms=step), "auto, cache_ratio 0.5": setting(2.0, skipped=0.5)}
    ours["pallas_sage"] = {"unsupported": "needs a Hopper GPU"}
    start = {"imports_s": 2.0, "device_s": 0.5, "weights_s": 10.0, "request_s": {"total": 20.0}}
    start["process_to_first_picture_s"] = 33.0
    stamp = {"device": "Card 9", "commit": "abc"}
    model = {"problem": {"task": "t2v", "sampling": sampling}, "stamp": stamp, "cold_start": start}
    cached = {"compiled, cache_ratio 0.5": {"total": seconds(6.0, 6, 6), "stages": {}, "peak_gb": 31.0, "skipped": 0.5}}
    model |= {"ours": {"settings": ours}, "diffusers": {"settings": peer}, "cache-dit": {"settings": cached}}
    results = tmp_path / "end-to-end-card-9.json"
    results.write_text(json.dumps({"stamp": stamp, "models": {"wan2.1-t2v-1.3b": model}}))
    page = report.render(report.Results(tmp_path, "card-9"), tmp_path / "docs").read_text()
    what = "| wan2.1-t2v-1.3b 832x480x81, 50 steps |"
    assert f"{what} auto | 5.00 | 2.00 | not measured | 5.20 | 20.0 |  | 70% |" in page
    assert f"{what} auto, cache_ratio 0.5 | 2.50 | 4.00 | not measured | 2.70 | 20.0 | 50% | 70% |" in page
    assert f"{what} pallas_sage: needs a Hopper GPU |" in page and "| flux1-dev | not measured |" in page
    assert f"{what} cache-dit, compiled, cache_ratio 0.5 | 6.00 |  |  |  | 31.0 | 50% |  |" in page
    assert "| wan2.1-t2v-1.3b | nothing compiled | 33.0 | 2.5 | 10.0 | 20.0 | 13.0 |" in page
    assert "Of a step not measured: flux1-dev, flux2-klein-4b, qwen-image, z-image." in page and "commits abc." in page
    plot = ElementTree.fromstring((tmp_path / "docs" / report.STEP_PLOT).read_text())
    bars = [float(each.get("width")) for each in plot.iter("{http://www.w3.org/2000/svg}rect") if each.get("height") == "20"]
    assert bars == pytest.approx([share * sum(bars) for share in (0.6, 0.3, 0.09, 0.01)], abs=0.2)
