"""The login of a shared lab: its gate, the password that it asks for, and the command that starts it."""

import asyncio
import io
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ClientState_pb2 import ClientState
from streamlit.proto.WidgetStates_pb2 import WidgetState, WidgetStates

from app import login
from prunedm import lab_command, password
from prunedm.__main__ import main
from prunedm.password import PasswordError

WORD = "correct horse battery"


# --- the gate ------------------------------------------------------------------------------------------
class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock, monkeypatch) -> Iterator[login.Gate]:
    """A gate whose hash is the password itself, in front of an application that says who it is."""

    async def lab(scope, receive, send):
        if scope["type"] == "websocket":
            received = [(await receive())["type"] for _ in range(2)]
            scope["state"]["received"] = received
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the lab"})

    monkeypatch.setattr(password, "matches", lambda known, given: known == given)
    monkeypatch.setattr(login.Gate, "stands", False)
    yield login.Gate(lab, "right", clock=clock)


def through(gate, method="GET", path="/", body=b"", cookie="", kind="http", messages=None, **headers):
    """What the gate answers: status and headers, or what a websocket's application received."""
    sent, state = [], {}
    waiting = list(messages or [{"type": "http.request", "body": body, "more_body": False}])
    given = [(b"host", b"lab"), *((k.encode(), v.encode()) for k, v in headers.items())]
    given += [(b"cookie", f"{login.COOKIE}={cookie}".encode())] if cookie else []
    scope = {"type": kind, "method": method, "path": path, "headers": given, "query_string": b"", "state": state}
    scope |= {"client": ("10.0.0.9", 1), "server": ("lab", 80), "scheme": "http", "root_path": ""}

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    if kind == "websocket":
        return state.get("received", sent)
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def logged_in(gate) -> str:
    status, headers = through(gate, "POST", body=b"password=right")
    assert status == 303
    return headers["set-cookie"].partition("=")[2].partition(";")[0]


def test_a_session_ends_when_it_is_not_used_and_in_any_case(gate, clock):
    token = logged_in(gate)
    assert through(gate, cookie=token)[0] == 200
    clock.now += login.IDLE - 1
    assert through(gate, cookie=token)[0] == 200
    clock.now += login.IDLE + 1
    assert through(gate, cookie=token)[0] == 401
    token, began = logged_in(gate), clock.now
    while clock.now - began < login.ABSOLUTE - login.IDLE:
        clock.now += login.IDLE - 1
        assert through(gate, cookie=token)[0] == 200
    clock.now = began + login.ABSOLUTE
    assert through(gate, cookie=token)[0] == 401 and not gate.sessions._known


def rerun(**values) -> bytes:
    """What a browser sends to have a page or a fragment run."""
    return BackMsg(rerun_script=ClientState(**values)).SerializeToString()


def pressed(**value) -> WidgetStates:
    return WidgetStates(widgets=[WidgetState(id="a", **value)])


AUTOMATIC = [
    rerun(fragment_id="a", is_auto_rerun=True),
    rerun(widget_states=pressed(json_trigger_value='[{"event": "turn", "value": "gone"}]')),
]
BY_HAND = [
    rerun(fragment_id="a"),
    rerun(widget_states=pressed(trigger_value=True)),
    rerun(widget_states=pressed(json_value='{"step": 3}')),
    b"\xff\xff no message at all",
]


def test_what_an_open_page_asks_for_by_itself_keeps_no_session_alive(gate, clock):
    token = logged_in(gate)
    for _ in range(4):
        clock.now += login.IDLE / 4 - 1
        for path in ("/live/a", "/media/a.png"):
            assert through(gate, path=path, cookie=token)[0] == 200
    clock.now += 5
    assert through(gate, path="/live/a", cookie=token)[0] == 401


@pytest.mark.parametrize(
    ("message", "used"), [(message, used) for used, some in enumerate((AUTOMATIC, BY_HAND)) for message in some]
)
def test_a_message_that_a_page_sends_by_itself_is_no_use(gate, clock, message, used):
    token = logged_in(gate)
    received = gate._while_alive(token, lambda: asyncio.sleep(0, {"type": "websocket.receive", "bytes": message}))
    clock.now += login.IDLE - 1
    assert asyncio.run(received())["type"] == "websocket.receive"
    clock.now += 2
    assert asyncio.run(received())["type"] == ("websocket.receive" if used else "websocket.disconnect")


def test_an_open_page_is_cut_off_when_its_session_ends(gate, clock):
    messages = [{"type": "websocket.connect"}, {"type": "websocket.receive", "bytes": b"rerun"}]
    token = logged_in(gate)
    assert through(gate, kind="websocket", cookie=token, messages=messages) == [m["type"] for m in messages]
    inner = gate._while_alive(token, lambda: asyncio.sleep(0, {"type": "websocket.receive", "bytes": b"rerun"}))
    clock.now += login.ABSOLUTE
    assert asyncio.run(inner())["type"] == "websocket.disconnect"
    assert through(gate, kind="websocket", cookie=token)[0]["type"] == "websocket.close"


def test_five_wrong_tries_slow_down_the_next_ones_but_lock_nobody_out(gate, clock, caplog):
    for _ in range(login.FREE_TRIES):
        assert through(gate, "POST", body=b"password=hunter2")[0] == 401
    waits = []
    for _ in range(12):
        status, headers = through(gate, "POST", body=b"password=right")
        assert status == 429, "while one must wait, not even the right password is looked at"
        waits.append(gate.tries.wait())
        assert float(headers["retry-after"]) >= waits[-1]
        clock.now += waits[-1]
        assert through(gate, "POST", body=b"password=hunter2")[0] == 401
    assert waits == [min(2.0**i, login.LONGEST_WAIT) for i in range(12)]
    clock.now += login.LONGEST_WAIT
    logged_in(gate)
    assert gate.tries.wrong == 0
    assert "hunter2" not in caplog.text and "try 17 in a row, from 10.0.0.9" in caplog.text


