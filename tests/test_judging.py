"""Runs, folders and packed files judged alike, through the commands as a user gives them."""

import csv
import html
import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from prunedm import cache, comparison, evaluate, judging, latency, pipeline, semi_structured, store
from prunedm import unet as unets
from prunedm.__main__ import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro):
    """A folder of two finished micro runs, which differ in their seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run = store.create(folder, micro(seed=seed, name=f"micro-{seed}"))
        assert pipeline.execute(run) == "done", run.log_path.read_text()
    return folder


@pytest.fixture
def ids(runs):
    return [run.id for run in reversed(store.all_runs(runs))]


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(judging, "BATCHES", dict.fromkeys(judging.BATCHES, (1, 2)))
    monkeypatch.setattr(judging.latency, "ROUNDS", 3)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))


def call(capsys, *arguments):
    """Exit status, standard output and standard error of one command."""
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def judged(capsys, *arguments):
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_runs_own_figures_are_not_computed_again_and_gain_speed(runs, ids, capsys, own_cache, monkeypatch):
    before = store.find(runs, ids[0]).evaluation()
    monkeypatch.setattr(judging.Judge, "quality", lambda *_: pytest.fail("sampled again"))
    found = judged(capsys, "evaluate", ids[0], "--runs-dir", runs)
    assert [one["variant"] for one in found] == ["dense", "structured", "nm"]
    for one in found:
        own, figures = before[one["variant"]], one["figures"]
        assert {k: figures[k] for k in ("fid", "kid", "validation_loss", "sizes")} == {
            k: own[k] for k in ("fid", "kid", "validation_loss", "sizes")
        }
        assert {row["batch"] for row in figures["speed"]} == {1, 2}
    assert len({one["figures"]["speed_session"] for one in found}) == 1, "timed in turn"
    for one in found[:2]:  # as the run's evaluation recorded them
        assert one["layers"] == store.find(runs, ids[0]).layers(one["variant"]) and len(one["layers"]) > 9
        assert all(row["density"] > 0.9 and row["reason"] and not row["eligible"] for row in one["layers"])
    after = store.find(runs, ids[0]).evaluation()
    assert {row["batch"] for row in after["nm"]["speed"]} == {1, 2} and after["nm"]["fid"] == before["nm"]["fid"]


def test_each_way_that_was_timed_is_printed_and_what_was_not_with_its_reason(runs, ids, capsys, own_cache):
    status, out, _ = call(capsys, "evaluate", ids[0], "--runs-dir", runs, "--ways", "eager,channels_last", "--measure")
    assert status == 0
    lines = [line for line in out.splitlines() if f"{ids[0]} N:M" in line]
    assert any("eager" in line for line in lines) and any("channels_last" in line for line in lines), out


def test_another_setting_is_judged_once_and_kept_in_the_run(runs, ids, capsys, own_cache, monkeypatch):
    arguments = ("evaluate", ids[0], "--images", "70", "--sampler", "ddpm", "--seed", "3", "--runs-dir", runs)
    first = judged(capsys, *arguments)
    for one in first:
        figures = one["figures"]
        assert (
            figures["fid_images"] == 70
            and figures["sampling"]["sampler"] == "ddpm"
            and figures["sampling"]["seed"] == 3
        )
    assert "noise_floor" in first[0]["figures"] and first[1]["figures"]["pairs"] == 64
    kept = store.find(runs, ids[0]).folder / "evaluations"
    assert len(list(kept.glob("*.json"))) == len(list(kept.glob("*.png"))) == 3
    monkeypatch.setattr(judging.Judge, "quality", lambda *_: pytest.fail("sampled again"))
    assert judged(capsys, *arguments) == first, "speed too: this very set was timed"
    again = judged(capsys, *arguments, "--measure")
    assert again[0]["figures"]["speed_session"] != first[0]["figures"]["speed_session"]


def test_one_variant_is_judged_against_its_dense_model(runs, ids, capsys, own_cache):
    (one,) = judged(capsys, "evaluate", f"{ids[0]}/nm", "--runs-dir", runs)
    assert one["variant"] == "nm" and one["efficiency"]["compression"] > 1 and one["figures"]["pattern"] == "2:4"
    assert one["layers"] and all(0.99 <= sum(la["pattern_shares"]) <= 1.01 for la in one["layers"] if la["eligible"])
    status, out, _ = call(capsys, "evaluate", f"{ids[0]}/nm", "--runs-dir", runs)
    assert status == 0 and "Compression" in out.replace("compression", "Compression")


def test_any_diffusers_folder_is_judged_also_without_images(tmp_path, capsys, own_cache, image_folder):
    unets.save(make_unet(), DDPMScheduler(), tmp_path / "theirs", {"variant": "dense"})
    (tmp_path / "theirs" / store.VARIANT_RECORD).unlink()
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "theirs" / "unet", bare)
    (one,) = judged(capsys, "evaluate", bare)
    figures = one["figures"]
    assert figures["fid"] is None and "data.source=bundled holds images of shape" in figures["quality_absent"]
    assert figures["latency_ms"] > 0 and figures["sizes"]["dense_fp32"] > figures["sizes"]["packed_int8"]
    status, out, _ = call(capsys, "evaluate", bare)
    assert status == 0 and "n/a" in out and "no quality figures" in out
    (one,) = judged(capsys, "evaluate", tmp_path / "theirs", "--data", image_folder, "--images", 8, "--steps", 2)
    assert one["figures"]["fid"] > 0 and one["figures"]["noise_floor"]["samples"]["fid"] > 0


def test_a_folder_is_compared_with_its_dense_model(runs, ids, tmp_path, capsys, own_cache, image_folder, model_folder):
    nm = store.find(runs, ids[0]).variant("nm")
    arguments = (
        "--dense",
        model_folder,
        "--data",
        image_folder,
        "--images",
        8,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    )
    found = judged(capsys, "compare", nm, *arguments)
    assert [one["label"] for one in found] == [f"{model_folder} (dense)", "nm"]
    assert found[1]["figures"]["ssim"] is not None and found[1]["efficiency"]["fid"] is not None
    assert found[1]["figures"]["compliance"] == 1 and found[1]["figures"]["macs_sparse"] < found[1]["figures"]["macs"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"comparison.{s}" for s in ("html", "csv", "md", "json")}
    assert len(list(csv.reader((tmp_path / "out" / "comparison.csv").open()))) == 3


def test_folders_of_one_name_and_a_run_given_twice_are_told_apart(runs, ids, tmp_path, own_cache):
    for place, factor in (("a", 1.0), ("b", 0.5)):
        model = make_unet()
        with torch.no_grad():
            model.conv_out.weight.mul_(factor)
        unets.save(model, DDPMScheduler(), tmp_path / place / "model", {"variant": "dense"})
    sources = [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), ids[0], f"{ids[0]}/nm"]
    found = judging.entries(sources, runs)
    assert [e.label for e in found[:2]] == ["model", "model (2)"] and len(found) == 5
    assert found[0].fingerprint != found[1].fingerprint
    assert found[3].dense is found[2] and found[4].dense is found[2], "each model is loaded once"


def printed(page, *verbs):
    """The commands of these verbs in a page's section on how to make its figures again."""
    cells = page.read_text().split('<section id="reproduce">')[1].split("</section>")[0]
    found = [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<code>.*?</code>", cells)]
    words = [shlex.split(text)[3:] for text in dict.fromkeys(found)]
    return [words for words in words if words[:1] and words[0] in verbs and "--measure" not in words]


def test_the_printed_commands_judge_a_folder_again_from_anywhere(
    tmp_path, capsys, own_cache, image_folder, model_folder, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, source in (("dense", model_folder), ("their model", model_folder), ("images", image_folder)):
        shutil.copytree(source, name)
    given = ("--data", "images", "--dense", "dense", "--device", "cpu", "--ways", "eager,channels_last")
    page = tmp_path / "page.html"
    assert call(capsys, "report", "their model", *given, "--images", 8, "--steps", 2, "--out", page)[0] == 0
    first = judged(capsys, "evaluate", "their model", *given, "--images", 8, "--steps", 2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    of_dense, again = printed(page, "evaluate")
    assert "--dense" not in of_dense and judged(capsys, *of_dense)[0]["figures"]["fid"] == first[0]["figures"]["fid"]
    (base, one) = judged(capsys, *again)
    assert one["label"] == "their model" and base["label"].endswith("dense (dense)")
    assert one["figures"]["ssim"] is not None
    for key in ("fid", "validation_loss", "sampling", "ssim"):
        assert one["figures"][key] == first[1]["figures"][key]
    assert {row["way"] for row in one["figures"]["speed"]} == {"eager", "channels_last"}
    *_, written = printed(page, "report")
    assert call(capsys, *written)[0] == 0 and "their model" in (tmp_path / "elsewhere" / "report.html").read_text()


def test_a_folder_judged_by_a_runs_images_is_judged_beside_it_again(runs, ids, tmp_path, capsys, own_cache):
    nm = store.find(runs, ids[0]).variant("nm")
    page = tmp_path / "page.html"
    given = ("report", nm, f"{ids[0]}/structured", "--images", 8, "--steps", 2, "--out", page, "--runs-dir", runs)
    assert call(capsys, *given)[0] == 0
    (again,) = printed(page, "compare")
    assert again[1:3] == [str(nm), ids[0]] and again[-2:] == ["--runs-dir", str(runs)]
    assert judged(capsys, *again)[0]["figures"]["sampling"]["data"] == "images0"


def test_a_packed_file_is_the_model_that_it_holds(runs, ids, tmp_path, capsys, own_cache, image_folder):
    path = tmp_path / "model.safetensors"
    assert call(capsys, "export", ids[0], "--format", "packed", "--out", path, "--runs-dir", runs)[0] == 0
    arguments = ("--data", image_folder, "--images", 8, "--steps", 2)
    (one,) = judged(capsys, "evaluate", path, *arguments)
    (same,) = judged(capsys, "evaluate", store.find(runs, ids[0]).variant("nm"), *arguments)
    assert one["figures"]["fid"] == same["figures"]["fid"] and one["figures"]["pattern"] == "2:4"
    assert one["figures"]["bytes"] == path.stat().st_size


def test_runs_judged_alike_are_compared_without_torch_or_sampling(runs, ids, capsys, own_cache, monkeypatch):
    monkeypatch.setattr(judging, "judge", lambda *_: pytest.fail("judged again"))
    found = judged(capsys, "compare", *ids, "--runs-dir", runs)
    assert len(found) == 5, "the dense model that both share stands there once"
    status, out, _ = call(capsys, "compare", *ids, "--runs-dir", runs)
    assert status == 0 and "on the front of" in " ".join(out.split()).replace("┃ ", "") and "--measure" in out


def test_runs_judged_otherwise_are_judged_alike_first(runs, ids, capsys, own_cache, micro):
    other = store.create(runs, micro(name="other", eval={"steps": 3}))
    try:
        assert pipeline.execute(other) == "done"
        assert comparison.recorded([ids[0], other.id], runs) is None
        found = judged(capsys, "compare", ids[0], other.id, "--images", 8, "--steps", 2, "--runs-dir", runs)
        assert {one["figures"]["sampling"]["steps"] for one in found} == {2}
        assert len({one["figures"]["speed_session"] for one in found}) == 1
    finally:
        shutil.rmtree(other.folder)


@pytest.mark.parametrize("settings", [(), ("--images", 9)], ids=["the run's own", "other"])
def test_a_broken_claim_is_a_figure_and_no_refusal(runs, ids, tmp_path, capsys, own_cache, settings):
    copy = store.Run(shutil.copytree(store.find(runs, ids[0]).folder, tmp_path / "copied"))
    name = next(la["layer"] for la in copy.layers() if la["eligible"]) + ".weight"
    path = copy.variant("nm") / "unet" / unets.WEIGHTS
    tensors = load_file(path)
    save_file(tensors | {name: torch.ones_like(tensors[name])}, path)
    before = copy.evaluation()
    figures = judged(capsys, "evaluate", "copied/nm", *settings, "--runs-dir", tmp_path)[0]["figures"]
    assert figures["compliance"] < 1 and figures["sizes"]["packed_fp16"] > 0
    assert figures["fid"] != before["nm"]["fid"] and figures["nonzero_parameters"] > before["nm"]["nonzero_parameters"]
    judged(capsys, "evaluate", "copied", *settings, "--runs-dir", tmp_path)
    assert copy.evaluation() == before, "the altered model's speed does not stand beside the run's own figures"


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"torch": "1.0"}, {"fingerprint": "of others"}])
def test_a_runs_own_figures_hold_for_its_files_device_and_torch(runs, ids, own_cache, change):
    run = store.find(runs, ids[0])
    entries = judging.entries([f"{run.id}/nm"], runs)
    session = judging.Session(run.recipe().eval, judging.Request(), torch.device("cpu"), lambda *_: None)
    before = run.evaluation()
    try:
        assert session._known(entries[0])[0] == before["nm"]
        for variant in ("nm", "dense"):  # whose samples the others are compared with
            run.write_evaluation(before | {variant: before[variant] | {"made_by": before[variant]["made_by"] | change}})
            assert session._known(entries[0]) == (None, None)
        run.write_evaluation({name: figures | {"made_by": None} for name, figures in before.items()})
        assert session._known(entries[0])[0]["fid"] == before["nm"]["fid"], "runs of earlier versions recorded none"
    finally:
        run.write_evaluation(before)


