"""The page in Chromium: from the form to the gallery, two results beside each other, keyboard, a narrow screen."""

import chromium
import pytest

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="Chromium is not installed")
READY = "document.getElementById('status')?.textContent === 'ready'"
# The gallery shows the last jobs of all: on a server that other tests have used, one more does not make it longer.
NEWEST = "(document.querySelector('#gallery li')?.dataset.id ?? '')"


@pytest.fixture(scope="module")
def page(server):
    with chromium.Page(server.url) as page:
        page.wait(READY)
        with server.client() as client:
            made = [job.id for job in client.jobs(limit=40) if job.state == "succeeded"]
        page.wait(f"{NEWEST} === '{made[0] if made else ''}'")
        yield page
        # A preview is asked for as soon as it is told of, which may be before it is written.
        assert [error for error in page.errors if "/files/preview-" not in error.get("entry", {}).get("url", "")] == []
        asked = [url for url in page.requests if not url.startswith((server.url, "blob:", "data:", "about:"))]
        assert asked == [], "the page works offline"


def make(page, **fields):
    before = page.value(NEWEST)
    for name, value in fields.items():
        page.value(f"document.getElementById('{name}').value = '{value}'")
    page.value("document.querySelector('button[type=submit]').click()")
    page.wait(f"{NEWEST} !== '{before}'")


SMALL = dict(prompt="a red fox", size="32x32", num_frames=5, num_inference_steps=4, seed=3)


def test_from_the_form_to_the_gallery(page):
    make(page, **SMALL)
    assert page.value("document.getElementById('problem').textContent") == ""
    assert page.wait("document.querySelector('#gallery video')?.videoWidth") == 32
    page.wait("document.getElementById('now').hidden")  # the queue is looked at by a clock, and may know first


def test_two_results_side_by_side(page, tmp_path):
    make(page, **SMALL)
    make(page, **SMALL | {"num_inference_steps": 6, "seed": 4})
    for index in range(2):
        page.value(f"document.querySelectorAll('[data-compare]')[{index}].click()")
    page.wait("!document.getElementById('comparison').hidden && document.querySelectorAll('#pair video').length === 2")
    page.screenshot(tmp_path / "compared.png")
    rows = page.value(
        "[...document.querySelectorAll('#differences tr')].map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    told = {name: sorted(values) for name, *values in rows}
    assert told["num inference steps"] == ["4", "6"] and told["seed"] == ["3", "4"]
    assert set(told) == {"num inference steps", "seed", "denoising", "steps skipped"}
    assert page.value("document.querySelectorAll('[data-compare][aria-pressed=true]').length") == 2
    page.value("document.querySelector('[data-compare][aria-pressed=true]').click()")
    page.wait("document.getElementById('comparison').hidden")


def test_a_mistake_is_told_beside_the_form(page):
    page.value("document.getElementById('size').value = '33x32'")
    page.value("document.querySelector('button[type=submit]').click()")
    assert "size" in page.wait("document.getElementById('problem').textContent")
    # The browser itself logs the answer 400.
    page.errors[:] = [error for error in page.errors if "400" not in str(error)]


def test_by_keyboard_alone(page):
    before = page.value(NEWEST)
    page.value("document.getElementById('size').value = '32x32'; document.getElementById('prompt').value = ''")
    page.value("document.getElementById('prompt').focus()")
    page.type("a blue fish")
    seen = []
    while (at := page.value("document.activeElement.type === 'submit' ? 'submit' : document.activeElement.id")) != "submit":
        seen.append(at)
        assert len(seen) < 20, seen
        if at == "num_outputs":
            page.press("ArrowRight")
        page.press("Tab")
    assert seen[0] == "prompt" and {"model", "num_inference_steps", "seed", "priority"} <= set(seen)
    assert page.value("document.getElementById('num_outputs').value") == "2"
    page.press("Enter", "\r")
    page.wait(f"{NEWEST} !== '{before}'")


def test_a_narrow_screen(page):
    page.resize(360, 800)
    assert not page.value("document.documentElement.scrollWidth > innerWidth")
    page.resize(1100, 1200)
