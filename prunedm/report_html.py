"""Parts of the report's page: escaped tables, charts with a table beside them, the frame. Nothing is fetched.

Everything that is not :class:`Html` is foreign and escaped. plotly.js is written into the page, once, and only
where there is a chart. The page forbids itself all requests (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

Figure = dict[str, Any]
TAGS = re.compile(r"<[^>]*>")
FIGURE = re.compile(r"([^\[(]+)(\[[^\]]*\])?\s*(\([^()]*\))?")
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NO_BODY = "The charts need JavaScript; the tables beside them hold the same figures."


class Html(str):
    """Text that is markup already."""


def esc(value: Any) -> Html:
    """Anything as HTML: markup as it is, text escaped, an absent figure as n/a."""
    return value if isinstance(value, Html) else Html(html.escape("n/a" if value is None else str(value)))


def join(*parts: Any) -> Html:
    return Html("".join(esc(part) for part in parts if part is not None))


def tag(name: str, content: Any, **attributes: Any) -> Html:
    """One element; ``class_`` is the attribute class, a dash is written as an underscore."""
    given = "".join(f' {key.strip("_").replace("_", "-")}="{html.escape(str(v))}"' for key, v in attributes.items())
    return Html(f"<{name}{given}>{esc(content)}</{name}>")


def paragraph(text: Any, kind: str = "") -> Html:
    return tag("p", text, class_=kind) if kind else tag("p", text)


def missing(text: str) -> Html:
    """Says what a section lacks."""
    return paragraph(text, "missing")


def bullets(items: Sequence[Any]) -> Html:
    return tag("ul", join(*(tag("li", item) for item in items))) if items else Html("")


def table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], name: str, over: Sequence[tuple[str, int]] = (), kind: str = ""
) -> Html:
    """A table in a box of its own that scrolls where the page is narrower; ``name`` is read aloud.

    over: a first line of headings, each over so many columns. The first column names the rows.
    """
    words = [_is_words([row[i] for row in rows if len(row) > i]) for i in range(len(head))]
    lines = [tag("tr", join(*(tag("th", text, colspan=span, scope="colgroup") for text, span in over)))] if over else []
    lines.append(tag("tr", join(*(_cell("th", cell, w, scope="col") for cell, w in zip(head, words)))))
    body = [
        tag("tr", join(tag("th", row[0], scope="row"), *(_cell("td", c, w) for c, w in zip(row[1:], words[1:]))))
        for row in rows
    ]
    content = join(tag("thead", join(*lines)), tag("tbody", join(*body)))
    box = f"scroll {kind}".strip()
    return tag("div", tag("table", content), class_=box, tabindex=0, role="region", aria_label=name)


def _is_words(cells: Sequence[Any]) -> bool:
    """Whether a column is of words, which are set from the left; figures are from the right."""
    texts = [TAGS.sub("", esc(cell)) for cell in cells]
    known = [text for text in texts if text not in ("n/a", "")]
    return bool(known) and all(text[0].isalpha() for text in known)


def _cell(name: str, value: Any, words: bool, **attributes: Any) -> Html:
    return tag(name, value, class_="words", **attributes) if words else tag(name, value, **attributes)


def figure_cell(text: str) -> Html:
    """A figure, and beneath it in small print its interval and its difference from dense."""
    found = FIGURE.fullmatch(text)
    if found is None:
        return esc(text)
    value, *rest = (part.strip() if part else "" for part in found.groups())
    return join(value, *(tag("small", part) for part in rest if part))


def command(text: str) -> Html:
    """A command line that breaks between its words only."""
    return tag("code", Html(" ".join(tag("span", word) for word in text.split())))


def folded(summary: str, content: Any) -> Html:
    return tag("details", join(tag("summary", summary), content))


def chart(figure: Figure, title: str, alt: str, data: Html, note: Any = None) -> Html:
    """A plotly figure under its title, with what it shows in words (``alt``) and its figures in a folded table."""
    caption = tag("figcaption", join(tag("strong", title), *([tag("span", note)] if note else [])))
    layout = figure["layout"]
    if layout.get("showlegend") is False or (len(figure["data"]) == 1 and not layout.get("showlegend")):
        figure = figure | {"layout": layout | {"margin": layout["margin"] | {"t": 12}}}  # no legend to make room for
    height = layout.get("height", 320)
    node = tag("div", "", class_="chart", role="img", aria_label=alt, style=f"min-height:{height}px")
    content = tag("script", Html(embedded(figure)), type="application/json")
    return tag("figure", join(caption, node, content, folded("The same figures as a table", data)))


def embedded(value: Any) -> str:
    """JSON that cannot end the script it stands in; what is no number is null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(image: Image.Image, alt: str, width: int) -> Html:
    """An image in the page itself, as small as it is and enlarged by the browser without smoothing."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    height = round(width * image.height / image.width)
    kind = "pixels" if width >= image.width else ""
    return Html(f'<img class="{kind}" alt="{html.escape(alt)}" src="{source}" width="{width}" height="{height}">')


def page(title: str, intro: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The document: contents, then the sections (anchor, heading, content)."""
    links = join(*(tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in sections))
    contents = tag("nav", join(tag("h2", "Contents"), tag("ol", links)), aria_label="Contents")
    parts = [tag("section", join(tag("h2", name), content), id=anchor) for anchor, name, content in sections]
    body = join(*parts)
    scripts = ""
    if '<div class="chart"' in body:
        scripts = f"<noscript><p>{NO_BODY}</p></noscript><script>{_plotly()}</script><script>{SCRIPT}</script>"
    header, main = tag("header", join(tag("h1", title), intro)), tag("main", body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{header}\n{contents}\n{main}\n{scripts}\n</body>\n</html>\n"
    )


