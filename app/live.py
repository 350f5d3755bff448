"""Parts of a page that stay fresh while no script runs: the browser asks for them by HTTP and draws them itself.

To run a page's script again, or a fragment of it, costs the browser some 50 ms, since Streamlit's frontend then looks
at everything on the page; to ask for one part and draw it costs a few. A part is offered under a random name, which
only the page that it was drawn for knows, and for an hour; then the page is drawn again, if its reader still may see
it. In the shared lab the password's gate stands before parts too; Streamlit's own login does not: with it the name is
what protects a part, for that hour or until its page logs out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from app import pace

LOG = logging.getLogger("prunedm.live")
FAULTS = (ValueError, OSError, KeyError)  # what bad input and damaged files raise
LIFE = 3600.0  # seconds after which a part is offered no more; its page then draws itself again
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

# Shared by every component with a part to follow. It rests while the page is hidden, and a chart out of sight too.
# (Not "then" for "seen": a promise would take the node for another promise.)
FOLLOW = """
const whenShown = (node, seen) => {
  node.seen = seen;
  window.prunedmSeen ??= document.addEventListener("visibilitychange", () => {
    for (const each of document.querySelectorAll(".live")) if (!each.outOfSight) each.seen?.();
  }) ?? true;
};
const whenInSight = (node, seen) => {
  whenShown(node, seen);
  node.sight ??= new IntersectionObserver((looks) => {
    node.outOfSight = !looks.at(-1).isIntersecting;
    if (!node.outOfSight) node.seen();
  });
  node.sight.observe(node);
};
const follow = (node, part, show, gone) => {
  clearTimeout(node.timer);
  node.ask = undefined;
  if (!part) return;
  let seen = part.digest, every = part.every;
  const ask = node.ask = async () => {
    if (node.ask !== ask || !node.isConnected) return;
    node.rests = document.hidden || node.outOfSight;
    if (node.rests) return;
    try {
      const answer = await fetch(new URL(`${part.path}?seen=${seen}`, document.baseURI));
      if (node.ask !== ask) return;
      if (answer.status === 404) return gone();
      every = Number(answer.headers.get("X-Again")) || every;
      if (answer.status === 200) {
        seen = answer.headers.get("X-Digest");
        await show(await answer.json());
      }
    } catch (error) {
      console.warn(`no answer from the lab: ${error}`);
    }
    if (node.ask === ask) node.timer = setTimeout(ask, 1000 * every);
  };
  node.timer = setTimeout(ask, 1000 * every);
};
const goOn = (node) => { if (node.rests) { node.rests = false; node.ask?.(); } };
"""
LINE = (
    FOLLOW
    + """
export default function ({ data, parentElement, setTriggerValue }) {
  const node = parentElement.querySelector(".live");
  let last = data.content.turn;
  const show = ({ html, turn }) => {
    if (node.shown !== html) node.innerHTML = node.shown = html;
    if (turn !== last) setTriggerValue("turn", (last = turn));
  };
  show(data.content);
  whenShown(node, () => goOn(node));  // also out of sight: the whole page turns with it
  follow(node, data.part, show, () => setTriggerValue("turn", "gone"));
}
"""
)


@dataclass
class Part:
    """Something that a page shows: ``look`` gives it as JSON goes."""

    look: Callable[[], Any]
    every: float  # seconds between two questions, where there is room
    tab: str
    offered: float

    def lives(self, now: float) -> bool:
        return now - self.offered < LIFE


_parts: dict[str, Part] = {}


def offer(key: str, look: Callable[[], Any], every: float, content: Any) -> dict[str, Any]:
    """What a component needs to follow a part of this page; ``content``: what ``look`` gave just now."""
    now, tab = time.monotonic(), pace.tab()
    for name, part in list(_parts.items()):
        if not part.lives(now):
            _parts.pop(name, None)
    names = st.session_state.setdefault("live.names", {})
    name = names.setdefault(key, secrets.token_urlsafe(32))
    _parts[name] = Part(look, every, tab, now)
    return {"path": f"live/{name}", "digest": _digest(_body(content)), "every": pace.every(every, tab)}


def withdraw() -> None:
    """End the offers of this session's pages."""
    for name in st.session_state.get("live.names", {}).values():
        _parts.pop(name, None)


def answer(request: Request) -> Response:
    """A part as it is now: nothing where the browser has seen it, 404 where the page must be drawn again."""
    part = _parts.get(request.path_params["name"])
    if part is None or not part.lives(time.monotonic()):
        return PlainTextResponse("this part is offered no more; draw the page again", 404, HEADERS)
    try:
        body = _body(part.look())
    except FAULTS as error:  # the page's script meets it too, and says it
        LOG.warning("a live part could not be drawn: %s", error)
        return PlainTextResponse("this part cannot be drawn; draw the page again", 404, HEADERS)
    digest = _digest(body)
    headers = HEADERS | {"X-Digest": digest, "X-Again": f"{pace.every(part.every, part.tab):.3f}"}
    if request.query_params.get("seen") == digest:
        return Response(status_code=204, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


ROUTES = [Route("/live/{name}", answer)]


def line(key: str, content: dict[str, str], look: Callable[[], dict[str, str]], every: float) -> None:
    """HTML that stays fresh: ``content`` for now, and what ``look`` gives later.

    Both hold the ``html``, its foreign text escaped, and a ``turn``: when that is another one, the page (or the
    fragment that the line stands in) is drawn again. The content is that of what the page draws, no later one: a change
    between the two would never be drawn.
    """
    component = st.components.v2.component(
        "prunedm_live_line", html="<div class='live'></div>", js=LINE, isolate_styles=False
    )
    data = {"content": content, "part": offer(key, look, every, content)}
    component(key=key, data=data, on_turn_change=lambda: None)


def _body(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=12).hexdigest()
