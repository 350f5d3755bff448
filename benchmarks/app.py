"""The lab's answers and what they cost: one line a figure, with its target and whether it is met.

    .venv/bin/python benchmarks/app.py                      everything, about half an hour
    .venv/bin/python benchmarks/app.py reruns tabs          some of it

first-page   a fresh server and a cold browser
reruns       each page's whole script on the server, beside a job that trains in the same process
tabs         the rate of training with 0, 1 and 5 open Monitor tabs, against `prunedm run` without a server
many-runs    the Runs page of a folder with 200 runs
long-run     the Monitor of a run with 100,000 recorded steps
memory       what the server keeps of 1,000 live updates

Every timing disturbs every other: run it on an idle machine. What is compared is measured in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browser  # noqa: E402
import fake_runs  # noqa: E402

from prunedm import recipe as recipes  # noqa: E402
from prunedm import store  # noqa: E402
from prunedm.jobs import load_engine  # noqa: E402
from prunedm.jsonl import Tail  # noqa: E402
from prunedm.recipe import Recipe  # noqa: E402
from prunedm.shelf import Notes  # noqa: E402
from prunedm.steps import Columns, Steps  # noqa: E402
from prunedm.store import Run  # noqa: E402

PAGES = ("home", "launch", "sweep", "monitor", "runs", "compare", "models", "system")
TURNS, RERUNS = 3, 12  # visits of each page, and reruns at each
TABS, ROUNDS = (0, 1, 5), 10
SETTLE = 24.0  # seconds until tabs have found their pace
START, WINDOW, RECORDED = 3.0, 12.0, 1.5  # seconds before a window counts, of it, and until its last step is on disk
RUNS, STEPS, OPENINGS, FRESH = 200, 100_000, 4, 7  # openings of a page in each of so many fresh servers
UPDATES, OPEN = 1500, 5  # live parts that were asked for and answered, in so many tabs
RATES = (0, 5, 100)  # steps a second: none, what training on two cores records, and many times that
ENDLESS = "prune.finetune_steps=100000"
CHART = "[aria-label*='Training loss']"


def tell(what: str, found: float, unit: str, limit: float | None = None, least: bool = False, more: str = "") -> None:
    """One line: what was found, the target, and whether it is met."""
    target, verdict = "", ""
    if limit is not None:
        target = f"; target {'at least' if least else 'under'} {limit:g} {unit}".rstrip()
        verdict = ": met" if (found >= limit if least else found < limit) else ": MISSED"
    print(f"{what}: {found:.3g} {unit}".rstrip() + (f" ({more})" if more else "") + target + verdict, flush=True)


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="prunedm-bench-"))


@functools.cache
def small_run() -> Path:
    """The folder of a finished run of a few steps, with all that a run leaves; BENCH_RUN names one that is there."""
    if given := os.environ.get("BENCH_RUN"):
        return Path(given)
    runs = folder()
    changes = ("prune.finetune_steps=4", "mask.steps=12", "mask.recover_steps=4", "mask.snapshot_every=1")
    sets = [word for assignment in changes for word in ("--set", assignment)]
    command = [sys.executable, "-m", "prunedm", "run", "--preset", "smoke", "--runs-dir", str(runs), *sets]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return store.all_runs(runs)[0].folder


def take_small_run(runs: Path) -> Run:
    return Run(Path(shutil.copytree(small_run(), runs / small_run().name)))


# --- the first page ------------------------------------------------------------------------------
def first_page() -> None:
    runs = folder()
    with browser.server(runs, runs / "server.log") as url, browser.chromium() as page:
        start = time.perf_counter()
        page.goto(url)
        page.get_by_role("button", name="Run the demo").wait_for()
        tell("first page of a fresh server in a cold browser", time.perf_counter() - start, "s")


# --- pages on the server ---------------------------------------------------------------------------
def app_test():
    """The lab in this process, set as its configuration file says, which AppTest does not read."""
    from streamlit import config
    from streamlit.testing.v1 import AppTest

    config.set_option("server.address", "127.0.0.1")
    config.set_option("runner.postScriptGC", False)
    config.set_option("runner.magicEnabled", False)
    return AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=120)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reruns() -> None:
    """Each page's script while a job trains; the folder holds finished runs too."""
    runs = folder()
    take_small_run(runs)
    for i in range(12):
        fake_runs.fake(runs, f"r{i}", notes=Notes((f"t{i % 5}",), f"note {i}"))
    os.environ["PRUNEDM_RUNS"] = str(runs)
    from app import lab

    run = lab.jobs().submit(recipes.resolve(preset_name="smoke", assignments=[ENDLESS]))
    while not run.metrics():
        time.sleep(0.2)
    app = app_test().run()
    found: dict[str, list[float]] = {page: [] for page in PAGES}
    for _ in range(TURNS):
        for page in PAGES:
            app.switch_page(f"../pages/{page}.py").run()
            found[page] += [timed(app.run) for _ in range(RERUNS)]
            if app.exception:
                raise RuntimeError(f"{page}: {app.exception[0].value}")
    lab.jobs().stop(run)
    while run.state().status in ("running", "stopping"):
        time.sleep(0.2)
    for page, seconds in found.items():
        p95 = sorted(seconds)[int(0.95 * (len(seconds) - 1))] * 1000
        more = f"median {statistics.median(seconds) * 1000:.0f} ms of {len(seconds)}"
        tell(f"rerun of {page} beside a training job, p95", p95, "ms", 150, more=more)


