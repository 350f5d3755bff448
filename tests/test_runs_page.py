"""The Runs page through AppTest and in a real chromium: each state, each action, and back again.

Runs are folders written here, without an engine: what the page shows is what lies in them.
"""

import json
import math
import re
import tempfile
from pathlib import Path

import browser
import pytest
from fake_runs import fake
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app import lab, pace, run_actions, run_table
from prunedm import recipe as recipes
from prunedm import shelf, store
from prunedm.shelf import Notes

ROOT = Path(__file__).resolve().parent.parent


def varied(runs_dir):
    """A dozen runs of every kind, with a family."""
    first = fake(runs_dir, "dense-base", notes=Notes(("baseline",), "the one to beat"))
    child = fake(runs_dir, "pruned-60", model={"source": f"{first.id}/structured"}, notes=Notes(("paper", "60pct")))
    again = fake(
        runs_dir, "relearned-gumbel", loss=0.0402, model={"source": str(child.variant("nm").absolute())},
        notes=Notes(("paper",), "Better than SR-STE at the same budget.\nTry 4:8 next."),
    )  # fmt: skip
    masks = str((again.variant("nm") / store.MASKS).absolute())
    fake(runs_dir, "fixed-masks", mask={"method": "fixed", "initial": masks})
    fake(runs_dir, "orphan", model={"source": "20260101-120000-gone/nm"})
    fake(runs_dir, "old", notes=Notes(("old",), "superseded", archived=True))
    for status in ("stopped", "failed", "interrupted"):
        fake(runs_dir, f"a-{status}", status, evaluated=False, steps={"finetune": 150, "mask": 60})
    fake(runs_dir, "broken", "unreadable", evaluated=False)
    (fake(runs_dir, "torn-notes").folder / shelf.NOTES).write_text("{")
    fake(runs_dir, "now-training", "running", evaluated=False, steps={"finetune": 150, "mask": 120})
    fake(runs_dir, "next", "queued", evaluated=False, steps={"finetune": 1})
    return first, child, again


def open_page():
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.switch_page("../pages/runs.py").run()
    return sound(app)


def sound(app):
    assert not app.exception, app.exception
    return app


def said(app):
    kinds = ("markdown", "caption", "error", "warning", "info", "subheader", "toast")
    return "\n".join(str(e.value) for kind in kinds for e in getattr(app, kind)).replace("\\", "")


def table(app):
    return app.dataframe[0].value


def tick(app, *ids):
    """Tick rows as a click in the browser does: by their places in the table."""
    places = [list(table(app)["run"]).index(run_id) for run_id in ids]
    app.session_state["runs.table"] = {"selection": {"rows": places, "columns": [], "cells": []}}
    app.session_state["runs.picked"] = list(ids)
    return sound(app.run())


def click(app, label):
    found = [b for b in app.button if b.label == label]
    assert found, f"no button {label}: {[b.label for b in app.button]}"
    return sound(found[0].click().run())


def labels(app):
    return [b.label for b in app.button]


# --- each state --------------------------------------------------------------------------------------
def test_without_a_run_it_says_what_to_do(runs):
    app = open_page()
    assert "No runs yet" in said(app) and not app.dataframe


@pytest.mark.parametrize(
    "status", ["queued", "running", "paused", "done", "stopped", "failed", "interrupted", "unreadable"]
)
def test_each_state_is_an_icon_and_a_word(runs, status):
    run = fake(runs, "one", status, evaluated=status == "done")
    app = open_page()
    (cell,) = table(app)["state"]
    assert status in cell and not cell[0].isalnum(), "an icon, then the word"
    tick(app, run.id)
    assert "Move to the trash" in labels(app)
    if status == "failed":
        assert "the disk is full" in said(app) and "the disk is full" in table(app)["problem"][0]
    if status == "unreadable":
        assert "cannot be read" in said(app) and "Open in Monitor" not in labels(app)
    if status == "running":
        assert "60%" in cell


