"""Every page of the lab in a real chromium: accessible by axe in both themes, whole at 390 px, worked by keyboard
alone, and without a request to another machine.

One server: on an empty runs folder at first, and then on one with a run in each state, a sweep and an imported model.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import browser
import pytest
from by_keys import BY_KEYS, act, arrive, playwright, press, rest, tab_to
from fake_runs import active_states, other_states
from test_sweep_page import swept

from app import login
from prunedm import imports, pipeline, store
from prunedm.store import Run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),  # trials that are asked for by hand
]
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TRIALS = 10  # the fewest that importances need

# Streamlit's own markup that neither CSS nor options reach: rule and the element that it is within.
EXCLUDED = {
    # Sections of the navigation are divs between the list and its items.
    "list": "[data-testid=stSidebarNav]",
    "listitem": "[data-testid=stSidebarNav]",
    # st.table scrolls in a box that has no tabindex; chromium and firefox let the keyboard into such a box.
    "scrollable-region-focusable": "[data-testid=stTable]",
}
RUN_AXE = """async (excluded) => {
  const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
  const found = await axe.run(document, { runOnly: { type: "tag", values: tags }, resultTypes: ["violations"] });
  const own = (rule, node) => {
    const element = document.querySelector(node.target[0]);
    return excluded[rule] && element?.closest(excluded[rule]);
  };
  return found.violations
    .filter((rule) => ["serious", "critical"].includes(rule.impact))
    .flatMap((rule) => rule.nodes.filter((node) => !own(rule.id, node)).map(
      (node) => `${rule.id}: ${node.html.slice(0, 160)} (${[...node.any, ...node.all, ...node.none][0]?.message})`));
}"""
# Words of charts, which axe does not look at, but for those on a bar or a cell, which test_charts.py looks at.
FAINT_WORDS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (...colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const page = getComputedStyle(document.querySelector(".stApp")).backgroundColor;
  return [...document.querySelectorAll(".js-plotly-plot svg text")].flatMap((text) => {
    if (!text.checkVisibility() || text.closest(".heatmaplayer, .heatmap-label, .bartext-inside")) return [];
    const pair = [light(page), light(page, getComputedStyle(text).fill)].sort((a, b) => b - a);
    const ratio = pair[0] / pair[1];
    return ratio >= 4.5 ? [] : [`faint in a chart: ${text.textContent} (${ratio.toFixed(2)})`];
  });
}"""
# What reaches past the page's edge, unless it lies in a box of its own that scrolls, and words that are cut.
CUT = """() => {
  const scrolls = (element) => {
    for (let box = element.parentElement; box && !box.matches("[data-testid=stMain]"); box = box.parentElement)
      if (/auto|scroll/.test(getComputedStyle(box).overflowX) || box.matches("canvas")) return true;
    return false;
  };
  const found = document.documentElement.scrollWidth > innerWidth ? ["the page scrolls sideways"] : [];
  for (const element of document.querySelectorAll("[data-testid=stMain] *")) {
    const unseen = !element.checkVisibility() || element.closest("[inert]") || element.parentElement.clientWidth === 1;
    if (unseen) continue;  // folded, or for screen readers alone
    const { right, width } = element.getBoundingClientRect(), style = getComputedStyle(element);
    const name = `${element.dataset.testid ?? element.tagName}: ${element.textContent.slice(0, 60)}`;
    if (width > 1 && right > innerWidth + 1 && !scrolls(element)) found.push(`past the edge: ${name}`);
    const hides = /hidden|clip/.test(style.overflowX) && element.clientWidth > 1;
    if (hides && element.scrollWidth > element.clientWidth + 1 && element.textContent.trim() && !scrolls(element))
      found.push(`cut: ${name}`);
  }
  return found;
}"""
TAB_IN_SIGHT = """() => {
  const { left, right } = document.querySelector("[role=tab][aria-selected=true]").getBoundingClientRect();
  return left >= 0 && right <= innerWidth;
}"""
# No colour half-way to another, and none faded while a part that turns by itself is drawn anew.
AT_ONCE = """* { transition-property: opacity !important; animation: none !important; }
[data-stale=true], summary, summary > *, [role=tablist], [role=tab] { opacity: 1 !important; }"""


