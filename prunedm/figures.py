"""The figures of judged models as tables of text: for the page, the terminal and Markdown. Knows no torch.

A figure stands beside the conditions that it holds for: they are part of its row's name, so that models judged
under others get a row of their own and are not read as comparable. Absent figures are 'n/a', never invented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import comparison
from .comparison import Judged
from .records import EXTRACTOR_LABELS, labels

ABSENT = "n/a"
SIZES = {  # sizes.FORMATS, in words
    "dense_fp32": "Bytes, dense fp32",
    "dense_fp16": "Bytes, dense fp16",
    "packed_fp16": "Bytes, packed N:M fp16",
    "packed_int8": "Bytes, packed N:M int8",
}
FLOORS = {"samples": "two sets of dense samples", "real": "two sets of real images"}
FLOOR_FIGURES = ("fid", "kid", "kid_low", "kid_high", "precision", "recall", "images")
RATIOS = {
    "compression": "compression (dense fp16 bytes over packed fp16 bytes)",
    "macs": "MACs, dense arithmetic (of dense)",
    "macs_sparse": "MACs, N:M hardware, theoretical (of dense)",
    "latency": "latency, measured (of dense)",
    "validation_loss": "validation loss (of dense)",
    "fid": "Frechet distance (of dense)",
}


# --- the figures, a row each -----------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Row:
    """How one figure is shown. ``name`` may hold its conditions.

    spread: keys of an interval's ends. deviation: key of a standard deviation. change: how the difference from dense
    is said: as a share, as a plain difference (of figures around zero or below one), or not at all. of: the figure of
    the dense model it is taken from, where that is another one. core: shown even where no model has it.
    """

    key: str
    name: str | Callable[[Judged], str]
    form: str
    change: str = "share"
    spread: tuple[str, str] | None = None
    deviation: str = ""
    of: str = ""
    core: str = ""

    def label(self, one: Judged) -> str:
        return self.name if isinstance(self.name, str) else self.name(one)


def extractor_of(one: Judged) -> str | None:
    """The recipe's word for the extractor; older records have only its distance's name."""
    by_label = {label: name for name, label in EXTRACTOR_LABELS.items()}
    return one.get("sampling.extractor") or by_label.get(one.get("fid_extractor"), one.get("fid_extractor"))


def names_of(one: Judged) -> dict[str, str]:
    """What the figures of this model's extractor are called: FID and KID are names of Inception's alone."""
    extractor = extractor_of(one)
    if extractor in EXTRACTOR_LABELS:
        return labels(extractor)
    given = one.get("fid_extractor") or "unknown extractor"
    plain = {"kid": "kernel distance", "precision": "precision", "recall": "recall", "isc": "inception score"}
    return {"fid": given} | {key: f"{word} ({given})" for key, word in plain.items()}


def sampled(one: Judged) -> str:
    """Sampler, steps, eta where it is not 0, and seed, in words; empty where none is recorded."""
    given = one.get("sampling") or {}
    parts = [given.get("sampler"), f"{given['steps']} steps" if given.get("steps") else None]
    parts += [f"eta {given['eta']}" if given.get("eta") else None, _seed(one)]
    return ", ".join(str(part) for part in parts if part)


def _seed(one: Judged) -> str:
    seed = one.get("sampling.seed")
    return "" if seed is None else f"seed {seed}"


def _name(word: str, *notes: str) -> str:
    """A figure's name with what it holds for; notes that are empty are left out."""
    kept = "; ".join(note for note in notes if note)
    return f"{word} ({kept})" if kept else word


def _kernel(key: str, note: str = "") -> Callable[[Judged], str]:
    def name(one: Judged) -> str:
        count = one.get("fid_images") if key == "isc" else one.get("kernel_images")
        return _name(names_of(one)[key], f"{count or '?'} images", sampled(one), note)

    return name


def _distance(one: Judged) -> str:
    note = "± deviation over the images" if one.get("fid_std") is not None else ""
    return _name(names_of(one)["fid"], f"{one.get('fid_images') or '?'} images", sampled(one), note)


def _loss(one: Judged) -> str:
    note = "95 % interval" if one.get("validation_loss_low") is not None else ""
    return _name("Validation loss", _validated(one), note)


def _validated(one: Judged) -> str:
    """What a validation loss holds for; its task is named where it is not the usual one."""
    count, task = one.get("validation_images"), one.get("prediction_type")
    parts = [f"{count} held-out images" if count else "", _seed(one) if count else ""]
    parts.append(f"predicts {task}" if task not in (None, "epsilon") else "")
    return ", ".join(part for part in parts if part)


