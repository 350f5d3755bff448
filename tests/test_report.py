"""The report: words, tables, CSV, Markdown and the page, from runs of this version and of earlier ones."""

import copy
import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import torch

from prunedm import (
    comparison,
    environment,
    figures,
    model_charts,
    pictures,
    recipe,
    report,
    report_html,
    report_page,
    store,
)
from prunedm.comparison import Judged
from prunedm.records import NOT_MASKED

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<b>"
OLD = {"parameters": 100, "nonzero_parameters": 100, "macs": 10, "bytes": 400}  # what the first version recorded
DAYS = ("20260101", "20260102")
SAMPLING = {"sampler": "ddim", "steps": 10, "seed": 3, "eta": 0.0, "extractor": "bundled", "weights": "ab", "data": "x"}
FLOOR = {"fid": 0.2, "kid": 0.001, "kid_low": -0.002, "kid_high": 0.004, "precision": 0.9, "recall": 0.8, "images": 64}


def speed(variant, median, batch=8, **changes):
    call = {"median": median, "p10": median - 1, "p90": median + 2, "device": "cpu", "dtype": "float32", "batch": batch}
    row = {"variant": variant, "way": "eager", "batch": batch, "rounds": 15, "threads": 2, "call": call, "absent": ""}
    row |= {"memory": 1_000_000, "memory_of": "resident set growth", "per_image": median / batch}
    return row | changes


def figures_of(variant, scale=1.0):
    """All that evaluate.py records of a variant today."""
    found = OLD | {"macs": int(1000 * scale), "parameters": int(100 * scale), "nonzero_parameters": int(100 * scale)}
    found |= {"sizes": {"dense_fp32": 400, "dense_fp16": 200, "packed_fp16": int(200 * scale), "packed_int8": 100}}
    found |= {"validation_loss": 0.04 / scale, "validation_loss_low": 0.03, "validation_loss_high": 0.05}
    found |= {"validation_images": 512, "loss_bins": [0.1 / scale, 0.02, None, 0.001], "timesteps": 1000}
    found |= {"fid": 1.0 / scale, "fid_std": 0.05, "fid_extractor": "FD-fashion", "fid_images": 128, "few_images": ""}
    found |= {"kid": 0.01, "kid_std": 0.001, "kid_low": -0.002, "kid_high": 0.02, "precision": 0.8, "recall": 0.7}
    found |= {"kernel_images": 128, "isc": 4.2, "isc_std": None, "sampling": SAMPLING, "noise_floor": None}
    found |= {"latency_ms": 10 * scale, "latency_ms_p10": 9 * scale, "latency_ms_p90": 12 * scale, "batch": 8}
    found |= {"device": "cpu", "dtype": "float32", "speed": [speed(variant, 10 * scale)], "speed_session": "one"}
    if variant == "dense":
        return found | {"noise_floor": {"samples": FLOOR, "real": FLOOR}, "few_images": "128 images are few"}
    found |= {"ssim": 0.8, "ssim_low": 0.7, "ssim_high": 0.9, "psnr": 20.0, "identical": 1, "feature_distance": 0.5}
    found |= {"pairs": 64}
    if variant == "nm":
        skipped = [{"layer": "conv_in", "reason": "first convolution, kept dense"}]
        found |= {
            "pattern": "2:4",
            "compliance": 1.0,
            "masked_layers": 2,
            "skipped_layers": skipped,
            "macs_sparse": 300,
        }
    return found


def layer(name, **changes):
    found = {"layer": name, "kind": "conv", "shape": [16, 16, 3, 3], "eligible": True, "reason": "", "groups": 576}
    found |= {"tensor_core_ready": True, "compliance": 1.0, "density": 0.5, "position_balance": [0.25] * 4}
    return found | {"pattern": "2:4", "pattern_shares": [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]} | changes


def write_sheet(path: Path, **info) -> None:
    images = torch.randint(0, 255, (10, 1, 8, 8), dtype=torch.uint8)
    path.write_bytes(pictures.sheet_png(images, {"sampler": "ddim", "steps": 10, "seed": 3} | info))


