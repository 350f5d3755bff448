"""Imported models: good zips load and sample; hostile ones are refused in one line and leave nothing behind."""

import io
import json
import os
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunedm import diffusion, import_hub, import_zip, imports, model_check, store, unet, untrusted
from prunedm.imports import ModelImportError


@pytest.fixture(scope="module")
def parts(model_folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(model_folder)): path.read_bytes() for path in model_folder.rglob("*") if path.is_file()
    }


def zipped(files, kind=zipfile.ZIP_DEFLATED) -> io.BytesIO:
    """A zip of names (or ZipInfo) and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return buffer


def refused(file, into: Path, match: str) -> None:
    with pytest.raises(ModelImportError, match=match) as error:
        import_zip.from_zip(file, into)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    left = [p.name for p in into.parent.iterdir()] if into.parent.exists() else []
    assert left == [], "nothing is left behind"


@pytest.mark.parametrize("top", ["", "tiny/"])
@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_good_zip_loads_and_samples(parts, tmp_path, model_folder, top, kind):
    file = zipped({f"{top}{name}": content for name, content in parts.items()}, kind)
    path = import_zip.from_zip(file, imports.target(tmp_path, "mine"))
    assert path == tmp_path / "models" / "mine"
    model, original = unet.load(str(path)), unet.load(str(model_folder))
    for a, b in zip(model.unet.parameters(), original.unet.parameters()):
        assert torch.equal(a, b)
    seeds = [1, 2]
    drawn = diffusion.sample(model.unet, model.scheduler, seeds, "ddim", 2)
    assert torch.equal(drawn, diffusion.sample(original.unet, original.scheduler, seeds, "ddim", 2))
    assert [(one.name, one.is_copy) for one in imports.listing(tmp_path)] == [("mine", True)]
    assert store.all_runs(tmp_path) == [], "no run in the eyes of lists"


def test_a_bare_unet_and_what_macos_adds_are_taken(parts, tmp_path):
    files = {name.removeprefix("unet/"): content for name, content in parts.items() if name.startswith("unet/")}
    noise = {"__MACOSX/._config.json": b"x", ".DS_Store": b"x"}
    path = import_zip.from_zip(zipped(files | noise), imports.target(tmp_path, "bare"))
    assert sorted(p.name for p in path.iterdir()) == sorted(files)
    assert unet.load(str(path)).image_shape == (1, 8, 8)


@pytest.fixture
def hub(model_folder, tmp_path_factory, monkeypatch) -> Path:
    """The folder that the hub gives for any id; of its weights only what was asked for."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("hub") / "snapshot")
    (folder / "evil.py").write_text("boom(")
    asked: list[list[str]] = []
    monkeypatch.setattr(unet, "download", lambda hub_id, patterns: asked.append(patterns) or folder)
    monkeypatch.setattr(unet, "asked", asked, raising=False)
    return folder


def test_a_model_of_the_hub_is_copied_without_anything_else(hub, tmp_path):
    path = import_hub.from_hub("someone/mine", imports.target(tmp_path, "mine"))
    assert unet.load(str(path)).image_shape == (1, 8, 8) and not list(path.rglob("*.py"))
    assert unet.asked == [["*.json"], unet.FETCHED]
    assert [(one.name, one.is_copy) for one in imports.listing(tmp_path)] == [("mine", True)]


def test_a_model_of_the_hub_that_is_not_supported_is_told_by_its_config_alone(hub, tmp_path):
    config = hub / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ModelImportError, match="model folder someone/mine holds a 'UNet2DConditionModel'"):
        import_hub.from_hub("someone/mine", imports.target(tmp_path, "mine"))
    assert unet.asked == [["*.json"]] and imports.listing(tmp_path) == []


def test_a_hub_out_of_reach_is_said_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(source, allow_patterns):
        raise LocalEntryNotFoundError("no network,\nnothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for hub_id, why in (
        ("someone/mine", "check the id and the network, or import a zip"),
        ("../x", "no id of the hub"),
    ):
        with pytest.raises(ModelImportError, match=why) as error:
            import_hub.from_hub(hub_id, imports.target(tmp_path, "mine"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "models").exists()


def test_the_loader_of_a_pruned_folder_is_never_unpacked(parts, tmp_path):
    files = {f"m/{name}": content for name, content in parts.items()} | {"m/unet/pruned_unet.py": b"boom("}
    path = import_zip.from_zip(zipped(files), imports.target(tmp_path, "pruned"))
    assert not list(path.rglob("*.py"))


HOSTILE = ["../x.json", "/etc/x.json", "a/../../config.json", "..\\x.json", "C:/config.json", "a//config.json", "./x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_folder_are_refused(parts, tmp_path, name):
    refused(zipped({**parts, name: b"{}"}), tmp_path / "models" / "a", "points outside")
    assert not (tmp_path / "x.json").exists()


@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_characters="\x00") | st.sampled_from("./\\:"), min_size=1, max_size=30
    )
)
def test_no_name_ever_writes_outside(parts, tmp_path_factory, name):
    root = tmp_path_factory.mktemp("root")
    into = root / "runs" / "models" / "a"
    try:
        import_zip.from_zip(zipped({**parts, name: b"{}"}), into)
    except ModelImportError as error:
        assert "\n" not in str(error)
        assert not into.exists()
    assert {p.name for p in root.iterdir()} <= {"runs"}
    assert not (root / "runs").exists() or {p.name for p in (root / "runs" / "models").iterdir()} <= {"a"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(parts, tmp_path, kind):
    info = zipfile.ZipInfo("README.md")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    refused(zipped([*parts.items(), (info, "/etc/passwd")]), tmp_path / "m", "a link or no plain file")


def test_encrypted_entries_are_refused(parts, tmp_path):
    raw = bytearray(zipped(parts).getvalue())
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.find(sign) + offset] |= 1
    refused(io.BytesIO(bytes(raw)), tmp_path / "m", "without a password")


