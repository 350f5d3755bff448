"""A plotly chart that updates in place and keeps its zoom.

``st.plotly_chart`` remounts whenever its data changes and so loses the zoom; this component calls
``Plotly.react`` on the same node. plotly.js is served from this machine, out of the plotly package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import plotly
import streamlit as st

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
    + """
export default async function ({ data, parentElement }) {
  const node = parentElement.querySelector(".live-plot");
  const figure = JSON.parse(data.figure);
  node.setAttribute("role", "figure");
  node.setAttribute("aria-label", data.alt);
  node.style.minHeight = (figure.layout.height || 320) + "px";
  // A chart that was drawn once and is not in sight (further down, in another tab) waits with its next drawing until
  // it is; one in a tab that is not shown has no size yet.
  node.redraw = () => {
    node.due = !node.clientWidth || (node.dataset.updates && (document.hidden || !node.inSight));
    return node.due ? undefined : draw(node, figure.data, figure.layout);
  };
  node.sight ??= new IntersectionObserver((looks) => {
    node.inSight = looks.at(-1).isIntersecting;
    if (node.due) node.redraw();
  });
  node.sight.observe(node);
  window.prunedmSeen ??= document.addEventListener("visibilitychange", () => {
    for (const each of document.querySelectorAll(".live-plot")) if (each.due) each.redraw();
  }) ?? true;
  return node.redraw();
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


def _component():
    """Registered in each run, as a script's top level would be: the registry belongs to the server."""
    install()
    return st.components.v2.component(
        "prunedm_live_plot", html="<div class='live-plot'></div>", js=JS, isolate_styles=False
    )


def live_plot(figure: Figure, key: str, alt: str) -> None:
    """Draw or update the chart with this key; ``alt`` says in words what it shows."""
    _component()(key=key, data={"figure": json.dumps(figure), "alt": alt})