def test_ways_of_running_are_timed_when_asked_for(runs, ids, capsys, own_cache):
    figures = judged(
        capsys, "evaluate", f"{ids[0]}/nm", "--ways", "eager,onnxruntime,channels_last", "--runs-dir", runs
    )
    rows = figures[0]["figures"]["speed"]
    assert {(row["way"], row["batch"]) for row in rows} == {
        (way, batch) for way in ("eager", "onnxruntime", "channels_last") for batch in (1, 2)
    }
    assert all(row["call"]["median"] > 0 and row["threads"] for row in rows)


def sessions(figures):
    return {one["speed_session"] for one in figures}


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_variant_is_timed_in_one_session_with_the_dense_model_that_it_is_set_beside(
    runs, ids, capsys, own_cache, monkeypatch, verb
):
    seen = []
    monkeypatch.setattr(judging, "_into_runs", lambda found, speeds, request: seen.append((found, speeds)))
    before = store.find(runs, ids[0]).evaluation()
    arguments = (verb, f"{ids[0]}/nm", "--runs-dir", runs, "--measure")
    (one,) = judged(capsys, *arguments)
    ((found, speeds),) = seen
    assert [entry.variant for entry in found] == ["nm"] and len(speeds) == 2 and len(sessions(speeds.values())) == 1
    dense = speeds[f"{ids[0]} dense"]
    assert dense["speed_session"] == one["figures"]["speed_session"] != before["dense"]["speed_session"]
    assert one["efficiency"]["latency"] == one["figures"]["latency_ms"] / dense["latency_ms"]
    out = call(capsys, *arguments)[1]
    assert "of dense n/a" not in out, "and its table too sets the two beside each other"


