"""A newcomer's first minute in a real chromium: press the demo button, watch, compare."""

import re
import time
from urllib.parse import urlparse

import browser
import pytest

from prunedm import store

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not"),
]


@pytest.mark.timeout(600)
def test_the_demo_from_the_button_to_the_comparison(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    with browser.server(runs, tmp_path / "server.log") as url, browser.chromium() as page:
        page.goto(url)
        browser.settle(page)
        page.get_by_role("button", name="Run the demo").click()
        page.wait_for_url(re.compile("/monitor"))
        run = store.all_runs(runs)[0]
        assert run.id in page.url, "the address names the run"
        sees_live_progress(page, run)
        deadline = time.monotonic() + 400
        while run.state().status in ("queued", "running"):
            assert time.monotonic() < deadline
            page.wait_for_timeout(1000)
        assert run.state().status == "done", run.log_path.read_text()
        expect(page.get_by_text("Done in")).to_have_count(1)
        page.get_by_role("tab", name="Masks").click()
        page.locator("[aria-label*='differ from the initial mask'] .heatmaplayer image").first.wait_for(
            state="attached"
        )
        page.get_by_role("tab", name="Compliance").click()
        page.locator("[aria-label*='Compliance, density'] .heatmaplayer image").first.wait_for(state="attached")
        page.get_by_role("tab", name="Samples").click()
        page.get_by_alt_text(re.compile("16 samples at")).wait_for()
        page.get_by_test_id("stMain").get_by_role("link", name="Compare").click()
        finds_the_comparison(page)
        exports_and_downloads(page, run, tmp_path)
        outside = [
            u for u in page.requested if not u.startswith(("data:", "blob:")) and urlparse(u).hostname != "127.0.0.1"
        ]
        assert outside == [], "no request leaves the machine"
        assert browser.errors(page) == []


def sees_live_progress(page, run) -> None:
    """The bar moves and the loss curve updates in place while the job trains."""
    drawn = page.locator("[aria-label*='Training loss'][data-updates] .scatterlayer path")
    drawn.first.wait_for(state="attached")
    chart = page.locator("[aria-label*='Training loss']")
    chart.evaluate("node => { node.marked = true }")
    updates = int(chart.get_attribute("data-updates"))
    progress = page.get_by_text(re.compile(r"\d+ of \d+ · ")).first
    first = progress.inner_text()
    page.wait_for_function(
        "n => Number(document.querySelector(\"[aria-label*='Training loss']\").dataset.updates) > n + 1",
        arg=updates,
    )
    assert chart.evaluate("node => node.marked === true"), "the chart was updated and not replaced"
    assert run.state().status == "running"
    assert progress.inner_text() != first, "steps, rate and time left move on"


def exports_and_downloads(page, run, tmp_path) -> None:
    """The Models page writes a packed file of the N:M variant, and the browser gets the very bytes."""
    from prunedm import packed

    page.get_by_role("link", name="Models").click()
    page.get_by_text("Every N:M layer keeps its pattern").wait_for()
    browser.settle(page)
    browser.choose(page, "Format", "packed")
    page.get_by_role("button", name="Export", exact=True).click()
    with page.expect_download() as found:
        page.get_by_role("button", name="Download").click()
    path = tmp_path / "model.safetensors"
    found.value.save_as(path)
    assert path.read_bytes() == (run.exports / found.value.suggested_filename).read_bytes()
    assert packed.manifest(path)["config"]["record"]["run"] == run.id


def moves_the_slider(page) -> None:
    """By keys alone: the left picture is cut where the bar stands."""
    bar = page.get_by_role("slider", name=re.compile("on the left.*on the right"))
    bar.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert page.locator(".slide .over").get_attribute("style").startswith("clip-path: inset(0px 60% 0px 0px)")


def finds_the_comparison(page) -> None:
    page.get_by_text("Same seeds, side by side").wait_for()
    for variant in ("dense", "structured", "N:M"):
        page.get_by_alt_text(re.compile(f"{re.escape(variant)}, seed 7$")).first.wait_for()
    page.get_by_text(re.compile("% of the dense model's weights are gone")).first.wait_for()
    moves_the_slider(page)
    page.get_by_role("tab", name="Latency").click()
    page.locator(".barlayer path").nth(2).wait_for(state="attached")
    page.get_by_role("tab", name="Pareto").click()
    page.locator(".scatterlayer .point").nth(5).wait_for(state="attached")
    page.get_by_role("tab", name="Figures").click()
    page.get_by_role("cell", name="Validation loss").or_(page.get_by_text("Validation loss")).first.wait_for()