def finished(runs: Path, name: str = "demo", **changes) -> store.Run:
    """A run folder as a finished run leaves it, without its models."""
    run = store.create(runs, recipe.build(recipe.merge({"name": name, "eval": {"images": 128, "steps": 10}}, changes)))
    stage = {"method": "taylor", "layout": "free", "reduction": 0.4, "achieved": 0.4, "of": "parameters", "target": 0.4}
    records = {"dense": {}, "structured": stage | {"reason": ""}, "nm": {"method": "gumbel", "pattern": "2:4"}}
    for variant, record in records.items():
        run.variant(variant).mkdir(parents=True)
        store.write_json(run.variant(variant) / store.VARIANT_RECORD, record | {"parent": "structured"})
        write_sheet(run.sheet(variant))
    scales = {"dense": 1.0, "structured": 0.6, "nm": 0.5}
    run.write_evaluation({variant: figures_of(variant, scale) for variant, scale in scales.items()})
    dense = {"eligible": False, "reason": "first convolution, kept dense", "pattern": "dense", "compliance": None}
    dense |= {"density": None, "position_balance": None, "pattern_shares": None, "groups": 0}
    run.write_layers([layer("conv_in", **dense), layer("mid_block.conv1"), layer("up_blocks.0.conv")])
    run.event("pruned", report=stage | {"reason": "widths are multiples of 8"})
    bins = {"images": 8, "timesteps": 1000, "dense": [0.1, 0.2], "dense_mean": 0.15, "m0": [0.2, None], "m0_mean": 0.3}
    run.event("baseline", initial="magnitude", **bins)
    run.append("metrics.jsonl", [{"stage": "finetune", "step": i, "loss": 1 / i} for i in range(1, 31)])
    mask = [{"stage": "mask", "step": i, "loss": 1 / i, "entropy": 2 - i / 9, "flips": i / 99} for i in range(1, 9)]
    run.append("metrics.jsonl", mask)
    return run


@pytest.fixture
def run(tmp_path):
    return finished(tmp_path / "runs") if (tmp_path / "runs").mkdir() is None else None


def page_of(*runs: store.Run, **options) -> str:
    return report_page.render([one for run in runs for one in report_page.of_run(run)], **options)


def own(page: str) -> str:
    """The page without plotly.js, which is not ours."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.S)


def section(page: str, anchor: str) -> str:
    return page.split(f'<section id="{anchor}">')[1].split("</section>")[0]


def text_of(markup: str) -> str:
    bare = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", markup, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(bare))


class Reader(HTMLParser):
    """Tags, attributes, and what does not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.open, self.wrong = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


# --- words and tables ------------------------------------------------------------------------
def test_differences_from_dense_stand_beside_the_figures():
    base = OLD | {"latency_ms": 4.0}
    rows = dict(report.figure_rows({"dense": base, "structured": base | {"parameters": 60, "latency_ms": 5.0}}))
    assert rows["Parameters"] == {"dense": "100", "structured": "60 (-40.0%)"}
    assert [r["structured"] for label, r in rows.items() if label.startswith("Latency")] == ["5.0 (+25.0%)"]


def test_latencies_of_two_sessions_are_shown_without_a_ratio_and_say_why():
    dense, nm = figures_of("dense"), figures_of("nm", 0.5)
    later = nm | {"speed_session": "two"}
    assert "0.50 times the dense model's time" in report.headline({"dense": dense, "nm": nm})
    said = report.headline({"dense": dense, "nm": later})
    assert "times the dense" not in said and "it was timed in another session than the dense model" in said
    cell = next(
        r["nm"] for n, r in dict(report.figure_rows({"dense": dense, "nm": later})).items() if n.startswith("Lat")
    )
    assert cell == "5.0 [4.5 to 6.0] (of dense n/a: timed in another session than the dense model)"
    (row,) = figures.efficiency_rows([Judged("b", later, dense=dense)])
    assert row[1 + list(figures.RATIOS).index("latency")] == "n/a: timed in another session than the dense model"
    memory = {n: r["nm"] for n, r in dict(report.figure_rows({"dense": dense, "nm": later})).items() if "memory" in n}
    assert all("session" not in cell and "(" in cell for cell in memory.values()), "memory does not drift"


def test_only_core_figures_are_shown_as_absent():
    rows = dict(report.figure_rows({"dense": OLD}))
    assert rows["Frechet distance"] == rows["Validation loss"] == {"dense": "n/a"}
    assert not [label for label in rows if re.search("SSIM|KID|KD|precision|Bytes,|Compression|memory|N:M", label)]


