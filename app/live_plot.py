"""A plotly chart that updates in place and keeps its zoom.

``st.plotly_chart`` remounts whenever its data changes and so loses the zoom; this component calls
``Plotly.react`` on the same node. plotly.js is served from this machine, out of the plotly package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly
import streamlit as st

from app import live
from prunedm.charts import Figure

STATIC = Path(__file__).parent / "static" / "plotly.min.js"
SOURCE = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"

# Shared by every component that draws with plotly. Zoom is kept by view (layout.uirevision) as long as the page is
# open: plotly forgets it with the chart, and a chart goes when its tab, page or run is left.
READY = """
const ready = () => window.prunedmPlotly ??= new Promise((done, fail) => {
  if (window.Plotly) return done(window.Plotly);
  const tag = document.createElement("script");
  tag.src = new URL("app/static/plotly.min.js", document.baseURI).href;
  tag.onload = () => done(window.Plotly);
  tag.onerror = fail;
  document.head.appendChild(tag);
});
const views = (window.prunedmViews ??= new Map());
const recall = (layout) => {
  for (const [axis, range] of Object.entries(views.get(layout.uirevision) ?? {}))
    if (layout[axis]) Object.assign(layout[axis], { range, autorange: false });
};
const remember = (node, layout) => {
  node.view = layout.uirevision;
  if (node.remembers) return;
  node.remembers = true;
  node.on("plotly_relayout", () => {
    const zoomed = {};
    for (const [name, axis] of Object.entries(node._fullLayout))
      if (/^[xy]axis\\d*$/.test(name) && node.layout[name]?.range && node.layout[name].autorange === false)
        zoomed[name] = [...axis.range];
    views.set(node.view, zoomed);
  });
};
// In a narrow column a scale of colours lies above the chart: beside it, it would take the room of what it explains.
const fit = ({ data, layout }, width) => {
  const scales = data.filter((trace) => trace.colorbar);
  if (width >= 560 || scales.length !== 1) return { data, layout };
  Object.assign(scales[0].colorbar,
    { orientation: "h", x: 0.5, xanchor: "center", y: 1, yanchor: "bottom", len: 1, thickness: 10, nticks: 4 });
  layout.margin = { ...layout.margin, l: 10, r: 20, t: (layout.margin?.t ?? 40) + 50 };
  return { data, layout };
};
const draw = async (node, data, layout) => {
  const Plotly = await ready();
  recall(layout);
  await Plotly.react(node, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false });
  remember(node, layout);
  node.dataset.updates = 1 + Number(node.dataset.updates || 0);
};
"""
JS = (
    READY
    + live.FOLLOW
    + """
export default async function ({ data, parentElement, setTriggerValue }) {
  const node = parentElement.querySelector(".live");
  // A chart that was drawn once and is not in sight (further down, in another tab) waits with its next drawing until
  // it is; one in a tab that is not shown has no size yet.
  const redraw = () => {
    node.due = !node.clientWidth || (node.dataset.updates && (document.hidden || node.outOfSight));
    const figure = fit(JSON.parse(node.figure), node.clientWidth);
    return node.due ? undefined : draw(node, figure.data, figure.layout);
  };
  const show = ({ figure, alt }) => {
    node.figure = figure;
    node.setAttribute("role", "figure");
    node.setAttribute("aria-label", alt);
    node.style.minHeight = (JSON.parse(figure).layout.height || 320) + "px";
    return redraw();
  };
  whenInSight(node, () => { if (node.due) redraw(); goOn(node); });
  follow(node, data.part, show, () => setTriggerValue("gone", true));
  return show(data.content);
}
"""
)


PREPARE = (
    READY
    + """
// A first chart, out of sight, has the browser compile what every chart needs.
const rehearse = async () => {
  const Plotly = await ready();
  if (document.querySelector(".js-plotly-plot")) return;
  const node = document.createElement("div");
  node.setAttribute("aria-hidden", "true");
  node.style.cssText = "position: fixed; left: -9999px; visibility: hidden";
  document.body.append(node);
  await Plotly.newPlot(node, [{ y: [0, 1], mode: "lines" }], { width: 400, height: 300 });
  Plotly.purge(node);
  node.remove();
};
export default function () {
  window.prunedmRehearsed ??= (window.requestIdleCallback ?? setTimeout)(rehearse);
}
"""
)


def install() -> None:
    """Put plotly.js where Streamlit's static serving finds it, once for each version."""
    if not STATIC.exists() or STATIC.stat().st_size != SOURCE.stat().st_size:
        STATIC.parent.mkdir(exist_ok=True)
        part = STATIC.with_suffix(".part")
        shutil.copyfile(SOURCE, part)
        part.replace(STATIC)


def prepare() -> None:
    """Have the browser load plotly when it rests: the first page with a chart need not wait for it."""
    install()
    st.components.v2.component("prunedm_prepare_plot", html="<div></div>", js=PREPARE, isolate_styles=False)(
        key="prepare-plot"
    )


def live_plot(figure: Figure, key: str, alt: str) -> None:
    """Draw or update the chart with this key; ``alt`` says in words what it shows."""
    _mount(key, _content(figure, alt))


def follow(key: str, make: Callable[[], tuple[Figure, str]], every: float | None) -> None:
    """A chart (and what it shows in words) that is made anew every so many seconds; None: once."""
    look = lambda: _content(*make())  # noqa: E731
    content = look()
    _mount(key, content, live.offer(key, look, every, content) if every else None)


def _content(figure: Figure, alt: str) -> dict[str, str]:
    return {"figure": json.dumps(figure), "alt": alt}


def _mount(key: str, content: dict[str, str], part: dict[str, Any] | None = None) -> None:
    # Registered in each run, as a script's top level would be: the registry belongs to the server.
    install()
    component = st.components.v2.component(
        "prunedm_live_plot", html="<div class='live live-plot'></div>", js=JS, isolate_styles=False
    )
    component(key=key, data={"content": content, "part": part}, on_gone_change=lambda: None)
