"""A layer's mask through time: played, stepped and zoomed in the browser, with no answer of the server between.

One chart of two heatmaps whose axes move together: what is kept, and what differs from the initial mask. All
frames travel at once (a byte a cell); the server hears only where the reader stopped.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np
import streamlit as st

from app import live_plot
from prunedm import charts

HTML = """
<div class="mask-player">
  <div class="picture" role="figure"></div>
  <div class="controls">
    <button type="button" class="play">▶ Play</button>
    <input type="range" min="0" step="1" aria-label="Snapshot">
    <span class="said"></span>
    <label>Speed <select aria-label="Speed">
      <option value="1">1 a second</option><option value="4" selected>4 a second</option>
      <option value="12">12 a second</option>
    </select></label>
  </div>
</div>
"""
CSS = """
.mask-player .controls{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin-top:.75rem;
  font:14px var(--st-font,system-ui),sans-serif}
.mask-player .controls>*{color:var(--st-text-color)}
.mask-player input{flex:1 1 12rem;min-width:8rem;accent-color:var(--st-primary-color)}
.mask-player button,.mask-player select{font:inherit;padding:.3rem .7rem;border-radius:.4rem;cursor:pointer;
  color:var(--st-text-color);background:var(--st-background-color);border:1px solid #808495}
.mask-player .said{flex:0 1 22rem}
"""
JS = (
    live_plot.READY
    + """
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const frame = (all, number, [rows, columns]) => Array.from({ length: rows }, (_, r) => Float32Array.from(
  all.subarray((number * rows + r) * columns, (number * rows + r + 1) * columns), (v) => v / 255));

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".mask-player");
  const find = (name) => root.querySelector(name);
  const node = find(".picture"), said = find(".said");
  const play = find(".play"), bar = find("input"), speed = find("select");
  const me = (root.me ??= { at: -1, timer: null });
  const kept = bytes(data.kept), changed = bytes(data.changed), last = data.steps.length - 1;
  // The end is followed; whoever went back stays at that step, in another layer too.
  const stayed = me.steps && me.at < me.steps.length - 1 ? data.steps.indexOf(me.steps[me.at]) : last;
  me.steps = data.steps;
  bar.max = last;
  bar.disabled = play.disabled = last === 0;

  const show = async (number) => {
    me.at = number;
    bar.value = number;
    const words = `step ${data.steps[number]} (${number + 1} of ${last + 1}) · ${data.words[number]}`;
    said.textContent = words;
    bar.setAttribute("aria-valuetext", words);
    node.setAttribute("aria-label", `${data.alt}, ${words}`);
    if (!node.clientWidth) return;
    const figure = JSON.parse(node.clientWidth < 560 ? data.narrow : data.wide);
    figure.data[0].z = frame(kept, number, data.shape);
    figure.data[1].z = frame(changed, number, data.shape);
    node.style.minHeight = `${figure.layout.height}px`;
    await draw(node, figure.data, figure.layout);
  };
  const tell = () => setStateValue("step", data.steps[me.at]);
  const stop = () => {
    clearInterval(me.timer);
    me.timer = null;
    play.textContent = "▶ Play";
  };
  const go = () => {
    play.textContent = "❚❚ Pause";
    let next = me.at >= last ? 0 : me.at;
    me.timer = setInterval(() => {
      show(next);
      if (next++ >= last) { stop(); tell(); }
    }, 1000 / Number(speed.value));
  };
  play.onclick = () => { if (me.timer) { stop(); tell(); } else go(); };
  speed.onchange = () => { if (me.timer) { stop(); go(); } };
  bar.oninput = () => { stop(); show(Number(bar.value)); };
  bar.onchange = tell;
  if (me.timer) { stop(); show(stayed < 0 ? last : stayed).then(go); }
  else show(stayed < 0 ? last : stayed);
  // In a tab that is not shown a chart has no size: draw it when it gets one.
  me.watcher?.disconnect();
  me.watcher = new ResizeObserver(() => {
    if (node.clientWidth === me.width) return;
    me.width = node.clientWidth;
    show(me.at);
  });
  me.watcher.observe(node);
  return () => { stop(); me.watcher.disconnect(); };
}
"""
)


@dataclass(frozen=True)
class Frames:
    """Snapshots of one layer, oldest first: ``kept`` and ``changed`` are ``[T, rows, columns]`` shares in [0, 1]."""

    steps: list[int]
    kept: np.ndarray
    changed: np.ndarray


def player(frames: Frames, layer: str, view: str) -> int:
    """Draw or update the player; returns the step that the reader rests at (the last one until they go back)."""
    live_plot.install()
    component = st.components.v2.component("prunedm_mask_player", html=HTML, css=CSS, js=JS, isolate_styles=False)
    words = [f"{k.mean():.1%} kept, {c.mean():.1%} of the weights changed" for k, c in zip(frames.kept, frames.changed)]
    wide, narrow = (charts.mask_pair(float(frames.changed.max()), f"{view}/{layer}", side) for side in (False, True))
    data = {
        "steps": frames.steps,
        "words": words,
        "kept": _bytes(frames.kept),
        "changed": _bytes(frames.changed),
        "shape": list(frames.kept.shape[1:]),
        "wide": json.dumps(wide),
        "narrow": json.dumps(narrow),
        "alt": f"Mask of {layer}: share kept, and share changed since the initial mask",
    }
    found = component(key="mask-player", data=data, default={"step": None}, on_step_change=lambda: None)
    return found.step if found.step in frames.steps else frames.steps[-1]


def _bytes(shares: np.ndarray) -> str:
    return base64.b64encode((shares * 255).round().astype(np.uint8).tobytes()).decode()