def _pairs(word: str, note: str = "") -> Callable[[Judged], str]:
    return lambda one: _name(word, f"{one.get('pairs') or '?'} pairs of the same seed", sampled(one), note)


def _latency(one: Judged) -> str:
    spread = "; 10th to 90th percentile" if one.get("latency_ms_p10") is not None else ""
    return f"Latency of a UNet call, ms (measured; median{spread}; {where(one)})"


def where(one: Judged) -> str:
    """The conditions of a model's latency."""
    parts = [one.get("device"), one.get("dtype"), one.get("batch") and f"batch {one.get('batch')}"]
    return ", ".join(str(part) for part in parts if part) or "device not recorded"


def machine(one: Judged) -> str:
    """The machine that a latency was taken on, in words; empty where none is recorded."""
    return f"on {one.get('host')} ({one.get('processor')})" if one.get("host") else ""


def timed_on(judged: Sequence[Judged]) -> str:
    """The conditions of the latencies of models that agree in them, with the machine where one of them names it."""
    named = next((one for one in judged if machine(one)), judged[0])
    return ", ".join(part for part in (where(named), machine(named)) if part)


def real_images(one: Judged) -> str:
    """The real images' name and the beginning of the digest of their content; empty where none are recorded."""
    name, digest = one.get("sampling.data"), one.get("sampling.digest")
    return _name(f"real images {name}", str(digest)[:8] if digest else "") if name else ""


def plain_call(one: Judged) -> dict[str, Any]:
    """The row of ``speed`` that the plain latency is taken from; empty where there is none."""
    rows = [row for row in one.get("speed") or [] if row.get("way") == "eager" and row.get("batch") == one.get("batch")]
    return rows[0] if rows else {}


def _memory(one: Judged) -> str:
    by = plain_call(one).get("memory_of") or "not said by whose count"
    return f"Peak memory of a UNet call, bytes (measured; {by}; {where(one)})"


ROWS = (
    Row("parameters", "Parameters", "{:,.0f}", core="Parameters"),
    Row("nonzero_parameters", "Non-zero parameters", "{:,.0f}", core="Non-zero parameters"),
    Row("macs", "MACs an image (dense arithmetic)", "{:,.0f}", core="MACs an image (dense arithmetic)"),
    Row("macs_sparse", "MACs an image (N:M hardware, theoretical)", "{:,.0f}", of="macs"),
    Row("bytes", "Bytes of the weights on disk", "{:,.0f}", core="Bytes of the weights on disk"),
    *(Row(f"sizes.{name}", words, "{:,.0f}") for name, words in SIZES.items()),
    Row("compression", "Compression (dense fp16 over packed fp16)", "{:.2f} x", ""),
    Row(
        "validation_loss",
        _loss,
        "{:.5f}",
        spread=("validation_loss_low", "validation_loss_high"),
        core="Validation loss",
    ),
    Row("fid", _distance, "{:.3f}", deviation="fid_std", core="Frechet distance"),
    Row("kid", _kernel("kid", "95 % interval"), "{:.5f}", "difference", ("kid_low", "kid_high")),
    Row("precision", _kernel("precision"), "{:.3f}", "difference"),
    Row("recall", _kernel("recall"), "{:.3f}", "difference"),
    Row("isc", _kernel("isc"), "{:.3f}", "difference", deviation="isc_std"),
    Row("ssim", _pairs("SSIM to dense", "95 % interval"), "{:.4f}", "", ("ssim_low", "ssim_high")),
    Row("psnr", _pairs("PSNR to dense, dB"), "{:.2f}", ""),
    Row("feature_distance", _pairs("Feature distance to dense"), "{:.3f}", ""),
    Row(
        "latency_ms",
        _latency,
        "{:.1f}",
        spread=("latency_ms_p10", "latency_ms_p90"),
        core="Latency of a UNet call, ms (measured)",
    ),
    Row("memory", _memory, "{:,.0f}"),
)
DERIVED: dict[str, Callable[[Judged], Any]] = {
    "compression": lambda one: comparison.efficiency(one)["compression"],
    "memory": lambda one: plain_call(one).get("memory"),
}
ALIKE = {axis.key: axis.conditions for axis in (*comparison.QUALITIES, *comparison.COSTS)}
ALIKE |= dict.fromkeys(("kid", "precision", "recall", "isc"), ALIKE["fid"]) | {"memory": ALIKE["latency_ms"]}


