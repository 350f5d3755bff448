"""What others made, altered thousands of times: each file ends in one clear line, in bounded time and memory, and
nothing is written outside the runs folder. A share of each count runs always, all of them with PRUNEDM_SLOW=all.
"""

import copy
import io
import json
import os
import re
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_imports_of_models import refused, zipped

from prunedm import data, imports, pictures, recipe, strict_yaml, untrusted
from prunedm.imports import ModelImportError
from prunedm.model_check import ModelError
from prunedm.recipe import Data, RecipeError

SECONDS = 20.0  # of the processor that a single file may take, on any machine
MIB_MORE = 400.0  # memory that all files of a test together may add
MARKER = "touched-by-a-stranger"  # what hostile files would create, if anything in them ran


def shares(few: int, many: int) -> pytest.MarkDecorator:
    """``count``: a few cases always, and all that the project promises as a slow test."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def examine(count: int, strategy: st.SearchStrategy, check) -> None:
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(check))()


@contextmanager
def bounded() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


@pytest.fixture(autouse=True)
def harmless(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory that stays empty, and memory that does not grow by much."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield here
    assert list(here.iterdir()) == [] and not Path("/tmp", MARKER).exists()
    unit = 2**10 if sys.platform == "linux" else 2**20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < MIB_MORE


def one_clear_line(error: BaseException, most: int = 700) -> None:
    text = str(error)
    assert text and text.isprintable() and len(text) < most, text


# --- recipes -------------------------------------------------------------------------------------------
HOSTILE_VALUES = [
    None, True, "", " ", 0, -1, 1, 2**63, 10**400, -(2**31), 1e308, -1e-308, float("nan"), float("inf"), "nan", "../..",
    "/etc/passwd", "x" * 5000, "\x00", "\x1b[2J", "\u202e", "a\nb", "<img src=x onerror=alert(1)>", "{{7*7}}",
    "$(touch x)", "'; DROP TABLE runs; --", [], {}, [[]], [None], {"": ""}, {"match": "*", "ratio": 2}, "2:4", "1:99",
    "cuda:99999999999", "hf:../..", b"bytes",
]  # fmt: skip
HOSTILE_TEXTS = [
    "&a", "*a", "<<: *a", "<<: {seed: 1}", "!!python/object/apply:os.system ['touch " + MARKER + "']", "!!binary aGk=",
    "!!python/name:os.system", "!!set {a}", "!!timestamp 2024-13-45", "!x y", "? [a, b]\n: c", "\t", "%YAML 9.9\n---",
    "---\n---", "...", "|", ">-", "{", "[", "]", "- ", ": ", "#", "\x00", "\ufeff", "\u2028", "\x85", "\ud800", "'",
    '"', "0x_", "1e999", "-.inf", ".nan", "0o9", "190:20:30", "2024-02-30", "~", "=", "@", "`", "9" * 5000,
]  # fmt: skip
DOCUMENTS = [recipe.build(recipe.preset(name)).model_dump() for name in recipe.PRESETS]


@st.composite
def mutated_documents(draw) -> str:
    """A recipe's text with one to four values replaced, fields added and lost, and then its letters altered."""
    document = copy.deepcopy(draw(st.sampled_from(DOCUMENTS)))
    for _ in range(draw(st.integers(0, 3))):
        place, key = _place(draw, document)
        action = draw(st.sampled_from(["replace", "replace", "lose", "add", "nest"]))
        if action == "replace":
            place[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
        elif action == "lose":
            del place[key]
        elif action == "add":
            place[draw(st.text(max_size=8))] = 1
        else:
            place[key] = {key: place[key]}
    text = strict_yaml.dump(document)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(HOSTILE_TEXTS) | st.text(max_size=4)) + text[end:]
    return text


def _place(draw, document: dict) -> tuple[dict, str]:
    """A field of the document, or of one of its sections."""
    key = draw(st.sampled_from(sorted(document)))
    inside = document[key]
    if isinstance(inside, dict) and inside and draw(st.booleans()):
        return inside, draw(st.sampled_from(sorted(inside)))
    return document, key