def test_a_runs_latency_and_its_session_change_together(runs, ids, capsys, own_cache):
    run = store.find(runs, ids[1])
    before = run.evaluation()
    try:
        judged(capsys, "evaluate", run.id, "--ways", "onnxruntime", "--runs-dir", runs)
        after = run.evaluation()
        assert len(sessions(after.values())) == 1 and sessions(after.values()) != sessions(before.values())
        for figures in after.values():
            assert {row["way"] for row in figures["speed"]} == {"eager", "onnxruntime"}, "the plain calls stay"
            plain = [row["call"] for row in figures["speed"] if (row["way"], row["batch"]) == ("eager", 2)]
            assert [call["median"] for call in plain] == [figures["latency_ms"]] and figures["batch"] == 2
    finally:
        run.write_evaluation(before)


def test_a_call_that_cannot_be_timed_leaves_no_older_latency():
    gone = latency.Speed("a", "eager", 8, 3, 1, absent="too little memory")
    found = evaluate.speed_figures([gone], "new")["a"]
    assert ({"latency_ms": 5.0, "device": "cpu", "speed_session": "old"} | found)["latency_ms"] is None


@pytest.fixture
def pair(tmp_path, own_cache):
    """Two models, of which only the second is 2:4."""
    for name in ("dense", "nm"):
        model = make_unet()
        for layer in model.modules():
            if name == "nm" and isinstance(layer, torch.nn.Linear):
                layer.weight.data.view(-1, 4)[:, :2] = 0
        unets.save(model, DDPMScheduler(), tmp_path / name, {"variant": "dense"})
    return judging.entries([str(tmp_path / "dense"), str(tmp_path / "nm")], tmp_path)


