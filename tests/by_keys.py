"""The lab's pages worked by keyboard alone, and the small steps in a browser's page that this takes."""

from __future__ import annotations

import io
import re
from contextlib import suppress

import browser
import numpy as np
import pytest
from PIL import Image

from prunedm import store
from prunedm.records import ACTIVE
from prunedm.store import Run

playwright = pytest.importorskip("playwright.sync_api")
expect, TimeoutError = playwright.expect, playwright.TimeoutError

# The script rests, nothing is still faded for being drawn anew, and every chart in sight is drawn, at the page's width.
AT_REST = """() => {
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());
  return document.querySelector("[data-testid=stApp][data-test-script-state=notRunning]")
    && !shown("[data-testid=stSkeleton], [data-testid=stSpinner]").length
    && !document.getAnimations().some((one) => one instanceof CSSTransition && one.transitionProperty === "opacity")
    && shown(".live-plot, .picture, [data-testid=stPlotlyChart]").every((plot) => {
      const drawn = plot.querySelector(".main-svg");
      return drawn && drawn.getBoundingClientRect().width <= plot.clientWidth + 1;
    });
}"""
FOCUSED = """() => {
  let at = document.activeElement;
  while (at.shadowRoot?.activeElement) at = at.shadowRoot.activeElement;
  window.focused = at;
  const place = at.closest("[data-testid=stSidebarNav]") ? "navigation " : "";
  const role = at.getAttribute("role") ?? { A: "link", BUTTON: "button", INPUT: at.type }[at.tagName] ?? at.tagName;
  const { x, y, width, height } = at.getBoundingClientRect();
  return [`${place}${role} ${at.ariaLabel ?? at.textContent.trim()}`, { x, y, width, height }];
}"""


def rest(page) -> None:
    page.wait_for_function(AT_REST)


def act(page) -> None:
    """Wait for what a click sets off."""
    browser.taken(page)
    rest(page)


def arrive(page, name: str) -> None:
    page.wait_for_function("name => document.title.startsWith(name)", arg=name)
    rest(page)


def tab_to(page, name: str) -> None:
    """Press Tab until the focus is on what bears this role and name; where it is must show."""
    for _ in range(250):
        page.keyboard.press("Tab")
        if re.search(name, page.evaluate(FOCUSED)[0]) and stays(page, name):
            return
    pytest.fail(f"Tab does not reach {name}")


def stays(page, name: str, tries: int = 10) -> bool:
    """Whether the focus stays there, where it must show. What the field before has set off, or a live part of the page,
    may move it while it is looked at: it is looked at again."""
    for _ in range(tries):
        rest(page)
        found, box = page.evaluate(FOCUSED)
        if not re.search(name, found):
            return False
        if focus_shows(page, box):
            return True
        page.wait_for_timeout(300)
    raise AssertionError(f"the focus on {found} at {box} is not seen")


def focus_shows(page, box: dict[str, float]) -> bool:
    """Whether the element and what is around it look otherwise than without the focus."""
    left, top = max(0, box["x"] - 8), max(0, box["y"] - 8)
    clip = {"x": left, "y": top, "width": box["width"] + 16, "height": box["height"] + 16}
    with_focus = pixels(page, clip)
    page.evaluate("focused.blur()")
    without = pixels(page, clip)
    page.evaluate("focused.focus()")
    return int((np.abs(with_focus - without).max(axis=-1) > 40).sum()) >= 60