def test_a_run_that_waits_says_its_place_in_the_queue(runs, monkeypatch):
    first, second = fake(runs, "one", "queued", evaluated=False), fake(runs, "two", "queued", evaluated=False)
    other = fake(runs, "another-servers", "queued", evaluated=False)
    places = {first.id: 1, second.id: 2}
    monkeypatch.setattr(lab.jobs(), "position", places.get)
    cells = dict(zip(table(open_page())["run"], table(open_page())["state"]))
    assert cells == {first.id: "○ queued, number 1", second.id: "○ queued, number 2", other.id: "○ queued"}


def test_one_row_shows_the_figures_with_their_conditions(runs):
    run = fake(runs, "one", notes=Notes(("a", "b"), "first line\nsecond"))
    row = table(open_page()).iloc[0]
    assert (row["run"], row["variant"], list(row["tags"]), row["note"]) == (run.id, "N:M", ["a", "b"], "first line")
    assert row["nonzero"] == int(2_734_945 * 0.22) and row["removed"] == pytest.approx(-0.78, abs=1e-3)
    assert row["validation"] == 0.0437 and row["worse"] == pytest.approx(0.0437 / 0.0391 - 1)
    assert (row["fd"], row["fd_by"]) == (0.93, "FD-fashion, 512 images")
    assert (row["latency"], row["timed_on"]) == (7.31, "cpu, float32, batch 8")
    assert row["packed"] == pytest.approx(5_480_000 * 0.22 * 1.12 / 2**20, abs=0.01) and row[
        "minutes"
    ] == pytest.approx(83 / 60)
    assert 40 <= len(row["loss"]) <= 50 and row["disk"] > 0.06


def test_differences_are_left_out_where_the_conditions_differ(runs):
    run = fake(runs, "one")
    results = run.evaluation()
    run.write_evaluation(results | {"nm": results["nm"] | {"validation_images": 64}})
    row = table(open_page()).iloc[0]
    assert row["validation"] == 0.0437 and (row["worse"] is None or math.isnan(row["worse"]))


def test_many_runs_of_every_kind_stand_side_by_side(runs):
    varied(runs)
    app = open_page()
    assert len(table(app)) == 12 and "12 of 13 runs" in said(app), "the archived one waits"
    app.toggle(key="runs.archived").set_value(True).run()
    assert len(table(sound(app))) == 13 and any("archived" in state for state in table(app)["state"])
    for run_id in table(app)["run"]:
        tick(app, run_id)


