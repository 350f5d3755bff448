"""Exports: what is written is what the model is, it keeps its patterns, and whatever is tampered with is found."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from prunedm import (
    export,
    latency,
    maskfile,
    onnx_export,
    onnx_graph,
    packed,
    pattern,
    semi_structured,
    store,
    subject,
    unet,
    verify,
)
from prunedm.__main__ import main
from prunedm.masked_unet import MaskedUNet
from prunedm.pruned_unet import build
from prunedm.stage_recipes import Pattern, parse_pattern

LAYER = "down_blocks.0.resnets.0.conv2"  # 2:4 in the fixture
TIGHT = "mid_block.resnets.0.conv1"  # 1:4
LINEAR = "mid_block.attentions.0.to_q"  # a MatMul in ONNX: stored transposed
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def masked_unet():
    masked = MaskedUNet(make_unet(), 2, 4, [("mid_block.resnets.*", "1:4")])
    patterns = {r.layer: r.pattern for r in masked.reports if r.eligible}
    return masked, masked.bake().requires_grad_(False), patterns


def narrowed(model):
    """The same UNet with half the channels inside one resnet: widths that its config does not tell."""
    tensors, name = dict(model.state_dict()), "mid_block.resnets.0"
    for layer in ("conv1", "time_emb_proj", "norm2"):
        for part in (f"{name}.{layer}.weight", f"{name}.{layer}.bias"):
            tensors[part] = tensors[part][:16].clone()
    tensors[f"{name}.conv2.weight"] = tensors[f"{name}.conv2.weight"][:, :16].clone()
    return build(dict(model.config), tensors)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro):
    """A runs folder with one run: a structured variant and an N:M variant with its masks."""
    runs_dir = tmp_path_factory.mktemp("runs")
    run = store.create(runs_dir, micro())
    masked, baked, patterns = masked_unet()
    unet.save(narrowed(make_unet()), DDPMScheduler(), run.variant("structured"), {"variant": "structured"})
    run.variant("nm").mkdir(parents=True)
    maskfile.write(run.variant("nm") / store.MASKS, masked.layer_masks(), patterns, {"run": run.id})
    record = {"variant": "nm", "pattern": "mixed", "method": "gumbel", "parent": "structured"}
    unet.save(baked, DDPMScheduler(), run.variant("nm"), record)
    return runs_dir, run.id


@pytest.fixture(scope="module")
def source(runs):
    return subject.find(runs[1], None, runs[0], Pattern(2, 4))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "model"
    export.write(source, "diffusers", out, "fp32")
    return out


@pytest.fixture(scope="module")
def graph(source, tmp_path_factory):
    """An ONNX file and its record."""
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return out, onnx_export.write(source.model, source.patterns, out, rounds=2)


def inputs(batch):
    random = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, 8, 8, generator=random), torch.randint(0, 1000, (batch,), generator=random)


def onnx_output(path, x, t):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"sample": x.numpy(), "timestep": t.numpy()})[0])


# --- sources ---------------------------------------------------------------------------------
def test_a_run_gives_its_last_variant_with_the_patterns_of_its_masks(source, runs):
    assert source.record["variant"] == "nm" and source.name == f"{runs[1]}/nm"
    assert source.patterns[LAYER] == "2:4" and source.patterns[TIGHT] == "1:4" and "conv_in" not in source.patterns
    structured = subject.find(runs[1], "structured", runs[0], Pattern(2, 4))
    assert structured.patterns == {} and structured.record["variant"] == "structured"


def test_without_masks_patterns_are_read_off_the_weights(runs, tmp_path):
    shutil.copytree(runs[0] / runs[1] / "variants" / "nm", tmp_path / "bare", ignore=shutil.ignore_patterns("masks.*"))
    found = subject.find(str(tmp_path / "bare"), None, runs[0], Pattern(2, 4))
    assert found.patterns[TIGHT] == "2:4", "at most 1 of 4 is at most 2 of 4"
    tight = subject.find(str(tmp_path / "bare"), None, runs[0], Pattern(1, 4)).patterns
    assert TIGHT in tight and LAYER not in tight
    export.write(found, "diffusers", tmp_path / "again", "fp32")
    assert verify.inspect(tmp_path / "again")["claimed_layers"] == len(found.patterns) > 10


def test_a_claim_that_the_weights_do_not_keep_is_not_exported(runs, tmp_path, capsys):
    shutil.copytree(runs[0] / runs[1] / "variants" / "nm", tmp_path / "bad")
    tamper_folder(tmp_path / "bad")
    assert main(["export", str(tmp_path / "bad"), "--format", "packed", "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert LAYER in error and error.count("\n") == 1 and not (tmp_path / "p").exists()


# --- diffusers -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_folder_holds_the_weights_cast_once(source, tmp_path, dtype):
    out = tmp_path / "model"
    export.write(source, "diffusers", out, dtype)
    kind = export.DTYPES[dtype]
    stored = load_file(out / "unet" / unet.WEIGHTS)
    loaded = unet.load(str(out)).unet.state_dict()
    for name, weight in source.model.unet.state_dict().items():
        assert stored[name].dtype == kind and torch.equal(stored[name], weight.to(kind))
        assert torch.equal(loaded[name], weight.to(kind).float())
    seen = verify.inspect(out)
    assert seen["ok"] and seen["claimed_layers"] == len(source.patterns)
    record = json.loads((out / "prunedm.json").read_text())
    assert record["method"] == "gumbel" and record["export"]["dtype"] == dtype
    assert maskfile.verify(out / store.MASKS, out / "unet") == []
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_the_card_tells_lineage_sizes_loading_and_limits(folder, source, runs):
    card = (folder / "README.md").read_text()
    assert runs[1] in card and "gumbel" in card and "buys size, not time" in card and "licence" in card
    model = source.model.unet
    assert f"{unet.parameters(model):,}" in card and f"{unet.nonzero_parameters(model):,}" in card
    assert "DiffusionPipeline.from_pretrained" in card and "trust_remote_code" not in card
    loaded = DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float16).unet
    assert torch.equal(loaded.conv_in.weight, model.conv_in.weight.half())


def test_free_widths_load_with_the_code_that_the_card_names(runs, tmp_path):
    out = tmp_path / "narrow"
    found = subject.find(f"{runs[1]}/structured", None, runs[0], Pattern(2, 4))
    export.write(found, "diffusers", out, "fp16")
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True).unet
    assert loaded.mid_block.resnets[0].conv1.weight.shape == (16, 32, 3, 3)


# --- packed ----------------------------------------------------------------------------------
def test_a_packed_file_gives_back_every_weight(source, folder, tmp_path):
    out = tmp_path / "model.packed"
    record = export.write(source, "packed", out, "fp32")
    loaded = unet.load_packed(out)
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), source.model.unet.parameters()))
    held = dict(loaded.scheduler.config)
    assert {k: v for k, v in source.model.scheduler.config.items() if k[0] != "_"}.items() <= held.items()
    assert record["bytes"] == out.stat().st_size
    assert out.stat().st_size < 0.75 * unet.weight_bytes(folder)
    small = export.write(source, "packed", tmp_path / "small.packed", "fp32", "weights")
    assert small["bytes"] < 0.5 * record["bytes"]
    weight, near = source.model.unet.conv_out.weight, unet.load_packed(tmp_path / "small.packed").unet.conv_out.weight
    assert 0 < (weight - near).abs().max() < weight.abs().max() / 100


def test_a_packed_file_of_something_else_is_no_model(tmp_path):
    packed.write(tmp_path / "x", {"a.weight": torch.ones(4, 4)}, {}, {"unet": {}})
    with pytest.raises(unet.ModelError, match="holds no UNet2DModel"):
        unet.load_packed(tmp_path / "x")


# --- onnx ------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_equals_torch_at_any_batch(graph, source, batch):
    x, t = inputs(batch)
    with torch.no_grad():
        expected = source.model.unet(x, t).sample
    found = onnx_output(graph[0], x, t)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5


def test_the_record_beside_an_onnx_file(graph):
    import hashlib

    path, record = graph
    assert json.loads(path.with_suffix(".json").read_text()) == record
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and record["bytes"] == path.stat().st_size
    assert set(record["difference_from_torch"]) == {"batch 1", "batch 3"}
    times = record["latency"]["milliseconds"]
    assert set(times) == {"torch eager", "onnxruntime fp32"} and record["latency"]["threads"] == torch.get_num_threads()
    assert all(0 < t["p10"] <= t["median"] <= t["p90"] for t in times.values())
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__


def test_each_layer_is_in_the_graph_under_its_own_name(graph, source):
    held = onnx_graph.weights(onnx_graph.load(graph[0]))
    layers = subject.layer_weights(source.model.unet)
    assert set(held) == set(layers) and all(torch.equal(held[name], layers[name]) for name in layers)


def test_equal_weights_do_not_share_an_initialiser():
    model = make_unet().requires_grad_(False)
    model.mid_block.resnets[1].conv1.weight.copy_(model.mid_block.resnets[0].conv1.weight)
    model.mid_block.attentions[0].to_k.weight.copy_(model.mid_block.attentions[0].to_q.weight)
    made = onnx_export.build(model, {})
    onnx.checker.check_model(made)
    assert set(onnx_graph.weights(made)) == set(subject.layer_weights(model))


def test_a_wrong_weight_is_never_named(graph):
    made = onnx_graph.load(graph[0])
    with pytest.raises(onnx_graph.OnnxError, match="does not hold the weight"):
        onnx_graph.name_weights(made, make_unet(sample_size=8, norm_eps=1e-4))  # dense: other values


def test_pruned_unets_of_free_widths_become_onnx(runs, tmp_path):
    found = subject.find(runs[1], "structured", runs[0], Pattern(2, 4))
    onnx_export.write(found.model, {}, tmp_path / "narrow.onnx", rounds=1)
    x, t = inputs(3)
    with torch.no_grad():
        assert (onnx_output(tmp_path / "narrow.onnx", x, t) - found.model.unet(x, t).sample).abs().max() < 1e-5


def test_a_file_that_differs_from_torch_is_not_written(source, tmp_path, monkeypatch):
    class Shifted(latency.OnnxModel):
        def forward(self, x, t):
            return super().forward(x, t) + (0.002 if len(x) == 3 else 0)

    monkeypatch.setattr(onnx_export, "OnnxModel", Shifted)
    with pytest.raises(onnx_graph.OnnxError, match=r"differs from torch by 2\.0.e-03 at batch 3"):
        onnx_export.write(source.model, source.patterns, tmp_path / "m.onnx", rounds=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("int8", ["weights", "dynamic", "static"])
def test_int8_keeps_the_patterns_and_reports_its_error(source, graph, tmp_path, int8):
    out = tmp_path / "small.onnx"
    record = onnx_export.write(source.model, source.patterns, out, int8, source.data, rounds=1)
    error = record["int8_error"]
    assert 1e-4 < error["relative_rms"] < 0.1 and 0 < error["mean"] < error["largest"] < 0.5
    assert f"onnxruntime int8 {int8}" in record["latency"]["milliseconds"]
    assert out.stat().st_size < (0.75 if int8 == "weights" else 1) * graph[0].stat().st_size
    seen = verify.inspect(out)
    assert seen["ok"] and seen["claimed_layers"] == len(source.patterns)
    dense = subject.layer_weights(source.model.unet)
    small = onnx_graph.weights(onnx_graph.load(out))
    for name in source.patterns:
        assert small[name].dtype == torch.int32 and (small[name][dense[name] == 0] == 0).all()
    assert ("calibration" in record) == (int8 == "static")
    assert "held-out images of images" in error["inputs"], "the run's own image folder"
    x, t = inputs(4)
    with torch.no_grad():
        expected = source.model.unet(x, t).sample
    assert 0 < (onnx_output(out, x, t) - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


# --- tensorrt --------------------------------------------------------------------------------
def test_tensorrt_writes_a_command_that_a_shell_can_read(runs, tmp_path, capsys):
    import shlex

    out = tmp_path / "my model.onnx"
    arguments = ["export", runs[1], "--format", "tensorrt", "--out", str(out), "--runs-dir", str(runs[0])]
    assert main(arguments) == 0
    script = out.with_suffix(".sh")
    command = shlex.split(script.read_text().splitlines()[-1])
    assert command[:3] == ["trtexec", "--onnx=my model.onnx", "--sparsity=enable"] and script.stat().st_mode & 0o100
    assert "--optShapes=sample:8x1x8x8,timestep:8" in command and "--saveEngine=my model.engine" in command
    assert "trtexec" in capsys.readouterr().out and out.with_suffix(".json").is_file()


def test_tensorrt_sees_a_tampered_initialiser(source, graph, tmp_path):
    path = tmp_path / "model.onnx"
    shutil.copy(graph[0], path)
    assert "trtexec" in export.write_trtexec(source, path)
    path.with_suffix(".sh").unlink()
    tamper_onnx(path)
    with pytest.raises(export.ExportError, match=f"{LAYER}: claimed 2:4, but 1 of 576 groups"):
        export.write_trtexec(source, path)
    assert not path.with_suffix(".sh").exists()


# --- semi-structured -------------------------------------------------------------------------
def test_the_plan_says_of_each_layer_whether_and_why_not(source):
    model = source.model.unet
    rows = {row["layer"]: row for row in semi_structured.plan(model)}
    assert rows[LINEAR]["convert"] and rows[LINEAR]["reason"] == ""
    assert rows["up_blocks.1.resnets.0.conv_shortcut"]["convert"], "a 1x1 convolution is a matrix product"
    assert "3x3 convolution" in rows[LAYER]["reason"] and not rows[LAYER]["convert"]
    assert rows["time_embedding.linear_2"]["reason"].startswith("not 2:4: only")
    cutlass = {row["layer"]: row for row in semi_structured.plan(model, "cutlass")}
    assert "32x32 is no multiple of 32x64" in cutlass[LINEAR]["reason"]
    assert all(row["convert"] == (not row["reason"]) for row in rows.values())


def test_the_size_rule_is_torchs_own():
    from torch.sparse import semi_structured as theirs

    classes = (theirs.SparseSemiStructuredTensorCUSPARSELT, theirs.SparseSemiStructuredTensorCUTLASS)
    for kind in classes:
        for dtype in semi_structured.DTYPES.values():
            found = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert semi_structured.MULTIPLES[kind.BACKEND] == (found.sparse_min_rows, found.sparse_min_cols)


@NO_CUDA
def test_without_a_gpu_the_refusal_is_one_line(runs, tmp_path, capsys):
    out = tmp_path / "s"
    arguments = ["export", runs[1], "--format", "semi-structured", "--out", str(out), "--runs-dir", str(runs[0])]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "CUDA GPU" in error and "--format diffusers" in error and error.count("\n") == 1 and not out.exists()
    with pytest.raises(unet.ModelError, match="need a CUDA GPU"):
        semi_structured.convert(make_unet())
    with pytest.raises(unet.ModelError, match="no 2:4 kernel"):
        semi_structured.convert(make_unet(), torch.float32)


def test_replaced_layers_compute_the_same(source, monkeypatch):
    """The conversion with the kernel's own layout left out: what is put in place of linear and 1x1 layers."""
    import copy

    taken = []
    monkeypatch.setattr(semi_structured, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: taken.append(w) or w)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    model = copy.deepcopy(source.model.unet)
    rows = semi_structured.convert(model)
    assert len(taken) == sum(row["convert"] for row in rows) > 10
    assert all(w.ndim == 2 and w.is_contiguous() and pattern.compliance(w, 2, 4) == 1 for w in taken)
    contiguous = []
    monkeypatch.setattr(semi_structured.F, "linear", watched(semi_structured.F.linear, contiguous))
    for batch in (1, 3):  # of one image the rows of attention are a transposed view, of three a copy
        x, t = inputs(batch)
        with torch.no_grad():
            assert torch.allclose(model(x, t).sample, source.model.unet(x, t).sample, atol=1e-5)
    assert len(contiguous) >= len(taken) and all(contiguous)
    converted = next(row["layer"] for row in rows if row["convert"])
    assert isinstance(model.get_submodule(converted), semi_structured.SparseLinear)