def _plotly() -> str:
    source = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return within_script(source.read_text(encoding="utf-8"))


def within_script(source: str) -> str:
    """JavaScript as it may stand in a script element: what would end the element is written otherwise."""
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


SCRIPT = """
const charts = [...document.querySelectorAll(".chart")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = { responsive: true, displaylogo: false, showSendToCloud: false };
function ink() { return getComputedStyle(document.body).color; }
function draw(node) {
  const figure = JSON.parse(node.nextElementSibling.textContent);
  figure.layout.font = { ...figure.layout.font, color: ink() };
  if (node.clientWidth < 600) figure.data.forEach((trace) => {
    delete trace.texttemplate;  // the cells of a heatmap are narrower than their figures
    if (trace.colorbar) trace.colorbar.thickness = 10;
  });
  Plotly.react(node, figure.data, figure.layout, shown);
}
charts.forEach(draw);
dark.addEventListener("change", () => charts.forEach(draw));
const tables = [...document.querySelectorAll("details")].filter((node) => !node.closest("figure") && !node.open);
addEventListener("beforeprint", () => {
  tables.forEach((node) => { node.open = true; });
  charts.forEach((node) => {
    const width = node.closest(".pair") ? 325 : 660, height = Math.min(node.layout.height, 880);  // within a sheet
    const small = width < 600 ? { "legend.font.size": 9, "margin.t": node.layout.margin.t + 14 } : {};
    node.style.minHeight = `${height}px`;
    Plotly.relayout(node, { width, height, "font.color": "#1a1f2b", ...small });
  });
});
addEventListener("afterprint", () => {
  tables.forEach((node) => { node.open = false; });
  charts.forEach((node) => {
    delete node.layout.width;
    draw(node);
    node.style.minHeight = `${node.layout.height}px`;
    Plotly.Plots.resize(node);
  });
});
"""

STYLE = """
:root{--ink:#1a1f2b;--soft:#566070;--line:#d5dae2;--panel:#f4f6f9;--paper:#fff;--link:#0a58a8;--warn:#fff4d6}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e4e8ef;--soft:#a3acba;--line:#2e3644;--panel:#171c26;--paper:#0e1117;--link:#79b8ff;--warn:#3a3115}}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--paper);margin:0;
padding:1.5rem 1rem 4rem;overflow-wrap:break-word}
header,main{max-width:66rem;margin:0 auto;min-width:0}
nav{max-width:66rem;margin:.75rem auto 1rem;padding:.75rem 1rem;background:var(--panel);border-radius:.5rem}
nav h2{font-size:1rem;margin:0;border:0;padding:0}
nav ol{margin:.25rem 0 0;padding-left:1.5rem;columns:14rem}
a{color:var(--link)}
h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}
section{scroll-margin-top:1rem}
.note,figcaption span,summary{color:var(--soft)}
.missing,.warn{background:var(--warn);padding:.5rem .75rem;border-radius:.4rem}
.missing{background:var(--panel);color:var(--soft)}
.scroll{overflow:auto;margin:.75rem 0;max-width:100%}
.tall{max-height:30rem;border:1px solid var(--line);border-radius:.4rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.35rem .7rem;text-align:right;vertical-align:top}
td{white-space:nowrap}
.words{text-align:left}
td.words{white-space:normal;min-width:7rem}
td small{display:block;color:var(--soft);font-size:.82em}
thead th{vertical-align:bottom;background:var(--paper)}
thead th[scope=colgroup]{text-align:center}
.tall thead th{position:sticky;top:0}
th:first-child{text-align:left;font-weight:500;min-width:9rem}
tbody th{position:sticky;left:0;background:var(--paper);max-width:22rem}
pre{background:var(--panel);padding:1rem;overflow:auto;border-radius:.4rem;font-size:.85rem}
code{font-size:.9em}code span{white-space:nowrap}
figure{margin:1rem 0;min-width:0}
figcaption span{display:block;font-size:.9em}
.chart{width:100%}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:0 1.5rem}
.absent{display:block;white-space:normal;min-width:12rem;text-align:left;color:var(--soft)}
.samples td{padding:.15rem;min-width:0}
.samples thead th{text-align:center}
.recipe{columns:17rem;column-gap:2rem}
img{display:block;max-width:none}
.pixels{image-rendering:pixelated}
@media (min-width:90rem){
body{display:grid;grid-template:"nav header" auto "nav main" auto / 15rem minmax(0,66rem);gap:0 2.5rem;
justify-content:center}
header{grid-area:header}main{grid-area:main}header,main{width:100%;margin:0}
nav{grid-area:nav;position:sticky;top:1.5rem;align-self:start;max-height:calc(100vh - 3rem);overflow:auto;margin:0}
nav ol{columns:auto}}
@media (max-width:40rem){
body{padding:1rem .75rem 3rem}h1{font-size:1.35rem}
nav ol{columns:8rem;padding-left:1.3rem;font-size:.93em}
table{font-size:.88em}
th,td{padding:.3rem .4rem}th:first-child{min-width:8.5rem}tbody th{max-width:9rem}}
@media print{
@page{margin:14mm}
body{display:block;font-size:10pt;padding:0}
nav,figure details,.modebar{display:none!important}
.scroll,.tall,pre{overflow:visible;max-height:none;border:0}
pre{white-space:pre-wrap}
table{font-size:8pt;max-width:100%}
th,td{padding:.15rem .35rem}td{white-space:normal}
tbody th,.tall thead th{position:static}
th:first-child{min-width:0}td.words{min-width:0}
.absent{min-width:8rem}
h2,h3{break-after:avoid}
figure,tr,.missing,.warn{break-inside:avoid}
thead{display:table-header-group}
.pair{grid-template-columns:1fr 1fr}
img{max-width:100%}
.samples img{width:36px;height:auto}}
"""
