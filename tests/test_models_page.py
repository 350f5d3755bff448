"""Models through AppTest: layers of any model, exports of a run's variants and of imported models, imports."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from apptest import click, labels, open_page, said, shown, wait_for
from conftest import make_unet
from diffusers import DDPMScheduler

from app import export_views, exports, layer_views
from prunedm import imports, layer_order, packed, pipeline, store, unet, verify

MARKUP = "<b>a</b> ![x](http://example.invalid/p.png) *b*, 50%"


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, micro):
    run = store.create(tmp_path_factory.mktemp("done"), micro())
    assert pipeline.execute(run) == "done"
    return run


@pytest.fixture
def with_done(runs, done_run):
    shutil.copytree(done_run.folder, runs / done_run.id)
    return store.Run(runs / done_run.id)


@pytest.fixture(autouse=True)
def fresh_exports():
    exports.exports.clear()


@pytest.fixture
def theirs(model_folder, tmp_path_factory):
    """A model folder of the user's own, outside the lab."""
    return shutil.copytree(model_folder, tmp_path_factory.mktemp("user") / "theirs")


@pytest.fixture(params=["copy", "path"])
def imported(request, runs, theirs, model_folder):
    """An imported model of either kind, and its source of exports."""
    if request.param == "path":
        one = imports.from_path(theirs, runs)
    else:
        shutil.copytree(model_folder, runs / "models" / "theirs")
        one = imports.find(runs, "theirs")
    return one


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def finish(source):
    wait_for(lambda: not exports.exports().busy(source.folder))
    assert [task.error for task in exports.exports().of(source.folder)] == []


# --- exports ---------------------------------------------------------------------------------------
def test_a_runs_variant_is_exported_verified_and_its_export_deleted(with_done):
    app = open_page("models", run=with_done.id)
    assert "Every N:M layer keeps its pattern" in said(app)
    app.selectbox(key="models.format").set_value("packed").run()
    click(app, "Export")
    finish(exports.of_variant(with_done, "nm"))
    (path,) = exports.finished(with_done.exports)
    assert path.name == f"{with_done.id}-nm-packed-fp32.safetensors" and packed.read(path)
    app.run()
    assert path.name in shown(app)
    click(app, "Export")
    assert "is already there; delete it first" in said(app)
    click(app, "Verify")
    click(app, "Delete it")
    assert exports.finished(with_done.exports) == []


FORMS = [("diffusers", "fp16", "none"), ("packed", "fp32", "weights"), ("onnx", "fp32", "dynamic"),
         ("tensorrt", "fp32", "none")]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "int8"), FORMS)
def test_an_imported_model_is_exported_in_each_format_into_the_labs_own_folder(imported, runs, kind, dtype, int8):
    before = listing(imported.path)
    source = exports.of_imported(imported)
    task = exports.exports().start(source, kind, dtype, int8)
    task.future.result(60)
    (path,) = exports.finished(source.folder)
    assert path.name == exports.file_name("theirs", kind, dtype, int8) and path.is_relative_to(runs)
    assert listing(imported.path) == before, "nothing is written into the model's folder"
    assert verify.inspect(path)["ok"] and task.doing in ("reading it back", "making a zip of it")
    assert task.phase == task.phases, "every phase was told of"
    assert [one.name for one in imports.listing(runs)] == ["theirs"], "exports are no model of the list"


def test_the_page_exports_an_imported_model_offers_it_verifies_and_deletes_it(imported):
    app = open_page("models", imported="theirs")
    assert app.segmented_control(key="models.view").value == "Imported models"
    app.selectbox(key="models.format").set_value("onnx").run()
    click(app, "Export")
    source = exports.of_imported(imported)
    finish(source)
    app.run()
    (path,) = exports.finished(source.folder)
    assert path.name == "theirs-onnx-fp32.onnx" and path.name in shown(app)
    offered = [(b.label, b.proto.id) for b in app.get("download_button")]
    assert [label for label, _ in offered] == ["Download", "Record"]
    click(app, "Verify")
    assert len(app.metric) == 8, "the model's figures, and the export's"
    app.text_input(key=f"filter {path}").set_value("conv_in").run()
    assert len(app.metric) == 8, "what was verified stays while its layers are searched"
    click(app, "Delete it")
    assert exports.finished(source.folder) == [] and imported.path.is_dir()


def test_an_exported_folder_holds_the_very_weights(imported):
    source = exports.of_imported(imported)
    exports.exports().start(source, "diffusers", "fp32", "none").future.result(60)
    (path,) = exports.finished(source.folder)
    original, written = unet.load(str(imported.path)).unet, unet.load(str(path)).unet
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), written.parameters(), strict=True))
    assert f"{path.name}/model_index.json" in zipfile.ZipFile(exports.archive(path)).namelist()
    exports.delete(path)
    assert not path.exists() and not exports.archive(path).exists()