def openings(page: str, runs: Path) -> list[float]:
    """Seconds of a page's first drawing in this process and of those after it."""
    os.environ["PRUNEDM_RUNS"] = str(folder())
    app = app_test().run()
    load_engine()  # a server does so on its own, in its first seconds
    os.environ["PRUNEDM_RUNS"] = str(runs)
    found = [timed(lambda: app.switch_page(f"../pages/{page}.py").run())]
    found += [timed(app.run) for _ in range(OPENINGS - 1)]
    if app.exception:
        raise RuntimeError(f"{page}: {app.exception[0].value}")
    return found


def opened(what: str, page: str, runs: Path, mark: str) -> None:
    """A page of a folder of runs, cold and warm: its script alone, and in chromium from the click to the sight."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        cold, *warm = fresh.submit(openings, page, runs).result()
    tell(f"{what}, script, cold", cold, "s", 1)
    tell(f"{what}, script, warm", statistics.median(warm), "s", 1)
    cold, warm = [], []
    for _ in range(FRESH):
        with browser.server(runs, folder() / "server.log") as url, browser.chromium() as tab:
            tab.goto(f"{url}/system")
            browser.settle(tab)
            tab.wait_for_timeout(8000)  # the engine is loaded in the background
            first, *later = [seen(tab, page, mark) for _ in range(OPENINGS)]
            cold.append(first)
            warm += later
    more = f"median of {FRESH} fresh servers and browsers, {min(cold):.2f} to {max(cold):.2f}"
    tell(f"{what}, in chromium, cold", statistics.median(cold), "s", 1, more=more)
    tell(f"{what}, in chromium, warm", statistics.median(warm), "s", 1)


def seen(tab, page: str, mark: str) -> float:
    """Seconds from the click on a page's name to the sight of what it is opened for."""
    start = time.perf_counter()
    tab.get_by_test_id("stSidebarNav").get_by_role("link", name=page.capitalize(), exact=True).click()
    tab.locator(mark).first.wait_for(state="attached", timeout=60_000)
    seconds = time.perf_counter() - start
    browser.settle(tab)
    tab.get_by_test_id("stSidebarNav").get_by_role("link", name="System", exact=True).click()
    tab.get_by_role("heading", name="System", exact=True).wait_for()
    browser.settle(tab)
    return seconds


def many_runs() -> None:
    runs = folder()
    steps = {stage: 3 * count for stage, count in fake_runs.STEPS.items()}
    for i in range(RUNS):
        run = fake_runs.fake(runs, f"r{i}", notes=Notes((f"t{i % 5}",), f"note {i}"), steps=steps)
        for kind in ("masks", "samples"):
            (run.folder / kind).mkdir()
            for j in range(20):
                (run.folder / kind / f"mask-{j:07}.bin").write_bytes(b"x" * 2000)
    opened(f"Runs of {RUNS} runs", "runs", runs, "[data-testid=stDataFrame] canvas")


