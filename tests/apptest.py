"""The lab's pages through Streamlit's AppTest."""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("markdown", "caption", "error", "warning", "info", "success", "title", "subheader", "metric")


def open_page(page: str, **query: str) -> AppTest:
    """A page as the address with this query shows it."""
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page(f"../pages/{page}.py").run()
    return sound(app)


def sound(app: AppTest) -> AppTest:
    assert not app.exception, app.exception
    return app


def said(app: AppTest) -> str:
    """All text of the page, as it was given to Markdown or HTML."""
    texts = [str(e.value) + str(getattr(e, "label", "")) for kind in KINDS for e in getattr(app, kind)]
    texts += [bare(e.proto.body) for e in app.get("html")] + [bare(line["html"]) for line in live_lines(app)]
    return "\n".join(texts)


def bare(markup: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "\n", markup))


def components(app: AppTest) -> list[tuple[str, dict]]:
    """Name and data of each component of the page that was given any."""
    found = [e.proto for e in app.get("bidi_component")]
    return [(proto.component_name, json.loads(proto.json)) for proto in found if proto.json]


def live_lines(app: AppTest) -> list[dict[str, str]]:
    """What the page's live lines were drawn with: ``html`` and ``turn``."""
    return [data["content"] for name, data in components(app) if name == "prunedm_live_line"]


def shown(app: AppTest) -> str:
    """The page's text as a reader sees it: without the backslashes of escaped characters."""
    return said(app).replace("\\", "")


def click(app: AppTest, label: str) -> AppTest:
    next(b for b in app.button if b.label == label).click().run()
    return sound(app)


def labels(app: AppTest) -> list[str]:
    return [b.label for b in app.button]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
