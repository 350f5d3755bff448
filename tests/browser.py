"""A lab server and a real chromium, for the browser test and for taking screenshots."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Streamlit asks for these beside the page before it asks at the root.
OWN_404 = re.compile(r"status of 404 \(Not Found\) http://127\.0\.0\.1:\d+/\w+/_stcore/(health|host-config)$")
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_healthy(port: int, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
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
    from playwright.sync_api import sync_playwright

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
    page.requested, page.errors = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("websocket", lambda socket_: page.requested.append(socket_.url))
    page.on("console", lambda message: page.errors.append(_told(message)) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    return page


def _told(message) -> str:
    return f"{message.text} {message.location.get('url', '')}".strip()


@contextmanager
def chromium(**context_options) -> Iterator:
    """A browser with one watched page."""
    with launched() as started:
        yield watched_page(started, **context_options)


def settle(page, seconds: float = 15) -> None:
    """Wait until the page's script rests."""
    page.wait_for_selector(IDLE, timeout=seconds * 1000)
    page.wait_for_timeout(400)


def choose(within, label: str, option: str | re.Pattern) -> None:
    """Take an option of a list on a page or in a part of one; brought into view first, as a list closes when the page
    scrolls."""
    page, field = getattr(within, "page", within), within.get_by_role("combobox", name=label, exact=True)
    field.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    field.click()
    page.get_by_role("option", name=option, exact=True).click()