def test_every_figure_says_its_conditions_and_its_spread():
    rows = dict(report.figure_rows({"dense": figures_of("dense"), "nm": figures_of("nm", 0.5)}))
    how = "ddim, 10 steps, seed 3"
    assert rows[f"FD-fashion (128 images; {how}; ± deviation over the images)"]["nm"] == "2.000 ± 0.050 (+100.0%)"
    assert rows[f"KD-fashion (128 images; {how}; 95 % interval)"]["nm"] == "0.01000 [-0.00200 to 0.02000] (+0.00000)"
    assert rows[f"SSIM to dense (64 pairs of the same seed; {how}; 95 % interval)"] == {
        "dense": "n/a", "nm": "0.8000 [0.7000 to 0.9000]",
    }  # fmt: skip
    made = [label for label in rows if re.match("FD|KD|IS|SSIM|PSNR|Feature|precision|recall", label)]
    assert len(made) == 8 and all(how in label and re.search(r"\d+ (images|pairs)", label) for label in made)
    assert "Validation loss (512 held-out images, seed 3; 95 % interval)" in rows
    latency = next(label for label in rows if label.startswith("Latency"))
    assert "measured" in latency and "cpu, float32, batch 8" in latency
    memory = next(label for label in rows if label.startswith("Peak memory"))
    assert "resident set growth" in memory and "batch 8" in memory and rows[memory]["nm"].startswith("1,000,000")
    assert rows["Compression (dense fp16 over packed fp16)"] == {"dense": "n/a", "nm": "2.00 x"}
    assert rows["MACs an image (N:M hardware, theoretical)"] == {"dense": "n/a", "nm": "300 (-70.0%)"}


@pytest.mark.parametrize(
    ("extractor", "label", "expected"),
    [
        ("bundled", "FD-fashion", ("FD-fashion", "KD-fashion", "precision-fashion", "IS-fashion")),
        ("inception", "FID", ("FID", "KID", "precision", "ISC")),
        (None, "FID", ("FID", "KID", "precision", "ISC")),
        ("theirs", "FD-theirs", ("FD-theirs", "kernel distance (FD-theirs)", "precision (FD-theirs)")),
    ],
)
def test_only_inceptions_figures_are_called_fid_and_kid(extractor, label, expected):
    found = figures_of("dense") | {"sampling": SAMPLING | {"extractor": extractor}, "fid_extractor": label}
    starts = [row.split(" (128")[0] for row, _ in report.figure_rows({"dense": found})]
    assert set(expected) <= set(starts)
    if expected[0] != "FID":
        assert not {"FID", "KID", "ISC", "precision"} & set(starts)


def test_models_judged_otherwise_get_rows_of_their_own_and_no_difference():
    dense, other = figures_of("dense"), figures_of("nm") | {"fid_images": 64, "device": "gpu", "fid_std": None}
    rows = dict(figures.rows([Judged("a", dense), Judged("b", other, dense=dense)]))
    assert rows["FD-fashion (64 images; ddim, 10 steps, seed 3)"] == ["n/a", "1.000"]
    assert sum(label.startswith("Latency") for label in rows) == 2
    assert next(cells for label, cells in rows.items() if "gpu" in label)[1].startswith("10.0 [9.0 to 12.0]")


@pytest.mark.parametrize(
    "changes",
    [{"sampler": "ddpm"}, {"steps": 11}, {"seed": 4}, {"eta": 0.5}, {"extractor": "inception"}, {"data": "y"}],
)
def test_no_two_conditions_share_a_row_of_quality(changes):
    dense = figures_of("dense")
    other = figures_of("nm") | {"sampling": SAMPLING | changes}
    found = figures.rows([Judged("a", dense), Judged("b", other, dense=dense)])
    for key in ("FD|FID", "KD|KID", "precision", "recall", "IS"):
        cells = [row for label, row in found if re.match(f"({key})[ C-]", label)]
        assert len(cells) == 2 and all("n/a" in row for row in cells), key
        assert "(" not in "".join(cells[0] + cells[1]), "no difference from dense across conditions"


def test_losses_of_another_task_do_not_compare():
    dense = figures_of("dense")
    for changes in ({"prediction_type": "v_prediction"}, {"timesteps": 100}, {"sampling": SAMPLING | {"seed": 4}}):
        assert comparison.efficiency(Judged("b", figures_of("nm") | changes, dense=dense))["validation_loss"] is None
    same = Judged("b", figures_of("nm") | {"prediction_type": "epsilon"}, dense=dense)
    assert comparison.efficiency(same)["validation_loss"] == 1.0, "records from before it was kept predict the noise"
    label = next(n for n, _ in figures.rows([Judged("v", dense | {"prediction_type": "v_prediction"})]) if "loss" in n)
    assert "predicts v_prediction" in label