def test_exports_go_with_the_imported_model_and_none_is_inherited(imported, runs, model_folder):
    source = exports.of_imported(imported)
    exports.exports().start(source, "packed", "fp32", "none").future.result(60)
    app = open_page("models", imported="theirs")
    assert any("Its export is deleted" in m.value for m in app.markdown)
    click(app, "Delete this model")
    assert not source.folder.exists() and imports.listing(runs) == []
    assert imported.path.is_dir() != imported.is_copy, "a folder by path stays"
    source.folder.mkdir(parents=True)  # a copy whose folder was removed by hand leaves its exports behind
    (source.folder / "theirs-packed-fp32.safetensors").write_bytes(b"of another model")
    again = shutil.copytree(model_folder, runs.parent / f"{runs.name}-again" / "theirs")
    assert exports.finished(exports.of_imported(imports.from_path(again, runs)).folder) == []


def test_a_model_that_is_being_exported_is_not_deleted(imported, monkeypatch):
    monkeypatch.setattr(exports.Exports, "busy", lambda self, folder: True)
    app = open_page("models", imported="theirs")
    click(app, "Delete this model")
    assert "an export of theirs is at work" in shown(app) and imported.path.is_dir()


def test_an_export_of_a_model_that_has_changed_since_is_marked(imported):
    source = exports.of_imported(imported)
    exports.exports().start(source, "packed", "fp32", "none").future.result(60)
    assert "This export is older than the model" not in shown(open_page("models", imported="theirs"))
    os.utime(imported.path / "unet" / unet.WEIGHTS)
    assert "This export is older than the model" in shown(open_page("models", imported="theirs"))


def test_a_folder_that_went_away_is_said_at_each_step(runs, theirs):
    one = imports.from_path(theirs, runs)
    source = exports.of_imported(one)
    app = open_page("models", imported=one.name)
    shutil.rmtree(theirs)
    click(app, "Export")
    assert "is gone; put it back, or take it off the list" in shown(app)
    with pytest.raises(ValueError, match="is not there, or not a folder"):
        exports.exports().start(source, "packed", None, "none")
    assert exports.finished(source.folder) == []


def test_a_model_that_breaks_before_its_turn_fails_in_one_line(runs, theirs):
    one = imports.from_path(theirs, runs)
    source = exports.of_imported(one)
    weights = theirs / "unet" / unet.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])  # the header is whole, so only loading finds out
    task = exports.exports().start(source, "packed", None, "none")
    wait_for(task.future.done)
    assert str(weights) in task.error and "\n" not in task.error
    app = open_page("models", imported=one.name)
    assert "cannot be read" in shown(app) and labels(app).count("Verify") == 0


def test_an_export_that_cannot_work_is_said_in_the_lab(with_done):
    app = open_page("models", run=with_done.id)
    app.selectbox(key="models.format").set_value("semi-structured").run()
    click(app, "Export")
    if not torch.cuda.is_available():
        assert "CUDA" in said(app)


def test_what_a_killed_server_left_half_exported_is_made_again(with_done):
    source = exports.of_variant(with_done, "structured")
    path = source.folder / exports.file_name(source.stem, "diffusers", "fp16", "none")
    path.mkdir(parents=True)
    (path / "torn").write_text("x")
    path.with_name(f".{path.name}.part.zip").write_bytes(b"torn")
    onnx = source.folder / exports.file_name(f"{with_done.id}-nm", "onnx", "fp32", "none")
    onnx.write_bytes(b"torn")
    assert exports.finished(source.folder) == []
    exports.exports().start(source, "diffusers", "fp16", "none").future.result(60)
    assert exports.finished(source.folder) == [path] and not (path / "torn").exists()


@pytest.mark.parametrize("stem", ["a-tensorrt-fp32", "a-tensorrt", "a-tensorrt-b"])
def test_a_models_name_is_not_taken_for_a_format(tmp_path, stem):
    onnx = tmp_path / exports.file_name(stem, "onnx", "fp32", "none")
    script = tmp_path / exports.file_name(stem, "tensorrt", "fp32", "none")
    for path in (onnx, script):
        path.write_bytes(b"x")
    assert exports.finished(tmp_path) == []
    onnx.with_suffix(".json").write_text("{}")
    assert exports.finished(tmp_path) == [onnx]
    script.with_suffix(".sh").write_text("")
    assert exports.finished(tmp_path) == sorted([onnx, script])