@pytest.mark.parametrize("twin", ["unet/config.json", "UNET/config.json", "unet/Config.json"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(parts, tmp_path, twin):
    refused(zipped([*parts.items(), (twin, b"{}")]), tmp_path / "m", "twice|only config.json")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "unet/a.pkl", "model.ckpt", "x/y/z.pt"])
def test_pickles_are_refused_with_the_reason(parts, tmp_path, name):
    refused(zipped({**parts, name: b"x"}), tmp_path / "m", "can run code and are never loaded")


@pytest.mark.parametrize("name", ["run.sh", "unet/setup.py", "vae/config.json", "a/b/c/config.json", "unet/x.json"])
def test_other_files_are_refused(parts, tmp_path, name):
    refused(zipped({**parts, name: b"x"}), tmp_path / "m", "are taken")


def test_bombs_are_refused_before_they_unpack(parts, tmp_path):
    bomb = zipped({**parts, "unet/zeros.safetensors": b"\0" * (60 * untrusted.MIB)})
    refused(bomb, tmp_path / "m", "times its size")
    many = zipped({f"README{i}.md": b"" for i in range(import_zip.MOST_FILES + 1)})
    refused(many, tmp_path / "m", "files and")
    text = zipped({**parts, "README.md": os.urandom(untrusted.LARGEST_TEXT + 1)})
    refused(text, tmp_path / "m", "MiB; 4 are allowed")


def test_limits_of_sizes(parts, tmp_path, monkeypatch):
    file = zipped(parts)
    monkeypatch.setattr(import_zip, "LARGEST_UNPACKED", 1000)
    refused(file, tmp_path / "m", "are allowed")
    monkeypatch.setattr(import_zip, "LARGEST_ZIP", 1000)
    refused(file, tmp_path / "m", "unpack it and give the folder")


def test_an_entry_that_lies_about_its_size_is_refused(parts, tmp_path):
    raw = bytearray(zipped(parts, zipfile.ZIP_DEFLATED).getvalue())
    at = raw.find(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 3)
    refused(io.BytesIO(bytes(raw)), tmp_path / "m", "torn or altered|less than|more than|no JSON|cannot be read")


@given(cut=st.floats(0, 0.9999))
def test_a_truncated_zip_is_refused(parts, tmp_path_factory, cut):
    raw = zipped(parts).getvalue()
    refused(io.BytesIO(raw[: int(len(raw) * cut)]), tmp_path_factory.mktemp("t") / "m", "zip")


@given(place=st.floats(0, 0.9999), value=st.integers(1, 255))
def test_an_altered_byte_is_refused_or_harmless(parts, tmp_path_factory, place, value):
    raw = bytearray(zipped(parts).getvalue())
    raw[int(len(raw) * place)] ^= value
    root = tmp_path_factory.mktemp("t")
    try:
        path = import_zip.from_zip(io.BytesIO(bytes(raw)), root / "m")
    except ModelImportError as error:
        assert "\n" not in str(error) and list(root.iterdir()) == []
    else:
        unet.load(str(path))


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(tmp_path_factory, content):
    refused(io.BytesIO(content), tmp_path_factory.mktemp("t") / "m", "zip")


def config_of(parts, **changes) -> dict[str, bytes]:
    config = json.loads(parts["unet/config.json"]) | changes
    return {**parts, "unet/config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 10**9}, {"sample_size": 10**6}, {"block_out_channels": [10**9, 4]}, {"norm_num_groups": 0},
        {"_class_name": "UNet2DConditionModel"}, {"down_block_types": []}, {"block_out_channels": "x"},
        {"attention_head_dim": 0}, {"sample_size": -1}, {"act_fn": "os.system"},
    ],
)  # fmt: skip
def test_configs_that_make_no_sense_are_refused(parts, tmp_path, changes):
    refused(zipped(config_of(parts, **changes)), tmp_path / "models" / "m", ".")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none_is_refused(parts, tmp_path, content):
    refused(zipped({**parts, "unet/config.json": content}, zipfile.ZIP_STORED), tmp_path / "m", ".")


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 8 + b"{", struct.pack("<Q", 2**40) + b"{", struct.pack("<Q", 2) + b"[]"]
)
def test_safetensors_headers_are_bounded(parts, tmp_path, header):
    weights = next(name for name in parts if name.endswith(".safetensors"))
    refused(zipped({**parts, weights: header}), tmp_path / "m", "no safetensors file")