def speed_of(pair, device, *ways):
    """Model to the rows of ways and batch sizes that were timed or are absent."""
    found = judging.measure_speed(pair, judging.Request(ways=ways), torch.device(device), lambda *_: None)
    return {name: {(row["way"], row["batch"]): row for row in figures["speed"]} for name, figures in found.items()}


def test_converted_copies_are_timed_in_any_case_and_those_without_a_fitting_layer_say_so(pair, monkeypatch):
    def convert(unet, dtype):
        unet.to(dtype)
        return semi_structured.plan(unet)

    monkeypatch.setattr(semi_structured, "require_cuda", lambda *_: None)
    monkeypatch.setattr(semi_structured, "convert", convert)
    monkeypatch.setattr(latency, "_memory", lambda *_: (None, None))
    found = speed_of(pair, "cpu", "channels_last", "semi-structured")
    for rows in found.values():
        own = ("eager", "channels_last", "fp16", "semi-structured fp16")
        assert set(rows) == {(way, batch) for way in own for batch in (1, 2)}
        assert rows["fp16", 1]["call"]["dtype"] == "float16"
    assert all(row["call"] and not row["absent"] for row in found["nm"].values())
    for (way, _), row in found["dense"].items():
        assert (row["call"] is None) == (way == "semi-structured fp16")
        if row["call"] is None:
            assert "layers can use the 2:4 kernels; " in row["absent"] and "not 2:4" in row["absent"]