# --- layers ----------------------------------------------------------------------------------------
def test_blocks_hold_every_layer_once_in_the_order_of_the_data(model_folder):
    rows = layer_order.in_order(verify.inspect(model_folder)["layers"])
    found = layer_views.blocks(rows)
    names = ["conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [block.name for block in found] == [*names, "conv_out"]
    model = make_unet()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    for block in found:
        own = [w for n, w in weights.items() if n == block.name or n.startswith(f"{block.name}.")]
        assert (block.layers, block.weights) == (len(own), sum(w.numel() for w in own))
        assert round(block.kept) == sum(int(w.count_nonzero()) for w in own)
    assert found[2].widths == (16, 16) and found[3].widths == (32, 32)


def test_the_bars_add_up_and_zeros_are_told_apart():
    rows = [
        {"layer": "conv_in", "shape": [4, 2, 1, 1], "density": 1.0},
        {"layer": "mid_block.a", "shape": [8, 4, 1, 1], "density": 0.5},
    ]
    found = layer_views.blocks(rows)
    kept, zero = layer_views.bars(found, 40, "view")["data"]
    assert kept["x"] == [8, 16] and zero["x"] == [0, 16] and zero["text"] == ["8 (20%)", "32 (80%)"]
    (only,) = layer_views.bars(layer_views.blocks(rows[:1]), 8, "view")["data"]
    assert only["x"] == [8], "no second bar where nothing is zero"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.00 k"), (703_104, "703 k"), (999_999, "1,000 k"),
                        (2_734_945, "2.73 M"), (35_746_307, "35.7 M"), (12_345_678_900, "12,346 M")],
)  # fmt: skip
def test_counts_are_short(count, text):
    assert layer_views.short_number(count) == text


def test_the_layers_are_filtered_by_a_part_of_the_name_or_a_pattern(runs, theirs):
    one = imports.from_path(theirs, runs)
    app = open_page("models", imported=one.name)
    whole = app.dataframe[0].value
    assert len(whole) > 20 and whole["weights"].dtype.kind == "i", "numbers sort as numbers"
    assert abs(whole["share"].sum() - 1) < 1e-6
    for typed, expected in (
        ("CONV1", whole["layer"].str.contains("conv1")),
        ("up_blocks.*", whole["layer"].str.startswith("up_blocks.")),
        ("*.to_?", whole["layer"].str.fullmatch(r".*\.to_.")),
        (" ", whole["layer"].notna()),
    ):
        app.text_input(key=f"filter {one.path}").set_value(typed).run()
        assert list(app.dataframe[0].value["layer"]) == list(whole["layer"][expected]) and expected.any()
    app.text_input(key=f"filter {one.path}").set_value("nowhere [").run()
    assert not app.exception and len(app.dataframe[0].value) == 0 and "0 of" in said(app)


def test_the_config_is_shown_as_it_stands(runs, theirs):
    one = imports.from_path(theirs, runs)
    app = open_page("models", imported=one.name)
    codes = [c.value for c in app.code if c.language == "json"]
    assert codes[0] == (theirs / "unet" / "config.json").read_text().strip() and "DDPMScheduler" in codes[1]
    assert [e for e in app.expander if e.label == "Config" and not e.proto.expanded]


def test_the_overview_is_that_of_the_loaded_model(model_folder, done_run):
    for folder in (model_folder, done_run.variant("nm")):
        model, seen = unet.load(str(folder)), imports.look(folder)
        assert seen.shape == model.image_shape and seen.parameters == unet.parameters(model.unet)
        assert seen.bytes == unet.weight_bytes(folder)


# --- imports ---------------------------------------------------------------------------------------
def zip_of(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, f"tiny/{path.relative_to(folder)}")
    return buffer.getvalue()


def test_a_zip_is_imported_looked_at_launched_from_and_deleted(runs, model_folder):
    app = open_page("models")
    assert "the demo makes two" in said(app) and next(b for b in app.button if b.label == "Import the zip").disabled
    app.segmented_control(key="models.view").set_value("Imported models").run()
    assert "None yet" in said(app)
    app.file_uploader(key="models.zip").set_value(("Tiny net.zip", zip_of(model_folder), "application/zip")).run()
    click(app, "Import the zip")
    assert not app.error, app.error[0].value
    assert "Tiny-net is imported" in shown(app) and "images 8x8, grey" in shown(app)
    (one,) = imports.listing(runs)
    assert one.path == runs / "models" / "Tiny-net" and app.selectbox(key="models.imported").value == "Tiny-net"
    assert len(app.dataframe) == 1 and list(app.dataframe[0].value["fits N:M"]).count("2:4") > 3
    launch = open_page("launch")
    launch.selectbox(key="recipe.model.source").set_value(str(one.path)).run()
    assert not launch.exception and str(one.path) in next(c.value for c in launch.code if c.language == "yaml")
    click(app, "Delete this model")
    assert imports.listing(runs) == [] and "None yet" in said(app)