@pytest.mark.parametrize("name", ["evaluation.json", "recipe.yaml", "state.json", "metrics.jsonl", "notes.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b"[1]", b'{"nm": {"parameters": "x", "nonzero_parameters": "y", "macs": 1, "bytes": 1}}'],
)
def test_a_damaged_file_is_told_in_its_row_and_breaks_no_other(runs, name, content):
    good, bad = fake(runs, "good"), fake(runs, "bad")
    (bad.folder / name).write_bytes(content)
    app = open_page()
    assert set(table(app)["run"]) == {good.id, bad.id}
    problems = dict(zip(table(app)["run"], table(app)["problem"]))
    harmless = name == "metrics.jsonl" or (name, content) == ("recipe.yaml", b"")  # an empty recipe is the default one
    assert problems[good.id] == "" and bool(problems[bad.id]) != harmless
    tick(app, bad.id)
    click(app, "Move to the trash")
    assert list(table(app)["run"]) == [good.id]


def test_damaged_notes_can_be_begun_anew(runs):
    run = fake(runs, "one")
    (run.folder / shelf.NOTES).write_text("{")
    app = tick(open_page(), run.id)
    assert table(app)["state"][0] == "✔ done, bad notes"
    assert "notes.json cannot be read" in said(app) and "delete the file" in said(app) and "Save" not in labels(app)
    click(app, "Start with new notes")
    assert shelf.read_notes(run) == Notes() and "Save" in labels(app)


# --- finding -----------------------------------------------------------------------------------------
def test_filters_by_text_state_and_tags(runs):
    a = fake(runs, "alpha", notes=Notes(("x", "y"), "About Gumbel"))
    b = fake(runs, "beta", "stopped", notes=Notes(("x",)))
    c = fake(runs, "gamma", "failed")

    def shown(app):
        return set(table(sound(app.run()))["run"])

    app = open_page()
    assert shown(app) == {a.id, b.id, c.id}
    for text, found in (("gumbel", {a.id}), ("ALPHA about", {a.id}), ("x", {a.id, b.id}), ("", {a.id, b.id, c.id})):
        app.text_input(key="runs.text").set_value(text)
        assert shown(app) == found
    app.multiselect(key="runs.state").set_value(["stopped", "failed"])
    assert shown(app) == {b.id, c.id}
    app.multiselect(key="runs.tags").set_value(["x"])
    assert shown(app) == {b.id}
    app.multiselect(key="runs.tags").set_value(["x", "y"]).run()
    assert not sound(app).dataframe and "No run passes the filters" in said(app)


def test_ticks_follow_their_runs_when_rows_move(runs):
    a, b = fake(runs, "alpha"), fake(runs, "beta")
    app = tick(open_page(), a.id)
    fake(runs, "newer")
    sound(app.run())
    ids, places = list(table(app)["run"]), app.session_state["runs.table"]["selection"]["rows"]
    assert [ids[p] for p in places] == [a.id]
    app.text_input(key="runs.text").set_value("beta").run()
    assert app.session_state["runs.table"]["selection"]["rows"] == [] and f"{a.id}" in said(app).replace("\\", "")
    app.text_input(key="runs.text").set_value("").run()
    ids, places = list(table(app)["run"]), app.session_state["runs.table"]["selection"]["rows"]
    assert [ids[p] for p in places] == [a.id]
    assert b.id in ids


@given(st.lists(st.floats() | st.none(), max_size=400))
def test_the_sparkline_is_short_in_order_and_of_numbers_only(losses):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(json.dumps({"stage": "mask", "loss": loss}) + "\n" for loss in losses) + '{"torn')
        found = run_table.loss_curve(path)
    good = [x for x in losses if x is not None and math.isfinite(x)]
    assert len(found) <= run_table.POINTS and all(math.isfinite(x) for x in found)
    if len(losses) <= run_table.POINTS:
        assert found == good


def test_of_a_long_file_little_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"loss": i, "rest": "x" * 300}) + "\n" for i in range(60_000)))
    found = run_table.loss_curve(path)
    assert len(found) == run_table.POINTS and found == sorted(found) and found[0] == 0 and found[-1] > 59_900
    assert run_table.loss_curve(tmp_path / "none") == []


# --- acting ------------------------------------------------------------------------------------------
def test_delete_asks_and_undo_restores(runs):
    a, b = fake(runs, "alpha"), fake(runs, "beta")
    before = {p: p.read_bytes() for p in a.folder.rglob("*") if p.is_file()}
    app = tick(open_page(), a.id, b.id)
    assert "to the trash? It can be undone" in said(app) and a.folder.exists()
    click(app, "Move to the trash")
    assert not a.folder.exists() and not b.folder.exists() and "2 runs moved to the trash" in said(app)
    click(app, "Undo")
    assert {p: p.read_bytes() for p in a.folder.rglob("*") if p.is_file()} == before
    assert set(table(app)["run"]) == {a.id, b.id} and "Undo" not in labels(app)