def rows(judged: Sequence[Judged]) -> list[tuple[str, list[str]]]:
    """The table of figures: a row's name with its conditions, then a cell for each model."""
    found = []
    for row in ROWS:
        names = _told_apart(row, judged, [None if _value(one, row.key) is None else row.label(one) for one in judged])
        for name in [n for n in dict.fromkeys(names) if n is not None] or ([row.core] if row.core else []):
            found.append((name, [_cell(one, row) if own == name else ABSENT for one, own in zip(judged, names)]))
    return found


# What a row's name does not say unless it must: how models agree in it, and the words for it.
UNSAID = dict.fromkeys(("validation_loss", "fid", "kid", "precision", "recall", "isc"), "real images")
UNSAID |= dict.fromkeys(("latency_ms", "memory"), "machine")
UNSAID_BY = {"real images": (comparison.real_images, real_images), "machine": (comparison.machine, machine)}


def _told_apart(row: Row, judged: Sequence[Judged], names: list[str | None]) -> list[str | None]:
    """Names that also say the real images or the machine where models of others would share a row."""
    if row.key not in UNSAID:
        return names
    agree, words = UNSAID_BY[UNSAID[row.key]]
    told = list(names)
    for name in {name for name in names if name is not None}:
        places = {id(one): i for i, one in enumerate(judged) if names[i] == name}
        groups = comparison.grouped([judged[i] for i in places.values()], agree)
        for own in groups if len(groups) > 1 else []:
            said = next((words(one) for one in own if words(one)), "")
            for one in own:
                told[places[id(one)]] = f"{name}, {said or f'{UNSAID[row.key]} not recorded'}"
    return told


def _value(one: Judged, key: str) -> Any:
    return DERIVED[key](one) if key in DERIVED else one.get(key)


def _cell(one: Judged, row: Row) -> str:
    value = _value(one, row.key)
    text, deviation = row.form.format(value), one.get(row.deviation) if row.deviation else None
    if deviation is not None:
        text += f" ± {row.form.format(deviation)}"
    low, high = (one.get(key) for key in row.spread or ("", ""))
    if low is not None and high is not None:
        text += f" [{row.form.format(low)} to {row.form.format(high)}]"
    return text + _change(one, row, value)


def _change(one: Judged, row: Row, value: float) -> str:
    """The difference from the model's own dense one, where both hold for the same conditions."""
    if one.dense is None or not row.change:
        return ""
    base = Judged("", one.dense)
    other = _value(base, row.of or row.key)
    if other is None or (row.key in ALIKE and ALIKE[row.key](one) != ALIKE[row.key](base)):
        return ""
    if row.key == "latency_ms" and comparison.timed_apart(one):
        return f" (of dense {ABSENT}: {comparison.timed_apart(one)})"
    if row.change == "difference":
        return f" ({row.form.replace(':', ':+').format(value - other)})"
    return f" ({value / other - 1:+.1%})" if other else ""


CONDITIONS: tuple[tuple[str, Callable[[Judged], Any]], ...] = (
    ("generated images", lambda one: one.get("fid_images")),
    ("images for the kernel figures", lambda one: one.get("kernel_images")),
    ("held-out images", lambda one: one.get("validation_images")),
    ("real images", lambda one: one.get("sampling.data")),
    ("real images' content (sha256)", lambda one: one.get("sampling.digest")),
    ("extractor", extractor_of),
    ("extractor's weights (sha256)", lambda one: one.get("sampling.weights")),
    ("sampler", lambda one: one.get("sampling.sampler")),
    ("sampling steps", lambda one: one.get("sampling.steps")),
    ("eta", lambda one: one.get("sampling.eta")),
    ("evaluation seed", lambda one: one.get("sampling.seed")),
    ("device", lambda one: one.get("device")),
    ("dtype", lambda one: one.get("dtype")),
    ("batch", lambda one: one.get("batch")),
    ("host", lambda one: one.get("host")),
    ("processor", lambda one: one.get("processor")),
    ("threads", lambda one: plain_call(one).get("threads")),
    ("timed calls", lambda one: plain_call(one).get("rounds")),
    ("timing session", lambda one: one.get("speed_session")),
)