def test_onnx_runtime_beside_another_device_is_absent_with_the_reason(pair):
    for rows in speed_of(pair, "mps", "onnxruntime").values():
        assert rows["eager", 1]["call"] and rows["onnxruntime", 2]["absent"] == judging.CPU_ONLY
        assert "--device cpu" in judging.CPU_ONLY and len(rows) == 4


@pytest.mark.parametrize("suffix", ["html", "csv", "md"])
def test_reports_go_where_they_are_asked_for(runs, ids, tmp_path, capsys, own_cache, suffix):
    path = tmp_path / "made" / f"report.{suffix}"
    status, out, err = call(capsys, "report", *ids, "--out", path, "--runs-dir", runs)
    assert status == 0 and out.strip() == str(path), err
    assert all(run in path.read_text() for run in ids)
    if suffix != "html":
        assert call(capsys, "report", *ids, "--format", suffix, "--runs-dir", runs)[1] == path.read_text()
    if suffix == "html":
        assert call(capsys, "report", ids[0], "--runs-dir", runs)[1].strip().endswith("report.html")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["evaluate", "nothing-there"], ["nothing-there"]),
        (["evaluate", "RUN/mn"], ["RUN/mn", "dense, structured, nm"]),
        (["evaluate", "RUN", "--quick", "--full"], ["--quick and --full", "leave one out"]),
        (["evaluate", "RUN", "--sampler", "heun"], ["eval.sampler='heun'"]),
        (["evaluate", "RUN", "--images", "1"], ["eval.images=1"]),
        (["evaluate", "RUN", "--ways", "fast"], ["--ways fast", "onnxruntime"]),
        (["evaluate", "RUN", "--ways", "semi-structured"], ["CUDA GPU", "leave it out of --ways"]),
        (["evaluate", "RUN", "--ways", "semi-structured", "--device", "cpu"], ["CUDA only", "--device cpu"]),
        (["evaluate", "RUN", "--extractor", "vgg"], ["vgg"]),
        (["evaluate", "RUN", "--data", "/no/such"], ["/no/such", "is not a folder"]),
        (["evaluate", "RUN", "--out", "report.pdf"], ["report.pdf", ".html"]),
        (["report", "RUN", "RUN2"], ["--out is needed"]),
        (["report", "RUN", "--format", "pdf"], ["pdf"]),
    ],
)
def test_bad_requests_are_one_line(runs, ids, capsys, own_cache, arguments, parts):
    if arguments[-1] == "semi-structured" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    named = [a.replace("RUN2", ids[1]).replace("RUN", ids[0]) for a in arguments]
    status, _, err = call(capsys, *named, "--runs-dir", runs)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(part.replace("RUN", ids[0]) in err for part in parts), err


def test_the_inception_extractor_says_how_to_get_its_weights(runs, ids, capsys, own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEDM_INCEPTION", str(tmp_path / "none.pth"))
    status, _, err = call(capsys, "evaluate", ids[0], "--extractor", "inception", "--images", 8, "--runs-dir", runs)
    assert status == 2 and "none.pth: no such file; download https://" in err


def test_timing_follows_the_mode(monkeypatch):
    monkeypatch.undo()
    assert judging.BATCHES["standard"] == latency.BATCHES == (1, 8, 64) and judging.BATCHES["quick"] == (8,)
    assert judging.Request("full").settings(judging.Eval()).images == 2048
    assert judging.Request("quick", {"images": 64}).settings(judging.Eval(seed=3)).model_dump() | {"x": 0} == (
        judging.Eval(images=64, steps=10, seed=3, noise_floor=False).model_dump() | {"x": 0}
    )
