"""Micro runs end to end: the same twice, the same when interrupted, right in the saved files."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from prunedm import (
    failure,
    inputs,
    learn,
    mask_stage,
    maskfile,
    pattern,
    pipeline,
    report,
    snapshots,
    stage_training,
    store,
)
from prunedm import unet as unets
from prunedm.progress import MetricsWriter
from prunedm.records import STAGES


def execute(tmp_path, recipe, **kwargs):
    run = store.create(tmp_path, recipe)
    status = pipeline.execute(run, **kwargs)
    assert status == "done" or "stop" in kwargs, run.log_path.read_text()
    return run


def weights(run, variant="nm"):
    return load_file(run.variant(variant) / "unet" / unets.WEIGHTS)


def without_time(run):
    """Every recorded figure that does not depend on the clock."""
    metrics = [{k: v for k, v in r.items() if k != "time"} for r in run.metrics()]
    timed = ("latency_ms", "latency_ms_p10", "latency_ms_p90", "speed", "speed_session")
    results = {v: {k: x for k, x in r.items() if k not in timed} for v, r in run.evaluation().items()}
    return metrics, results


def assert_same(a, b):
    for variant in a.variants():
        for name, tensor in weights(a, variant).items():
            assert torch.equal(tensor, weights(b, variant)[name]), (variant, name)
    assert without_time(a) == without_time(b)
    assert a.mask_layers() == b.mask_layers()
    for first, second in zip(a.mask_snapshots(), b.mask_snapshots(), strict=True):
        assert first.name == second.name and (snapshots.read(first) == snapshots.read(second)).all()


@pytest.fixture(scope="module")
def done(tmp_path_factory, micro):
    return execute(tmp_path_factory.mktemp("runs"), micro())


def test_the_run_folder_holds_everything(done):
    state = done.state()
    assert state.status == "done" and state.stages_done == list(STAGES)
    assert done.variants() == ["dense", "structured", "nm"]
    stages = [r["stage"] for r in done.metrics()]
    assert stages == ["finetune"] * 6 + ["mask"] * 6 + ["recover"] * 6
    assert [r["step"] for r in done.metrics()] == [*range(1, 7)] * 3
    assert done.mask_snapshots() and len(done.samples()) >= 5
    assert "PruneDM report" in done.report_path.read_text()
    assert "broken.png" in done.log_path.read_text(), "skipped images are named"
    assert not [p for p in done.folder.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_the_summary_has_the_documented_shape(done):
    found = json.loads(json.dumps(report.summary(done)))
    assert set(found) >= {"run", "folder", "seconds", "variants"}
    common = {
        "parameters", "nonzero_parameters", "macs", "bytes", "validation_loss", "fid", "fid_extractor", "fid_images",
        "latency_ms", "device", "dtype", "batch", "sizes", "validation_loss_low", "loss_bins", "kid", "precision",
        "recall", "sampling", "speed", "fid_std",
    }  # fmt: skip
    assert list(found["variants"]) == ["dense", "structured", "nm"]
    for figures in found["variants"].values():
        assert common <= set(figures) and None not in [figures[k] for k in common]
    nm = found["variants"]["nm"]
    assert nm["pattern"] == "2:4" and nm["compliance"] == 1.0 and nm["masked_layers"] > 5
    assert all(set(layer) == {"layer", "reason"} and layer["reason"] for layer in nm["skipped_layers"])
    assert nm["nonzero_parameters"] < nm["parameters"] == found["variants"]["structured"]["parameters"]
    assert nm["macs_sparse"] < nm["macs"]


def test_every_masked_layer_is_compliant_in_the_file(done):
    tensors = weights(done)
    masked = [layer for layer in done.layers() if layer["eligible"]]
    for layer in masked:
        assert pattern.compliance(tensors[f"{layer['layer']}.weight"], 2, 4) == 1.0, layer["layer"]
    done_bytes = (done.variant("nm") / "unet" / unets.WEIGHTS).stat().st_size
    assert done.evaluation()["nm"]["bytes"] == done_bytes


def test_a_tampered_file_is_not_called_compliant(done, tmp_path):
    import shutil

    from safetensors.torch import save_file

    from prunedm import evaluate

    copy = store.Run(shutil.copytree(done.folder, tmp_path / done.id))
    tensors = weights(copy)
    name = next(layer["layer"] for layer in copy.layers() if layer["eligible"]) + ".weight"
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, copy.variant("nm") / "unet" / unets.WEIGHTS)
    target = evaluate.target_of(copy, "nm", torch.device("cpu"))
    assert evaluate.sparsity(target.model.unet, target.patterns)["compliance"] < 1


def test_the_same_recipe_gives_the_same_result(done, tmp_path, micro):
    assert_same(done, execute(tmp_path, micro()))


def test_another_seed_gives_another_result(done, tmp_path, micro):
    other = execute(tmp_path, micro(seed=1))
    assert not all(torch.equal(t, weights(other)[n]) for n, t in weights(done).items())


@pytest.mark.in_turn(4)
@pytest.mark.parametrize(
    ("stage", "step"),
    [("prune", 0), ("prune", 1), ("finetune", 3), ("mask", 1), ("mask", 4), ("recover", 2), ("evaluate", 2)],
)
def test_stopping_and_resuming_gives_the_uninterrupted_result(done, tmp_path, micro, stage, step):
    seen = []
    run = execute(
        tmp_path,
        micro(),
        on_step=seen.append,
        stop=lambda: bool(seen) and (seen[-1].stage, seen[-1].step) == (stage, step),
    )
    assert run.state().status == "stopped"
    run.take()
    assert pipeline.execute(store.Run(run.folder)) == "done"
    assert_same(done, run)


def test_a_worker_that_is_told_to_end_leaves_the_run_to_the_next_one_but_obeys_its_folder(done, tmp_path, micro):
    """As a machine that goes down tells it, on a cluster; whoever goes on obeys what the folder asks for meanwhile."""
    run, seen = store.create(tmp_path, micro()), []
    told = {"on_step": seen.append, "stop": lambda: len(seen) >= 5, "stopped": "interrupted"}
    with run.lock():
        assert pipeline.work(run, **told) == run.state().status == "interrupted"
    run.request_stop()
    run.request_pause()
    run.end(run.state(), "interrupted", None)
    assert run.stop_requested() and run.pause_requested()
    run.claim(run.state(), "queued")
    with run.lock():
        assert pipeline.work(run, **told) == run.state().status == "stopped"
    assert not run.stop_requested() and not run.pause_requested()
    run.take()
    assert pipeline.execute(run) == "done"
    assert_same(done, run)


@pytest.mark.in_turn(4)
@pytest.mark.parametrize(
    "mask",
    [
        {"method": "gumbel"},
        {"method": "reinforce"},
        {"method": "offset", "masks_until": 0.5, "snapshot_every": 1},
        {"method": "gumbel", "density": 0.4, "initial": "wanda", "snapshot_every": 2},
    ],
    ids=lambda mask: "-".join(map(str, mask.values())),
)
def test_a_crash_between_checkpoints_loses_and_doubles_nothing(tmp_path, micro, mask, monkeypatch):
    """Checkpoint after every step, crash a step later: the line beyond the checkpoint must go."""
    recipe = micro(mask={"train_weights": True} | mask)
    whole = execute(tmp_path / "a", recipe)
    monkeypatch.setattr(stage_training, "CHECKPOINT_SECONDS", 0)
    run = store.create(tmp_path / "b", recipe)

    def crash(step):
        if (step.stage, step.step) == ("mask", 4) and step.values:  # a learning step, not a sensitivity
            raise KeyboardInterrupt

    assert pipeline.execute(run, crash) == "interrupted"
    assert run.metrics()[-1]["step"] == 4, "step 4 was recorded but is beyond the checkpoint of step 3"
    assert pipeline.execute(run) == "done"
    assert_same(whole, run)


@pytest.mark.in_turn(10)
@pytest.mark.parametrize(
    ("changes", "variants"),
    [
        ({"mask": {"method": "magnitude"}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "magnitude", "train_weights": True}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "random"}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "wanda"}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "fisher", "n": 3, "m": 4}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "fixed", "initial": "wanda"}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "sr-ste", "train_weights": True}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "offset", "train_weights": True, "masks_until": 0.7}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "gumbel", "train_weights": True, "weights_from": 0.5}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "gumbel", "temperature": "adaptive"}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "reinforce", "n": 1}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "reinforce", "samples": 2, "antithetic": True}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "reinforce", "cached_batches": 3}}, ["dense", "structured", "nm"]),
        ({"mask": {"n": 5, "m": 8, "method": "reinforce"}}, ["dense", "structured", "nm"]),
        ({"mask": {"n": 4, "m": 8, "recover_steps": 0}}, ["dense", "structured", "nm"]),
        ({"mask": {"method": "none"}}, ["dense", "structured"]),
        ({"prune": {"target": 0}}, ["dense", "nm"]),
        ({"prune": {"method": "random", "finetune_steps": 0}}, ["dense", "structured", "nm"]),
        ({"eval": {"sampler": "ddpm"}, "train": {"precision": "bf16"}}, ["dense", "structured", "nm"]),
        ({"train": {"distill": 0.5, "timesteps": "late", "min_snr": 5}}, ["dense", "structured", "nm"]),
        ({"train": {"timesteps": "importance", "schedule": "linear"}}, ["dense", "structured", "nm"]),
    ],
)
def test_every_way_through_the_recipe(tmp_path, micro, changes, variants):
    run = execute(tmp_path, micro(**changes))
    assert run.variants() == variants == list(run.evaluation())
    if "nm" in variants:
        figures, mask = run.evaluation()["nm"], run.recipe().mask
        assert figures["compliance"] == 1.0 and figures["pattern"] == f"{mask.n}:{mask.m}"
        assert maskfile.verify(maskfile.locate(run.folder), run.variant("nm") / "unet") == []


def test_patterns_of_single_layers_reach_the_saved_file(tmp_path, micro):
    layers = [{"match": "up_blocks.*", "pattern": "1:4"}, {"match": "mid_block.*", "pattern": "dense"}]
    run = execute(tmp_path, micro(mask={"layers": layers}))
    figures, tensors = run.evaluation()["nm"], weights(run)
    assert figures["pattern"] == "mixed (1:4, 2:4)" and figures["compliance"] == 1.0
    for layer in run.layers():
        weight = tensors[f"{layer['layer']}.weight"]
        if layer["layer"].startswith("mid_block."):
            assert not layer["eligible"] and pattern.density(weight) == 1.0
        elif layer["eligible"]:
            n = 1 if layer["layer"].startswith("up_blocks.") else 2
            assert pattern.compliance(weight, n, 4) == 1.0 and pattern.density(weight) == pytest.approx(n / 4)
    assert figures["nonzero_parameters"] == inputs.preview(run.recipe(), tmp_path)["parameters"]["nm_nonzero"]


def test_a_density_is_spent_where_it_hurts_least(tmp_path, micro):
    run = execute(tmp_path, micro(mask={"density": 0.4}))
    record, tensors = run.allocation(), weights(run)
    assert record["kept"] <= 0.4 and record["kept"] > 0.3
    kept = total = 0
    for layer in record["layers"]:
        weight = tensors[f"{layer['layer']}.weight"]
        kept, total = kept + int(weight.count_nonzero()), total + weight.numel()
    assert kept / total == pytest.approx(record["kept"], abs=1e-3)
    assert run.evaluation()["nm"]["compliance"] == 1.0


def test_the_masks_of_an_earlier_run_start_the_next(done, micro, tmp_path):
    runs_dir = done.folder.parent
    recipe = micro(mask={"method": "fixed", "initial": done.id, "recover_steps": 0})
    run = store.create(runs_dir, inputs.absolute(recipe, runs_dir))
    assert pipeline.execute(run) == "done", run.log_path.read_text()
    first, second = (maskfile.read(maskfile.locate(r.folder)) for r in (done, run))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with pytest.raises(inputs.InputError, match=r"mask.initial=nothing is none of random, magnitude"):
        inputs.load_inputs(micro(mask={"initial": "nothing"}), runs_dir)


def test_the_cost_of_the_initial_mask_is_recorded_by_timestep_bin(done):
    (found,) = [e for e in done.events() if e["kind"] == "baseline"]
    assert len(found["dense"]) == len(found["m0"]) == 10 and found["initial"] == "magnitude"
    assert found["m0_mean"] > 0 and found["images"] == 4


def test_alerts_are_recorded_and_a_loss_that_is_no_number_is_one(tmp_path, micro, monkeypatch):
    run = execute(tmp_path, micro(mask={"lr": 1e-9, "steps": 40}))
    (alert,) = [e for e in run.events() if e["kind"] == "alert"]
    assert alert["what"] == "no movement" and alert["stage"] == "mask" and "mask.lr" in alert["remedy"]
    assert alert["changes"] == {"mask.lr": 3e-9}
    assert "ALERT (no movement)" in run.log_path.read_text()
    monkeypatch.setattr(learn.GumbelMasks, "step", lambda *args: {"loss": float("inf")})
    failed = store.create(tmp_path, micro())
    assert pipeline.execute(failed) == "failed"
    assert [e["what"] for e in failed.events() if e["kind"] == "alert"] == ["not a number"]


def test_an_earlier_run_can_be_the_model_of_the_next(done, micro):
    runs_dir = done.folder.parent
    assert inputs.resolve_source(done.id, runs_dir) == str(done.variant("nm"))
    source = f"{done.id}/structured"
    run = execute(runs_dir, micro(model={"source": source}, prune={"target": 0}))
    dense, parent = weights(run, "dense"), weights(done, "structured")
    assert all(torch.equal(dense[name], parent[name]) for name in parent)
    with pytest.raises(inputs.InputError, match="name one of them"):
        inputs.resolve_source(f"{done.id}/none", runs_dir)


def test_a_diverging_run_fails_in_plain_words_and_keeps_its_folder(tmp_path, micro, monkeypatch):
    def explode(self, task, batch, step, weights):
        return {"loss": float("nan")}

    monkeypatch.setattr(learn.GumbelMasks, "step", explode)
    run = store.create(tmp_path, micro())
    assert pipeline.execute(run) == "failed"
    state = run.state()
    assert "the loss became nan at step 1 of mask" in state.error and "\n" not in state.error
    assert state.remedy.keys() == {"mask.lr"} and 0 < state.remedy["mask.lr"] < 1
    assert "Traceback" in run.log_path.read_text() and run.variants() == ["dense", "structured"]


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_without_memory_a_smaller_batch_is_offered(tmp_path, micro, monkeypatch, error):
    def explode(*given):
        raise error

    monkeypatch.setattr(learn.GumbelMasks, "step", explode)
    run = store.create(tmp_path, micro())
    assert pipeline.execute(run) == "failed"
    state = run.state()
    assert "halve data.batch_size" in state.error
    assert state.remedy == {"data.batch_size": run.recipe().data.batch_size // 2}
    calibrated = micro(prune={"method": "taylor", "calibration_images": 8})
    assert failure.remedy(error, calibrated, "prune") == {"prune.calibration_images": 4}
    assert failure.remedy(error, run.recipe(), "prune") == {}  # magnitude looks at no images
    monkeypatch.undo()
    assert pipeline.execute(run) == "done" and run.state().remedy == {}


def test_steps_that_a_lost_checkpoint_takes_along_are_said(tmp_path, micro):
    run = store.create(tmp_path, micro())
    seen: list = []
    stop = lambda: bool(seen) and (seen[-1].stage, seen[-1].step) == ("finetune", 3)  # noqa: E731
    assert pipeline.execute(run, seen.append, stop) == "stopped"
    stage = run.state().stage
    run.drop_checkpoint(stage)
    steps = sum(record["stage"] == stage for record in run.metrics())
    assert steps == 3 and pipeline.execute(run) == "done"
    assert (
        f"stage {stage} goes on from step 0: {steps} steps after its checkpoint are redone" in run.log_path.read_text()
    )


def test_a_full_disk_is_said_and_resumes(done, tmp_path, micro, monkeypatch):
    run = store.create(tmp_path, micro())
    write = store.Run.save_checkpoint

    def full(self, name, tensors, meta):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Run, "save_checkpoint", full)
    assert pipeline.execute(run) == "failed"
    assert "disk is full" in run.state().error and run.state().remedy == {}, "the recipe is not to blame"
    monkeypatch.setattr(store.Run, "save_checkpoint", write)
    assert pipeline.execute(run) == "done"
    assert_same(done, run)


def test_only_unfinished_runs_resume(done):
    with pytest.raises(store.StoreError, match="is done"):
        done.take()


def test_preview_predicts_what_the_run_does(done, micro, tmp_path):
    found = inputs.preview(micro(), tmp_path)
    results = done.evaluation()
    assert found["parameters"]["dense"] == results["dense"]["parameters"]
    assert found["parameters"]["structured"] == results["structured"]["parameters"]
    assert found["macs"]["structured"] == results["structured"]["macs"]
    assert found["parameters"]["nm_nonzero"] == results["nm"]["nonzero_parameters"]
    assert [la["layer"] for la in found["layers"]] == [la["layer"] for la in done.layers()]


def test_records_are_json(done):
    assert json.loads((done.folder / "state.json").read_text()) == dataclasses.asdict(done.state())


ROUNDS = {"rounds": 3, "round_steps": 2, "method": "taylor", "calibration_images": 4, "calibration_steps": 2}


@pytest.mark.in_turn(5)
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_pruning_in_rounds_stops_and_resumes_anywhere(tmp_path, micro, step):
    recipe = micro(prune=ROUNDS, mask={"method": "none"})
    whole = execute(tmp_path / "whole", recipe)
    cuts = [e["report"] for e in whole.events() if e["kind"] == "pruned"]
    assert [c["round"] for c in cuts] == [1, 2, 3]
    assert [c["target"] for c in cuts] == pytest.approx([0.1, 0.2, 0.3])
    sizes = [c["parameters_after"] for c in cuts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
    assert cuts[-1]["parameters_before"] == cuts[0]["parameters_before"], "shares are of the dense model"
    steps = [r["step"] for r in whole.metrics() if r["stage"] == "prune"]
    assert steps == [1, 2, 3, 4]
    seen = []
    run = execute(
        tmp_path / "parts",
        recipe,
        on_step=seen.append,
        stop=lambda: bool(seen) and (seen[-1].stage, seen[-1].step) == ("prune", step),
    )
    assert run.state().status == "stopped"
    assert pipeline.execute(store.Run(run.folder)) == "done"
    assert_same(whole, run)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(
    "prune", [{"layout": "uniform"}, {"of": "macs", "ranking": "global"}, {"method": "activation"}]
)
def test_layouts_targets_and_methods_run_to_the_end(tmp_path, micro, prune):
    from diffusers import DDPMPipeline

    run = execute(tmp_path, micro(prune=prune | {"finetune_steps": 2}))
    record = next(e["report"] for e in run.events() if e["kind"] == "pruned")
    assert record["layout"] == prune.get("layout", "free") and record["of"] == prune.get("of", "parameters")
    assert "eligible for N:M" in run.report_path.read_text()
    if prune.get("layout") == "uniform":
        for variant in ("structured", "nm"):
            unet = DDPMPipeline.from_pretrained(run.variant(variant)).unet
            saved = weights(run, variant)
            assert all(torch.equal(tensor, saved[name]) for name, tensor in unet.state_dict().items())


def test_a_stage_one_that_cannot_work_is_refused_before_a_run_is_made(tmp_path, micro):
    recipe = micro(prune={"layers": [{"match": "nowhere.*", "ratio": 0.5}]})
    with pytest.raises(ValueError, match=r"'nowhere\.\*' matches no prunable layer"):
        inputs.load_inputs(recipe, tmp_path)
    recipe = micro(prune={"layout": "uniform"}, eval={"sampler": "euler"})
    with pytest.raises(ValueError, match=r"eval\.sampler=euler .*; use ddim"):
        inputs.load_inputs(recipe, tmp_path)


@pytest.mark.slow
def test_validation_losses_on_the_way_are_recorded_and_change_nothing(tmp_path, micro):
    plain, watched = (store.create(tmp_path, micro(train={"validations": n})) for n in (0, 3))
    assert pipeline.execute(plain) == pipeline.execute(watched) == "done"
    found = [(r["stage"], r["step"]) for r in watched.metrics() if "validation_loss" in r]
    assert found == [(stage, step) for stage in ("finetune", "mask", "recover") for step in (2, 4, 6)]
    assert all(0 < r["validation_loss"] < 10 for r in watched.metrics() if "validation_loss" in r)
    assert not [r for r in plain.metrics() if "validation_loss" in r]
    ways = [
        (run.variant("nm") / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for run in (plain, watched)
    ]
    assert ways[0] == ways[1]
    losses = [[r["loss"] for r in run.metrics() if "loss" in r] for run in (plain, watched)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["pruned", mask_stage.M0])
def test_an_end_beside_a_checkpoint_neither_loses_nor_doubles_what_is_recorded_once(
    tmp_path, micro, monkeypatch, name, when
):
    """A resumed run that finds the checkpoint takes the event and the sheet that go with it as there."""
    save = store.Run.save_checkpoint

    def end_there(run, which, *what):
        if which != name or when == "after":
            save(run, which, *what)
        if which == name:
            raise OSError("gone")

    recipe = micro(prune={"finetune_steps": 1}, mask={"steps": 1, "recover_steps": 0}, eval={"noise_floor": False})
    run = store.create(tmp_path, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(store.Run, "save_checkpoint", end_there)
        assert pipeline.execute(run) == "failed"
    run.take()
    execute_up_to = iter([False] * 5)
    pipeline.execute(run, stop=lambda: next(execute_up_to, True))
    kinds = [event["kind"] for event in run.events()]
    assert kinds.count("pruned") == 1 and kinds.count("baseline") == (name == mask_stage.M0)
    samples = [(event["stage"], event["step"]) for event in run.events() if event["kind"] == "sample"]
    assert samples == [store.stage_step(path) for path in run.samples()] and ("prune", 1) in samples


def test_seconds_do_not_follow_a_clock_that_is_set_back(tmp_path, micro, monkeypatch):
    run = store.create(tmp_path, micro())
    session = pipeline.Session(run, MetricsWriter(run, run.state()), lambda: False)
    monkeypatch.setattr(pipeline.time, "time", lambda: 0.0)
    session._count_time()
    assert 0 <= run.state().seconds <= session.writer.state.seconds < 60
