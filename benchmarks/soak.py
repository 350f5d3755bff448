"""What the lab bears: many who watch, and many jobs one after the other. One line a figure, with its target.

    .venv/bin/python benchmarks/soak.py load                              about eight minutes
    .venv/bin/python benchmarks/soak.py load --sessions 3 --seconds 20    a try
    .venv/bin/python benchmarks/soak.py soak                              a hundred jobs of a tiny model
    .venv/bin/python benchmarks/soak.py soak --jobs 5 --warm 2            a try

load   websocket sessions watch one training job in the Monitor: errors, the time an update takes, and the rate of
       training against `prunedm run` without a server, in turns
soak   short jobs in one server: its threads, open files and memory afterwards against those before

A session speaks Streamlit's own protocol over a websocket, as a page in a browser does: it opens the Monitor and asks
for each part of it, live or drawn by the script, as often as the page and the answers say. Every timing disturbs
every other: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import psutil
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def beside(name: str) -> ModuleType:
    """A benchmark of this folder, under a name of its own: ``app`` is the lab's package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = beside("app")
tiny_run = beside("tiny_run")

import browser  # noqa: E402

from prunedm import recipe as recipes  # noqa: E402
from prunedm import store  # noqa: E402
from prunedm.recipe import Recipe  # noqa: E402
from prunedm.records import ACTIVE  # noqa: E402
from prunedm.store import Run  # noqa: E402

PATIENCE, JOB = 120.0, 600.0  # seconds for one answer of the server, and for one short job
SETTLE = 5.0  # seconds before a window counts
GROWTH = 5.0  # percent that threads, files and memory may be above the start
SHORT = (
    "prune.finetune_steps=2", "prune.calibration_steps=2", "mask.steps=4", "mask.recover_steps=2", "eval.images=32",
    "eval.steps=2",
)  # fmt: skip
FINISHED = (ForwardMsg.FINISHED_SUCCESSFULLY, ForwardMsg.FINISHED_FRAGMENT_RUN_SUCCESSFULLY)


# --- a page in a browser, as the server sees it ---------------------------------------------------------
class Session:
    """One tab with the Monitor of a run. RuntimeError when the page fails or the server does not answer."""

    def __init__(self, url: str, run_id: str) -> None:
        address = url.replace("http", "ws", 1) + "/_stcore/stream"
        self._connection = connect(address, origin=url, subprotocols=["streamlit"], max_size=None)
        self._host = urlsplit(url).netloc
        self._digests: dict[str, str] = {}  # of live parts, as they were seen last
        self._first = run_id
        self._known: set[str] = set()  # messages that the server need not send again
        self._script = ""
        self._turn = ""  # of the page, by its progress line
        self.ticks: dict[str, float] = {}  # the page's parts that ask for updates, and seconds between two
        self.buttons: dict[str, str] = {}  # label to id

    def __enter__(self) -> Session:
        self._socket = self._connection.__enter__()
        self.show(self._first)
        return self

    def __exit__(self, *given: Any) -> None:
        self._connection.__exit__(*given)

    def show(self, run_id: str, press: str = "") -> None:
        """Draw the whole page of a run, with a click on the button of this label."""
        self._query = f"run={run_id}"
        ask = self._request()
        if press:
            ask.rerun_script.widget_states.widgets.add(id=self.buttons[press], trigger_value=True)
        self.ticks, self.buttons, self._digests = {}, {}, {}
        self._answer(ask)

    def update(self, part: str) -> None:
        """Draw one part of the page anew, as its timer does."""
        if part in self._digests:
            self._look(part)
            return
        ask = self._request()
        ask.rerun_script.fragment_id, ask.rerun_script.is_auto_rerun = part, True
        self._answer(ask)

    def _look(self, path: str) -> None:
        """Ask for a live part. The whole page again where it asks for that."""
        # A new connection each time: one that rested for the server's five seconds may close as it is used, which a
        # browser meets by asking again.
        connection = HTTPConnection(self._host, timeout=PATIENCE)
        try:
            connection.request("GET", f"/{path}?seen={self._digests[path]}")
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status == 404:
            self.show(self._first)
            return
        self.ticks[path] = float(answer.headers["X-Again"])
        if answer.status == 200:
            self._digests[path] = answer.headers["X-Digest"]
            turn = json.loads(body).get("turn")
            if turn is not None and turn != self._turn:
                self.show(self._first)

    def _request(self) -> BackMsg:
        ask = BackMsg()
        ask.rerun_script.query_string = self._query
        ask.rerun_script.page_name = "monitor" if not self._script else ""
        ask.rerun_script.page_script_hash = self._script
        ask.rerun_script.cached_message_hashes.extend(self._known)
        return ask

    def _answer(self, ask: BackMsg) -> None:
        """Send and take in all messages up to the end of the script."""
        self._socket.send(ask.SerializeToString())
        try:
            while not self._take(self._message()):
                pass
        except (TimeoutError, ConnectionClosed) as error:
            raise RuntimeError(f"the server gave no answer: {error or 'timed out'}") from error

    def _message(self) -> ForwardMsg:
        message = ForwardMsg()
        message.ParseFromString(self._socket.recv(timeout=PATIENCE))
        return message

    def _take(self, message: ForwardMsg) -> bool:
        """Whether it was the last of an answer."""
        kind = message.WhichOneof("type")
        if message.metadata.cacheable and message.hash:
            self._known.add(message.hash)
        if kind == "navigation":
            self._script = message.navigation.page_script_hash
        elif kind == "auto_rerun":
            self.ticks[message.auto_rerun.fragment_id] = message.auto_rerun.interval
        elif kind == "stop_auto_rerun":
            self.ticks = {part: every for part, every in self.ticks.items() if part in self._digests}
        elif kind == "delta":
            self._see(message.delta.new_element)
        elif kind == "script_finished" and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
            if message.script_finished not in FINISHED:
                raise RuntimeError("the page's script does not compile")
            return True
        return False

    def _see(self, element: Any) -> None:
        if element.HasField("exception"):
            raise RuntimeError(f"the page failed: {element.exception.type}: {element.exception.message}")
        if element.HasField("bidi_component") and element.bidi_component.json:
            data = json.loads(element.bidi_component.json)
            self._turn = data.get("content", {}).get("turn", self._turn)
            if part := data.get("part"):
                self.ticks[part["path"]], self._digests[part["path"]] = part["every"], part["digest"]
        if element.HasField("button"):
            self.buttons[element.button.label] = element.button.id


