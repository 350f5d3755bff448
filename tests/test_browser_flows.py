"""The lab's main flows in a real chromium, on one server: launch, watch, hold and go on, duplicate, compare, sweep,
export, import.

The model has 60 k parameters and the images are noise: what is tested is that a person gets from each page to the next
and that the pages say what the run folders hold.
"""

import re
import shutil
import time
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import browser
import pytest

from prunedm import pipeline, store, sweep
from prunedm import recipe as recipes
from prunedm.records import ACTIVE

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The runs folder of this file's lab."""
    folder = tmp_path_factory.mktemp("lab") / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def url(place):
    with browser.server(place, place.parent / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as started:
        yield started


@pytest.fixture
def new_page(chromium):
    """Opens pages, each of a person of their own; in the end none may have had an error or asked another host."""
    opened = []

    def open_one():
        opened.append(browser.watched_page(chromium))
        return opened[-1]

    yield open_one
    errors = [error for page in opened for error in browser.errors(page)]
    local = ("data:", "blob:")
    outside = [u for page in opened for u in page.requested if not u.startswith(local) and host(u) != "127.0.0.1"]
    for page in opened:
        page.context.close()
    assert errors == [] and outside == []


def host(address: str) -> str | None:
    return urlparse(address).hostname


@pytest.fixture
def page(new_page):
    return new_page()


@pytest.fixture
def at_rest(place):
    """After the test no run is left in the queue, whatever came of it."""
    yield
    while active := [run for run in store.all_runs(place) if run.state().status in ACTIVE]:
        for run in active:
            run.request_stop()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def tiny(micro):
    """A recipe builder: figures in a second or two."""

    def build(**changes):
        quick = {"prune": {"finetune_steps": 4}, "mask": {"steps": 4, "recover_steps": 4}}
        quick |= {"eval": {"noise_floor": False}}
        return micro(**recipes.merge(quick, changes))

    return build


@pytest.fixture(scope="module")
def done(place, tiny):
    """Two finished runs that differ in four fields, the older first."""
    found = []
    for name, n in (("older", 2), ("newer", 1)):
        run = store.create(place, tiny(name=name, mask={"n": n, "train_weights": n == 1}, seed=n))
        assert pipeline.execute(run) == "done", run.log_path.read_text()
        found.append(run)
    return found


# --- small steps -------------------------------------------------------------------------------------
def go(page, address: str) -> None:
    page.goto(address)
    rest(page)


def rest(page) -> None:
    """Wait until the page's script rests."""
    browser.settle(page)


def section(page, title: str):
    """The box of the form under this heading."""
    heading = page.get_by_test_id("stHeading").get_by_text(title, exact=True)  # not by role: an open list hides others
    return page.get_by_test_id("stVerticalBlock").filter(has=heading).last


def beside(page, field):
    """The column that a field stands in, with what is said about it."""
    return page.get_by_test_id("stColumn").filter(has=field).last


def type_in(within, values: dict[str, object]) -> None:
    """Type into the fields with these labels, and leave each."""
    for label, value in values.items():
        field = within.get_by_label(label, exact=True)
        field.fill(str(value))
        field.press("Tab")


def upload(page, name: str, content: bytes, kind: str) -> None:
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": kind, "buffer": content})


def ids(place: Path) -> set[str]:
    return {run.id for run in store.all_runs(place)}


def started(page, place: Path, before: set[str]):
    """The run that Monitor has opened with."""
    page.wait_for_url(re.compile(r"/monitor\?run="))
    (new,) = ids(place) - before
    assert parse_qs(urlparse(page.url).query)["run"] == [new]
    return store.find(place, new)


def launch(page, url: str, place: Path, recipe):
    """Start a run from a recipe file, by keyboard; Monitor is open then."""
    before = ids(place)
    go(page, f"{url}/launch")
    page.get_by_text("Begin from a recipe file").click()
    upload(page, "mine.yaml", recipe.to_yaml().encode(), "application/yaml")
    page.get_by_text("The form holds the recipe of mine.yaml").wait_for()
    page.get_by_role("button", name="Start").wait_for()
    rest(page)
    page.keyboard.press("Control+Enter")
    run = started(page, place, before)
    assert run.recipe() == recipe
    return run


def until(page, condition, *about) -> None:
    """Wait for a condition of Python's."""
    deadline = time.monotonic() + browser.PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline, about
        page.wait_for_timeout(50)


# --- launch ------------------------------------------------------------------------------------------
def test_a_custom_run_is_typed_mended_and_started(page, url, place, at_rest, model_folder, image_folder):
    before = ids(place)
    go(page, f"{url}/launch")
    page.get_by_role("button", name="Balanced", exact=True).click()
    expect(page.get_by_label("Name", exact=True)).to_have_value("balanced")
    rest(page)  # fields further down get their values later
    type_in(page, {"Name": "typed", "Device": "cpu"})
    rest(page)  # a list closes when it is drawn anew
    model = section(page, "Model").get_by_label("Source", exact=True)
    model.fill(str(model_folder))
    model.press("Enter")
    type_in(section(page, "Data"), {"Source": image_folder, "Batch size": 8})
    pruning, masks = section(page, "Stage 1: structured pruning"), section(page, "Stage 2: N:M masks")
    browser.choose(pruning, "Share of", "macs")
    type_in(pruning, {"Target": 0.3, "Fine-tune steps": 5})
    type_in(masks, {"Steps": 4, "Recovery steps": 3})
    type_in(section(page, "Evaluation"), {"Images": 8, "Steps": 2})

    n = masks.get_by_label("N (kept)", exact=True)
    type_in(masks, {"N (kept)": 4})
    expect(beside(page, n).get_by_role("alert")).to_contain_text("n=4 must be less than m=4")
    expect(page.get_by_role("button", name="Start")).to_have_count(0)
    page.keyboard.press("Control+Enter")
    type_in(masks, {"N (kept)": 1})
    expect(beside(page, n).get_by_role("alert")).to_have_count(0)
    assert ids(place) == before, "a wrong recipe does not start"

    page.get_by_role("button", name="Start").click()
    run = started(page, place, before)
    changes = {
        "name": "typed",
        "device": "cpu",
        "model": {"source": str(model_folder)},
        "data": {"source": str(image_folder), "batch_size": 8},
        "prune": {"of": "macs", "target": 0.3, "finetune_steps": 5},
        "mask": {"n": 1, "steps": 4, "recover_steps": 3},
        "eval": {"images": 8, "steps": 2},
    }
    assert run.recipe() == recipes.build(recipes.merge(recipes.preset("balanced"), changes))
    expect(page.get_by_text(re.compile(r"of 6 stages done"))).to_have_count(1)


# --- while it trains ---------------------------------------------------------------------------------
def test_what_trains_is_followed_and_zoom_stays(page, url, place, at_rest, tiny):
    endless = {"prune": {"finetune_steps": 100}, "mask": {"steps": 100_000, "snapshot_every": 20}}
    run = launch(page, url, place, tiny(name="endless", **endless))
    page.get_by_role("tab", name="Samples").click()
    new_samples(page, run)
    page.get_by_role("tab", name="Curves").click()
    chosen = follows(page, "Training loss", "node.data.at(-1).x.at(-1)")
    page.get_by_role("tab", name="Masks").click()
    follows(page, "initial mask, by layer, at", "node.data[0].x.length")
    page.get_by_role("tab", name="Curves").click()
    loss = page.locator("[aria-label*='Training loss']")
    until(page, lambda: zoom(loss) == chosen, "zoom outlives a look at another tab")
    expect(page.locator(".modebar-btn[data-title*='Share']")).to_have_count(0)  # plotly would send the chart away
    rests_while_hidden(page, loss)
    assert run.state().status == "running"
    run.request_stop()
    page.get_by_role("button", name="Resume").wait_for()


def rests_while_hidden(page, chart) -> None:
    """A page in the background asks for no live part, and goes on when it is looked at again."""
    hide = "is => { Object.defineProperty(document, 'hidden', { value: is, configurable: true }); }"
    page.evaluate(hide, True)
    page.wait_for_timeout(6000)  # the slowest of its questions is on its way
    asked, number = live_questions(page), updates(chart)
    page.wait_for_timeout(6000)
    assert live_questions(page) == asked and updates(chart) == number
    page.evaluate(hide, False)
    page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    until(page, lambda: updates(chart) > number and live_questions(page) > asked, "it goes on")


def live_questions(page) -> int:
    return sum("/live/" in address for address in page.requested)


def new_samples(page, run) -> None:
    """The picture of the samples makes room for a later one, here one that would be long in coming."""
    picture = page.get_by_alt_text("16 samples at")
    first = picture.get_attribute("alt")
    shutil.copy(run.samples()[-1], run.sample_path("mask", 99_999))
    expect(picture).not_to_have_attribute("alt", first)


def zoom(chart) -> list[float] | None:
    """Range of the x-axis where the reader chose it; None where plotly did."""
    return chart.evaluate("({ _fullLayout: { xaxis } = {} }) => xaxis?.autorange === false ? xaxis.range : null")


def updates(chart) -> int:
    return int(chart.get_attribute("data-updates") or 0)


def follows(page, alt: str, extent: str) -> list[float]:
    """Zoomed by mouse, the chart goes on to grow, on the same node and in the same range, which is returned."""
    chart = page.locator(f"[aria-label*='{alt}']")
    area = chart.locator(".nsewdrag").first
    area.wait_for()
    chart.scroll_into_view_if_needed()
    lies_still(page, area)
    chart.evaluate("node => { node.marked = true }")
    until(page, lambda: is_zoomed(page, chart, area), alt)
    chosen, size, number = zoom(chart), chart.evaluate(f"node => {extent}"), updates(chart)
    until(page, lambda: updates(chart) > number and chart.evaluate(f"node => {extent}") > size, alt)
    assert chart.evaluate("node => node.marked === true"), "the chart was updated and not replaced"
    assert zoom(chart) == chosen
    return chosen


def lies_still(page, area) -> None:
    """Wait until what is drawn above it no longer moves it."""
    places = [area.bounding_box()]

    def again() -> bool:
        places.append(area.bounding_box())
        return len(places) > 5 and all(place == places[-1] for place in places[-5:])

    until(page, again, "the chart moves")


def is_zoomed(page, chart, area) -> bool:
    """Zoom by mouse; a chart that moves meanwhile, or is drawn anew, takes no notice."""
    drag(page, area.bounding_box())
    page.wait_for_timeout(1000)
    return bool(zoom(chart))


def drag(page, box: dict[str, float]) -> None:
    """From a quarter of the chart to its half, level."""
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 4, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, y, steps=4)
    page.mouse.up()