def pixels(page, clip: dict[str, float]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"), dtype=int)


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def works(page, name: str, effect, state: str = "visible") -> None:
    """Enter, on what bears this name, has its effect. A press may be lost while a part of the page is drawn anew, with
    the focus or not: whoever sees that nothing happens goes there and presses again."""
    for _ in range(4):
        if not re.search(name, page.evaluate(FOCUSED)[0]):
            tab_to(page, name)
        press(page, "Enter")
        with suppress(TimeoutError):
            effect.wait_for(state=state, timeout=browser.PATIENCE / 4)
            return
    said = page.get_by_test_id("stMain").inner_text()[:2000]
    pytest.fail(f"Enter on {name} does nothing; the focus is on {page.evaluate(FOCUSED)}, and the page says: {said}")


def monitor_by_keys(page, filled: dict[str, Run]) -> None:
    tab_to(page, "^combobox Run$")
    for name in ("done", "live"):
        pick_by_keys(page, filled[name].id)
        page.wait_for_url(re.compile(f"run={filled[name].id}$"))
        act(page)
    opens_and_closes(page, "^button Stop", "Stop this run")
    works(page, "^button Pause$", page.get_by_role("button", name="Pausing…"))
    assert filled["live"].pause_requested()
    filled["live"].clear_pause()
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    rest(page)
    next_tab(page, "Curves", "Masks")
    page.get_by_role("combobox", name="Layer", exact=True).wait_for()


def next_tab(page, name: str, right: str) -> None:
    """From a tab to the one on its right, which opens and has the focus."""
    tab_to(page, f"^tab {name}$")
    press(page, "ArrowRight")
    opened = page.get_by_role("tab", name=right, selected=True)
    opened.wait_for()
    page.wait_for_function(
        "name => document.activeElement.matches('[role=tab]') && document.activeElement.textContent === name", arg=right
    )
    rest(page)


def pick_by_keys(page, name: str) -> None:
    """Open the list that has the focus, go to its top, and down to the option that begins so."""
    press(page, "ArrowDown", *["ArrowUp"] * 40)
    for _ in range(40):
        option = page.evaluate("document.getElementById(focused.getAttribute('aria-activedescendant'))?.textContent")
        if option and f"{option} ".startswith(f"{name} "):
            break
        press(page, "ArrowDown")
    press(page, "Enter")


def compare_by_keys(page, filled: dict[str, Run]) -> None:
    tab_to(page, "^range .* on the left, .* on the right")
    cut = page.locator(".slide .over")
    before = cut.get_attribute("style")
    press(page, *["ArrowLeft"] * 5)
    expect(cut).not_to_have_attribute("style", before)


def runs_by_keys(page, filled: dict[str, Run]) -> None:
    for _ in range(4):
        tab_to(page, "^CANVAS ")
        press(page, "ArrowDown", "Shift+Space")
        with suppress(TimeoutError):
            page.get_by_role("button", name="Untick").wait_for(timeout=browser.PATIENCE / 4)
            break
    rest(page)
    opens_and_closes(page, "^button Delete", "Move to the trash")
    before = ids(filled)
    works(page, "^button Delete", page.get_by_role("button", name="Move to the trash"))
    works(page, "^button Move to the trash$", page.get_by_role("button", name="Undo"))
    rest(page)
    assert len(before - ids(filled)) == 1
    works(page, "^button Undo$", page.get_by_role("button", name="Undo"), "hidden")
    rest(page)
    assert ids(filled) == before


def ids(filled: dict[str, Run]) -> set[str]:
    return {run.id for run in store.all_runs(filled["done"].folder.parent)}


TYPED = {  # fields of Launch from the top down, and what is typed into them
    "text Name": "by-keys", "number Fine-tune steps": 5, "number Steps": 4, "number Recovery steps": 3,
    "number Images": 8, "number Eta": 0.5,
}  # fmt: skip


def launch_by_keys(page, filled: dict[str, Run]) -> None:
    """A run of one's own from the form; Monitor opens with it."""
    before = ids(filled)
    for field, value in TYPED.items():
        tab_to(page, f"^{field}$")
        press(page, "Control+A")
        page.keyboard.type(str(value))
    press(page, "Tab")
    act(page)
    press(page, "Control+Enter")
    page.wait_for_url(re.compile(r"/monitor\?run="))
    (new,) = ids(filled) - before
    run = store.find(filled["done"].folder.parent, new)
    run.request_stop()
    recipe = run.recipe()
    assert (recipe.name, recipe.prune.finetune_steps, recipe.eval.images, recipe.eval.eta) == ("by-keys", 5, 8, 0.5)
    assert (recipe.mask.steps, recipe.mask.recover_steps) == (4, 3)
    while run.state().status in ACTIVE:
        page.wait_for_timeout(200)


def sweep_by_keys(page, filled: dict[str, Run]) -> None:
    """From chart to chart, then a new sweep up to the button that would start it."""
    next_tab(page, "Pareto front", "Parallel coordinates")
    next_tab(page, "Parallel coordinates", "Importances")
    tab_to(page, "^radio Watch$")
    press(page, "ArrowRight", "Space")
    page.get_by_role("button", name="Fill in an example").wait_for()
    rest(page)
    works(page, "^button Fill in an example$", page.get_by_role("button", name="Start the sweep"))
    rest(page)
    tab_to(page, "^number Trials$")
    press(page, "Control+A")
    page.keyboard.type("4")
    press(page, "Tab")
    act(page)
    tab_to(page, "^button .*Start the sweep")


def models_by_keys(page, filled: dict[str, Run]) -> None:
    """Another variant, another format, and a folder that is none."""
    tab_to(page, "^radio dense$")
    press(page, "ArrowRight", "Space")
    page.get_by_role("radio", name="structured", checked=True).wait_for()
    rest(page)
    tab_to(page, "^combobox Format$")
    pick_by_keys(page, "packed")
    act(page)
    page.get_by_text("one safetensors file that stores kept weights only").wait_for()
    works(page, "^SUMMARY .*Import a model$", page.get_by_role("tab", name="Zip file"))
    rest(page)
    next_tab(page, "Zip file", "Folder on this machine")
    tab_to(page, "^text Path of the model folder$")
    page.keyboard.type("/nowhere")
    press(page, "Tab")
    act(page)
    works(page, "^button Add the folder$", page.get_by_text("/nowhere"))
    rest(page)


def system_by_keys(page, filled: dict[str, Run]) -> None:
    page.get_by_text("Checks and versions").wait_for()
    rest(page)
    works(page, "^SUMMARY .*Checks and versions", page.locator("details[open] [data-testid=stDataFrame]").first)
    rest(page)
    tab_to(page, "^text Search the glossary$")
    page.keyboard.type("compliance")
    press(page, "Enter")
    act(page)
    page.get_by_text(re.compile(r"^[1-9] of \d+ entries")).wait_for()


def opens_and_closes(page, name: str, within: str) -> None:
    """What asks first opens by Enter and closes by Escape; the focus is then where it was."""
    asks = page.get_by_role("button", name=within)
    works(page, name, asks)
    press(page, "Escape")
    asks.wait_for(state="hidden")
    for _ in range(1200):
        if re.search(name, page.evaluate(FOCUSED)[0]):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"the focus is on {page.evaluate(FOCUSED)[0]} and not back on {name}")


BY_KEYS = {
    "Monitor": monitor_by_keys, "Compare": compare_by_keys, "Runs": runs_by_keys, "Sweep": sweep_by_keys,
    "Models": models_by_keys, "System": system_by_keys, "Launch": launch_by_keys,
}  # fmt: skip