def test_undo_is_put_away_and_the_trash_still_restores_and_empties(runs):
    a, b, c = (fake(runs, name) for name in ("alpha", "beta", "gamma"))
    app = tick(open_page(), a.id, b.id)
    click(app, "Move to the trash")
    click(app, "Dismiss")
    assert "Undo" not in labels(app) and [e.label for e in app.expander if e.label.startswith("Trash (2 runs")]
    click(app, "Restore")
    assert len(shelf.trashed(runs)) == 1
    assert "for good? This cannot be undone" in said(app)
    click(app, "Remove them for good")
    assert shelf.trashed(runs) == [] and not [e for e in app.expander if "Trash" in e.label] and c.folder.exists()


def test_an_active_run_is_refused_and_the_others_go(runs):
    a, b = fake(runs, "alpha"), fake(runs, "beta", "running")
    app = tick(open_page(), a.id, b.id)
    click(app, "Move to the trash")
    assert "is running; stop it" in said(app) and b.folder.exists() and not a.folder.exists()
    app.run()
    assert "Undo" in labels(app) and app.session_state["runs.picked"] == [b.id]


def test_a_run_that_is_back_already_is_not_overwritten_by_undo(runs):
    a = fake(runs, "alpha")
    app = tick(open_page(), a.id)
    click(app, "Move to the trash")
    a.folder.mkdir()
    (a.folder / "mine").write_text("x")
    click(app, "Undo")
    assert "there is a run" in said(app) and (a.folder / "mine").read_text() == "x"


def test_tags_and_note_are_edited(runs):
    run = fake(runs, "one", notes=Notes(("old",), "before", True))
    app = open_page()
    assert not app.dataframe
    app.toggle(key="runs.archived").set_value(True).run()
    tick(app, run.id)
    next(m for m in app.multiselect if m.label == "Tags" and m.key != "runs.tags").set_value(["old", "new"])
    app.text_area[0].set_value("after\r\nmore ")
    click(app, "Save")
    assert shelf.read_notes(run) == Notes(("old", "new"), "after\nmore", True)
    assert list(table(app)["tags"][0]) == ["old", "new"] and table(app)["note"][0] == "after"
    next(m for m in app.multiselect if m.label == "Tags" and m.key != "runs.tags").set_value(["no tag"])
    click(app, "Save")
    assert "is not a tag" in said(app) and shelf.read_notes(run).tags == ("old", "new")


def test_several_runs_are_tagged_at_once(runs):
    a, b = fake(runs, "alpha", notes=Notes(("x",))), fake(runs, "beta")
    app = tick(open_page(), a.id, b.id)
    box = next(m for m in app.multiselect if m.label == "Tags for all of them")
    box.set_value(["x", "paper"])
    click(app, "Add to all")
    assert [shelf.read_notes(r).tags for r in (a, b)] == [("x", "paper"), ("x", "paper")]
    next(m for m in app.multiselect if m.label == "Tags for all of them").set_value(["x"])
    click(app, "Remove from all")
    assert [shelf.read_notes(r).tags for r in (a, b)] == [("paper",), ("paper",)]


def test_archive_and_back(runs):
    a, b = fake(runs, "alpha"), fake(runs, "beta")
    app = tick(open_page(), a.id)
    click(app, "Archive")
    assert list(table(app)["run"]) == [b.id] and shelf.read_notes(a).archived
    app.toggle(key="runs.archived").set_value(True).run()
    tick(app, a.id)
    click(app, "Unarchive")
    assert not shelf.read_notes(a).archived


def test_compare_opens_with_the_ticked_runs(runs):
    a, b = fake(runs, "alpha"), fake(runs, "beta")
    app = tick(open_page(), a.id, b.id)
    click(app, "Compare")
    assert app.title[0].value == "Compare"


def test_the_link_of_compare_holds_what_compare_can_show(runs):
    found = [run_table.row(fake(runs, f"r{i}")) for i in range(8)]
    link = run_actions.comparison_of
    assert link(found[:2]) == {"runs": f"{found[0].id},{found[1].id}"}
    models = link(found[:4])["models"].split(",")
    assert models == [f"{found[0].id}/dense", *(f"{row.id}/nm" for row in found[:4])]
    assert len(link(found)["models"].split(",")) == 8