@shares(200, 2000)
def test_mutated_recipes(count, tmp_path):
    path = tmp_path / "recipe.yaml"
    ends = {"taken": 0, "refused": 0}

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with bounded():
            try:
                found = recipe.resolve(path)
            except RecipeError as error:
                one_clear_line(error)
                ends["refused"] += 1
            else:
                assert recipe.build(recipe.parse(found.to_yaml())) == found
                assert re.fullmatch(recipe.NAME_PATTERN, found.name)
                ends["taken"] += 1

    examine(count, mutated_documents(), check)
    assert min(ends.values()) > count // 50, ends


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
COLLIDING = "".join(f"{n * (2**61 - 1)}: 1\n" for n in range(60_000))
TAGS = [
    f"name: !!python/object/apply:os.system ['touch /tmp/{MARKER}']", f"!!python/object/new:os.system [touch {MARKER}]",
    "name: !!python/name:os.system", "name: !!python/module:os", "name: !!python/tuple [a]", "name: !local x",
    "!!python/object/apply:subprocess.Popen {args: [id]}", "!!timestamp 2024-13-45name: x", "name: !!timestamp x",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "alias"), ("seed: &a 1\ntrain: *a", "alias"), ("a: &a [*a]", "alias"),
        ("base: &b {seed: 1}\n<<: *b", "alias"), *((text, "is a tag") for text in TAGS),
        ("[" * 100_000, "deep"), ("{a: " * 60_000, "deep"), ("- " * 100_000, "deep|not YAML"),
        (COLLIDING, "characters"), (COLLIDING[:200_000], "string"), ("a: 1\n" * 40_000, "stands twice"),
        ("x" * 300_000, "characters"),
        ("seed: " + "9" * 100_000, "digits"), ("name: " + "x" * 200_000, "letters"),
    ],
)  # fmt: skip
def test_yaml_that_would_run_or_grow(text, said):
    with bounded(), pytest.raises(RecipeError, match=said) as error:
        recipe.build(recipe.parse(text))
    one_clear_line(error.value)


# --- model folders -------------------------------------------------------------------------------------
CONFIG_VALUES = [
    None, True, 0, -1, 1, 3, 10**9, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../x", "os.system",
    [], [0], [16, 32, 64], [-1, 32], [10**9, 32], [[16], [32]], {}, {"a": 1}, ["DownBlock2D"] * 40, "fourier",
    "learned", "UNet2DConditionModel", ["DownBlock2D", "NoBlock"], "silu", 0.5, "\x1b[2J", "<b>",
]  # fmt: skip
EXTRA_KEYS = [
    "auto_map",
    "_name_or_path",
    "quantization_config",
    "__class__",
    "x" * 300,
    "trust_remote_code",
    "class_embed_type",
]
PICKLE = b"cos\nsystem\n(S'touch /tmp/" + MARKER.encode() + b"'\ntR."
FILES = [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "model_index.json",
]


@st.composite
def harms(draw) -> tuple:
    """What is done to a folder: its kind, a file and values."""
    kind = draw(st.sampled_from(["config", "config", "config", "header", "header", "bytes", "cut", "file"]))
    if kind == "config":
        changes = draw(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(CONFIG_VALUES)), min_size=1, max_size=3))
        return kind, draw(st.sampled_from([FILES[0], FILES[0], FILES[2], FILES[3]])), changes
    if kind == "header":
        return kind, FILES[1], (draw(st.integers(0, 200)), draw(st.sampled_from(HEADER_CHANGES)))
    if kind == "bytes":
        places = st.tuples(st.floats(0, 0.999), st.integers(0, 255))
        return kind, draw(st.sampled_from(FILES)), draw(st.lists(places, min_size=1, max_size=6))
    if kind == "cut":
        return kind, draw(st.sampled_from(FILES)), draw(st.floats(0, 0.999))
    return (
        kind,
        draw(st.sampled_from(FILES)),
        draw(st.sampled_from(["gone", "folder", "link", "pipe", "pickle", "code"])),
    )