def test_a_noise_floor_names_its_extractor_and_how_its_samples_were_made():
    dense = figures_of("dense")
    head, rows = figures.floor_table([Judged("a", dense)])
    assert head[2:6] == ["FD-fashion", "KD-fashion", "precision-fashion", "recall-fashion"]
    assert [row[-1] for row in rows] == ["ddim, 10 steps, seed 3", "not sampled"]
    inception = dense | {"fid_extractor": "FID", "sampling": SAMPLING | {"extractor": "inception"}}
    head, rows = figures.floor_table([Judged("a", dense), Judged("b", inception)])
    assert head[2] == "Frechet distance" and [row[2].split()[0] for row in rows] == ["FD-fashion"] * 2 + ["FID"] * 2
    assert figures.floor_table([Judged("c", figures_of("nm"))]) is None


def test_figures_fit_the_words_of_the_record():
    """Each row's figure is a field of the record, so that none is silently always absent."""
    known = set(report.PLAIN) | {f"sizes.{name}" for name in figures.SIZES} | set(figures.DERIVED)
    for row in figures.ROWS:
        assert {row.key, *(row.spread or ()), *filter(None, (row.deviation, row.of))} <= known, row.key


# --- CSV -------------------------------------------------------------------------------------
def read_csv(text: str) -> list[dict[str, str]]:
    lines = list(csv.reader(io.StringIO(text)))
    assert len({len(line) for line in lines}) == 1, "as many columns in each row"
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_round_trips_with_a_header_that_never_changes(run):
    judged = report_page.of_run(run)
    found = read_csv(report.csv_text(judged))
    head = list(map(report.column, report.COLUMNS))
    assert list(found[0]) == head == list(read_csv(report.csv_text([Judged("x", OLD)]))[0])
    assert not [name for name in head if re.search(r"(^|[._])(fid|kid|isc)([._]|$)", name)], "Inception's names"
    nm = found[2]
    assert (nm["run"], nm["variant"], nm["sampling.sampler"], nm["sampling.seed"]) == (run.id, "nm", "ddim", "3")
    for key in ("fid", "kid_low", "latency_ms_p90", "sizes.packed_fp16", "macs_sparse", "compliance"):
        assert float(nm[report.column(key)]) == judged[2].get(key), key
    assert float(nm["ratio.compression"]) == 2.0 and nm["front.frechet_distance.macs"] == "yes"
    assert float(found[0]["noise_floor.samples.kernel_distance_low"]) == -0.002
    assert nm["frechet_distance_extractor"] == "FD-fashion"
    assert found[0]["ssim"] == "" and found[0]["ratio.macs"] == "", "absent is empty"