def watched(linear, seen):
    def call(x, *rest):
        if x.ndim == 2:
            seen.append(x.is_contiguous())
        return linear(x, *rest)

    return call


def test_a_semi_structured_folder_tells_how_to_convert(source, tmp_path):
    out = tmp_path / "semi"
    export.write_semi_structured(source, out, "fp16", None)
    plan = json.loads((out / semi_structured.PLAN).read_text())
    assert len(plan["load"]) == 3 and "cannot be saved" in plan["note"]
    names: dict = {}
    exec("\n".join(plan["load"][:2]), names)  # the third needs the GPU
    assert torch.equal(names["model"].conv_in.weight, source.model.unet.conv_in.weight.half().float())
    compile(plan["load"][2], "load", "exec")
    assert verify.inspect(out)["kind"] == "semi-structured folder"


# --- verify ----------------------------------------------------------------------------------
def tamper_folder(path, layer=LAYER):
    """One more non-zero weight in the first group of a layer."""
    file = path / "unet" / unet.WEIGHTS
    tensors = load_file(file)
    tensors[f"{layer}.weight"][0, :4, 0, 0] = 1
    save_file(tensors, file, {"format": "pt"})


def tamper_onnx(path, layer=LAYER):
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name.startswith(f"{layer}.weight") and len(t.dims) > 1)
    values = numpy_helper.to_array(tensor).copy()
    if values.ndim == 4:
        values[0, :4, 0, 0] = 1
    else:
        values[:4, 0] = 1  # a MatMul's weight is [C, K]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())