HEADER_CHANGES = [
    {"shape": [2**40]}, {"shape": [0]}, {"shape": []}, {"shape": [-1, 3]}, {"shape": [10**30]}, {"shape": "x"},
    {"dtype": "F64"}, {"dtype": "O"}, {"dtype": 1}, {"data_offsets": [0, 2**62]}, {"data_offsets": [8, 0]},
    {"data_offsets": [-8, 0]}, {"data_offsets": [0]}, {"shape": [1] * 2000}, None, [], "x",
]  # fmt: skip


def harm(folder: Path, kind: str, name: str, what) -> None:
    path = folder / name
    if kind == "config":
        config = json.loads(path.read_text())
        keys = [*config, *EXTRA_KEYS]
        path.write_text(json.dumps(config | {keys[place % len(keys)]: value for place, value in what}))
    elif kind == "header":
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        key = sorted(header)[what[0] % len(header)]
        header[key] = header[key] | what[1] if isinstance(what[1], dict) else what[1]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    elif kind == "bytes":
        raw = bytearray(path.read_bytes())
        for place, value in what:
            raw[int(len(raw) * place)] = value
        path.write_bytes(raw)
    elif kind == "cut":
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * what)])
    else:
        replace(path, what)


def replace(path: Path, by: str) -> None:
    path.unlink()
    if by == "folder":
        path.mkdir()
    elif by == "link":
        path.symlink_to("/dev/zero")
    elif by == "pipe":
        os.mkfifo(path)
    elif by == "pickle":
        path.with_suffix(".bin").write_bytes(PICKLE)
    elif by == "code":
        path.with_name("pruned_unet.py").write_text(f"open('/tmp/{MARKER}', 'w')")


