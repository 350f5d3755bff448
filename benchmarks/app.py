"""The lab's answers while a job trains: first page, reruns on the server, and what an open tab costs.

    .venv/bin/python benchmarks/app.py

First page: a fresh server and a cold browser. Reruns: each page's whole script through Streamlit's
AppTest beside a training job in the same process. Open tab: the training rate of the demo with
Monitor open in chromium, as a ratio to the same demo with the tab closed.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browser  # noqa: E402

from prunedm import recipe as recipes  # noqa: E402
from prunedm import store  # noqa: E402
from prunedm.jobs import Jobs  # noqa: E402

RERUNS, WINDOW = 12, 15.0


def first_page() -> float:
    runs = Path(tempfile.mkdtemp())
    with browser.server(runs, runs / "server.log") as url, browser.chromium() as page:
        start = time.perf_counter()
        page.goto(url)
        page.get_by_role("button", name="Run the demo").wait_for()
        return time.perf_counter() - start


def reruns() -> dict[str, list[float]]:
    """Seconds of each page's script while a job trains."""
    from streamlit.testing.v1 import AppTest

    runs = Path(tempfile.mkdtemp())
    os.environ["PRUNEDM_RUNS"] = str(runs)
    jobs = Jobs(runs)
    run = jobs.submit(recipes.resolve(preset_name="smoke", assignments=["prune.finetune_steps=5000"]))
    while not run.metrics():
        time.sleep(0.2)
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60).run()
    found: dict[str, list[float]] = {}
    for page in ("home", "launch", "monitor", "runs", "compare"):
        if page != "home":
            app.switch_page(f"../pages/{page}.py").run()
        found[page] = []
        for _ in range(RERUNS):
            start = time.perf_counter()
            app.run()
            found[page].append(time.perf_counter() - start)
    jobs.stop(run)
    while run.state().status in ("running", "stopping"):
        time.sleep(0.2)
    return found


def rate(tab_open: bool) -> float:
    """Steps a second of the demo's fine-tuning."""
    runs = Path(tempfile.mkdtemp())
    with browser.server(runs, runs / "server.log") as url, browser.chromium() as page:
        page.goto(url)
        page.wait_for_timeout(10_000)  # the engine loads in the background
        page.get_by_role("button", name="Run the demo").click()
        page.wait_for_url(re.compile("/monitor"), timeout=60_000)
        run = store.all_runs(runs)[0]
        if not tab_open:
            page.goto("about:blank")
        while len(run.metrics()) < 5:
            page.wait_for_timeout(200)
        first, start = len(run.metrics()), time.perf_counter()
        page.wait_for_timeout(WINDOW * 1000 * 0.8)
        return (len(run.metrics()) - first) / (time.perf_counter() - start)


def main() -> None:
    print(f"first page: {first_page():.2f} s")
    for page, seconds in reruns().items():
        median, p95 = statistics.median(seconds) * 1000, sorted(seconds)[int(0.95 * (len(seconds) - 1))] * 1000
        print(f"rerun of {page} beside a training job: median {median:.0f} ms, p95 {p95:.0f} ms")
    closed, opened = rate(False), rate(True)
    rates = f"{opened:.2f} / {closed:.2f} steps a second"
    print(f"training rate with Monitor open / tab closed: {opened / closed:.2f} ({rates})")


if __name__ == "__main__":
    main()