def waiting_run(runs: Path, recipe: Recipe) -> Run:
    """A run that a click on Resume starts."""
    run = store.create(runs, recipe)
    run.end(run.state(), "stopped", None)
    return run


# --- load ---------------------------------------------------------------------------------------------
class Watcher(threading.Thread):
    """A session that asks for updates until it is ended; the seconds of each, and what went wrong."""

    def __init__(self, url: str, run: Run) -> None:
        super().__init__(daemon=True)
        self.url, self.watched, self.ending = url, run, threading.Event()
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self.is_open = threading.Event()

    def run(self) -> None:
        try:
            with Session(self.url, self.watched.id) as session:
                self.is_open.set()
                self._watch(session)
        except (RuntimeError, OSError, HTTPException) as error:
            self.errors.append(str(error))
        finally:
            self.is_open.set()

    def _watch(self, session: Session) -> None:
        if not session.ticks:
            raise RuntimeError("the page asks for no updates")
        due = {part: time.monotonic() + every for part, every in session.ticks.items()}
        while not self.ending.wait(max(0.0, min(due.values()) - time.monotonic())):
            part = min(due, key=due.__getitem__)
            start = time.monotonic()
            session.update(part)
            end = time.monotonic()
            self.seconds.append(end - start)
            due = {name: due.get(name, end + every) for name, every in session.ticks.items()}
            if not due:
                raise RuntimeError("the page stopped asking for updates while the job was running")
            if part in due:
                due[part] = max(start + session.ticks[part], end)


@dataclass
class Load:
    """What ``sessions`` saw, and steps a second with them and without a server."""

    seconds: list[float]
    errors: list[str]
    watched: float
    alone: list[float]