def long_run() -> None:
    runs = folder()
    lengthen(take_small_run(runs), STEPS)
    opened(f"Monitor of {STEPS:,} steps", "monitor", runs, f"{CHART} .scatterlayer path")


def lengthen(run: Run, steps: int) -> None:
    """Give a run as many step records, in the shapes that its stages write."""
    last = {record["stage"]: record for record in run.metrics()}
    share = steps // len(last)
    records = ((last[stage], step) for stage in last for step in range(1, share + 1))
    lines = (json.dumps(at_step(record, step)) + "\n" for record, step in records)
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def at_step(record: dict, step: int) -> dict:
    """A step record like this one, at another step: values that do not repeat."""
    wave = 1 + 0.1 * (step * 0.618034 % 1)
    values = {key: value * wave for key, value in record.items() if isinstance(value, float) and key != "time"}
    return record | values | {"step": step, "time": round(record["time"] + 0.2 * step, 3)}


# --- training beside open tabs -----------------------------------------------------------------------
def endless() -> Recipe:
    return recipes.resolve(preset_name="smoke", assignments=[ENDLESS])


@contextmanager
def headless(runs: Path) -> Iterator[psutil.Process]:
    """`prunedm run` in a process of its own."""
    command = [sys.executable, "-m", "prunedm", "run", "--preset", "smoke", "--set", ENDLESS, "--runs-dir", str(runs)]
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def server_process() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if "streamlit" in p.cmdline()]
    return found


def rate(run: Run, seconds: float, wait: Callable[[float], None] = time.sleep) -> float:
    """Training steps a second over the next so many seconds, by the times that the run records."""
    begin = time.time()
    wait(seconds + RECORDED)
    times = [r["time"] for r in run.metrics() if begin <= r["time"] <= begin + seconds]
    return (len(times) - 1) / (times[-1] - times[0])


def wait_for_steps(run_of: Callable[[], Run | None], wait: Callable[[float], None]) -> Run:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        run = run_of()
        if run and len(run.metrics()) >= 5:
            return run
        wait(0.2)
    raise RuntimeError("no training step after 180 s")


def newest(runs: Path) -> Run | None:
    return next(iter(store.all_runs(runs)), None)


def tabs() -> None:
    """The same recipe with open tabs and without a server, in turns: what is not measured stands still."""
    with_server, without = folder(), folder()
    waiting = store.create(with_server, endless())
    waiting.end(waiting.state(), "stopped", None)
    with browser.server(with_server, with_server / "server.log") as url, headless(without) as alone:
        wait_for_steps(lambda: newest(without), time.sleep)
        alone.send_signal(signal.SIGSTOP)
        with browser.chromium() as page:
            page.goto(f"{url}/monitor?run={waiting.id}")
            page.get_by_role("button", name="Resume").click()
            wait_for_steps(lambda: waiting, lambda seconds: page.wait_for_timeout(seconds * 1000))
            pages = [page, *(page.context.new_page() for _ in range(max(TABS) - 1))]
            for count in TABS:
                show(pages, count, f"{url}/monitor?run={waiting.id}")
                page.wait_for_timeout(SETTLE * 1000)
                compare_rates(count, waiting, newest(without), [server_process(), *browser_processes()], alone)


def compare_rates(
    count: int, beside_lab: Run, by_itself: Run, lab: list[psutil.Process], alone: psutil.Process
) -> None:
    """Tell the rate beside the lab as a share of the mean of the headless windows just before and after."""
    watched, headless_rates, load = [], [window(by_itself, [alone], lab)], []
    for _ in range(ROUNDS):
        before = browser_seconds()
        watched.append(window(beside_lab, lab, [alone]))
        load.append((browser_seconds() - before) / (START + WINDOW + RECORDED))
        headless_rates.append(window(by_itself, [alone], lab))
    send(lab, signal.SIGCONT)
    ratios = [2 * rate / (a + b) for rate, a, b in zip(watched, headless_rates, headless_rates[1:])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    more = (
        f"quartiles {low:.3f} to {high:.3f} of {ROUNDS}; {statistics.median(watched):.2f} of "
        f"{statistics.median(headless_rates):.2f} steps/s; chromium {statistics.median(load):.0%} of a core"
    )
    limit = {0: None, 1: 0.95, 5: 0.9}[count]
    tell(f"training rate with {count} tabs of headless", middle, "", limit, True, more)


def window(run: Run, moving: list[psutil.Process], still: list[psutil.Process]) -> float:
    """The rate of a run whose processes move while the others are held still."""
    send(still, signal.SIGSTOP)
    send(moving, signal.SIGCONT)
    time.sleep(START)
    return rate(run, WINDOW)


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def browser_processes() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if "chrom" in process.name()]


