"""Names, notes and errors that hold markup, on every page of a real chromium: shown as text, never rendered or run."""

import re

import browser
import pytest
from fake_runs import fake

from prunedm import imports, store
from prunedm.shelf import Notes

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not"),
]
MARKUP = (
    "</script><script>window.ran=1</script><img src=x onerror='window.ran=1'><svg onload='window.ran=1'>"
    "![tracker](http://tracker.invalid/a.png) [link](javascript:window.ran=1) <a href='javascript:window.ran=1'>a</a>"
)
RENDERED = "[onerror], [onload], img[src=x], img[alt=tracker], a[href^=javascript]"
PAGES = ("", "launch", "sweep", "monitor", "runs", "compare", "models", "system")  # Home's address has no name


@pytest.mark.timeout(600)
def test_markup_is_shown_and_never_rendered(tmp_path):
    runs = tmp_path / "runs"
    told = {"model": {"source": MARKUP}, "data": {"source": MARKUP}}
    run = fake(runs, "marked", "failed", notes=Notes(("tag",), MARKUP), **told)
    state = run.state()
    state.error = MARKUP
    run.write_state(state)
    run.log(MARKUP)
    run.event("note", text=MARKUP)
    results = {
        name: figures | {"fid_extractor": MARKUP, "device": MARKUP} for name, figures in run.evaluation().items()
    }
    run.write_evaluation(results)
    folder = runs / imports.MODELS
    folder.mkdir()
    store.write_json(folder / imports.PATHS, {"marked": f"/{MARKUP}"})
    with browser.server(runs, tmp_path / "server.log") as url, browser.chromium() as page:
        seen = {name: look(page, f"{url}/{name}?run={run.id}&imported=marked") for name in PAGES}
        outside = [u for u in page.requested if not re.match(r"(data|blob):|(http|ws)://127\.0\.0\.1:", u)]
        assert outside == []
        assert browser.errors(page) == []
    assert "onerror=" in seen["monitor"], "the error is shown as it is"


def look(page, address: str) -> str:
    """The words of a page, in which nothing was rendered or run."""
    page.goto(address)
    browser.settle(page)
    assert page.evaluate("window.ran") is None and page.locator(RENDERED).count() == 0, address
    words = page.locator("body").inner_text()
    assert "Page not found" not in words, address
    return words