def test_runs_without_figures_are_not_compared(runs):
    a = fake(runs, "alpha", "stopped", evaluated=False)
    app = tick(open_page(), a.id)
    button = next(b for b in app.button if b.label == "Compare")
    assert button.disabled and "none of them is evaluated" in button.help


def test_duplicate_fills_the_launch_form(runs):
    run = fake(runs, "one", seed=77, mask={"steps": 123, "n": 1})
    app = tick(open_page(), run.id)
    click(app, "Duplicate into Launch")
    assert app.title[0].value == "Launch"
    assert app.number_input(key="recipe.mask.steps").value == 123 and app.number_input(key="recipe.seed").value == 77
    shown = next(c.value for c in app.code if c.language == "yaml")
    assert recipes.build(recipes.parse(shown)) == run.recipe()


def test_duplicate_wins_over_a_form_that_was_filled_before(runs):
    run = fake(runs, "one", mask={"steps": 123})
    app = AppTest.from_file(str(ROOT / "app" / "router.py"), default_timeout=60).run()
    app.switch_page("../pages/launch.py").run()
    app.number_input(key="recipe.mask.steps").set_value(55).run()
    app.switch_page("../pages/runs.py").run()
    tick(app, run.id)
    click(app, "Duplicate into Launch")
    assert app.number_input(key="recipe.mask.steps").value == 123


def test_monitor_opens_with_the_run(runs):
    a = fake(runs, "alpha")
    fake(runs, "beta")
    app = tick(open_page(), a.id)
    click(app, "Open in Monitor")
    assert app.title[0].value == "Monitor" and app.selectbox(key="run_pick").value == a.id


def test_lineage_shows_parents_children_and_the_missing(runs):
    first, child, again = varied(runs)
    app = tick(open_page(), child.id)
    text = said(app)
    assert "from the weights of the structured model above" in text
    assert "from the bundled dense model and the masks of the N:M model above" in text
    links = [element.proto.label.replace("\\", "") for element in app.get("page_link")]
    assert {f":blue[{first.id}]", f":blue[{again.id}]"} <= set(links) and f":blue[{child.id}]" not in links
    orphan = next(i for i in table(app)["run"] if i.endswith("orphan"))
    tick(app, orphan)
    assert "20260101-120000-gone (missing" in said(app)


def test_a_real_run_and_one_made_from_it(runs, micro):
    """What the engine writes, not a folder made up here."""
    from prunedm import inputs, pipeline

    first = store.create(runs, micro(name="first"))
    assert pipeline.execute(first) == "done"
    changed = {"source": f"{first.id}/structured"}
    made = recipes.merge(micro(name="second").model_dump(), {"model": changed, "mask": {"initial": first.id}})
    second = store.create(runs, inputs.absolute(recipes.build(made | {"prune": {"target": 0}}), runs))
    second.end(second.state(), "stopped", None)
    app = tick(open_page(), second.id)
    row = table(app).set_index("run").loc[first.id]
    assert row["variant"] == "N:M" and row["nonzero"] > 0 and len(row["loss"]) == 18 and not row["problem"]
    assert "from the weights of the structured model above and the masks of the N:M model above" in said(app)
    tick(app, first.id)
    click(app, "Move to the trash")
    assert f"{first.id} (missing" in said(tick(app, second.id))
    click(app, "Undo")
    assert lab.card(first).results


def test_foreign_text_is_never_rendered(runs):
    run = fake(runs, "one", "failed", notes=Notes((), "![x](http://example.invalid/p.png)"))
    state = run.state()
    state.error = "![x](http://example.invalid/p.png) <b>"
    run.write_state(state)
    app = tick(open_page(), run.id)
    shown = [str(e.value) for kind in ("markdown", "error", "caption") for e in getattr(app, kind)]
    assert not [text for text in shown if re.search(r"(?<!\\)!\[|(?<!\\)<b>", text)]