# --- the lab -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The runs folder, empty until ``filled``."""
    folder = tmp_path_factory.mktemp("lab") / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def url(place) -> Iterator[str]:
    with browser.server(place, place.parent / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def page(url):
    """One browser page for all tests: to load it takes longer than to look at a view."""
    with browser.launched() as started:
        opened = browser.watched_page(started, viewport=WIDE)
        load(opened, url)
        yield opened


def load(page, url: str) -> None:
    page.goto(url)
    page.evaluate(AXE.read_text())
    page.add_style_tag(content=AT_ONCE)
    rest(page)


@pytest.fixture(autouse=True)
def nothing_from_outside(page) -> Iterator[None]:
    """No request leaves the machine, and no error is said on the console."""
    yield
    errors = browser.errors(page)
    requested = page.requested[:]
    page.errors.clear()
    page.requested.clear()
    outside = [url for url in requested if not re.match(r"(data|blob):|(http|ws)://127\.0\.0\.1:", url)]
    assert outside == [] and errors == []


@pytest.fixture(scope="module")
def filled(place, micro, model_folder, page) -> dict[str, Run]:
    """A finished run of the engine, a copy of it at work, one made otherwise, and a run in each other state."""
    active_states(place)  # these are older than what the tests delete
    swept(place, trials=TRIALS)
    other_states(place)
    imports.from_path(model_folder, place)
    return engine_runs(place, micro)


def engine_runs(place: Path, micro) -> dict[str, Run]:
    done = store.create(place, micro(name="real", mask={"density": 0.4, "lr": 1e-9}, eval={"noise_floor": False}))
    assert pipeline.execute(done) == "done", done.log_path.read_text()
    other, live = (Run(shutil.copytree(done.folder, place / f"{done.id}-{name}")) for name in ("other", "live"))
    recipe = other.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1", 1))
    (live.folder / "evaluation.json").unlink()
    state = live.state()
    state.stage, state.step, state.of, state.rate, state.eta = "mask", 4, 10, 2.0, 3.0
    live.claim(state, "running")  # of this process, as long as it lives
    return {"done": done, "other": other, "live": live}


# --- small steps ---------------------------------------------------------------------------------------
def go(page, name: str) -> None:
    """To a page by its link, in the light theme at 1280 px."""
    look(page, "light", WIDE)
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
    arrive(page, name)


def tabs(page, *names: str) -> Iterator[str]:
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()
        act(page)
        yield name


def unfold(page, *names: str) -> None:
    """Open the expanders whose headings begin so."""
    for name in names:
        folds = page.locator("summary").filter(has=page.get_by_text(re.compile(f"^{name}")))
        folds.first.wait_for()
        for fold in folds.all():
            fold.click()
            act(page)


def choose(page, label: str, option: re.Pattern) -> None:
    browser.choose(page, label, option)
    act(page)


# --- each page, in each of its views -------------------------------------------------------------------
def home(page) -> Iterator[str]:
    yield "home"
    page.set_viewport_size(NARROW)  # where the navigation has to be opened
    page.get_by_role("button", name="Expand sidebar").click()
    yield "navigation"


def launch(page) -> Iterator[str]:
    unfold(page, "Begin from", "Layers", "Recipe as YAML", "More settings")
    yield "all of it open"


def sweep(page) -> Iterator[str]:
    yield from tabs(page, "Pareto front", "Parallel coordinates", "Importances", "Settings")
    page.get_by_text("New sweep", exact=True).click()
    page.get_by_role("button", name="Fill in an example").click()
    page.get_by_role("button", name="Start the sweep").wait_for()
    unfold(page, "The sweep as YAML")
    yield "a new one"
    page.get_by_text("Watch", exact=True).click()


def monitor(page) -> Iterator[str]:
    choose(page, "Run", re.compile("-live "))
    yield from tabs(page, "Masks", "Compliance", "Samples", "Log", "Recipe", "System", "Curves")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop this run").wait_for()
    yield "before a stop"
    page.keyboard.press("Escape")
    for state in ("queued", "paused", "stopping", "stopped", "failed", "interrupted", "unreadable"):
        choose(page, "Run", re.compile(state))
        if state == "failed":
            unfold(page, "Log with the traceback")
        yield state


def runs(page) -> Iterator[str]:
    yield "none ticked"
    page.get_by_test_id("data-grid-canvas").first.focus()
    for key in ("ArrowDown", "Shift+Space"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Delete").wait_for()
    unfold(page, "Trash")
    yield "one ticked"
    page.get_by_role("button", name="Untick").click()


def compare(page) -> Iterator[str]:
    choose(page, "Models", re.compile("real · N:M$"))
    page.keyboard.press("Escape")
    unfold(page, "Add a model folder")
    yield from tabs(page, "Figures", "Pareto", "Latency", "Curves", "Recipes", "Report", "Samples")


def models(page) -> Iterator[str]:
    unfold(page, "Layers", "Import a model")
    yield "of a run"
    yield from tabs(page, "Folder on this machine", "Hub id")
    page.get_by_text("Imported models", exact=True).click()
    act(page)
    yield "imported"


def system(page) -> Iterator[str]:
    page.get_by_text("Environment", exact=True).wait_for()
    unfold(page, "Checks and versions", r"\d+ of \d+ entries", "Licence")
    yield "all of it open"


def empty(page) -> Iterator[str]:
    for name in PAGES:
        go(page, name)
        yield name


PAGES = {
    "Home": home, "Launch": launch, "Sweep": sweep, "Monitor": monitor,
    "Runs": runs, "Compare": compare, "Models": models, "System": system,
}  # fmt: skip


def faults(page, views: Iterator[str]) -> list[str]:
    """What is wrong in each view.

    A view is opened as the one before was left, so that the page is laid out anew but once a view.
    """
    found, looks = [], of_the_day()
    for view in views:
        for theme, size in looks:
            look(page, theme, size)
            found += [f"{view}, {theme}, {size['width']} px: {fault}" for fault in lasting_faults(page)]
        looks.reverse()
    return found


def lasting_faults(page, tries: int = 10) -> list[str]:
    """What is wrong and stays so: a table takes the page's new width a moment after the page has it."""
    for left in reversed(range(tries)):
        wrong = page.evaluate(RUN_AXE, EXCLUDED) + page.evaluate(FAINT_WORDS) + page.evaluate(CUT)
        if wrong and left:
            page.wait_for_timeout(500)
            rest(page)
        else:
            break
    return wrong


def of_the_day() -> list[tuple[str, dict[str, int]]]:
    """Themes and sizes: at 1280 px the light theme and at 390 px the dark one, on odd days the other way round, and in
    the nightly run all four."""
    turn = os.environ["PRUNEDM_SLOW"]
    even, odd = [("light", WIDE), ("dark", NARROW)], [("light", NARROW), ("dark", WIDE)]
    if turn == "all":
        return even + odd
    return odd if turn.isdecimal() and int(turn) % 2 else even


def look(page, theme: str, size: dict[str, int]) -> None:
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size(size)
    page.wait_for_function(f"getComputedStyle(document.querySelector('.stApp')).colorScheme === '{theme}'")
    rest(page)


@pytest.mark.timeout(600)
def test_pages_of_an_empty_lab(page):
    """Stands first: the folder is filled after it."""
    found = faults(page, empty(page))
    assert not found, "\n".join(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PAGES)
def test_page(page, filled, name):
    go(page, name)
    found = faults(page, PAGES[name](page))
    assert not found, "\n".join(found)


@pytest.mark.timeout(120)
def test_the_login_page(page):
    """As the gate answers it, after a wrong password."""
    with closing(page.context.new_page()) as gate:
        gate.set_content(login.PAGE.format(title="Log in", fields=f"{login.ASK}<p>This is not the password.</p>"))
        gate.evaluate(AXE.read_text())
        gate.set_viewport_size(NARROW)
        for theme in ("light", "dark"):
            gate.emulate_media(color_scheme=theme)
            assert gate.evaluate(RUN_AXE, EXCLUDED) == [], theme
        assert gate.evaluate("document.documentElement.scrollWidth <= innerWidth")


# --- by keyboard ---------------------------------------------------------------------------------------
@pytest.mark.timeout(300)
def test_the_tab_that_a_link_opens_is_in_sight_at_390_px(page, url, filled):
    look(page, "light", NARROW)
    for address, name in ((f"monitor?run={filled['done'].id}&tab=System", "System"), ("compare?view=Report", "Report")):
        load(page, f"{url}/{address}")
        page.get_by_role("tab", name=name, selected=True).wait_for()
        page.wait_for_function(TAB_IN_SIGHT)


@pytest.mark.timeout(300)
def test_a_heatmap_of_layers_has_half_of_a_narrow_window(page, url, filled):
    look(page, "light", NARROW)
    load(page, f"{url}/monitor?run={filled['done'].id}&tab=Masks")
    page.locator("[aria-label*='by layer, at'] .heatmaplayer image").wait_for(state="attached")
    share = page.evaluate("""() => {
      const plot = document.querySelector("[aria-label*='by layer, at']");
      return plot.querySelector(".heatmaplayer image").getBoundingClientRect().width / plot.clientWidth;
    }""")
    assert share > 0.5


@pytest.mark.timeout(900)
def test_the_keyboard_is_enough(page, url, filled):
    load(page, url)
    look(page, "light", WIDE)
    tab_to(page, "^button .*Run the demo$")
    for name in BY_KEYS:
        tab_to(page, f"^navigation link {name}$")
        press(page, "Enter")
        arrive(page, name)
        try:
            BY_KEYS[name](page, filled)
        except (AssertionError, playwright.TimeoutError, pytest.fail.Exception):
            page.reload()  # about once in five walks a press is lost, why is not known; what fails again is no chance
            arrive(page, name)
            BY_KEYS[name](page, filled)