# --- hold and go on ------------------------------------------------------------------------------------
def test_pause_continue_stop_and_resume_to_the_end(page, url, place, at_rest, tiny):
    """Long enough that it is not done before it is stopped; what is left of it then is cut short."""
    changes = {"prune": {"finetune_steps": 50_000}, "mask": {"steps": 20, "recover_steps": 4}}
    run = launch(page, url, place, tiny(name="held", **changes))
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("button", name="Continue").wait_for()
    page.get_by_text("❚❚ paused", exact=True).wait_for()
    held = len(run.metrics())
    assert run.state().status == "paused"
    page.get_by_role("button", name="Continue").click()
    until(page, lambda: len(run.metrics()) > held)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Resume goes on from there").wait_for()
    assert not run.stop_requested(), "it asks first"
    page.get_by_role("button", name="Stop this run").click()
    page.get_by_role("button", name="Resume").wait_for()
    page.get_by_text("◼ stopped", exact=True).wait_for()
    assert run.state().status == "stopped"
    steps = {"finetune": run.load_checkpoint("finetune")[1]["done"] + 20, "mask": 20, "recover": 4}
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("finetune_steps: 50000", f"finetune_steps: {steps['finetune']}"))
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("Done in")).to_have_count(1)  # for a moment beside the line that has followed the run
    assert run.state().status == "done", run.log_path.read_text()
    done = [(record["stage"], record["step"]) for record in run.metrics()]
    assert done == [(stage, i + 1) for stage, of in steps.items() for i in range(of)], "each step once, in order"