def test_many_tries_and_sessions_take_no_more_memory(gate, clock):
    for _ in range(login.MOST_SESSIONS + 5):
        gate.sessions.open()
    assert len(gate.sessions._known) == login.MOST_SESSIONS
    for _ in range(3000):
        gate.tries.failed()
    assert gate.tries.wait() == login.LONGEST_WAIT and set(vars(gate.tries)) == {"_clock", "wrong", "_next"}


@pytest.mark.parametrize(
    "body", [b"", b"x", b"password=" + b"a" * 5000, b"\xff\xfe", b"a=1&b=2&c=3&d=4&password=right", b"password"]
)
def test_what_is_no_login_is_refused_without_a_try(gate, body):
    assert through(gate, "POST", body=body)[0] == 400 and gate.tries.wrong == 0


def test_a_login_that_does_not_arrive_is_given_up(gate, monkeypatch):
    monkeypatch.setattr(login, "FORM_SECONDS", 0.05)

    class Slow:
        async def stream(self):
            yield b"password="
            await asyncio.Event().wait()

    assert asyncio.run(login._form(Slow())) is None


# --- the password --------------------------------------------------------------------------------------
@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "config" / "password"
    monkeypatch.setenv(password.ENV, str(file))
    return file


def test_the_password_is_kept_as_an_argon2_hash_that_others_cannot_read(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{WORD}\n"))
    before = os.umask(0)
    try:
        assert main(["lab", "--set-password", "--runs-dir", str(tmp_path / "runs")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and [p.name for p in kept.parent.iterdir()] == ["password"]
    assert kept.read_text().startswith("$argon2id$") and WORD not in kept.read_text() + capsys.readouterr().out
    known = password.read()
    assert password.matches(known, WORD)
    assert not any(password.matches(known, given) for given in ("", WORD[:-1], WORD + " ", "x" * 10**6))


@pytest.mark.parametrize("text", ["", "short", "x" * 201])
def test_weak_passwords_are_refused(kept, tmp_path, text):
    with pytest.raises(PasswordError, match="characters"):
        password.store(text, tmp_path / "runs")
    assert not kept.exists()


def test_the_hash_may_not_lie_among_the_runs(kept, tmp_path):
    with pytest.raises(PasswordError, match="runs folder"):
        password.store(WORD, tmp_path)


@pytest.mark.parametrize("harm", ["absent", "readable", "link", "folder", "pipe", "text", "binary", "empty"])
def test_a_hash_that_is_not_the_owners_own_is_refused(kept, tmp_path, harm):
    password.store(WORD, tmp_path / "runs")
    if harm == "readable":
        kept.chmod(0o644)
    elif harm in ("text", "binary", "empty"):
        kept.write_bytes({"text": WORD.encode(), "binary": b"\xff" * 50, "empty": b""}[harm])
    else:
        kept.rename(tmp_path / "moved")
        make = {"link": lambda: kept.symlink_to(tmp_path / "moved"), "folder": kept.mkdir, "absent": lambda: None}
        make.get(harm, lambda: os.mkfifo(kept, 0o600))()
    with pytest.raises(PasswordError, match="set-password") as error:
        password.read()
    assert "\n" not in str(error.value) and WORD not in str(error.value)


# --- the command ---------------------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch) -> list:
    """What the command would have become."""
    found: list = []
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))
    monkeypatch.setattr(os, "chdir", lambda place: None)
    return found


def test_sharing_needs_a_password(kept, tmp_path, started, capsys):
    assert main(["lab", "--share-on-network", "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--set-password" in error and error.count("\n") == 1 and not started


def test_the_lab_is_served_to_this_machine_and_shared_only_when_told(kept, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setenv(lab_command.LOGIN_ENV, "password")
    assert main(["lab", "--runs-dir", str(tmp_path)]) == 0
    _, command, environment = started[0]
    assert command[4].endswith("main.py") and "127.0.0.1" in command and "0.0.0.0" not in command
    assert lab_command.LOGIN_ENV not in environment and environment["PRUNEDM_RUNS"] == str(tmp_path)
    password.store(WORD, tmp_path / "runs")
    more = ["--share-on-network", "--host", "lab.example", "--port", "9000"]
    assert main(["lab", "--runs-dir", str(tmp_path / "runs"), *more]) == 0
    _, command, environment = started[1]
    assert command[4].endswith("shared.py") and "0.0.0.0" in command and "lab.example" in command
    assert environment[lab_command.LOGIN_ENV] == "password" and WORD not in str(command)
    assert main(["lab", "--host", "lab.example", "--runs-dir", str(tmp_path)]) == 2
    assert "--share-on-network" in capsys.readouterr().err


def test_a_shared_lab_does_not_start_without_a_barrier(kept):
    """Whatever starts it, and however."""
    code = "from streamlit import config; config.set_option('server.allowedHosts', {}); import app.shared"
    barriers = [("password", ["lab"], "set-password"), ("oidc", ["lab"], "[auth]"), ("", ["lab"], "prunedm lab")]
    for kind, hosts, why in (*barriers, ("password", [], "allowedHosts"), ("password", ["*"], "allowedHosts")):
        environment = os.environ | {lab_command.LOGIN_ENV: kind}
        command = [sys.executable, "-c", code.format(hosts)]
        ended = subprocess.run(command, env=environment, cwd=browser.ROOT, capture_output=True, text=True)
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert ended.returncode == 1 and len(errors) == 1 and why in errors[0], ended.stderr