def listed(folder: Path) -> list[tuple]:
    """All that lies in a folder, with its size and when it was changed."""
    found = ((p.relative_to(folder).as_posix(), p.lstat()) for p in sorted(folder.rglob("*")))
    return [(name, stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@shares(60, 500)
def test_mutated_model_folders(count, model_folder, tmp_path):
    runs = tmp_path / "runs"
    ends = {"taken": 0, "refused": 0}

    def check(harm_of: tuple) -> None:
        folder = shutil.copytree(model_folder, tmp_path / "given")
        try:
            harm(folder, *harm_of)
            before = listed(folder)
            with bounded():
                try:
                    imports.from_path(folder, runs)
                    imports.delete(runs, "given")
                    ends["taken"] += 1
                except ModelError as error:
                    one_clear_line(error, 900)
                    ends["refused"] += 1
            assert listed(folder) == before, "a folder of others is never touched"
            assert [p.name for p in runs.rglob("*") if p.is_file()] in ([], ["paths.json"])
        finally:
            shutil.rmtree(folder)

    examine(count, harms(), check)
    assert min(ends.values()) > 0, ends


@pytest.mark.parametrize("length", [20 * 2**20, 99 * 10**6, 2**33, 2**63])
def test_giant_headers_are_not_read(model_folder, tmp_path, length):
    """A file of the size that its header claims, without a byte of disk behind it where the system allows."""
    folder = shutil.copytree(model_folder, tmp_path / "given")
    weights = folder / FILES[1]
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(min(length + 8, 2**34))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bounded(), pytest.raises(ModelImportError, match=r"header of|no safetensors file") as error:
        imports.from_path(folder, tmp_path / "runs")
    one_clear_line(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 20 * 2**10, "20 MiB"


# --- zips ----------------------------------------------------------------------------------------------
def test_a_zip_whose_entries_share_their_bytes_is_refused(tmp_path):
    """Many names for one compressed block: small on disk, large when unpacked, each entry honest by itself."""
    block = zipped({"unet/config.json": b"\0" * (3 * untrusted.MIB)}).getvalue()
    start, end = block.index(b"PK\x01\x02"), block.index(b"PK\x05\x06")
    entry, head = block[start:end], block[:start]
    entries = b"".join(entry for _ in range(60))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60, 60, len(entries), len(head), 0)
    refused(io.BytesIO(head + entries + tail), tmp_path / "models" / "m", "times its size|twice")


def test_a_zip_in_a_zip_is_not_opened(tmp_path):
    inner = zipped({"unet/config.json": b"{}"}).getvalue()
    refused(zipped({"model.zip": inner}, zipfile.ZIP_STORED), tmp_path / "models" / "m", "are taken")


# --- image files ---------------------------------------------------------------------------------------
SUFFIXES = ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "tga", "pcx", "sgi", "jp2"]


def picture(suffix: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, {"jp2": "JPEG2000"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


PICTURES = {suffix: picture(suffix) for suffix in SUFFIXES}


@st.composite
def mutated_pictures(draw) -> tuple[str, bytes]:
    """A picture under its own suffix or another's: bytes altered, cut out, doubled; sides claimed to be huge."""
    raw = bytearray(PICTURES[draw(st.sampled_from(SUFFIXES))])
    for _ in range(draw(st.integers(1, 6))):
        place = int(draw(st.sampled_from([1.0, 0.05])) * draw(st.floats(0, 0.999)) * len(raw))
        change = draw(st.sampled_from(["byte", "byte", "huge", "cut", "double"]))
        if change == "byte":
            raw[place] = draw(st.integers(0, 255))
        elif change == "huge":
            raw[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"]))
        elif change == "cut":
            del raw[place : place + draw(st.integers(1, 64))]
        else:
            raw[place:place] = raw[place : place + 64]
        raw = raw or bytearray(b"\0")
    return draw(st.sampled_from(SUFFIXES)), bytes(raw)


@shares(100, 500)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_image_files(count, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        (folder / f"good{i}.png").write_bytes(PICTURES["png"])

    def check(given: tuple[str, bytes]) -> None:
        path = folder / f"given.{given[0]}"
        path.write_bytes(given[1])
        with bounded():
            found = data.load(Data(source=str(folder)), (3, 8, 8))
        assert len(found.train) + len(found.held_out) + len(found.skipped) == 3
        for line in found.skipped:
            assert line.startswith(path.name) and len(line) < 400 and line.isprintable(), line
        path.unlink()

    examine(count, mutated_pictures(), check)


def test_a_picture_of_many_pixels_is_not_decoded(tmp_path):
    """80 million pixels in a few kB: below what Pillow itself calls a bomb."""
    Image.new("1", (10_000, 8_000)).save(tmp_path / "large.png")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(PICTURES["png"])
    found = data.load(Data(source=str(tmp_path)), (1, 8, 8))
    assert found.skipped == ["large.png: has 10,000 x 8,000 pixels and 64,000,000 are allowed; make it smaller"]


SHEET = pictures.sheet_png(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), {})


@pytest.mark.parametrize(
    "change",
    [
        {"count": 10**9}, {"count": -1}, {"count": "3"}, {"count": 0}, {"height": 10**6}, {"width": 0}, {"columns": 0},
        {"columns": 1}, {"height": 4.0}, {"height": None}, {"columns": True},
    ],
)  # fmt: skip
def test_a_sheet_that_lies_about_its_geometry_is_refused(tmp_path, change):
    path = tmp_path / "sheet.png"
    path.write_bytes(pictures.sheet_png(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), change))
    with bounded(), pytest.raises(ValueError, match="no sample sheet"):
        pictures.read_sheet(path)


@shares(100, 500)
def test_mutated_sheets(count, tmp_path):
    path = tmp_path / "sheet.png"

    def check(changes: list[tuple[float, int]]) -> None:
        raw = bytearray(SHEET)
        for place, value in changes:
            raw[int(len(raw) * place)] = value
        path.write_bytes(raw)
        with bounded():
            try:
                assert len(pictures.read_sheet(path)[0]) == 3
            except (ValueError, OSError) as error:
                one_clear_line(error)

    examine(count, st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8), check)
