"""A lab server and a real chromium, for the browser test and for taking screenshots."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Streamlit asks for these beside the page before it asks at the root.
OWN_404 = re.compile(r"status of 404 \(Not Found\) http://127\.0\.0\.1:\d+/\w+/_stcore/(health|host-config)$")
PATIENCE = 120_000  # milliseconds that a page may take on a loaded machine
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"


def free_port() -> int:
    """A port that nobody has, and none that the system gives out by itself before the server has it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # tests seed the module's own generator
        with suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


@contextmanager
def server(runs_dir: Path, log: Path) -> Iterator[str]:
    """The lab on a free port; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app" / "main.py"), "--server.port", str(port)]
    environment = os.environ | {"PRUNEDM_RUNS": str(runs_dir)}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=runs_dir)
        try:
            wait_healthy(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_healthy(port: int, process: subprocess.Popen, log: Path, seconds: float = PATIENCE / 1000) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer after {seconds} s: {log.read_text()[-2000:]}")


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched() -> Iterator:
    """A browser without a page."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


def watched_page(started, **context_options):
    """A page in a context of its own; its requests and console errors are collected in ``page.requested`` and
    ``page.errors``, an error with the address that it is of."""
    page = started.new_context(**({"viewport": {"width": 1280, "height": 900}} | context_options)).new_page()
    page.set_default_timeout(PATIENCE)
    page.requested, page.errors = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("websocket", lambda socket_: page.requested.append(socket_.url))
    page.on("console", lambda message: page.errors.append(_told(message)) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    return page


def errors(page) -> list[str]:
    """What went wrong on a watched page, without what Streamlit asks for in vain by itself."""
    page.wait_for_timeout(0)  # takes in what the browser has told
    return [error for error in page.errors if not OWN_404.search(error)]


def _told(message) -> str:
    return f"{message.text} {message.location.get('url', '')}".strip()


@contextmanager
def chromium(**context_options) -> Iterator:
    """A browser with one watched page."""
    with launched() as started:
        yield watched_page(started, **context_options)


def taken(page) -> None:
    """Wait until the server has what was just clicked or typed: its message leaves a moment later, and the page rests
    until it is answered."""
    page.wait_for_timeout(150)
    page.evaluate("() => fetch('/_stcore/health').then(() => null)")  # answered after what was asked before
    page.wait_for_timeout(150)


def settle(page) -> None:
    """Wait until the page's script rests, that which was set off just before too."""
    taken(page)
    page.wait_for_selector(IDLE)
    page.wait_for_timeout(250)


def choose(within, label: str, option: str | re.Pattern) -> None:
    """Take an option of a list on a page or in a part of one; brought into view first, as a list closes when the page
    scrolls or is drawn anew."""
    page, field = getattr(within, "page", within), within.get_by_role("combobox", name=label, exact=True)
    field.scroll_into_view_if_needed()
    settle(page)
    field.click()
    page.get_by_role("option", name=option, exact=True).click()
