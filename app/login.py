"""Who may see a lab that is shared on the network: a password, or an OpenID Connect provider of the owner's choice.

The password is asked for by an ASGI gate in front of all that Streamlit serves: without a session neither a page nor
a websocket, an upload or a picture is reached. Sessions are random tokens in this process's memory: a restart ends
them. With OpenID Connect, Streamlit's own login does the work, and :func:`guard` stops the pages.
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

import streamlit as st
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from streamlit.proto.BackMsg_pb2 import BackMsg

from app import live
from prunedm import password
from prunedm.lab_command import LOGIN_ENV, Login

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("prunedm.login")
COOKIE = "prunedm_session"
LOGOUT, HEALTH = "/logout", "/_stcore/health"
BY_ITSELF = ("/live/", "/media/")  # what an open page asks for as its run goes on, with nobody before it
IDLE, ABSOLUTE = 2 * 3600.0, 12 * 3600.0  # seconds that a session lives unused, and at all
MOST_SESSIONS = 1000
FREE_TRIES, LONGEST_WAIT = 5, 300.0
LARGEST_FORM, FORM_SECONDS = 4096, 10.0  # bytes of a login, and how long it may take to arrive
REFUSED = 1008  # websocket: policy violation
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",  # with no-referrer the form itself would come from the origin null
    "X-Content-Type-Options": "nosniff",
}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} · PruneDM Lab</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{{color-scheme:light dark;background:Canvas;color:CanvasText}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:22rem;margin:15vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;padding:.5rem;margin:.4rem 0;box-sizing:border-box}}
button{{background:#155fd0;color:#fff;border:0;border-radius:.3rem}}p{{color:light-dark(#a11,#f99)}}</style>
<main><h1>PruneDM Lab</h1><form method="post">{fields}</form></main></html>"""
ASK = """<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>"""
Clock = Callable[[], float]


class Sessions:
    """Who has logged in: tokens, each with the times at which it began and was last used."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, float]] = {}

    def open(self) -> str:
        """A new token; the oldest makes room for it where there are many."""
        self._known = {token: times for token, times in self._known.items() if self._lives(times)}
        while len(self._known) >= MOST_SESSIONS:
            self._known.pop(next(iter(self._known)))
        token, now = secrets.token_urlsafe(32), self._clock()
        self._known[token] = (now, now)
        return token

    def goes_on(self, token: str | None, used: bool) -> bool:
        """Whether this token's session lives; if so and somebody uses it, it was used now."""
        times = self._known.get(token or "")
        if times is None or not self._lives(times):
            self.close(token)
            return False
        if used:
            self._known[token or ""] = (times[0], self._clock())
        return True

    def close(self, token: str | None) -> None:
        self._known.pop(token or "", None)

    def _lives(self, times: tuple[float, float]) -> bool:
        now = self._clock()
        return now - times[0] < ABSOLUTE and now - times[1] < IDLE


class Tries:
    """Wrong passwords of all strangers together: after five, each further try has to wait, twice as long each time."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self.wrong, self._next = clock, 0, 0.0

    def wait(self) -> float:
        """Seconds until a password is looked at again."""
        return max(0.0, self._next - self._clock())

    def failed(self) -> None:
        self.wrong += 1
        over = min(self.wrong - FREE_TRIES, 16)  # 2 ** 16 is beyond the longest wait
        self._next = self._clock() + (min(2.0**over, LONGEST_WAIT) if over >= 0 else 0.0)

    def succeeded(self) -> None:
        self.wrong, self._next = 0, 0.0


class Gate:
    """ASGI middleware: nothing behind it is reached without a session, but for the health check.

    known: the password's hash. secure: the lab is served by HTTPS, so that the cookie may not travel otherwise.
    """

    stands = False  # in this process

    def __init__(self, app: ASGIApp, known: str, secure: bool = False, clock: Clock = time.monotonic) -> None:
        Gate.stands = True
        self.app, self.known, self.secure = app, known, secure
        self.sessions, self.tries = Sessions(clock), Tries(clock)
        self._one_by_one = asyncio.Lock()  # a try takes 64 MiB, and must know of those before it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == HEALTH):
            return await self.app(scope, receive, send)
        asked = HTTPConnection(scope)
        token = asked.cookies.get(COOKIE)
        if not _same_origin(asked):
            return await _refuse(scope, receive, send)
        used = not scope["path"].startswith(BY_ITSELF)
        if self.sessions.goes_on(token, used) and scope["path"] != LOGOUT:
            inner = self._while_alive(token, receive) if scope["type"] == "websocket" else receive
            return await self.app(scope, inner, send)
        if scope["type"] == "websocket":
            return await _refuse(scope, receive, send)
        answer = await self._stranger(Request(scope, receive), token)
        return await answer(scope, receive, send)

    def _while_alive(self, token: str | None, receive: Receive) -> Receive:
        """A websocket's messages for as long as its session lives; then it is told that the other side has gone."""

        async def checked() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive":
                used = not _is_automatic(message.get("bytes"))
                if not self.sessions.goes_on(token, used):
                    return {"type": "websocket.disconnect", "code": REFUSED}
            return message

        return checked

    async def _stranger(self, request: Request, token: str | None) -> Response:
        """What is answered to somebody without a session, or who ends it."""
        if request.url.path == LOGOUT:
            if request.method != "POST":
                return _page("Log out", "<button>Log out</button>", 200)
            self.sessions.close(token)
            return _moved("/")
        if request.method != "POST":
            return _page("Log in", ASK, 401)
        given = await _form(request)
        if given is None:
            return PlainTextResponse("a login is a short form", 400, HEADERS)
        return await self._try(request, given)

    async def _try(self, request: Request, given: str) -> Response:
        async with self._one_by_one:
            seconds = self.tries.wait()
            if seconds:
                return _page("Wait", ASK + f"<p>Wait {seconds:.0f} s before the next try.</p>", 429, seconds)
            right = await run_in_threadpool(password.matches, self.known, given)
            if not right:
                self.tries.failed()
                LOG.warning("wrong password, try %d in a row, from %s", self.tries.wrong, _address(request))
                return _page("Log in", ASK + "<p>This is not the password.</p>", 401)
            self.tries.succeeded()
        LOG.warning("logged in from %s", _address(request))
        answer = _moved(request.url.path)
        answer.set_cookie(COOKIE, self.sessions.open(), httponly=True, samesite="strict", secure=self.secure)
        return answer