def watch(url: str, run: Run, sessions: int, seconds: float) -> tuple[list[Watcher], float]:
    """Watch a training run; the watchers, ended, and the run's steps a second meanwhile."""
    watchers = [Watcher(url, run) for _ in range(sessions)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.is_open.wait(PATIENCE)
    time.sleep(SETTLE)
    for watcher in watchers:
        watcher.seconds.clear()
    found = bench.rate(run, seconds, time.sleep)
    for watcher in watchers:
        watcher.ending.set()
    for watcher in watchers:
        watcher.join(PATIENCE)
        if watcher.is_alive():
            watcher.errors.append("a session did not end")
    return watchers, found


def measure_load(sessions: int, seconds: float) -> Load:
    """Without a server (which is held still meanwhile), with the sessions, and without a server again."""
    with_server, without = bench.folder(), bench.folder()
    run = waiting_run(with_server, bench.endless())
    with browser.server(with_server, with_server / "server.out") as url, bench.headless(without) as alone:
        bench.wait_for_steps(lambda: bench.newest(without), time.sleep)
        alone.send_signal(signal.SIGSTOP)
        with Session(url, run.id) as session:
            session.show(run.id, press="Resume")
        bench.wait_for_steps(lambda: run, time.sleep)
        server = bench.server_process()

        def by_itself() -> float:
            server.send_signal(signal.SIGSTOP)
            alone.send_signal(signal.SIGCONT)
            time.sleep(SETTLE)
            found = bench.rate(bench.newest(without), seconds / 5, time.sleep)
            alone.send_signal(signal.SIGSTOP)
            server.send_signal(signal.SIGCONT)
            return found

        before = by_itself()
        watchers, watched = watch(url, run, sessions, seconds)
        after = by_itself()
    times = [second for watcher in watchers for second in watcher.seconds]
    return Load(times, [error for watcher in watchers for error in watcher.errors], watched, [before, after])


def load(sessions: int, seconds: float) -> None:
    found = measure_load(sessions, seconds)
    who = f"{sessions} sessions, {seconds:g} s"
    bench.tell(f"errors of {who}", len(found.errors), "", 1, more="; ".join(sorted(set(found.errors)))[:300])
    if len(found.seconds) < 2:
        raise SystemExit("no session saw an update")
    more = f"median {statistics.median(found.seconds):.3f} s of {len(found.seconds):,} updates"
    bench.tell(f"update of {who}, p95", statistics.quantiles(found.seconds, n=20)[-1], "s", 1, more=more)
    rates = f"{found.watched:.2f} steps/s; headless " + ", ".join(f"{one:.2f}" for one in found.alone)
    bench.tell(
        f"training rate with {who} of headless", found.watched / statistics.mean(found.alone), "", 0.85, True, rates
    )


# --- soak ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Held:
    """What a process holds: threads, open files (sockets and pipes too), and MB of memory of its own."""

    threads: int
    files: int
    memory: float

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        """The least of some looks, so that a helper's short-lived thread counts for nothing."""
        found = []
        for _ in range(10):
            with process.oneshot():
                found.append((process.num_threads(), process.num_fds(), process.memory_full_info().uss / 2**20))
            time.sleep(0.3)
        return cls(*(min(values) for values in zip(*found)))

    def growth(self, start: Held) -> dict[str, float]:
        """Percent above the start; below it is negative."""
        return {name: 100 * (vars(self)[name] / vars(start)[name] - 1) for name in vars(self)}


def work(session: Session, run: Run) -> None:
    """Start a run by its button and wait until it is done; RuntimeError when it ends in another way."""
    session.show(run.id)
    session.show(run.id, press="Resume")
    deadline = time.monotonic() + JOB
    while (state := run.state()).status in ACTIVE and time.monotonic() < deadline:
        time.sleep(0.1)
    if state.status != "done":
        raise RuntimeError(f"{run.id} is {state.status}: {state.error or f'not done after {JOB:g} s'}")


def measure_soak(recipe: Recipe, jobs: int, warm: int, progress: Callable[[int, Held], None]) -> tuple[Held, Held]:
    """What the server holds after ``warm`` jobs, which load the engine and fill its caches, and ``jobs`` later."""
    runs = bench.folder()
    with browser.server(runs, runs / "server.out") as url:
        server = bench.server_process()
        with Session(url, waiting_run(runs, recipe).id) as session:
            for _ in range(warm):
                work(session, waiting_run(runs, recipe))
            start = end = Held.by(server)
            progress(0, start)
            for number in range(1, jobs + 1):
                work(session, waiting_run(runs, recipe))
                if number % 10 == 0 or number == jobs:
                    end = Held.by(server)
                    progress(number, end)
    return start, end


def tell_held(number: int, held: Held) -> None:
    print(f"after {number} jobs: {held.threads} threads, {held.files} files, {held.memory:.1f} MB", flush=True)


def soak(jobs: int, warm: int, bundled: bool) -> None:
    if bundled:
        recipe = recipes.resolve(preset_name="smoke", assignments=SHORT)
    else:
        source = bench.folder()
        tiny_run.furnish(source)
        recipe = tiny_run.recipe(source)
    start, end = measure_soak(recipe, jobs, warm, tell_held)
    for name, percent in end.growth(start).items():
        more = f"{vars(start)[name]:g} to {vars(end)[name]:g}"
        bench.tell(f"{name} of the server after {jobs} jobs", percent, "% above the start", GROWTH, more=more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_load = parts.add_parser("load")
    of_load.add_argument("--sessions", type=int, default=20)
    of_load.add_argument("--seconds", type=float, default=300)
    of_soak = parts.add_parser("soak")
    of_soak.add_argument("--jobs", type=int, default=100)
    of_soak.add_argument("--warm", type=int, default=10, help="jobs before the start is taken")
    of_soak.add_argument("--bundled", action="store_true", help="jobs of the bundled model: half a minute each")
    given = parser.parse_args()
    if given.part == "load":
        load(given.sessions, given.seconds)
    else:
        soak(given.jobs, given.warm, given.bundled)


if __name__ == "__main__":
    main()
