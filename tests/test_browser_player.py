"""A mask played through time in a real chromium: by mouse and keys, with a zoom that stays."""

import re

import browser
import numpy as np
import pytest

from prunedm import snapshots, store
from prunedm.recipe import Recipe

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not"),
]
STEPS = (0, 10, 20, 30, 40, 50)
LAYER = {"kind": "linear", "shape": [12, 8], "eligible": True, "reason": "", "groups": 24, "tensor_core_ready": True}
LAYER |= {"compliance": 1.0, "density": 0.5, "position_balance": [0.25] * 4, "pattern": "2:4"}
WATCH = """node => {
  window.seen = [];
  new MutationObserver(() => window.seen.push(node.textContent)).observe(node, { childList: true });
}"""
ZOOM = "node => node._fullLayout.xaxis.range.map(v => Math.round(v * 10) / 10)"


@pytest.fixture
def run(tmp_path):
    """A finished run of two masked layers whose masks change from snapshot to snapshot."""
    made = store.create(tmp_path, Recipe(name="played"))
    rng = np.random.default_rng(0)
    for step in STEPS:
        masks = [(rng.random((24, 4)) < 0.5).astype(np.uint8) for _ in range(2)]
        snapshots.write(made.snapshot_path("mask", step), masks)
    made.write_layers([LAYER | {"layer": "first", "offset": 0}, LAYER | {"layer": "second", "offset": 96}])
    made.append("metrics.jsonl", [{"stage": "mask", "step": i, "time": 1.0 + i, "loss": 1 / i} for i in range(1, 60)])
    made.end(made.state(), "done", None)
    return made


def test_a_mask_is_played_stepped_and_zoomed(run, tmp_path):
    with browser.server(run.folder.parent, tmp_path / "server.log") as url, browser.chromium() as page:
        page.goto(f"{url}/monitor?run={run.id}&tab=Masks")
        picture, said, bar = page.locator(".mask-player .picture"), page.locator(".said"), page.get_by_label("Snapshot")
        picture.locator(".heatmaplayer image").first.wait_for(state="attached")
        assert said.inner_text().startswith("step 50 (6 of 6)"), "the last one first"
        page.get_by_label("Speed").select_option("12")
        browser.settle(page)
        said.evaluate(WATCH)
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("window.seen.length > 5 && document.querySelector('.play').textContent.includes('Play')")
        seen = [int(text.split()[1]) for text in page.evaluate("window.seen")]
        assert seen[: len(STEPS)] == list(STEPS) and set(seen[len(STEPS) :]) <= {STEPS[-1]}, "then it rests"

        picture.evaluate("node => Plotly.relayout(node, {'xaxis.range': [1.5, 4.5]})")
        bar.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.get_by_text("Step 10 as tables").wait_for()
        assert said.inner_text().startswith("step 10 (2 of 6)")
        assert bar.get_attribute("aria-valuetext") == said.inner_text()
        assert picture.evaluate(ZOOM) == [1.5, 4.5]

        page.get_by_role("tab", name="Curves").click()
        page.locator("[aria-label*='Training loss'] .scatterlayer path").first.wait_for(state="attached")
        page.get_by_role("tab", name="Masks").click()
        picture.locator(".heatmaplayer image").first.wait_for(state="attached")
        assert picture.evaluate(ZOOM) == [1.5, 4.5], "the zoom outlives another tab"
        assert "tab=Masks" in page.url

        browser.choose(page, "Layer", "second")
        page.locator(".picture[aria-label*='Mask of second']").wait_for()
        assert re.match(r"-0\.5,\d", str(picture.evaluate(ZOOM))[1:].replace(" ", "")), "another layer, another view"
        assert browser.errors(page) == []