# --- duplicate -------------------------------------------------------------------------------------------
def test_a_run_is_duplicated_with_one_change(page, url, place, at_rest, done):
    newer = done[1]
    go(page, f"{url}/runs")
    type_in(page, {"Search": newer.id})
    page.get_by_text(re.compile(r"^1 of \d+ runs")).wait_for()
    rest(page)
    page.get_by_test_id("data-grid-canvas").first.focus()
    page.keyboard.press("Shift+Space")
    page.get_by_role("button", name="Duplicate into Launch").click()
    page.wait_for_url(re.compile("/launch"))
    recipe, masks = newer.recipe(), section(page, "Stage 2: N:M masks")
    expect(page.get_by_label("Name", exact=True)).to_have_value(recipe.name)
    expect(masks.get_by_label("N (kept)", exact=True)).to_have_value(str(recipe.mask.n))
    expect(masks.get_by_label("Train weights", exact=True)).to_be_checked()
    expect(section(page, "Data").get_by_label("Source", exact=True)).to_have_value(recipe.data.source)
    expect(section(page, "Evaluation").get_by_label("Noise floor", exact=True)).not_to_be_checked()
    before = ids(place)
    type_in(masks, {"Steps": 7})
    page.get_by_role("button", name="Start").click()
    run = started(page, place, before)
    assert recipes.differences(recipe, run.recipe()) == {"mask.steps": (recipe.mask.steps, 7)}