def held(one: Judged) -> str:
    """What a model's quality and latency hold for, in one sentence without its full stop."""
    parts = []
    if one.get("fid") is not None:
        images = f"{one.get('fid_images')} images"
        how = ", ".join(part for part in (images, sampled(one), real_images(one)) if part)
        parts.append(f"{names_of(one)['fid']}, {names_of(one)['kid']}: {how}")
    if one.get("validation_loss") is not None:
        parts.append(f"validation loss: {_validated(one) or 'images not recorded'}")
    if one.get("latency_ms") is not None:
        parts.append(f"time of a UNet call: {timed_on([one])}")
    return "; ".join(parts) or "nothing was judged"


def holds_for(plot: comparison.Plot) -> str:
    """The conditions of a Pareto plot, in words."""
    one = plot.judged[0]
    if plot.quality.key == "fid":
        parts = [f"{one.get('fid_images')} images", sampled(one)]
    else:
        parts = [f"{one.get('validation_images')} held-out images" if one.get("validation_images") else ""]
    parts.append(real_images(one))
    parts += [timed_on(plot.judged)] if plot.cost.key == "latency_ms" else []
    return ", ".join(str(part) for part in parts if part)


def label_of(one: Judged) -> str:
    return one.label


RARE = {"images for the kernel figures", "held-out images", "real images", "extractor's weights (sha256)", "eta"}
RARE |= {"real images' content (sha256)", "host", "processor"}
RARE |= {"threads", "timed calls", "timing session"}  # older runs recorded none of these


def condition_rows(judged: Sequence[Judged]) -> list[tuple[str, list[str]]]:
    """What the figures hold for: a row a condition, a cell for each model."""
    found = [(name, [get(one) for one in judged]) for name, get in CONDITIONS]
    kept = [(name, values) for name, values in found if name not in RARE or any(v is not None for v in values)]
    return [(name, [_shown(value) for value in values]) for name, values in kept]


def floor_table(
    judged: Sequence[Judged], name: Callable[[Judged], str] = label_of
) -> tuple[list[str], list[list[str]]] | None:
    """The noise floors as heads and rows: a row for each dense model and each two sets; None where there are none.

    The distances carry their extractor's name: in the heads where all share it, else in the cells.
    """
    own = [one for one in judged if any(one.get(f"noise_floor.{kind}") for kind in FLOORS)]
    if not own:
        return None
    alike = all(names_of(one) == names_of(own[0]) for one in own)
    words = {"fid": "Frechet distance", "kid": "kernel distance", "precision": "precision", "recall": "recall"}
    names = names_of(own[0]) if alike else words
    head = ["dense model", "between", *(names[key] for key in words), "images of a set", "samples by"]
    return head, [row for one in own for row in _floor_rows(one, name(one), names_told=not alike)]


def _floor_rows(one: Judged, name: str, names_told: bool) -> Iterator[list[str]]:
    """A row for two sets of its samples and one for two sets of real images."""
    told = {key: f"{word} " for key, word in names_of(one).items()} if names_told else dict.fromkeys(("fid", "kid"), "")
    for kind, words in FLOORS.items():
        floor = one.get(f"noise_floor.{kind}")
        if not floor:
            continue
        kernel = _form(floor, "kid", told["kid"] + "{:.5f}")
        if floor.get("kid_low") is not None and floor.get("kid_high") is not None:
            kernel += f" [{floor['kid_low']:.5f} to {floor['kid_high']:.5f}]"
        cells = [_form(floor, "fid", told["fid"] + "{:.3f}"), kernel]
        cells += [_form(floor, key, "{:.3f}") for key in ("precision", "recall")]
        cells += [_form(floor, "images", "{:,.0f}"), sampled(one) if kind == "samples" else "not sampled"]
        yield [name, words, *cells]


def efficiency_rows(judged: Sequence[Judged]) -> list[list[str]]:
    """Each compressed model's ratios to its dense one, in the order of RATIOS."""
    found = []
    for one in judged:
        if one.dense is not None:
            ratios, apart = comparison.efficiency(one), comparison.timed_apart(one)
            cells = {key: _form(ratios, key, "{:.3f}") for key in RATIOS}
            cells |= {"latency": f"{ABSENT}: {apart}"} if apart else {}
            found.append([one.label, *cells.values()])
    return found


def _form(values: dict[str, Any], key: str, form: str) -> str:
    return ABSENT if values.get(key) is None else form.format(values[key])


def _shown(value: Any) -> str:
    return ABSENT if value is None else str(value)