def show(pages: list, count: int, url: str) -> None:
    """Monitor in so many tabs, nothing in the others."""
    for page in pages[:count]:
        if page.url == "about:blank" or "/monitor" not in page.url:
            page.goto(url)
            page.locator(f"{CHART} .scatterlayer path").first.wait_for(state="attached", timeout=60_000)
    for page in pages[count:]:
        page.goto("about:blank")


def browser_seconds() -> float:
    """Processor seconds of chromium so far."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "chrom" in process.name():
                found += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return found


# --- memory --------------------------------------------------------------------------------------------
class Growing(threading.Thread):
    """A live run's folder: so many step records a second, and a heartbeat every second."""

    def __init__(self, run: Run, rate: int) -> None:
        super().__init__(daemon=True)
        self.job, self.rate, self.ending, self.steps = run, rate, threading.Event(), 0

    def run(self) -> None:
        state, began, beat = self.job.state(), time.monotonic(), 0.0
        record = next(r for r in reversed(self.job.metrics()) if r["stage"] == "mask")
        while not self.ending.wait(0.01):
            now = time.monotonic()
            due = int((now - began) * self.rate)
            self.job.append("metrics.jsonl", [at_step(record, step) for step in range(self.steps + 1, due + 1)])
            self.steps = max(due, self.steps)
            if now - beat >= 1:
                beat, state.step, state.of, state.stage = now, self.steps, 1_000_000, "mask"
                self.job.claim(state, "running")


def memory() -> None:
    """The server's resident set while tabs follow a live run that records so many steps a second."""
    for rate in RATES:
        found = followed(rate)
        updates, sizes, columns = zip(*found[len(found) // 10 :])
        many = max(1, len(sizes) // 10)
        grown, kept = (statistics.median(one[-many:]) - statistics.median(one[:many]) for one in (sizes, columns))
        over = statistics.median(updates[-many:]) - statistics.median(updates[:many])
        more = (
            f"{grown / 1024:.1f} MB over {over:,.0f} updates, {kept / 1024:.1f} MB of them the step records; "
            f"{found[-1][1] / 1024:.0f} MB at the end"
        )
        tell(f"memory of the server, {rate} new steps a second", (grown - kept) / over, "kB an update", 5, more=more)


def followed(rate: int) -> list[tuple[int, float, float]]:
    """(live parts answered in all tabs, kB of the server, kB of the step records in it) every five seconds."""
    runs = folder()
    run = take_small_run(runs)
    writer = Growing(run, rate)
    writer.start()
    found: list[tuple[int, float, float]] = []
    with browser.server(runs, runs / "server.log") as url, browser.chromium() as page:
        server, pages = server_process(), [page, *(page.context.new_page() for _ in range(OPEN - 1))]
        answers: list[str] = []
        page.wait_for_timeout(2000)
        show(pages, OPEN, f"{url}/monitor?run={run.id}")
        page.wait_for_timeout(10_000)  # the engine is loaded in the background
        page.context.on("response", lambda answer: answers.append(answer.url) if "/live/" in answer.url else None)
        followed_file = Tail(run.metrics_path, Columns)  # as the server keeps it
        while not found or found[-1][0] < UPDATES:
            page.wait_for_timeout(5000)
            found.append((len(answers), server.memory_info().rss / 1024, room(followed_file.read()) / 1024))
    writer.ending.set()
    writer.join()
    return found


def room(steps: Steps) -> int:
    """Bytes of the arrays that the records are kept in, with what is free behind them."""
    columns = [c for one in steps.stretches for c in (one.steps, one.times, *one.figures.values())]
    return sum(column.base.nbytes for column in columns)


PARTS = {
    "first-page": first_page,
    "reruns": reruns,
    "tabs": tabs,
    "many-runs": many_runs,
    "long-run": long_run,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="default: all of them")
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
