"""Runs the demo in the real lab, among other runs and beside a sweep, and photographs each page.

    make screenshots          # or: .venv/bin/python assets/build/screenshots.py [--runs DIR] [--only compare home ...]

All pictures, light and dark and narrow, go to ``.build/screenshots``; the tops of Monitor (while the masks of a
fresh demo evolve) and Compare also to ``assets/``, for the README.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browser  # noqa: E402
from fake_runs import fake, other_states  # noqa: E402
from PIL import Image  # noqa: E402
from test_sweep_page import swept  # noqa: E402

from prunedm import imports, shelf, store, sweep  # noqa: E402
from prunedm.records import ACTIVE  # noqa: E402
from prunedm.shelf import Notes  # noqa: E402

OUT = ROOT / ".build" / "screenshots"
PAGES = ("launch", "sweep", "monitor", "runs", "compare", "models", "system")
LIVE = "monitor-live"
ASSETS = {"monitor": LIVE, "compare": "compare"}  # pictures of the README, and what they are made of
TOP = 1240  # pixels of a page's height in the README
TABS = {  # beside the first one of each page
    "monitor?tab": ("Masks", "Compliance", "Samples", "Log", "Recipe", "System"),
    "compare?view": ("Figures", "Pareto", "Latency", "Curves", "Recipes", "Report"),
    "sweep?chart": ("Parallel coordinates", "Importances", "Settings"),
}
EMPTY = ("home", "sweep", "monitor", "runs", "compare", "models")  # pages that say what to do while there is nothing
OF_TWO_RUNS = ("compare-pareto", "compare-curves", "compare-recipes")  # pictures that say little of one
TRIALS = 12


def photograph(page, path: Path, tallest: int = 9000) -> None:
    """The whole page: as high as its content."""
    width = page.viewport_size["width"]
    page.wait_for_timeout(1500)
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": width, "height": min(int(height) + 40, tallest)})
    page.wait_for_timeout(1500)
    page.screenshot(path=str(path))
    page.set_viewport_size({"width": width, "height": 900})


def to_asset(name: str) -> None:
    """The page's top as a palette PNG: a third of the bytes, the same to the eye."""
    image = Image.open(OUT / f"{ASSETS[name]}.png").convert("RGB")
    image = image.crop((0, 0, image.width, min(TOP, image.height))).quantize(128, dither=Image.Dither.NONE)
    image.save(ROOT / "assets" / f"{name}.png", optimize=True)


def fill(runs: Path) -> None:
    """What a lab in use holds when the demo is run: a sweep, finished runs, and one in each other state."""
    swept(runs, trials=TRIALS)
    other_states(runs)
    fake(runs, "three-of-four", keep=0.32, loss=0.0425, notes=Notes(("keep",), "gentler masks"), mask={"n": 3})
    fake(runs, "reinforce", notes=Notes(("paper", "keep"), "as the paper has it"), mask={"method": "reinforce"})


def new_sweep(page) -> None:
    page.get_by_text("New sweep", exact=True).click()
    page.get_by_role("button", name="Fill in an example").click()
    page.get_by_role("button", name="Start the sweep").wait_for()


def tick_a_run(page) -> None:
    page.get_by_test_id("data-grid-canvas").first.focus()
    for key in ("ArrowDown", "Shift+Space"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Untick").wait_for()
    page.locator("summary").filter(has=page.get_by_text(re.compile("^Trash"))).click()


ACTS = {"sweep-new": new_sweep, "runs-ticked": tick_a_run}  # what is done on a page before its picture is taken


def demo(url: str, runs: Path) -> None:
    """Press the button, photograph Monitor in the middle of mask learning, wait for the end."""
    with browser.chromium() as page:
        page.goto(url)
        browser.settle(page)
        page.get_by_role("button", name="Run the demo").click()
        page.wait_for_url(re.compile("/monitor"), timeout=60_000)
        run = store.all_runs(runs)[0]
        while run.state().status in ACTIVE and (run.state().stage != "mask" or run.state().step < 40):
            page.wait_for_timeout(500)
        page.get_by_role("tab", name="Masks").click()
        page.wait_for_timeout(6000)
        photograph(page, OUT / f"{LIVE}.png")
        while run.state().status in ACTIVE:
            page.wait_for_timeout(500)
    imports.from_path(run.variant("dense") / "unet", runs)


def each_page(url: str, suffix: str, runs: Path, only: list[str], **options) -> None:
    evaluated = [run.id for run in store.all_runs(runs) if (run.folder / "evaluation.json").exists()]
    with browser.chromium(**options) as page:
        for name, address in addresses(runs).items():
            if only and name not in only:
                continue
            if name in OF_TWO_RUNS:
                address += f"&runs={','.join(evaluated[:2])}"
            page.goto(f"{url}/{address}")
            browser.settle(page)
            if name in ACTS:
                ACTS[name](page)
                browser.settle(page)
            photograph(page, OUT / f"{name}{suffix}.png")
        for error in browser.errors(page):
            print(f"console error: {error}")


def addresses(runs: Path) -> dict[str, str]:
    """Every page and tab: the name of its picture, and where it is."""
    there = store.all_runs(runs)
    if not there:
        return {f"{page}-empty": page.replace("home", "") for page in EMPTY}
    found = {"home": ""} | {page: page for page in PAGES}
    if sweep.names(runs):
        found["sweep-new"] = "sweep"
    if shelf.trashed(runs):
        found["runs-ticked"] = "runs"
    for query, tabs in TABS.items():
        found |= {f"{query.partition('?')[0]}-{tab.lower().replace(' ', '-')}": f"{query}={tab}" for tab in tabs}
    for run in there:
        for state in ("failed", "interrupted", "unreadable"):
            if run.id.endswith(f"-{state}"):
                found[f"monitor-{state}"] = f"monitor?run={run.id}"
    for one in imports.listing(runs):
        found["models-imported"] = f"models?imported={one.name}"
    return found


def in_each_look(runs: Path, only: list[str], act: Callable[[str], None] = lambda url: None) -> None:
    """All pages of a lab on this folder, light, dark and narrow, after ``act``."""
    with browser.server(runs.resolve(), OUT / "server.log") as url:
        act(url)
        each_page(url, "", runs, only)
        each_page(url, "-dark", runs, only, color_scheme="dark")
        each_page(url, "-narrow", runs, only, viewport={"width": 390, "height": 900})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="photograph these runs instead of a fresh demo")
    parser.add_argument("--only", nargs="+", default=[], help="of pictures: home, monitor-masks, runs-empty...")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if given.runs is None:
        runs = Path(tempfile.mkdtemp(prefix="prunedm-"))
        in_each_look(runs, given.only)
        fill(runs)
        in_each_look(runs, given.only, lambda url: demo(url, runs))
    else:
        in_each_look(given.runs, given.only)
    for name, picture in ASSETS.items():
        was_taken = given.runs is None if picture == LIVE else not given.only or picture in given.only
        if was_taken and (OUT / f"{picture}.png").exists():
            to_asset(name)
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
