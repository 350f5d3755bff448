"""Strangers: who reaches a lab, by which name, and what is served to those who have no session."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlparse

import browser
import psutil
import pytest
from fake_runs import fake
from streamlit import config
from streamlit.testing.v1 import AppTest

from app import login
from prunedm import lab_command, password

WORD = "correct horse battery"
PRIVATE = "what stands in a run is nobody's business"
ROUTER = str(Path(browser.ROOT / "app" / "router.py"))


# --- a real server -------------------------------------------------------------------------------------
class Server:
    """A server on loopback, and what it answers to raw requests."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def ask(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, str, dict]:
        """Status, body and headers; the path is sent as it is. A ``_`` of a header's name is a ``-``."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = {"Host": f"127.0.0.1:{self.port}"} | {key.replace("_", "-"): value for key, value in headers.items()}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for key, value in (own | ({"Content-Length": str(len(body))} if body is not None else {})).items():
            connection.putheader(key, value)
        connection.endheaders((body or "").encode())
        answer = connection.getresponse()
        text = "" if answer.status == 101 else answer.read().decode("utf-8", "replace")
        connection.close()
        return answer.status, text, {key.lower(): value for key, value in answer.getheaders()}

    def websocket(self, **headers: str) -> int:
        """The status of a handshake: 101 opens the connection."""
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
        key = {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec_WebSocket_Protocol": "streamlit"}
        return self.ask("/_stcore/stream", **(upgrade | key | headers))[0]

    @property
    def own(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[Server]:
    log = folder / "server.log"
    with log.open("w") as out:
        settings = os.environ | {"PRUNEDM_RUNS": str(folder / "runs")} | environment
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        try:
            browser.wait_healthy(port, process, log)
            yield Server(port, process, log)
        finally:
            browser.end(process)


def with_a_run(folder: Path) -> Path:
    run = fake(folder / "runs", "private")
    (run.folder / "log.txt").write_text(PRIVATE)
    return run.folder


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Iterator[Server]:
    """The lab as `make lab` serves it."""
    folder, port = tmp_path_factory.mktemp("local"), browser.free_port()
    with_a_run(folder)
    with serving(lab_command.serving(port, None), port, folder) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Server]:
    """The lab as `make lab SHARE=1` serves it, but for its address: tests open no port to the network."""
    folder, port = tmp_path_factory.mktemp("shared"), browser.free_port()
    with_a_run(folder)
    secret = folder / "secret" / "password"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(password.ENV, str(secret))
        password.store(WORD, folder / "runs")
    command = lab_command.serving(port, [*lab_command.HOME_NAMES, "lab.example"])
    command[command.index("0.0.0.0")] = "127.0.0.1"
    with serving(command, port, folder, **{password.ENV: str(secret), lab_command.LOGIN_ENV: "password"}) as server:
        yield server


def test_the_lab_listens_to_this_machine_alone(local):
    listening = [c for c in psutil.Process(local.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_the_configuration_says_what_the_lab_relies_on():
    text = (browser.ROOT / "app" / ".streamlit" / "config.toml").read_text()
    wanted = ('address = "127.0.0.1"', 'allowedHosts = ["127.0.0.1", "localhost"]', "enableCORS = true")
    for line in (*wanted, "enableXsrfProtection = true", 'showErrorDetails = "none"'):
        assert line in text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 101),
        ({"Origin": "own"}, 101),
        ({"Host": "evil.example:8501"}, 403),  # DNS rebinding: its name leads here
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),  # a page of another site reaches out
        ({"Origin": "null"}, 403),
    ],
)
def test_a_websocket_opens_to_the_labs_own_pages_only(local, headers, status):
    assert local.websocket(**{key: local.own if value == "own" else value for key, value in headers.items()}) == status


PATHS = [
    "/app/static/../../runs/{run}/log.txt", "/app/static/%2e%2e/%2e%2e/runs/{run}/log.txt",
    "/app/static/{folder}/log.txt", "/app/static//{folder}/log.txt", "/app/static/..%2f..%2frouter.py",
    "/live/x", "/live/{run}", "/live/..%2f..%2frouter.py", "/live/%2e%2e/{run}/log.txt",
    "/app/static/../.streamlit/config.toml",
    "/media/../runs/{run}/log.txt", "/media/{folder}/log.txt", "/media/%2e%2e/runs/{run}/log.txt", "/media/log.txt",
    "/static/../../../../../../../../{folder}/log.txt", "/static/..%5c..%5clog.txt", "/runs/{run}/log.txt",
    "/component/../{run}/log.txt", "/component/x/../../../{folder}/log.txt",
    "/_stcore/bidi-components/../{run}/log.txt",
    "/_stcore/bidi-components/prunedm_mask_player/../../log.txt", "/..{folder}/log.txt", "//{folder}/log.txt",
    "/_stcore/metrics", "/_stcore/host-config", "/_stcore/script-health-check", "/_stcore/health", "/",
]  # fmt: skip


@pytest.mark.parametrize("host", [None, "evil.example"])
@pytest.mark.parametrize("path", PATHS)
def test_no_address_serves_a_file_of_a_run(local, path, host):
    run = next((local.log.parent / "runs").iterdir())
    given = path.format(run=run.name, folder=str(run).lstrip("/"))
    status, text, _ = local.ask(given, **({"Host": host} if host else {}))
    assert PRIVATE not in text and run.name not in text and "[server]" not in text and "st.navigation" not in text
    assert status in (200, 400, 404)  # 200: the empty page of the front end, which its own router fills


def test_an_upload_needs_the_token_of_a_page_and_an_open_session(local):
    body = '--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\ny\r\n--x--\r\n'
    form = {"Content_Type": "multipart/form-data; boundary=x"}
    place = "/_stcore/upload_file/session/file"
    assert local.ask(place, "PUT", body, **form)[0] == 403
    cookie = local.ask("/_stcore/health")[2]["set-cookie"].partition(";")[0]
    token = cookie.partition("=")[2]
    assert local.ask(place, "PUT", body, Cookie=cookie, **form)[0] == 403, "another site's page sends the cookie alone"
    assert local.ask(place, "PUT", body, Cookie=cookie, X_Xsrftoken="2|1|2|3", **form)[0] == 403
    status, text, _ = local.ask(place, "PUT", body, Cookie=cookie, X_Xsrftoken=token, **form)
    assert status == 400 and "session" in text


# --- a shared one --------------------------------------------------------------------------------------
def test_a_stranger_to_a_shared_lab_sees_the_login_and_nothing_else(shared):
    for path in [*PATHS, "/monitor?run=x", "/static/index.html", "/media/x.png"]:
        if path != "/_stcore/health":
            status, text, headers = shared.ask(path.format(run="x", folder="y"))
            assert (status, "Password" in text) in ((401, True), (400, False)), path
            assert "set-cookie" not in headers
    assert shared.websocket() == shared.websocket(Cookie=f"{login.COOKIE}=guessed") == 403
    assert shared.ask("/_stcore/upload_file/a/b", "PUT", "x")[0] == 401
    assert shared.ask("/", Host="evil.example")[0] == 400
    assert shared.ask("/", Host=f"lab.example:{shared.port}")[0] == 401


def test_a_shared_lab_opens_by_its_password_and_closes_by_a_log_out(shared):
    assert shared.ask("/", "POST", "password=wrong")[0] == 401
    foreign = shared.ask("/", "POST", f"password={WORD}".replace(" ", "+"), Origin="http://evil.example")
    assert foreign[0] == 403
    status, _, headers = shared.ask("//evil.example/monitor", "POST", f"password={WORD}".replace(" ", "+"))
    assert status == 303 and headers["location"] == "/evil.example/monitor", "no redirect leaves the lab"
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {flag.lower() for flag in flags} >= {"httponly", "samesite=strict"}
    assert shared.ask("/", Cookie=cookie)[0] == 200
    assert shared.websocket(Cookie=cookie) == 101
    assert shared.websocket(Cookie=cookie, Origin="http://localhost:3000") == 403
    assert shared.websocket(Cookie=cookie, Host="evil.example") == 400
    assert shared.ask("/logout", Cookie=cookie)[0] == 200
    assert shared.ask("/logout", "POST", "", Cookie=cookie)[0] == 303
    assert shared.ask("/", Cookie=cookie)[0] == 401
    said = shared.log.read_text()
    assert "wrong password, try 1 in a row, from 127.0.0.1" in said and WORD not in said


@pytest.mark.browser
@pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed")
def test_a_friend_logs_in_and_sees_pictures_that_a_stranger_does_not(shared):
    with browser.chromium() as page:
        page.goto(f"{shared.own}/runs")
        page.get_by_label("Password").fill(WORD)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Runs").first.wait_for()
        page.get_by_role("link", name="Home", exact=True).click()
        garments = page.get_by_alt_text("32 garments drawn by the bundled dense model")
        address = urlparse(garments.evaluate("image => image.src")).path
        assert address.startswith("/media/")
        assert page.request.get(f"{shared.own}{address}").status == 200
        assert shared.ask(address)[0] == 401


# --- in front of each page -----------------------------------------------------------------------------
def test_pages_served_to_the_network_without_a_login_are_not_drawn(runs):
    config.set_option("server.address", "0.0.0.0")
    try:
        app = AppTest.from_file(ROUTER, default_timeout=60).run()
    finally:
        config.set_option("server.address", "127.0.0.1")
    assert "without a login" in app.error[0].value and not app.title and not app.button


@pytest.fixture
def by_account(runs, monkeypatch):
    """The lab as somebody sees it who logs in at a provider."""
    monkeypatch.setenv(lab_command.LOGIN_ENV, "oidc")

    def see(**user):
        app = AppTest.from_file(ROUTER, default_timeout=60)
        provider = {"redirect_uri": "http://lab/oauth2callback", "cookie_secret": "x" * 32, "client_id": "a"}
        app.secrets["auth"] = provider | {
            "client_secret": "b",
            "server_metadata_url": "https://idp.example/.well-known",
        }
        app.secrets["prunedm"] = {"allowed": ["ada@example.org", "*@team.example"]}
        app.user = user
        return app.run()

    return see


def test_an_account_must_be_on_the_list(by_account):
    outside = by_account(is_logged_in=False)
    assert [b.label for b in outside.button] == ["Log in"] and not outside.exception
    for email in ("eve@example.org", "ada@example.org.evil", "", "x@team.example.evil"):
        refused = by_account(is_logged_in=True, email=email)
        assert "not on the lab's list" in refused.error[0].value and not refused.title
    unverified = by_account(is_logged_in=True, email="ada@example.org", email_verified=False)
    assert "not on the lab's list" in unverified.error[0].value
    for email in ("ada@example.org", "Ada@Example.org", "bob@team.example"):
        inside = by_account(is_logged_in=True, email=email)
        assert not inside.exception and "smaller" in inside.title[0].value
