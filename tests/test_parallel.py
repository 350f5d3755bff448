"""One run on several ranks: real processes that meet over gloo, against one process."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
from launched import PRUNEDM, TORCHRUN, launch, only_run, start_run
from safetensors.torch import load_file

from prunedm import parallel, pipeline, stages, store
from prunedm.progress import MetricsWriter

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=2"]
STILL = {"prune": {"finetune_steps": 0}, "mask": {"method": "magnitude", "steps": 0, "recover_steps": 0}}


# --- the arithmetic ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two ranks made of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNEDM_CACHE", str(folder / "cache"))
        ended = launch([*TORCHRUN, "tests/ranked.py", str(folder)])
    assert ended.returncode == 0, ended.stderr
    assert [(folder / f"ranks.{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    return folder


def records(folder: Path, case: str, rank: int) -> list[dict]:
    return json.loads((folder / f"{case}.{rank}.json").read_text())


@pytest.mark.parametrize("case", [case for case in ranked.CASES if "wide" not in case and "bf16" not in case])
def test_two_ranks_with_half_the_batch_each_equal_one_with_all_of_it(two_ranks, case):
    equal_one_rank(two_ranks, case)


def equal_one_rank(folder: Path, case: str) -> None:
    tensors, alone = ranked.work(case)
    found = load_file(folder / f"{case}.0.safetensors")
    not_told = {name for name in tensors if name.startswith("cached.")}  # of a rank's own slices
    assert found.keys() == tensors.keys() - not_told
    for name, tensor in ((name, tensor) for name, tensor in tensors.items() if name not in not_told):
        atol = 1e-5 * max(1.0, float(tensor.float().abs().max()))  # a small entry may be the sum of large ones
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(alone, records(folder, case, 0), strict=True):
        assert theirs["masks"] == ours["masks"]
        for figure in {"loss", "grad_norm", "mask_grad_norm"} & ours.keys():
            assert theirs[figure] == pytest.approx(ours[figure], rel=1e-5), figure


def test_a_model_is_judged_by_two_ranks_as_by_one(two_ranks, tmp_path, monkeypatch):
    """Sampling, features, distances and losses: the same figures, and each rank made its part of them."""
    monkeypatch.setenv("PRUNEDM_CACHE", str(tmp_path / "cache"))
    alone, made = ranked.judged(tmp_path)
    (found, by_0), (_, by_1) = (json.loads((two_ranks / f"judged.{rank}.json").read_text()) for rank in (0, 1))
    assert found == json.loads(json.dumps(alone)) and found["fid"] > 0 and found["noise_floor"]
    assert by_0 + by_1 == made and by_1 >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_with_compiled_networks_equal_one(tmp_path):
    ended = launch([*TORCHRUN, "tests/ranked.py", str(tmp_path), *ranked.COMPILED])
    assert ended.returncode == 0, ended.stderr
    for case in ranked.COMPILED:
        equal_one_rank(tmp_path, case)


def test_the_case_of_a_reference_that_is_refreshed_is_one(two_ranks):
    found = load_file(two_ranks / "reinforce, refreshed.0.safetensors")
    _, masked = ranked.trainer(**ranked.CASES["reinforce, refreshed"])
    assert any(not torch.equal(found[f"reference.{i}"], bank.initial) for i, bank in enumerate(masked.banks))


@pytest.mark.parametrize(
    ("case", "apart"), [("fine-tune, bf16", 0.02), ("fine-tune, sharded, bf16", 0.02), ("gumbel, bf16", 0.1)]
)
def test_two_ranks_in_bf16_equal_one_but_for_its_rounding(two_ranks, case, apart):
    """bf16 keeps 8 bits: a gradient summed from two rounded halves is 2**-8 from the whole one (0.004 is found). A
    gumbel mask whose two best scores are that near flips, one in a thousand, and moves the gradients of later steps
    (0.04 is found). Ranks that did not sum would be further apart than a half."""
    tensors, alone = ranked.work(case)
    found = load_file(two_ranks / f"{case}.0.safetensors")
    assert found.keys() == tensors.keys()
    kinds = {re.sub(r"\.\d+", "", name): [] for name in tensors}
    for name, tensor in tensors.items():
        kinds[re.sub(r"\.\d+", "", name)].append((found[name].float().flatten(), tensor.float().flatten()))
    for kind, pairs in kinds.items():
        two, one = (torch.cat(parts) for parts in zip(*pairs))
        assert (two - one).norm() <= apart * one.norm(), kind
    for ours, theirs in zip(alone, records(two_ranks, case, 0), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=apart)


@pytest.mark.parametrize("case", ranked.CASES)
def test_ranks_hold_the_same_masks_at_each_step_and_the_same_bits_at_the_end(two_ranks, case):
    ours, theirs = records(two_ranks, case, 0), records(two_ranks, case, 1)
    assert [r["masks"] for r in ours] == [r["masks"] for r in theirs]
    first, second = (load_file(two_ranks / f"{case}.{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert second and (second.keys() == first.keys() or "sharded" in case), "rank 0 alone gathers what is in shards"
    if case.startswith("reinforce"):
        assert len({r["masks"] for r in ours}) == ranked.STEPS  # each step drew masks of its own


def test_reinforce_sends_the_same_few_bytes_whatever_the_models_size(two_ranks):
    cases = [case for case in ranked.CASES if "sharded" not in case]  # FSDP's bytes are not counted
    sent = {case: {r["bytes_sent"] for r in records(two_ranks, case, 0)} for case in cases}
    assert sent["reinforce"] == sent["reinforce, wide"] == {2 * 4 * (3 + 10)}  # samples, floats: means and bins
    assert min(sent["gumbel, wide"]) > 3 * max(sent["gumbel"]) > 1000 * max(sent["reinforce"])  # gradients grow


@pytest.mark.parametrize("kind", [*ranked.CHANNEL_SCORES, *ranked.WEIGHT_SCORES])
def test_what_images_say_of_channels_and_weights_is_the_same_over_two_ranks(two_ranks, kind):
    alone = ranked.statistics(kind)
    for rank in (0, 1):
        found = load_file(two_ranks / f"{kind}.{rank}")
        assert found.keys() == alone.keys()
        for name, scores in alone.items():
            torch.testing.assert_close(found[name], scores, atol=1e-5 * float(scores.abs().max()), rtol=1e-5)
    assert any(scores.abs().max() > 0 for scores in alone.values())


# --- whole runs -------------------------------------------------------------------------------
@pytest.mark.slow
def test_evaluation_over_two_ranks_equals_one(micro, tmp_path, monkeypatch):
    """Nothing is trained, so that all figures but measured times are of the same weights."""
    recipe = micro(**STILL, eval={"images": 24})
    figures = []
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        ended = start_run(launcher, recipe, tmp_path / name)
        assert ended.returncode == 0, ended.stderr
        run = only_run(tmp_path / name)
        figures.append({name: _judged(figures) for name, figures in run.evaluation().items()})
        # else the second would only read what the first has left
        monkeypatch.setenv("PRUNEDM_CACHE", str(tmp_path / "cache of two"))
    assert figures[0].keys() == {"dense", "structured", "nm"}
    assert figures[0]["nm"]["fid"] > 0
    assert figures[0] == figures[1]


def _judged(figures: dict[str, Any]) -> dict[str, Any]:
    """All but what was measured with a clock."""
    return {name: value for name, value in figures.items() if not name.startswith(("latency", "speed"))}


@pytest.mark.slow
def test_accelerate_launch_starts_two_that_work_on_one_run(micro, tmp_path):
    """On a machine without a GPU --multi_gpu starts as many processes as it is asked for."""
    ended = start_run([*ACCELERATE, "--multi_gpu"], micro(), tmp_path / "runs")
    assert ended.returncode == 0, ended.stderr
    run = only_run(tmp_path / "runs")
    started = [event for event in run.events() if event["kind"] == "started"]
    assert [event["ranks"] for event in started] == [2]  # told once: rank 0 alone writes
    steps = [(r["stage"], r["step"]) for r in run.metrics()]
    assert len(steps) == len(set(steps))


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_starts_one_and_the_run_says_so(micro, tmp_path):
    ended = start_run([*ACCELERATE, "--cpu"], micro(**STILL), tmp_path / "runs")
    assert ended.returncode == 0, ended.stderr
    assert "has started one, which goes on alone" in ended.stderr
    assert "ranks" not in next(event for event in only_run(tmp_path / "runs").events() if event["kind"] == "started")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mask"),
    [
        ("mask", {"method": "gumbel", "lr": 0.15}),
        ("mask", {"method": "reinforce", "cached_batches": 2}),
        ("mask", {"method": "reinforce", "train_weights": True}),
        ("finetune", {"method": "gumbel"}),
        ("finetune, sharded", {"method": "none"}),
    ],
)
def test_a_run_that_one_rank_began_is_resumed_by_two(micro, tmp_path, stage, mask):
    """In the middle of a stage; the result is that of one rank, but for rounding."""
    stage, _, shard = stage.partition(", ")
    recipe = micro(train={"precision": "fp32", "shard": bool(shard), "validations": 2}, mask=mask)
    pipeline.execute(store.create(tmp_path / "whole", recipe))
    run, steps = store.create(tmp_path / "resumed", recipe), []
    pipeline.execute(run, steps.append, lambda: bool(steps) and (steps[-1].stage, steps[-1].step) == (stage, 3))
    assert run.has_checkpoint(stage)
    assert run.state().status == "stopped"
    ended = launch([*TORCHRUN, *PRUNEDM, "resume", run.id, "--runs-dir", str(run.folder.parent)])
    assert ended.returncode == 0, ended.stderr
    last = "structured" if shard else "nm"
    expected, found = (only_run(tmp_path / name).evaluation()[last] for name in ("whole", "resumed"))
    assert found["nonzero_parameters"] == expected["nonzero_parameters"]
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-4)
    recorded = [(r["stage"], r["step"]) for r in run.metrics()]
    assert len(recorded) == len(set(recorded))


@pytest.mark.slow
def test_a_run_in_shards_equals_that_of_one_rank(micro, tmp_path):
    """Cut in rounds, trained between them and after the last."""
    recipe = micro(
        train={"precision": "fp32", "shard": True},
        prune={"target": 0.3, "rounds": 2, "round_steps": 4, "finetune_steps": 6},
        mask={"method": "none"},
    )
    pipeline.execute(store.create(tmp_path / "whole", recipe))
    ended = start_run(TORCHRUN, recipe, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    expected, found = (only_run(tmp_path / name) for name in ("whole", "two"))
    figures = [run.evaluation()["structured"] for run in (expected, found)]
    assert figures[1]["parameters"] == figures[0]["parameters"]
    assert figures[1]["validation_loss"] == pytest.approx(figures[0]["validation_loss"], rel=1e-4)
    assert found.log_path.read_text().count("2 ranks share the training state") == 2, "between the rounds and after"
    assert "ranks share the training state" not in expected.log_path.read_text()
    assert found.sample_path("finetune", 3).exists() and found.sample_path("finetune", 6).exists()


@pytest.mark.slow
def test_without_steps_there_is_nothing_to_share(micro, tmp_path):
    recipe = micro(train={"shard": True}, **STILL)
    ended = start_run(TORCHRUN, recipe, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert "share the training state" not in only_run(tmp_path / "two").log_path.read_text()


def test_ranks_that_share_a_model_need_equal_parts(micro, tmp_path, monkeypatch):
    recipe = micro(train={"shard": True, "accumulate": 5})
    run = store.create(tmp_path, recipe)
    made = stages.Pipeline(run, recipe, MetricsWriter(run, run.state()))
    monkeypatch.setattr(parallel._Ranks, "size", 2)
    with pytest.raises(ValueError, match=r"train.accumulate=5: 2 ranks .* set it to 4 or less"):
        next(made.stages())
    assert made.run.variants() == [], "before anything is done"


def test_equal_parts_are_of_the_images_that_there_are_and_only_of_what_is_left_to_train(micro, tmp_path, monkeypatch):
    recipe = micro(train={"shard": True, "accumulate": 8}, data={"batch_size": 64})
    run = store.create(tmp_path, recipe)
    made = stages.Pipeline(run, recipe, MetricsWriter(run, run.state()))
    made.images = types.SimpleNamespace(train=range(12))
    made._require_fair_shares()
    assert "train.shard: one process works on this run, so that nothing is shared" in run.log_path.read_text()
    monkeypatch.setattr(parallel._Ranks, "size", 2)
    with pytest.raises(ValueError, match="as many parts each of a batch of 12; set it to 6 or less"):
        made._require_fair_shares()
    made.writer.state.stages_done = ["prune", "finetune"]
    made._require_fair_shares()


def test_memory_that_a_rank_cannot_get_is_no_lost_rank(monkeypatch):
    monkeypatch.setattr(parallel._Ranks, "is_lost", False)
    with pytest.raises(torch.OutOfMemoryError), parallel.talking(alone=True):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert not parallel.is_lost()
    with pytest.raises(parallel.RankLost, match="Connection reset"), parallel.talking(alone=True):
        raise RuntimeError("Connection reset by peer")
    assert parallel.is_lost()


# --- what a launcher may ask for --------------------------------------------------------------
@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_USE_FSDP", "true", "train.shard: true"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision: bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile: true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.accumulate"),
    ],
)
def test_what_the_recipe_says_is_not_asked_of_the_launcher(monkeypatch, variable, value, told):
    monkeypatch.setenv(variable, value)
    with pytest.raises(parallel.LaunchError, match=told):
        parallel.join()


def test_more_ranks_than_gpus_work_on_the_cpu_alone(monkeypatch):
    """They meet over gloo, and a recipe that asks for CUDA is told why it has none."""
    made = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    state = types.SimpleNamespace(num_processes=3, process_index=1, local_process_index=1)
    monkeypatch.setattr("accelerate.PartialState", lambda **given: made.append(given) or state)
    for name in ("size", "rank", "local"):
        monkeypatch.setattr(parallel._Ranks, name, getattr(parallel._Ranks, name))
    parallel.join()
    assert made[0]["cpu"] and made[0]["backend"] == "gloo" and parallel.size() == 3
    assert parallel.own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="2 ranks share 1 on this machine; launch 1 a machine, or set device: cpu"):
        parallel.own_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.own_device(torch.device("cuda")) == torch.device("cuda:1")


def test_a_batch_has_an_image_for_each_rank(monkeypatch):
    monkeypatch.setattr(parallel._Ranks, "size", 4)
    slices = []
    for rank in range(4):
        monkeypatch.setattr(parallel._Ranks, "rank", rank)
        slices.append(parallel.own_slice(10))
    assert slices == [(0, 2), (2, 5), (5, 7), (7, 10)]
    with pytest.raises(ValueError, match="a batch of 3 images is too small for 4 ranks"):
        parallel.own_slice(3)