def test_nothing_is_polled_when_nothing_runs(runs, monkeypatch):
    import streamlit

    seen, fragment = [], streamlit.fragment

    def spy(*args, run_every=None, **kwargs):
        seen.append(run_every)
        return fragment(*args, run_every=run_every, **kwargs)

    fake(runs, "one")
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 64)  # where one tab takes nothing from the training
    app = open_page()
    monkeypatch.setattr(streamlit, "fragment", spy)
    app.run()
    assert seen == [None]
    fake(runs, "two", "running")
    app.run()
    assert seen == [None, 2.0]


# --- in a browser --------------------------------------------------------------------------------------
@pytest.mark.browser
@pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not")
@pytest.mark.timeout(300)
def test_delete_undo_filter_and_compare_by_mouse_and_keyboard(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    a, b, c = (fake(runs, name, notes=Notes((name[:1],))) for name in ("alpha", "beta", "gamma"))
    order = sorted((a.id, b.id, c.id), reverse=True)
    with browser.server(runs, tmp_path / "server.log") as url, browser.chromium() as page:
        page.goto(url)
        browser.settle(page)
        page.get_by_role("link", name="Runs").click()
        grid = page.get_by_test_id("stDataFrame").first
        grid.wait_for()
        browser.settle(page)

        page.get_by_test_id("data-grid-canvas").first.focus()
        for key in ["ArrowDown"] * order.index(b.id) + ["Shift+Space"]:
            page.keyboard.press(key)
        page.get_by_role("heading", name=b.id).wait_for()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Move to the trash").click()
        page.get_by_text("moved to the trash").wait_for()
        page.get_by_text("2 of 2 runs").wait_for()
        assert not b.folder.exists()
        page.get_by_role("button", name="Undo").click()
        page.get_by_text("3 of 3 runs").wait_for()
        assert b.folder.exists()

        browser.settle(page)
        page.get_by_label("Search", exact=True).fill("gam")
        page.get_by_label("Search", exact=True).press("Enter")
        page.get_by_text("1 of 3 runs").wait_for()
        tick_row(page, 0)
        page.get_by_role("heading", name=c.id).wait_for()
        page.get_by_label("Search", exact=True).fill("")
        page.get_by_label("Search", exact=True).press("Enter")
        page.get_by_text("3 of 3 runs").wait_for()
        browser.settle(page)
        # Sorted the other way round, a tick still means the run that it stands beside.
        box = grid.bounding_box()
        page.mouse.click(box["x"] + 100, box["y"] + 18)
        page.wait_for_timeout(700)  # the table sorts by itself, the server does not know
        browser.settle(page)
        tick_row(page, sorted(order).index(a.id))
        page.get_by_text("2 runs ticked").wait_for()
        page.get_by_test_id("stCaptionContainer").get_by_text(f"{c.id}, {a.id}").wait_for()
        page.get_by_role("button", name="Compare", exact=True).click()
        page.wait_for_url(re.compile("/compare"))
        for run in (a, c):
            page.get_by_test_id("stMain").get_by_text(re.compile(re.escape(run.id))).first.wait_for()
        assert page.get_by_test_id("stMain").get_by_text(b.id).count() == 0
        assert browser.errors(page) == []


def tick_row(page, place):
    """Tick the row at this place of the table as it is drawn."""
    box = page.get_by_test_id("stDataFrame").first.bounding_box()
    page.mouse.click(box["x"] + 16, box["y"] + 36 + 35 * place + 17)
    browser.settle(page)


def test_every_key_figure_fits_the_page_at_1280_pixels():
    """900 pixels, of which the box to tick takes 33; the column of tags is there only where a run has any."""
    found = run_table.columns()
    shown = list(found)[: list(found).index("packed") + 1]
    assert {"nonzero", "validation", "fd", "latency", "packed"} <= set(shown)
    assert sum(found[name]["width"] for name in shown if name != "tags") <= 900 - 33
