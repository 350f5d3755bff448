"""Parts that a browser keeps fresh by itself: who may ask for them, what is answered, and when a page turns."""

import json
import logging
from types import SimpleNamespace

import pytest
from apptest import components, live_lines, open_page, said
from fake_runs import fake
from starlette.applications import Starlette
from starlette.testclient import TestClient

from app import live, pace, parts, system_views
from prunedm import store
from prunedm.recipe import Recipe

RECORD = {"stage": "finetune", "step": 1, "time": 100.0, "loss": 0.5, "lr": 1e-3, "grad_norm": 1.0}


@pytest.fixture
def offered(monkeypatch):
    """offered(look) is the address of a part; each test has its own session and none of others' parts."""
    monkeypatch.setattr(live, "_parts", {})
    monkeypatch.setattr(live.st, "session_state", {})
    monkeypatch.setattr(pace, "_watchers", {})
    return lambda look, key="part", seen=None: "/" + live.offer(key, look, 1.0, seen)["path"]


@pytest.fixture
def browser():
    return TestClient(Starlette(routes=live.ROUTES))


@pytest.fixture
def run(runs):
    made = store.create(runs, Recipe())
    made.claim(made.state(), "running")
    return made


def test_a_part_is_answered_as_it_is_now_and_not_twice(offered, browser, monkeypatch):
    count = [0]
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 64)
    path = offered(lambda: {"count": count[0]})
    first = browser.get(path)
    assert first.json() == {"count": 0} and float(first.headers["x-again"]) == 1.0
    assert first.headers["cache-control"] == "no-store"
    again = browser.get(path, params={"seen": first.headers["x-digest"]})
    assert again.status_code == 204 and not again.content
    count[0] = 1
    assert browser.get(path, params={"seen": first.headers["x-digest"]}).json() == {"count": 1}


def test_what_the_page_was_drawn_with_counts_as_seen(offered, browser):
    part = live.offer("part", lambda: {"a": 1}, 1.0, {"a": 1})
    assert browser.get("/" + part["path"], params={"seen": part["digest"]}).status_code == 204


def test_names_are_random_and_a_page_drawn_again_keeps_its_own(offered, browser, monkeypatch):
    path = offered(lambda: "old")
    assert len(path) > 40 and offered(lambda: "new") == path and browser.get(path).json() == "new"
    monkeypatch.setattr(live.st, "session_state", {})  # another session
    assert offered(lambda: "other") != path and browser.get(path).json() == "new"
    assert browser.get("/live/part").status_code == browser.get("/live/..%2fx").status_code == 404


def test_a_part_is_offered_for_an_hour_however_often_it_is_asked_for(offered, browser, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    path = offered(lambda: 1)
    offered(lambda: 2, "left")
    for clock[0] in (live.LIFE / 2, live.LIFE - 1):
        assert browser.get(path).status_code == 200
    clock[0] = live.LIFE
    assert browser.get(path).status_code == 404, "the page is drawn again, and guarded"
    assert offered(lambda: 3) == path and browser.get(path).json() == 3 and len(live._parts) == 1


def test_a_page_that_logs_out_is_answered_no_more(offered, browser, monkeypatch):
    path = offered(lambda: 1)
    monkeypatch.setattr(live.st, "session_state", {})
    other = offered(lambda: 2)
    live.withdraw()
    assert browser.get(path).status_code == 200 and browser.get(other).status_code == 404


@pytest.mark.parametrize("error", [ValueError("bad line"), OSError("gone"), KeyError("loss")])
def test_a_part_that_cannot_be_drawn_has_the_page_drawn_again_and_is_logged(offered, browser, caplog, error):
    def look():
        raise error

    with caplog.at_level(logging.WARNING, "prunedm.live"):
        assert browser.get(offered(look)).status_code == 404
    assert str(error) in caplog.text


def test_the_answer_says_when_to_ask_again(offered, browser, monkeypatch):
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 1)
    path = offered(lambda: 1)
    alone = float(browser.get(path).headers["x-again"])
    for other in "abcdef":
        pace.every(1.0, other)
    assert float(browser.get(path).headers["x-again"]) > alone


def turn(app):
    (line,) = live_lines(app)
    return line["turn"]


def a_file(run, folder, name):
    (run.folder / folder).mkdir(exist_ok=True)
    (run.folder / folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    "happens",
    [
        lambda run: run.claim(run.state(), "paused"),
        lambda run: run.event("alert", what="spike", text="x", remedy="y", step=1),
        lambda run: run.append("metrics.jsonl", [RECORD]),
        lambda run: run.request_pause(),
    ],
)
def test_the_monitor_turns_with_its_run(run, happens):
    before = turn(open_page("monitor", run=run.id))
    assert turn(open_page("monitor", run=run.id)) == before, "not by itself"
    happens(run)
    assert turn(open_page("monitor", run=run.id)) != before