@pytest.mark.parametrize("label", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_runs_no_formula_of_a_label(label):
    found = read_csv(report.csv_text([Judged(label, OLD | {"kid": -0.5})]))
    assert found[0]["label"] == "'" + label.replace("\r", " ") and found[0]["kernel_distance"] == "-0.5"


def test_csv_keeps_commas_quotes_and_lines_in_a_label():
    label = 'a, "b"\nc'
    assert read_csv(report.csv_text([Judged(label, OLD)]))[0]["label"] == label


# --- Markdown --------------------------------------------------------------------------------
def tables_of(markdown: str) -> list[list[str]]:
    blocks = [block.split("\n") for block in markdown.strip().split("\n\n")]
    return [lines for lines in blocks if lines[0].startswith("|")]


def test_markdown_tables_are_well_formed(run):
    found = report.markdown(report_page.of_run(run))
    assert len(tables_of(found)) == 5
    for lines in tables_of(found):
        assert re.fullmatch(r"\| --- (\| ---: )+\|", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]
    assert "50% of the dense model's weights are gone" in found and "noise floor" in found
    assert "sampling steps" in found and "| n/a |" in found


def test_markdown_takes_foreign_text_as_text():
    label = "a|b`c` <img src=x>\n# *d* ![e](http://f) [g](http://h)"
    found = report.markdown([Judged(label, OLD)])
    lines = tables_of(found)[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<" not in found and "](" not in found.replace("]\\(", "") and "\n# *" not in found


# --- the page --------------------------------------------------------------------------------
def test_the_page_asks_the_web_for_nothing(run):
    page = page_of(run)
    assert "default-src 'none'" in page.split("</head>")[0]
    assert "plotly.js" in page and page.count("<script>") == 2, "plotly once, and a few lines of ours"
    for tag, attributes in Reader(own(page)).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import", own(page))


def test_the_page_is_well_formed_and_has_all_sections(run):
    found = Reader(own(page_of(run)))
    assert found.wrong == [] and found.open == []
    anchors = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    links = [attributes["href"][1:] for tag, attributes in found.tags if tag == "a"]
    assert anchors == links == [anchor for anchor, *_ in report_page.SECTIONS]
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")
    drawn = [a for tag, a in found.tags if tag == "div" and a.get("class") == "chart"]
    assert len(drawn) > 8 and all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert sum(tag == "figure" for tag, _ in found.tags) == len(drawn) <= sum(tag == "details" for tag, _ in found.tags)


def embedded(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def test_the_page_shows_what_was_found(run):
    page = page_of(run, command="python -m prunedm report demo --quick")
    text = text_of(own(page))
    assert "50% of the dense model's weights are gone" in text and "widths are multiples of 8" in text
    assert "128 images are few" in text and "noise floor" in text and "SSIM" in text
    assert "prunedm evaluate" in text and "--images 128 --steps 10 --sampler ddim --seed 3" in text
    assert "prunedm report demo --quick" in text
    assert "finetune_steps: 200" in text and "→ structured → N:M" in text and "torch-fidelity" in text
    assert text_of(section(page, "conditions")).count("ddim") == 3
    assert len(re.findall("<img", section(page, "samples"))) == 3 * 8
    assert all({"data", "layout"} <= set(figure) for figure in embedded(page))
    kept = next(f for f in embedded(page) if f["data"][0].get("x") == ["1100", "1010", "1001", "0110", "0101", "0011"])
    assert kept["data"][0]["z"] == [[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]] * 2


def test_measured_and_theoretical_figures_stand_apart(run):
    rows = re.findall(r'<th scope="row">(.*?)</th>', section(page_of(run), "figures"))
    assert [r for r in rows if "theoretical" in r] == ["MACs an image (N:M hardware, theoretical)"]
    assert not [r for r in rows if "theoretical" in r and "measured" in r]


def evaluated_by(run, **changes):
    """The run's figures as another environment would have recorded them; ``changes``: a variant's own torch."""
    results = run.evaluation()
    for name, found in results.items():
        versions = environment.versions() | ({"torch": changes[name]} if name in changes else {})
        found["made_by"] = {"versions": versions, "machine": environment.machine()}
    run.write_evaluation(results)


def test_the_environment_is_that_of_the_evaluation_and_of_the_page_where_they_differ(run):
    def shown():
        return section(page_of(run), "environment")

    assert "wrote this page" in shown() and "evaluated" not in shown(), "older runs recorded none"
    evaluated_by(run)
    assert "It wrote this page too" in shown() and "<th" in shown() and "this page</th>" not in shown()
    evaluated_by(run, dense="1.0", structured="1.0", nm="1.0")
    assert re.search(
        r">torch</th>\s*<td[^>]*>1\.0</td>\s*<td[^>]*>" + re.escape(environment.versions()["torch"]), shown()
    )
    assert "written elsewhere, or by other versions" in shown()
    evaluated_by(run, nm="1.0")
    assert "evaluated: dense, structured" in shown() and "evaluated: N:M" in shown()


def test_models_without_masks_have_their_layers_too(run):
    dense = {"eligible": False, "pattern": "dense", "compliance": None, "position_balance": None, "groups": 0}
    dense |= {"pattern_shares": None, "tensor_core_ready": False}
    first = layer("conv_in", **dense, reason="first convolution, kept dense", density=1.0)
    run.write_layers([first, layer("mid", **dense, reason=NOT_MASKED, density=0.5)], "dense")
    found = text_of(section(page_of(run), "sparsity"))
    assert "dense Nothing is masked; density 75.0%. 1 of 2 layers are eligible for N:M masks." in found
    assert "1 layer: first convolution, kept dense" in found and "All 2 layers" in found
    assert "structured" not in found and "N:M Pattern 2:4" in found, "older runs recorded those of the masks alone"


def test_hostile_text_is_text_everywhere(tmp_path):
    run = finished(tmp_path)
    results = run.evaluation()
    for one in results.values():
        one |= {"device": HOSTILE, "fid_extractor": HOSTILE, "few_images": HOSTILE, "speed_session": HOSTILE}
        one["sampling"] = SAMPLING | {"extractor": HOSTILE, "data": HOSTILE}
        one["speed"] = [speed(HOSTILE, 9.0, way=HOSTILE), speed("x", 1.0, way="z", call=None, absent=HOSTILE)]
    run.write_evaluation(results)
    shares = [layer(f"a.{HOSTILE}"), layer("b", eligible=False, reason=HOSTILE, compliance=None, pattern_shares=None)]
    run.write_layers(shares)
    chosen = [{"layer": f"a.{HOSTILE}", "chosen": "2:4", "increase": {"2:4": 0.1, HOSTILE: 0.2}}]
    run.write_allocation({"layers": chosen, "density": 0.5, "kept": 0.5, "images": 8})
    run.append("metrics.jsonl", [{"stage": HOSTILE, "step": i, "loss": 0.5} for i in (1, 2)])
    run.event("alert", stage="mask", step=1, what=HOSTILE, text=HOSTILE, remedy=HOSTILE)
    for sheet in (run.sheet(name) for name in run.variants()):
        write_sheet(sheet, sampler=HOSTILE)
    judged = [*report_page.of_run(run), Judged(HOSTILE, results["nm"], dense=results["dense"])]
    page = report_page.render(judged, title=HOSTILE, command=f"python {HOSTILE}")
    found = Reader(own(page))
    assert found.wrong == [] and found.open == []
    assert not [a for tag, a in found.tags if tag in ("b", "x") or "onerror" in a]
    assert {a.get("type") for tag, a in found.tags if tag == "script"} == {None, "application/json"}
    assert "cannot be shown" not in page, re.findall("[^>]*cannot be shown[^<]*", page)
    for figure in embedded(page):
        for text in strings(figure):
            assert "<img" not in text and "<b>" not in text, text
    assert any("&lt;img" in text for figure in embedded(page) for text in strings(figure)), "names are kept as text"


def strings(value):
    """Every text in a figure; hover templates are ours."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item) if key != "uirevision" else ()
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_records_of_earlier_versions_render(tmp_path):
    run = store.create(tmp_path, recipe.Recipe())
    old = OLD | {"validation_loss": 0.04, "fid": 1.0, "fid_extractor": "FD-fashion", "fid_images": 64}
    old |= {"latency_ms": 4.0, "device": "cpu", "dtype": "float32", "batch": 8}
    old |= {"latency_ms_p10": 3.0, "latency_ms_p90": 5.0}
    nm = old | {"pattern": "2:4", "compliance": 1.0, "masked_layers": 1, "skipped_layers": [], "macs_sparse": 5}
    run.write_evaluation({"dense": old, "nm": nm})
    bare = {"layer": "conv", "kind": "conv", "shape": [8, 8, 3, 3], "eligible": True, "reason": ""}
    run.write_layers([bare])
    run.event(
        "pruned", report={"method": "<b>", "reduction": 0.1, "target": 0.4, "reason": "<script>alert(1)</script>"}
    )
    page = page_of(run)
    text = text_of(own(page))
    assert "cannot be shown" not in text and "&lt;script&gt;" in page and "<script>alert" not in page
    assert "No noise floor was measured" in text and "not recorded by timestep" in text and "n/a" in text
    assert "eager" in text_of(section(page, "speed")) and "4.00" in text_of(section(page, "speed"))


def test_a_page_without_charts_is_small(tmp_path):
    page = report_page.render([Judged("one", OLD)])
    assert "plotly" not in page.lower().replace('<th scope="row">plotly</th>', "") and "<script" not in page
    assert "n/a" in page and len(page) < 50_000
    assert "Nothing has been evaluated" in report_page.render([])


def break_sheet(run):
    run.sheet("nm").write_bytes(run.sheet("nm").read_bytes()[:60])


def break_foreign_sheet(run):
    run.sheet("nm").write_bytes(b"no picture")


def drop_sheet(run):
    run.sheet("nm").unlink()


def break_layers(run):
    (run.folder / "layers.json").write_text("[{]")


def drop_layers(run):
    (run.folder / "layers.json").unlink()


def break_shares(run):
    run.write_layers([layer("a", pattern_shares=[1.0])])


def drop_metrics(run):
    (run.folder / "metrics.jsonl").unlink()


def break_metrics(run):
    lines = '[1]\n{"stage": "mask"}\n{"stage": "mask", "step": 1, "loss": NaN}\n'
    lines += '{"stage": "mask", "step": 2, "loss": 1}\n{"st'
    (run.folder / "metrics.jsonl").write_text(lines)


def break_recipe(run):
    (run.folder / "recipe.yaml").write_text("nobody: [knows")


def break_lineage(run):
    (run.variant("nm") / store.VARIANT_RECORD).write_text("{")


def break_allocation(run):
    (run.folder / "allocation.json").write_text("{")


def break_events(run):
    (run.folder / "events.jsonl").write_text('{"kind": "pruned", "report": {}}\n[2]\n')


@pytest.mark.parametrize(
    ("fault", "anchor", "said"),
    [
        (break_sheet, "samples", "N:M: no samples"),
        (break_foreign_sheet, "samples", "N:M: no samples"),
        (drop_sheet, "samples", "it has no sample sheet"),
        (break_layers, "sparsity", "is damaged|cannot be read"),
        (drop_layers, "sparsity", "no record of its layers"),
        (break_shares, "sparsity", "do not fit 2:4"),
        (drop_metrics, "training", "no record of its training"),
        (break_metrics, "training", "Training loss"),
        (break_recipe, "recipe", "nobody: \\[knows"),
        (break_lineage, "lineage", "cannot be read"),
        (break_allocation, "choices", "cannot be read"),
        (break_events, "summary", "cannot be shown"),
    ],
)
def test_a_damaged_file_costs_its_section_only(run, fault, anchor, said):
    fault(run)
    page = page_of(run)
    assert re.search(said, text_of(section(page, anchor)))
    assert "128 images" in section(page, "figures") and Reader(own(page)).wrong == []
    for figure in embedded(page):
        assert figure["data"], "what is no number is null, not a broken document"


def test_write_leaves_the_page_in_the_run(run):
    report_page.write(run)
    assert f"PruneDM report: {run.id}" in run.report_path.read_text(encoding="utf-8")


# --- several runs ----------------------------------------------------------------------------
def test_several_runs_stand_side_by_side(tmp_path):
    first, second = finished(tmp_path, "one"), finished(tmp_path, "two", mask={"steps": 7}, seed=5)
    changed = copy.deepcopy(second.evaluation())
    for figures_ in changed.values():
        figures_["speed_session"] = "two"
    second.write_evaluation(changed)
    page = page_of(first, second)
    head = section(page, "figures").split("</thead>")[0]
    assert re.findall(r'colspan="(\d)" scope="colgroup">([^<]*)', head) == [
        ("1", ""),
        ("3", first.id),
        ("2", second.id),
    ]
    assert "6 models" in page.split("</header>")[0]
    differences = text_of(section(page, "recipe"))
    assert "mask.steps 300 7" in differences and "seed 0 5" in differences
    assert "Timed at different times, in these sets: one dense, one structured, one N:M; two dense" in text_of(page)
    assert section(page, "training").count("<h3>") == 2 and "two N:M" in section(page, "pareto")
    assert "Not all models were judged alike" not in page


def test_a_damaged_run_costs_the_others_nothing(tmp_path):
    first, second = finished(tmp_path, "one"), finished(tmp_path, "two", mask={"density": 0.4})
    break_allocation(first)
    found = text_of(section(page_of(first, second), "choices"))
    assert f"This part of {first.id} cannot be shown" in found and f"{second.id} Loss under the initial masks" in found
    assert "mask.density null 0.4" in text_of(section(page_of(first, second), "recipe"))


def test_models_judged_or_sampled_otherwise_are_warned_of(tmp_path):
    first, second = finished(tmp_path, "one"), finished(tmp_path, "two")
    for name in second.variants():
        write_sheet(second.sheet(name), seed=4)
    second.write_evaluation({k: v | {"fid_images": 64} for k, v in second.evaluation().items()})
    page = page_of(first, second)
    assert "not the same noise" in section(page, "samples")
    assert "Not all models were judged alike" in section(page, "conditions")
    assert "128 images" in section(page, "pareto") and "64 images" in section(page, "pareto")


def test_runs_of_one_name_are_told_apart_by_their_ids(tmp_path):
    first, second = (store.Run(finished(tmp_path).folder.rename(tmp_path / f"{day}-000000-same")) for day in DAYS)
    assert f"{second.id} N:M" in text_of(section(page_of(first, second), "pareto"))


def test_what_cannot_run_is_absent_with_its_reason(run):
    results = run.evaluation()
    none = {"call": None, "per_image": None, "memory": None, "memory_of": None, "threads": None}
    row = speed("nm", 1.0, 64, way="compile") | none
    results["nm"]["speed"].append(row | {"absent": "no compiler was found"})
    run.write_evaluation(results)
    found = section(page_of(run), "speed")
    assert "absent: no compiler was found" in found and "batch 64" not in text_of(found.split("<figure>")[1])


def test_ratios_to_dense_are_of_the_same_session_only(run):
    assert "0.50" in text_of(section(page_of(run), "speed"))
    judged = report_page.of_run(run)
    judged[2].figures = judged[2].figures | {"speed_session": "later"}
    cells = re.findall(r'<th scope="row">N:M</th>(.*?)</tr>', section(report_page.render(judged), "speed"))[0]
    assert "0.50" not in cells and "n/a" in cells


# --- parts -----------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028", HOSTILE, "&lt;"])
def test_embedded_json_cannot_end_its_script(text):
    found = report_html.embedded({"a": [text, float("nan"), float("inf"), 1.5]})
    assert not re.search("[<>&]", found) and json.loads(found) == {"a": [text, None, None, 1.5]}


def test_a_script_cannot_end_its_element():
    assert report_html.within_script('"</script>" "<!--"') == r'"<\/script>" "<\!--"'


def test_a_figures_cell_has_its_interval_and_difference_beneath():
    small = "<small>[-0.1 to 0.2]</small><small>(+3.0%)</small>"
    assert report_html.figure_cell("0.1 ± 0.01 [-0.1 to 0.2] (+3.0%)") == f"0.1 ± 0.01{small}"
    assert report_html.figure_cell("n/a") == "n/a" and report_html.figure_cell("<b>") == "&lt;b&gt;"


def test_close_points_have_their_names_apart():
    models = [model_charts.Model("a"), model_charts.Model("b"), model_charts.Model("c")]
    figure = model_charts.pareto(models, [(1, 1.0), (1.1, 1.05), (9, 0.1)], [True, False, True], ("x", "y"), "v")
    assert [t["textposition"] for t in figure["data"][1:]] == ["bottom right", "top right", "bottom left"]
    assert (figure["data"][0]["x"], figure["data"][0]["y"]) == ([1, 9], [1.0, 0.1]), "the line joins the front alone"


def test_the_page_needs_no_torch_until_it_names_the_machine():
    import subprocess
    import sys

    code = "import prunedm.report_page, sys; assert not {'torch', 'diffusers', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# --- in a browser ----------------------------------------------------------------------------
SIZES = """[...document.querySelectorAll(".chart")].map((node) => {
  const [box, svg] = [node, node.querySelector(".main-svg")].map((n) => n.getBoundingClientRect());
  return [box.height, svg.height, svg.width];
})"""
NARROWEST = (
    "Math.min(...[...document.querySelectorAll('.chart .main-svg')].map((n) => n.getBoundingClientRect().width))"
)


def comes_true(page, condition: str) -> None:
    """playwright's own waiting needs eval, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def fits_on_paper(page) -> None:
    """No chart is wider or higher than a sheet, or lies over what follows it."""
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    comes_true(page, f"{SIZES}.every(([box, height, width]) => height <= box + 1 && height < 950 && width < 700)")
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")


@pytest.mark.browser
@pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not")
@pytest.mark.in_turn(2)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_offline_and_draws_every_chart(tmp_path, width):
    first, second = finished(tmp_path, "one"), finished(tmp_path, "a-long-name-for-a-run-on-a-narrow-screen")
    second.write_layers([layer(f"down_blocks.{i}.resnets.0.conv1") for i in range(60)])
    path = tmp_path / "report.html"
    path.write_text(page_of(first, second), encoding="utf-8")
    with browser.chromium(viewport={"width": width, "height": 800}) as page:
        page.context.set_offline(True)
        page.goto(path.as_uri())
        comes_true(page, "[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
        drawn = page.locator(".chart:has(.main-svg)").count()
        assert drawn == page.locator("figure").count() > 15
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
        before = page.evaluate(NARROWEST)
        page.locator(".chart").first.hover()
        page.locator("summary").first.click()
        assert page.locator("figure details[open], details[open]").count() == 1
        with page.expect_download() as picture:  # plotly draws it from a blob, which the page's policy must allow
            page.locator(".chart").first.locator("[data-title*='PNG'], [data-title*='png']").first.click()
        assert picture.value.suggested_filename.endswith(".png")
        fits_on_paper(page)
        comes_true(page, f"{NARROWEST} === {before}")  # after printing the charts are as they were
        assert page.errors == []
        assert [u for u in page.requested if not u.startswith(("data:", "blob:"))] == [path.as_uri()]


@pytest.mark.browser
@pytest.mark.skipif(browser.chromium_path() is None, reason="chromium is not installed and apt-get could not")
def test_markup_in_names_is_not_rendered_by_plotly(tmp_path):
    dense = figures_of("dense")
    judged = [Judged(HOSTILE, dense), Judged("<i>b</i>", figures_of("nm", 0.5), dense=dense)]
    path = tmp_path / "report.html"
    path.write_text(report_page.render(judged), encoding="utf-8")
    with browser.chromium() as page:
        page.goto(path.as_uri())
        page.locator(".chart .main-svg").first.wait_for(state="attached")
        said = page.locator("#pareto text", has_text="<i>b</i>")
        assert said.count() > 0, "the name is there, as it is"
        assert page.locator("img[src=x], #pareto tspan[style*=italic]").count() == 0
        assert page.errors == []
