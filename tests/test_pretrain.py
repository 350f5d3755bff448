"""A dense model from images: what comes out, stopping and going on, bad input in one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prunedm import pretrain, unet
from prunedm.__main__ import main
from prunedm.pretrain import Architecture
from prunedm.store import Run

TINY = ["--size", "8", "--channels", "1", "--widths", "16,32", "--layers-per-block", "1", "--device", "cpu",
        "--batch-size", "8"]  # fmt: skip


def arguments(images: Path, out: Path, steps: int = 6) -> list[str]:
    return ["pretrain", "--data", str(images), "--out", str(out), "--steps", str(steps), *TINY]


def plan_of(folder: Path) -> pretrain.Plan:
    return pretrain.Plan.of(json.loads((folder / "pretrain.json").read_text()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / unet.WEIGHTS)


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory) -> Path:
    """Six steps without a pause."""
    out = tmp_path_factory.mktemp("trained") / "model"
    assert main(arguments(image_folder, out)) == 0
    return out


def stopping_after(steps: int):
    """A callback and a question, so that execute() stops after so many steps."""
    seen: list[int] = []
    return (lambda step: seen.append(step.step)), (lambda: len(seen) >= steps)


def test_the_folder_holds_a_model_and_its_record(trained, image_folder, capsys):
    record = json.loads((trained / "prunedm.json").read_text())
    assert record["images"] == {"train": 36, "held_out": 4, "skipped": 1}
    assert record["pretrain"]["steps"] == 6 and record["pretrain"]["data"]["source"] == str(image_folder)
    assert record["validation_loss"]["after"] < record["validation_loss"]["before"]
    metrics = Run(trained).metrics()
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6] and all(row["loss"] > 0 for row in metrics)
    assert not list(trained.rglob("*.bin")) and not list((trained / "checkpoints").glob("*"))
    assert "image skipped: broken.png" in (trained / "log.txt").read_text()


def test_diffusers_and_this_program_load_it(trained):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    model = unet.load(str(trained))
    assert model.image_shape == (1, 8, 8) and record_parameters(trained) == unet.parameters(model.unet)
    kinds = [block.__class__.__name__ for block in (*model.unet.down_blocks, *model.unet.up_blocks)]
    assert kinds == ["DownBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "UpBlock2D"]


def test_a_run_takes_it_as_its_model(trained, image_folder, tmp_path, capsys):
    given = ["--set", f"model.source={trained}", "--set", f"data.source={image_folder}", "--set", "device=cpu"]
    assert main(["run", "--runs-dir", str(tmp_path), *given, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["dense"] == record_parameters(trained)


def record_parameters(folder: Path) -> int:
    return json.loads((folder / "prunedm.json").read_text())["parameters"]


def test_the_same_command_gives_the_same_model_and_another_seed_another(trained, image_folder, tmp_path, capsys):
    assert main([*arguments(image_folder, tmp_path / "again"), "--json"]) == 0
    printed = capsys.readouterr()
    assert same(trained, tmp_path / "again")
    lines = printed.out.splitlines()
    assert lines[0] == "36 images to train on, 4 held out" and "1 skipped" in printed.err
    loss = json.loads(lines[-1])["validation_loss"]
    assert f"validation loss {loss['before']:.5f} before, {loss['after']:.5f} after 6 steps" in lines
    assert main([*arguments(image_folder, tmp_path / "other"), "--seed", "1"]) == 0
    assert not same(trained, tmp_path / "other")


@pytest.mark.parametrize("pauses", [(3,), (1, 2, 5), (6,)])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(trained, image_folder, tmp_path, pauses):
    out = tmp_path / "model"
    plan = plan_of(trained)
    run, done = pretrain.begin(out, plan), 0
    for pause in pauses:
        images = pretrain.data.load(plan.recipe.data, plan.architecture.shape)
        assert pretrain.execute(run, plan, images, *stopping_after(pause - done)) is None
        assert not (out / "unet").exists()
        run, plan = pretrain.reopen(out)
        done = pause
    run.append("metrics.jsonl", [{"stage": "pretrain", "step": 7, "loss": 0.0}])  # of a process that was killed
    assert main(["pretrain", "--out", str(out), "--resume"]) == 0
    assert same(trained, out)
    ours, theirs = (json.loads((folder / "prunedm.json").read_text()) for folder in (out, trained))
    assert ours["validation_loss"] == theirs["validation_loss"]
    drop = [{k: v for k, v in row.items() if k != "time"} for row in Run(out).metrics()]
    assert drop == [{k: v for k, v in row.items() if k != "time"} for row in Run(trained).metrics()]


def test_options_of_data_and_train_reach_the_training(trained, image_folder, tmp_path):
    changed = ["--set", "data.flip=true", "--set", "train.schedule=constant", "--set", "data.limit=20"]
    assert main([*arguments(image_folder, tmp_path / "m"), *changed, "--lr", "1e-3"]) == 0
    record = json.loads((tmp_path / "m" / "prunedm.json").read_text())
    assert record["pretrain"]["data"]["flip"] and record["pretrain"]["train"]["lr"] == 1e-3
    assert record["images"]["train"] + record["images"]["held_out"] <= 20
    assert not same(trained, tmp_path / "m")


def test_ctrl_c_saves_and_exits_130_and_resume_goes_on(image_folder, tmp_path):
    out = tmp_path / "model"
    command = [sys.executable, "-m", "prunedm", *arguments(image_folder, out, steps=100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out / ".lock").exists():  # taken by who minds interruptions
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "--resume" in output
    tensors, meta = Run(out).load_checkpoint("pretrain")
    assert meta["done"] >= 1 and "weight.0" in tensors
    assert len(Run(out).metrics()) == meta["done"]
    assert main(arguments(image_folder, out)) == 2, "an unfinished training is not overwritten"


def one_line(capsys) -> str:
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in printed.err + printed.out
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--size", "33"], "--size=33 must be 4 to 1024 and divisible by 2 for 2 widths; try 32"),
        (["--size", "0"], "--size=0 must be 4"),
        (["--channels", "2"], "--channels=2 must be 1 (grey) or 3 (colour)"),
        (["--widths", "16,20"], "--widths=16,20 must be multiples of 8"),
        (["--widths", "16;20"], "--widths='16;20' must be numbers with commas between"),
        (["--widths", "none"], "must be 1 to 8 widths"),
        (["--layers-per-block", "0"], "--layers-per-block=0 must be 1 to 8"),
        (["--attention-at", "2"], "--attention-at=2 must be levels from 0 to 1, or none"),
        (["--attention-at", "-1"], "--attention-at=-1 must be levels"),
        (["--steps", "0"], "--steps=0 must be 1 to"),
        (["--batch-size", "0"], "data.batch_size=0"),
        (["--lr", "0"], "train.lr=0"),
        (["--lr", "fast"], "--lr"),
        (["--size", "big"], "--size"),
        (["--seed", "-1"], "seed=-1"),
        (["--device", "tpu"], "device='tpu'"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--data", "/nowhere"], "data.source=/nowhere is not a folder"),
        (["--data", "bundled"], "data.source=bundled holds images of shape (1, 28, 28)"),
        (["--set", "mask.n=1"], "--set mask.n=1: a pretraining reads data and train only"),
        (["--set", "data.colour=1"], "data.colour is not a field"),
        (["--set", "train.distill=1"], "train.distill=1.0 needs a teacher"),
        (["--resume"], "--resume goes on with the options in the folder; leave out --size --channels"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(image_folder, tmp_path, capsys, extra, says):
    assert main([*arguments(image_folder, tmp_path / "out"), *extra]) == 2
    assert says in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(trained, image_folder, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for out in (full, full / "thesis.txt", trained):
        assert main(arguments(image_folder, out)) == 2
        assert "is not an empty folder; name another" in capsys.readouterr().err
    for out, says in ((full, "holds no training"), (trained, "holds a finished model; there is nothing to resume")):
        assert main(["pretrain", "--out", str(out), "--resume"]) == 2
        assert says in one_line(capsys)
    assert main(["pretrain", "--out", str(tmp_path / "new")]) == 2
    assert "--data is missing" in one_line(capsys)
    assert (full / "thesis.txt").read_text() == "mine"


def test_what_changed_since_the_checkpoint_is_refused(image_folder, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "model"
    shutil.copytree(image_folder, images)
    plan = plan_of(started(images, out))
    loaded = pretrain.data.load(plan.recipe.data, plan.architecture.shape)
    assert pretrain.execute(Run(out), plan, loaded, *stopping_after(2)) is None
    again, kept = ["pretrain", "--out", str(out), "--resume"], (out / "pretrain.json").read_text()
    Image.new("L", (8, 8)).save(images / "new.png")
    assert main(again) == 2
    assert "held 36 + 4 images when the training began and now 37 + 4" in capsys.readouterr().err
    (images / "new.png").unlink()
    for damaged, says in (
        (kept.replace('"steps": 6', '"steps": 7'), "pretrain.json has been changed since the checkpoint"),
        (kept.replace('"steps": 6', '"steps": "x"'), "pretrain.json is damaged"),
        ("{", "pretrain.json"),
        ("[]", "pretrain.json is damaged"),
    ):
        (out / "pretrain.json").write_text(damaged)
        assert main(again) == 2
        assert says in capsys.readouterr().err
    (out / "pretrain.json").write_text(kept)
    assert main([*again, "--device", "cpu"]) == 0, "the device may be named again"


def started(images: Path, out: Path) -> Path:
    """A folder with a plan and nothing else, as of a process killed before its first checkpoint."""
    plan = pretrain.Plan(
        pretrain.recipes.build({"data": {"source": str(images), "batch_size": 8}, "device": "cpu"}),
        Architecture(8, 1, (16, 32), 1),
        6,
    )
    pretrain.begin(out, plan)
    return out


def test_a_training_killed_before_its_first_checkpoint_begins_again(trained, image_folder, tmp_path):
    assert main(["pretrain", "--out", str(started(image_folder, tmp_path / "m")), "--resume"]) == 0
    assert same(trained, tmp_path / "m")


def test_a_loss_that_is_no_number_is_exit_1(image_folder, tmp_path, capsys, monkeypatch):
    lost = torch.full((8,), torch.nan, requires_grad=True)
    monkeypatch.setattr(pretrain.Task, "_pass", lambda *_: (lost, lost.detach()))
    assert main(arguments(image_folder, tmp_path / "m")) == 1
    printed = capsys.readouterr()
    assert "error: the loss became nan at step 1 of pretrain; lower train.lr" in printed.err
    assert "Traceback" not in printed.err + printed.out and not (tmp_path / "m" / "prunedm.json").exists()


@pytest.mark.parametrize(
    ("architecture", "attends"),
    [
        (Architecture(8, 3, (8,), 1, ()), [False]),
        (Architecture(12, 1, (8, 16, 8), 2, (0, 2)), [True, False, True]),
        (Architecture(16, 3, (16, 16), 1), [False, True]),
    ],
)
def test_architectures_are_built_as_said(architecture, attends):
    model, again = architecture.build(0), architecture.build(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert unet.image_shape(model) == architecture.shape
    assert [hasattr(block, "attentions") for block in model.down_blocks] == attends
    x = torch.zeros(1, *architecture.shape)
    with torch.no_grad():
        assert model(x, torch.tensor([3])).sample.shape == x.shape
    assert len(model.down_blocks[0].resnets) == architecture.layers_per_block


def test_building_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Architecture(8, 1, (8,), 1).build(3)
    assert torch.equal(torch.rand(1), expected)