# --- compare -------------------------------------------------------------------------------------------
def test_the_address_of_a_comparison_shows_the_same_to_another_person(page, new_page, url, done):
    older, newer = done
    go(page, f"{url}/compare?runs={older.id},{newer.id}")
    grid = page.get_by_role("region", name="Same-seed grid")
    expect(grid.get_by_alt_text("seed 0")).to_have_count(5)
    remove(page, f"{older.id} · structured")
    expect(grid.get_by_alt_text("seed 0")).to_have_count(4)
    remove(page, "0")
    expect(grid.get_by_alt_text("seed 0")).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^quick")).click()
    page.get_by_role("button", name="Judge these 4 models alike").wait_for()
    rest(page)
    other = new_page()
    go(other, page.url)
    other.get_by_role("button", name="Judge these 4 models alike").wait_for()
    expect(other.get_by_role("radio", name=re.compile("^quick"))).to_be_checked()
    models = [f"{newer.id} · {variant}" for variant in ("dense", "structured", "N:M")] + [f"{older.id} · N:M"]
    for one in (page, other):
        holds(one, "Models", models)
        holds(one, "Seeds", [str(seed) for seed in range(1, 8)])
        until(one, lambda: len(pictures(one)) == 4 * 7, pictures(one))  # noqa: B023  (done with before the next)
    assert pictures(other) == pictures(page)


def remove(page, name: str) -> None:
    """Take one choice out of a list."""
    page.locator(f"button[aria-label='Remove {name}']").click()


def holds(page, label: str, wanted: list[str]) -> None:
    """The list with this label holds these choices, in any order."""
    tags = page.get_by_test_id("stMultiSelect").filter(has_text=label).locator("[data-tag]")
    expect(tags).to_have_count(len(wanted))
    assert sorted(tags.all_inner_texts()) == sorted(wanted)


def pictures(page) -> list[tuple[str, str]]:
    """What the grid shows, and as what."""
    found = page.get_by_role("region", name="Same-seed grid").locator("img").all()
    return [(image.get_attribute("alt"), image.get_attribute("src")) for image in found]


# --- sweep ---------------------------------------------------------------------------------------------
def test_a_sweep_of_three_trials_to_its_front_and_into_compare(page, url, place, at_rest, tiny):
    go(page, f"{url}/sweep")
    browser.choose(page, "Recipe", "YAML")
    common = tiny(prune={"finetune_steps": 1}, mask={"method": "none"})
    type_in(page, {"Recipe as YAML": common.to_yaml()})
    page.get_by_role("button", name="Add a range").click()
    browser.choose(page, "Values", "these values")
    type_in(page, {"List": "0.15, 0.35, 0.55", "Trials": 3, "Name": "three"})
    browser.choose(page, "Sampler", "grid")
    page.get_by_role("button", name="Start the sweep").click()
    # Once the sweep has ended, a line or a chart stands for a moment beside the one that it replaces.
    expect(page.get_by_text("3 of 3 trials: 3 complete")).to_have_count(1)
    chart = page.locator("[aria-label*='of 3 trials; on the front']")
    expect(chart).to_have_count(1)
    chart.locator(".scatterlayer .point").nth(2).wait_for(state="attached")
    study = sweep.load("three", place)
    targets = [row["params"]["prune.target"] for row in sweep.trials(study)]
    assert sorted(targets) == [0.15, 0.35, 0.55]
    front = [row["run"] for row in sweep.trials(study) if row["number"] in sweep.front(study)]
    numbers = ", ".join(map(str, sweep.front(study)))
    # The line above the charts is ahead of them by a moment.
    expect(chart).to_have_attribute("aria-label", re.compile(f"on the front: {numbers}$"))
    compare = page.get_by_role("link", name=re.compile("^Compare the front"))
    expect(compare).to_have_count(1)
    compare.click()
    page.wait_for_url(re.compile("/compare"))
    holds(page, "Models", [f"{run} · structured" for run in front])
    expect(page.get_by_role("region", name="Same-seed grid").locator("img")).to_have_count(8 * len(front))


# --- models --------------------------------------------------------------------------------------------
def test_a_model_is_exported_downloaded_and_imported_again(page, url, done, tmp_path):
    run = done[0]
    go(page, f"{url}/models?run={run.id}")
    page.get_by_text("Every N:M layer keeps its pattern").wait_for()
    page.get_by_role("button", name="Export", exact=True).click()
    with page.expect_download() as found:
        page.get_by_role("button", name="Download", exact=True).click()
    path = tmp_path / found.value.suggested_filename
    found.value.save_as(path)
    assert path.suffix == ".zip" and path.read_bytes() == (run.exports / path.name).read_bytes()

    rest(page)
    page.get_by_text("Import a model").click()
    upload(page, path.name, path.read_bytes(), "application/zip")
    type_in(page, {"Name": "again"})
    page.get_by_role("button", name="Import the zip").click()
    page.get_by_text("again is imported: Launch offers it").wait_for()
    page.get_by_role("link", name="Launch").click()
    browser.choose(section(page, "Model"), "Source", "again (imported)")
    dense = page.get_by_test_id("stMetric").filter(has_text="Parameters, dense").get_by_test_id("stMetricValue")
    expect(dense).to_have_text(f"{run.evaluation()['nm']['parameters']:,}")