def test_a_large_header_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "LARGEST_HEADER", 4)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 8) + b"{      }")
    with pytest.raises(model_check.ModelError, match="are allowed"):
        model_check.shapes(tmp_path / "x.safetensors")


HEADERS = [b"{not json", b'{"a": 1}', b'{"a": {"shape": 3}}', b'{"a": {"shape": [-1]}}', b'{"a":' * 50_000]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_make_no_sense_are_refused(parts, tmp_path, header):
    weights = next(name for name in parts if name.endswith(".safetensors"))
    content = struct.pack("<Q", len(header)) + header
    refused(zipped({**parts, weights: content}, zipfile.ZIP_STORED), tmp_path / "m", "no header that can be read")


@pytest.mark.parametrize("name", ["unet/config.json", f"unet/{unet.WEIGHTS}"])
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(model_folder, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=r"has no config\.json|is no regular file|no diffusion_pytorch_model"):
        imports.look(folder)


@pytest.mark.parametrize("side", [[8], [8, 8, 8], "8", [8, "8"], True, {}])
def test_a_config_whose_images_have_no_shape_is_refused(parts, tmp_path, side):
    refused(zipped(config_of(parts, sample_size=side)), tmp_path / "m", "make no image|must be 1 to")


def test_a_look_reads_headers_only_and_agrees_with_the_model(model_folder, monkeypatch):
    model = unet.load(str(model_folder))
    monkeypatch.setattr(unet, "read_weights", lambda folder: pytest.fail("weights were read"))
    seen = imports.look(model_folder)
    assert seen == imports.Overview(model.image_shape, unet.parameters(model.unet), unet.weight_bytes(model_folder))


def test_an_imported_model_is_found_by_its_own_name_only(model_folder, tmp_path):
    one = imports.from_path(model_folder, tmp_path)
    assert imports.find(tmp_path, one.name) == one
    for name in ("", ".", "..", f"../models/{one.name}", f"{one.name}/", one.name.upper(), "paths.json", ".exports"):
        with pytest.raises(ModelImportError, match="no imported model"):
            imports.find(tmp_path, name)


def test_weights_are_needed(parts, tmp_path):
    bare = {name: content for name, content in parts.items() if not name.endswith(".safetensors")}
    refused(zipped(bare), tmp_path / "m", "no diffusion_pytorch_model")
    refused(zipped({}), tmp_path / "m", "zip|config")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 61, "paths.json", ".part-x", "a\nb"])
def test_names_of_models_are_checked(tmp_path, name):
    with pytest.raises(ModelImportError, match="name"):
        imports.target(tmp_path, name)


def test_a_folder_is_listed_by_its_path_and_stays(model_folder, tmp_path):
    one = imports.from_path(model_folder, tmp_path)
    assert imports.listing(tmp_path) == [one] and one.path == model_folder and not one.is_copy
    with pytest.raises(ModelImportError, match="on the list already"):
        imports.from_path(str(model_folder), tmp_path)
    with pytest.raises(ModelImportError, match="is taken"):
        imports.target(tmp_path, one.name.upper())
    imports.delete(tmp_path, one.name)
    assert imports.listing(tmp_path) == [] and (model_folder / "model_index.json").is_file()


def test_what_is_no_model_folder_is_not_listed(tmp_path):
    with pytest.raises(ModelImportError, match="not a folder"):
        imports.from_path(tmp_path / "absent", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelImportError, match=r"config\.json"):
        imports.from_path(tmp_path / "empty", tmp_path)
    assert imports.listing(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"../x": "y"}', '{"a": 1}'])
def test_a_damaged_list_is_said(tmp_path, content):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "paths.json").write_text(content)
    with pytest.raises(ModelImportError, match="mend or delete"):
        imports.listing(tmp_path)


def test_delete_removes_the_copy_but_not_under_a_run_that_needs_it(parts, tmp_path, micro):
    path = import_zip.from_zip(zipped(parts), imports.target(tmp_path, "mine"))
    run = store.create(tmp_path, micro(model={"source": str(path)}))
    with pytest.raises(ModelImportError, match="stop the run"):
        imports.delete(tmp_path, "mine")
    run.end(run.state(), "stopped", None)
    imports.delete(tmp_path, "mine")
    assert not path.exists() and list((tmp_path / "models").iterdir()) == []
    with pytest.raises(ModelImportError, match="no imported model"):
        imports.delete(tmp_path, "../mine")