def test_a_hostile_zip_is_refused_in_one_line_on_the_page(runs):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("unet/diffusion_pytorch_model.bin", b"x")
    app = open_page("models")
    app.file_uploader(key="models.zip").set_value(("x.zip", buffer.getvalue(), "application/zip")).run()
    click(app, "Import the zip")
    assert "can run code and are never loaded" in said(app) and imports.listing(runs) == []


def test_a_folder_is_added_by_path_and_a_missing_one_is_said(runs, theirs):
    app = open_page("models")
    app.text_input(key="models.path").set_value(str(theirs)).run()
    click(app, "Add the folder")
    assert "theirs is imported" in said(app)
    shutil.rmtree(theirs)
    app.run()
    assert not app.exception and "is gone" in said(app)
    click(app, "Delete this model")
    assert imports.listing(runs) == []


def test_a_model_is_imported_by_its_hub_id_and_a_missing_network_is_said(runs, theirs, monkeypatch):
    app = open_page("models")

    def offline(hub_id, patterns):
        raise unet.ModelError("no network") from OSError()

    monkeypatch.setattr(unet, "download", offline)
    app.text_input(key="models.hub").set_value("someone/tiny-net").run()
    click(app, "Import from the hub")
    assert "the hub did not give someone/tiny-net (OSError); check the id and the network" in shown(app)
    assert len(app.error) == 1 and imports.listing(runs) == []
    monkeypatch.setattr(unet, "download", lambda hub_id, patterns: theirs)
    click(app, "Import from the hub")
    assert not app.error and "tiny-net is imported" in shown(app)
    (one,) = imports.listing(runs)
    assert one.path == runs / "models" / "tiny-net" and one.is_copy


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "/no/such", "a\0b", "/", "/dev/null"])
def test_a_path_that_is_no_model_is_said(runs, path):
    app = open_page("models")
    app.text_input(key="models.path").set_value(path).run()
    click(app, "Add the folder")
    assert len(app.error) == 1 and imports.listing(runs) == []


def test_a_folders_name_with_markup_is_shown_as_text(runs, model_folder, tmp_path_factory):
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("user") / MARKUP.replace("/", "-"))
    one = imports.from_path(folder, runs)
    app = open_page("models", imported=one.name)
    assert folder.name in shown(app)
    assert "<b>" not in said(app) and "![x]" not in said(app)


def test_another_architecture_is_refused_with_its_name(runs, theirs):
    config = theirs / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    app = open_page("models")
    app.text_input(key="models.path").set_value(str(theirs)).run()
    click(app, "Add the folder")
    assert "'UNet2DConditionModel'; only UNet2DModel is supported" in shown(app) and imports.listing(runs) == []


def test_a_link_chooses_runs_or_an_imported_model(with_done, runs, theirs):
    one = imports.from_path(theirs, runs)
    app = open_page("models")
    assert app.selectbox(key="run_pick").value == with_done.id
    app.segmented_control(key="models.view").set_value("Imported models").run()
    assert app.query_params["imported"] == one.name and "run" not in app.query_params
    app.query_params["run"] = with_done.id
    app.run()
    assert app.selectbox(key="run_pick").value == with_done.id and "imported" not in app.query_params
    gone = open_page("models", imported="<b>gone</b>")
    assert "There is no imported model \\<b\\>gone\\</b\\> here" in said(gone)
    assert gone.selectbox(key="models.imported").value == one.name


def test_a_damaged_list_of_models_breaks_no_page(runs):
    (runs / "models").mkdir()
    (runs / "models" / "paths.json").write_text("{")
    for page in ("models", "launch", "compare"):
        assert "mend or delete" in said(open_page(page))


def test_an_imported_model_of_three_colours_is_looked_at(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "rgb"
    unet.save(make_unet(in_channels=3, out_channels=3, sample_size=[8, 12]), DDPMScheduler(), folder, {})
    assert imports.look(folder).shape == (3, 8, 12)
    app = open_page("models", imported=imports.from_path(folder, runs).name)
    assert "images 12x8, colour" in shown(app)


def test_an_export_at_work_shows_how_many_of_its_phases_are_done(monkeypatch):
    drawn = []
    monkeypatch.setattr(export_views.parts, "bar", lambda share, *lines: drawn.append((share, lines[0])))
    task = exports.Task(Path("a-1.5-diffusers-fp32"))
    for phase in ("loading", "writing"):
        export_views.at_work(task)
        task.tell(phase)
    export_views.at_work(task)
    assert [share for share, _ in drawn] == [0, 0, 0.25] and "writing (2 of 4)" in drawn[-1][1]
    assert exports.Task(Path("a-1.5-packed-fp16.safetensors")).phases == 3