def _same_origin(asked: HTTPConnection) -> bool:
    """Whether a request comes from the lab's own pages, as far as a browser says where it comes from."""
    origin = asked.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == asked.headers.get("host")


def _is_automatic(message: bytes | None) -> bool:
    """Whether a page sent this by itself: a fragment that runs every so often, or a live part that has changed.

    What cannot be read was sent by somebody, and Streamlit says what it thinks of it.
    """
    try:
        asked = BackMsg.FromString(message or b"").rerun_script
    except DecodeError:
        return False
    # Only live parts have triggers in JSON: their pages are to be drawn again. A button's is of another kind.
    return asked.is_auto_rerun or any(widget.json_trigger_value for widget in asked.widget_states.widgets)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": REFUSED})  # before it was accepted: the browser sees 403
        return
    await PlainTextResponse("this comes from another site", 403, HEADERS)(scope, receive, send)


async def _form(request: Request) -> str | None:
    """The password of a login form; None where it is too long, too slow or no form."""

    async def read() -> bytes | None:
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > LARGEST_FORM:
                return None
        return content

    try:
        content = await asyncio.wait_for(read(), FORM_SECONDS)
        found = parse_qs(content.decode("ascii"), max_num_fields=4) if content is not None else {}
    except (asyncio.TimeoutError, ClientDisconnect, ValueError):
        return None
    return found.get("password", [None])[0]


def _page(title: str, fields: str, status: int, wait: float = 0.0) -> Response:
    more = {"Retry-After": str(round(wait) + 1)} if wait else {}
    return HTMLResponse(PAGE.format(title=title, fields=fields), status, HEADERS | more)


def _moved(path: str) -> Response:
    """To a page of this server: ``//x`` would be another one."""
    return RedirectResponse("/" + quote(path.lstrip("/\\"), safe="/"), 303, HEADERS)


def _address(request: Request) -> str:
    return request.client.host if request.client else "an unknown address"


# --- in front of each page -----------------------------------------------------------------------------
def is_oidc_configured() -> bool:
    """Whether .streamlit/secrets.toml names an OpenID Connect provider and who of its people may enter."""
    return _secret("auth") is not None and bool(_allowed())


def guard() -> None:
    """Stop the page before anything is drawn, unless its reader may see it."""
    if Gate.stands:  # no page's script is reached without a session
        st.sidebar.markdown("[Log out](/logout)")
    elif os.environ.get(LOGIN_ENV) == Login.oidc.value:
        _require_account()
    elif not _is_loopback(st.get_option("server.address")):
        st.error("This lab listens to the network without a login. Start it with `make lab SHARE=1`.")
        st.stop()


def _require_account() -> None:
    if not st.user.is_logged_in:
        st.title("PruneDM Lab")
        st.button("Log in", type="primary", on_click=st.login)
        st.stop()
    email = str(st.user.get("email") or "")
    verified = st.user.get("email_verified", True) in (True, "true")
    if not (verified and any(fnmatch.fnmatch(email.lower(), rule.lower()) for rule in _allowed())):
        LOG.warning("refused an account that is not on the list")
        st.error("This account is not on the lab's list. Ask its owner.")
        st.button("Log out", on_click=st.logout)
        st.stop()
    st.sidebar.button("Log out", on_click=_log_out)


def _log_out() -> None:
    """Of Streamlit's own login; what this page was offered ends with it, as no gate stands before that."""
    live.withdraw()
    st.logout()


def _allowed() -> list[str]:
    """Addresses, or shell patterns of them, that may enter: ``[prunedm] allowed`` of the secrets."""
    found: Any = (_secret("prunedm") or {}).get("allowed", [])
    return [str(rule) for rule in found] if isinstance(found, list | tuple) else []


def _secret(section: str) -> Any:
    try:
        return st.secrets.get(section)
    except (FileNotFoundError, KeyError):
        return None


def _is_loopback(address: str | None) -> bool:
    """Whether a server at this address hears this machine alone; without one it hears all."""
    if address in (None, ""):
        return False
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