def tamper_packed(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def cut_folder(path):
    cut(path / "unet" / unet.WEIGHTS)


# A packed file holds N values a group by construction: an altered one is not another pattern but unreadable.
CASES = {
    "diffusers": (tamper_folder, 1, cut_folder),
    "semi-structured": (lambda path: tamper_linear(path), 1, cut_folder),
    "packed": (tamper_packed, 2, cut),
    "onnx": (tamper_onnx, 1, cut),
}


def tamper_linear(path):
    file = path / "unet" / unet.WEIGHTS
    tensors = load_file(file)
    tensors[f"{LINEAR}.weight"][0, :4] = 1
    save_file(tensors, file, {"format": "pt"})
    (path / store.MASKS).unlink()  # so that only the plan claims it
    maskfile.manifest_path(path / store.MASKS).unlink()
    record = json.loads((path / "prunedm.json").read_text())
    del record["export"]
    (path / "prunedm.json").write_text(json.dumps(record))


@pytest.mark.parametrize("kind", CASES)
def test_verify_exits_0_1_and_2(source, folder, graph, tmp_path, capsys, kind):
    tamper, status, spoil = CASES[kind]
    path = tmp_path / ("model.onnx" if kind == "onnx" else "model")
    if kind == "onnx":
        shutil.copy(graph[0], path)
    elif kind == "packed":
        export.write(source, "packed", path, "fp16")
    elif kind == "diffusers":
        shutil.copytree(folder, path)
    else:
        export.write_semi_structured(source, path, "bf16", None)
    assert main(["verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and {row["layer"] for row in found["layers"] if row["claimed"]} == set(source.patterns)
    tamper(path)
    assert main(["verify", str(path)]) == status
    shown = capsys.readouterr()
    layer = LINEAR if kind == "semi-structured" else LAYER
    assert f"PROBLEM: {layer}: claimed 2:4" in shown.out if status == 1 else "packed file" in shown.err
    spoil(path)
    assert main(["verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_transposed_onnx_weight_is_looked_at_along_its_input_channels(graph, tmp_path):
    path = tmp_path / "model.onnx"
    shutil.copy(graph[0], path)
    tamper_onnx(path, LINEAR)
    assert verify.inspect(path)["problems"] == [f"{LINEAR}: claimed 2:4, but 1 of 256 groups have more than 2 non-zero"]


@pytest.mark.parametrize("int8", ["weights", "dynamic", "static"])
def test_tampered_int8_weights_are_found(source, tmp_path, int8):
    path = tmp_path / "small.onnx"
    made = onnx_export.build(source.model.unet, source.patterns)
    small = onnx_export.onnx_int8.METHODS[int8](made, inputs(4))
    onnx_graph.set_metadata(small, {onnx_graph.CLAIMS: json.dumps(source.patterns)})
    path.write_bytes(small.SerializeToString())
    assert verify.inspect(path)["ok"]
    tamper_onnx(path)
    assert [p.partition(":")[0] for p in verify.inspect(path)["problems"]] == [LAYER]


def test_rows_say_what_was_claimed_found_and_why_not(folder):
    rows = {row["layer"]: row for row in verify.inspect(folder)["layers"]}
    assert rows[LAYER]["compliance"] == 1 and rows[LAYER]["density"] == 0.5 and rows[LAYER]["tensor_core_ready"]
    assert rows[TIGHT]["pattern"] == "1:4" and rows[TIGHT]["density"] == 0.25 and rows[TIGHT]["tensor_core_ready"]
    assert rows["conv_out"]["claimed"] is None and rows["conv_out"]["compliance"] < 1
    assert not rows["conv_out"]["eligible"] and "last convolution" in rows["conv_out"]["reason"]
    assert rows["conv_in"]["compliance"] is None and "fewer than M=4" in rows["conv_in"]["reason"]


def test_a_mask_that_the_weights_do_not_wear_is_found(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    file = path / "unet" / unet.WEIGHTS
    tensors = load_file(file)
    weight = tensors[f"{LAYER}.weight"]
    weight[0, :4, 0, 0] = weight[0, :4, 0, 0].ne(0).logical_not().float()  # 2:4 still, but not where the mask says
    save_file(tensors, file, {"format": "pt"})
    (problem,) = verify.inspect(path)["problems"]
    assert LAYER in problem and "pruned weights are not zero" in problem


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "masks.json").write_text("{"),
        lambda path: (path / "masks.safetensors").unlink(),
        lambda path: (path / "prunedm.json").write_text("[]"),
        lambda path: (path / "prunedm.json").write_text('{"export": {"patterns": {"conv_in": "9:4"}}}'),
        lambda path: (path / "prunedm.json").write_text('{"export": {"patterns": ["conv_in"]}}'),
        lambda path: (path / "semi-structured.json").write_text('{"layers": [1]}'),
        lambda path: shutil.rmtree(path / "unet"),
    ],
)
def test_claims_that_cannot_be_read_are_unreadable_not_absent(folder, tmp_path, spoil, capsys):
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    assert main(["verify", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_models_of_others_claim_nothing_and_are_looked_at(folder, tmp_path, capsys):
    tensors = load_file(folder / "unet" / unet.WEIGHTS)
    names = sorted(tensors)
    (tmp_path / "sharded").mkdir()
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = tmp_path / "sharded" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, shard)
    shutil.copy(folder / "unet" / unet.WEIGHTS, tmp_path / "plain.safetensors")
    for path in (tmp_path / "sharded", tmp_path / "plain.safetensors", folder / "unet"):
        assert main(["verify", str(path), "--pattern", "1:4", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["layer"]: row for row in found["layers"]}
        assert found["claimed_layers"] == 0 and rows[TIGHT]["compliance"] == 1 > rows[LAYER]["compliance"]


def test_foreign_onnx_and_nonsense(tmp_path, capsys):
    weight = np.zeros((8, 4), np.float32)
    weight[:4] = 1  # [C, K] of a MatMul: the first group of C is full
    tensor = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [tensor("x", 1, [1, 8])], [tensor("y", 1, [1, 4])]
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", *ends, [numpy_helper.from_array(weight, "w")]))
    onnx.save(made, tmp_path / "other.onnx")
    (row,) = verify.inspect(tmp_path / "other.onnx")["layers"]
    assert row["layer"] == "w" and row["shape"] == [4, 8] and row["compliance"] == 0.5
    onnx_graph.set_metadata(made, {onnx_graph.CLAIMS: json.dumps({"gone": "2:4"})})
    onnx.save(made, tmp_path / "other.onnx")
    assert main(["verify", str(tmp_path / "other.onnx")]) == 1 and "not in the file" in capsys.readouterr().out
    onnx_graph.set_metadata(made, {onnx_graph.CLAIMS: "{"})
    onnx.save(made, tmp_path / "other.onnx")
    for path in (tmp_path / "other.onnx", tmp_path / "missing", tmp_path):
        assert main(["verify", str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1


# --- the command line ------------------------------------------------------------------------
def test_export_prints_one_json_object_and_overwrites_nothing(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "model"
    arguments = ["export", runs[1], "--variant", "nm", "--format", "diffusers", "--dtype", "fp16", "--out", str(out)]
    arguments += ["--runs-dir", str(runs[0])]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dtype"] == "fp16"
    before = sorted(p.stat().st_mtime_ns for p in out.rglob("*"))
    assert main(arguments) == 2 and "already there" in capsys.readouterr().err
    assert before == sorted(p.stat().st_mtime_ns for p in out.rglob("*"))


@pytest.mark.parametrize(
    "given, said",
    [
        (["--format", "onnx", "--dtype", "fp16"], "--dtype fp16 is not for --format onnx"),
        (["--format", "diffusers", "--int8", "static"], "--int8 static is not for --format diffusers"),
        (["--format", "packed", "--dtype", "bf16", "--int8", "weights"], "exclude one another"),
        (["--format", "onnx"], "must end in .onnx"),
        (["--format", "packed", "--variant", "dense"], "has the variants structured, nm"),
        (["--format", "packed", "--pattern", "4:2"], "must be N:M"),
        (["--format", "pickle"], "pickle"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, given, said):
    assert main(["export", runs[1], "--runs-dir", str(runs[0]), "--out", str(tmp_path / "x"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_onnx_by_the_command_line_tells_what_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "m.onnx"
    arguments = ["export", runs[1], "--format", "onnx", "--int8", "dynamic", "--out", str(out)]
    assert main([*arguments, "--runs-dir", str(runs[0])]) == 0
    told = capsys.readouterr().out
    assert "largest difference of fp32 from torch" in told and "root mean square" in told
    assert all(name in told for name in ("torch eager:", "onnxruntime fp32:", "onnxruntime int8 dynamic:"))


def test_patterns_of_the_fixture_are_what_the_tests_take_them_for(source):
    assert {parse_pattern(text) for text in source.patterns.values()} == {Pattern(2, 4), Pattern(1, 4)}
    assert source.patterns[LINEAR] == "2:4"


def test_claims_survive_every_way_through_our_own_exports(tmp_path):
    """4:8 weights: folder -> packed -> folder -> packed keeps pattern and record."""
    masked = MaskedUNet(make_unet(), 4, 8)
    unet.save(masked.bake(), DDPMScheduler(), tmp_path / "a", {"run": "r", "variant": "nm"})
    found = subject.find(str(tmp_path / "a"), None, tmp_path, verify.parse("4:8"))
    assert found.patterns and set(found.patterns.values()) == {"4:8"}
    source = found
    for kind, name in (("packed", "b.safetensors"), ("diffusers", "c"), ("packed", "d.safetensors")):
        export.write(source, kind, tmp_path / name, "fp32")
        source = subject.find(str(tmp_path / name), None, tmp_path, verify.parse("2:4"))
        assert source.patterns == found.patterns and source.record["run"] == "r"


def test_a_uniform_model_exports_in_every_format(tmp_path):
    """Its table of timesteps goes through ONNX and the packed file, and its card names the limit."""
    from prunedm import structured
    from prunedm.stage_recipes import Prune

    model, _ = structured.prune(make_unet(), Prune(target=0.4, layout="uniform"), 4, 0)
    unet.save(model, DDPMScheduler(), tmp_path / "u", {"variant": "structured"})
    source = subject.find(str(tmp_path / "u"), None, tmp_path, Pattern(2, 4))
    export.write(source, "diffusers", tmp_path / "d", "fp16")
    card = (tmp_path / "d" / "README.md").read_text()
    assert "## Timesteps" in card and "Euler" in card and "trust_remote_code" not in card
    assert "## Timesteps" not in model_card_of(make_unet(), tmp_path / "plain")
    export.write(source, "packed", tmp_path / "p.safetensors", "fp32")
    loaded = unet.load(str(tmp_path / "p.safetensors")).unet
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        wanted = model(x, t).sample
        assert torch.equal(loaded(x, t).sample, wanted)
    export.write(source, "onnx", tmp_path / "o.onnx", "fp32")
    session = onnxruntime.InferenceSession(tmp_path / "o.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"sample": x.numpy(), "timestep": t.numpy()})
    assert np.abs(found - wanted.numpy()).max() < 1e-4
    assert verify.inspect(tmp_path / "o.onnx")["ok"]


def model_card_of(model, folder):
    unet.save(model, DDPMScheduler(), folder, {})
    export.write(subject.find(str(folder), None, folder, Pattern(2, 4)), "diffusers", folder / "out", "fp32")
    return (folder / "out" / "README.md").read_text()