FILES = {
    "Samples": lambda run: a_file(run, "samples", "mask-0000010.png"),
    "Masks": lambda run: a_file(run, "masks", "mask-0000010.npz"),
    "Compliance": lambda run: run.write_layers([]),
}


@pytest.mark.parametrize("tab", ["Curves", "Masks", "Compliance", "Samples", "Log"])
def test_files_turn_the_page_of_the_tab_that_draws_them_and_no_more_than_every_five_seconds(
    run, browser, monkeypatch, tab
):
    """Samples record an event each, which no tab draws: it must not turn the page either."""
    clock = [100.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    app = open_page("monitor", run=run.id, tab=tab)
    (line,) = live_lines(app)
    part = next(data["part"] for name, data in components(app) if name == "prunedm_live_line")
    now = lambda: browser.get("/" + part["path"]).json()["turn"]  # noqa: E731
    for other, happens in FILES.items():
        if other != tab:
            happens(run)
    run.event("sample", stage="mask", step=10)
    clock[0] = 106.0
    assert now() == line["turn"], "what another tab draws"
    if tab in FILES:
        clock[0] = 103.0
        FILES[tab](run)
        assert now() == line["turn"], "not yet"
        clock[0] = 106.0
        assert now() != line["turn"]


@pytest.mark.parametrize("page", ["monitor", "home"])
def test_what_happens_while_a_page_is_drawn_turns_it_once_more(run, monkeypatch, page):
    """The turn that a page was drawn with is that of what it shows, and no later one."""
    chip = parts.state_chip

    def ended_meanwhile(status):
        chip(status)
        run.end(run.state(), "done", None)

    app = open_page(page)
    before = [line["turn"] for line in live_lines(app)]
    monkeypatch.setattr(parts, "state_chip", ended_meanwhile)
    assert [line["turn"] for line in live_lines(app.run())] == before and run.state().status == "done"


def test_further_steps_change_the_line_and_the_charts_and_do_not_turn_the_page(run, browser):
    run.append("metrics.jsonl", [RECORD])
    app = open_page("monitor", run=run.id)
    (line,) = live_lines(app)
    offers = {name: data["part"] for name, data in components(app)}
    state = run.state()
    state.stage, state.step, state.of = "finetune", 2, 10
    run.claim(state, "running")
    run.append("metrics.jsonl", [RECORD | {"step": 2, "loss": 0.25}])
    now = browser.get("/" + offers["prunedm_live_line"]["path"]).json()
    assert "2 of 10" in now["html"] and "2 of 10" not in line["html"] and now["turn"] == line["turn"]
    chart = browser.get(
        "/" + offers["prunedm_live_plot"]["path"], params={"seen": offers["prunedm_live_plot"]["digest"]}
    )
    assert chart.status_code == 200 and len(json.loads(chart.json()["figure"])["data"][0]["x"]) == 2


def test_foreign_text_in_a_line_is_no_markup(run):
    state = run.state()
    state.stage = "<img src=x onerror=alert(1)>"
    run.claim(state, "running")
    (line,) = live_lines(open_page("monitor", run=run.id))
    assert "<img" not in line["html"]


@pytest.mark.parametrize("page", ["home", "launch", "sweep", "monitor", "runs", "compare", "models", "system"])
def test_nothing_is_asked_for_when_nothing_runs(runs, page, monkeypatch):
    asked, fragment = [], live.st.fragment

    def noted(*given, run_every=None):
        asked.append(run_every)
        return fragment(*given, run_every=run_every)

    fake(runs, "done")
    fake(runs, "stopped", "stopped", evaluated=False)
    app = open_page(page)
    system_views.look().result(60)  # System asks until the machine has been looked at
    monkeypatch.setattr(live.st, "fragment", noted)
    app.run()
    assert not live_lines(app)
    assert all(data.get("part") is None for _, data in components(app))
    assert [every for every in asked if every is not None] == []


def test_home_turns_when_a_run_comes_or_changes(runs, run):
    app = open_page("home")
    count, progress = live_lines(app)
    assert "1 running" in count["html"] and "progress" in progress["html"] and "1 running" in said(app)
    store.create(runs, Recipe())
    assert live_lines(open_page("home"))[0]["turn"] != count["turn"]
