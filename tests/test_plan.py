"""Plans: what they count against the product's own counters, real tensors, measured memory and bytes sent."""

import gc
import itertools
import json
import sys

import numpy as np
import psutil
import pytest
import torch
from conftest import make_unet
from faulty import without_main
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor

from prunedm import calibration, devices, outline, parallel, plan, plan_model, structured
from prunedm import recipe as recipes
from prunedm import unet as unets
from prunedm.__main__ import main
from prunedm.masked_unet import MaskedUNet
from prunedm.stage_recipes import Mask, Prune

sys.path.insert(0, str(unets.bundled.ASSETS.parent / "benchmarks"))
import architectures  # noqa: E402
import plan as bench  # noqa: E402

MEMORY_FACTOR = 1.35  # between predicted and measured peaks on a CPU, as docs/PLANNING.md says
PEAKS = ("mask, gumbel", "mask, reinforce", "evaluate")  # besides fine-tuning's
PLAIN = {"_class_name": "UNet2DModel"}
H100 = devices.published("h100")


def tiny(**changes) -> outline.Outline:
    return outline.build(dict(make_unet(**changes).config) | PLAIN)


def planner(found: outline.Outline, gpus: int = 1, device: devices.Device = H100, **changes) -> plan.Planner:
    base = {"name": "plan", "device": "cpu", "mask": {"m": 4}}
    return plan.Planner(recipes.build(recipes.merge(base, changes)), found, plan_model.Setting(device, gpus))


def stage(found: plan.Planner, name: str) -> plan_model.Stage:
    return next(one for one in found.stages() if one.stage == name and "loss under" not in one.what)


# --- without weights -------------------------------------------------------------------------------
def test_stable_diffusion_is_planned_without_its_weights(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(architectures.conditioned("sd15")))
    before = psutil.Process().memory_info().rss
    assert main(["plan", "--model", str(file), "--device", "h100", "--gpus", "8", "--json"]) == 0
    grown = psutil.Process().memory_info().rss - before
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == 859_520_964
    assert grown < found["model"]["parameters"]  # a quarter of the weights in fp32, and there are two models
    assert found["fits"] and found["gpus"] == 8 and found["device"]["basis"] == "published"
    assert {row["stage"] for row in found["stages"]} >= {"finetune", "mask", "recover", "evaluate"}
    assert all(row["seconds"] > 0 and row["communication"] is not None for row in found["stages"])


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("name", sorted(architectures.CONDITIONED))
def test_text_conditioned_unets_are_traced_on_fake_tensors(name):
    found = outline.build(architectures.conditioned(name))
    assert all(isinstance(p, FakeTensor) for p in found.unet.parameters())
    assert found.parameters == {"sd15": 859_520_964, "sdxl": 2_567_463_684}[name]
    smaller = outline.narrowed(found, 0.4)
    assert abs(smaller.parameters / found.parameters - 0.6) < 0.04


def test_what_is_counted_on_fake_tensors_is_what_real_ones_cost(tiny_unet):
    fake, real = (outline.trace(one, 3, False, "cpu") for one in (tiny(), outline.Outline(tiny_unet, PLAIN)))
    for name in ("flops", "moved", "kind", "live", "gradients"):
        assert np.array_equal(getattr(fake, name), getattr(real, name)), name
    assert fake.saved == real.saved and fake.forward == real.forward


def test_in_bf16_fake_tensors_cost_nearly_what_real_ones_do(tiny_unet):
    """Real kernels of GroupNorm give mixed gradients that fake ones cast afterwards."""
    fake, real = (outline.trace(one, 32, True, "cpu") for one in (tiny(), outline.Outline(tiny_unet, PLAIN)))
    assert fake.macs == real.macs and fake.saved == pytest.approx(real.saved, rel=0.02)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)
    assert fake.moved.sum() == pytest.approx(real.moved.sum(), rel=0.1)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("batch", [2, 7, 64])
def test_costs_of_any_batch_lie_on_a_line(batch):
    found = tiny()
    line, traced = outline.costs(found, False, "cuda").at(batch), outline.trace(found, batch, False, "cuda")
    assert line.macs == pytest.approx(traced.macs) and line.saved == pytest.approx(traced.saved, rel=0.02)
    assert line.peak == pytest.approx(traced.peak, rel=0.02)


# --- against the product's own counters ------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny", "bundled", "cifar10"])
def test_macs_and_parameters_are_the_products_own(name, tiny_unet):
    if name == "cifar10":
        real, found = architectures.build(name), outline.build(architectures.CONFIGS[name] | PLAIN)
    else:
        real, found = (tiny_unet, tiny()) if name == "tiny" else (unets.load(name).unet, outline.find(name))
    call = outline.costs(found, False, "cpu", backward=False)
    assert call.at(1).macs == pytest.approx(unets.macs(real), rel=1e-9)
    assert found.parameters == unets.parameters(real)


def test_a_pruned_folder_is_planned_by_the_shapes_of_its_weights(model_folder, tmp_path):
    dense = unets.load(str(model_folder))
    pruned, _ = structured.prune(dense.unet, Prune(target=0.3), 4, 0)
    unets.save(pruned, dense.scheduler, tmp_path / "pruned", {"variant": "structured"})
    found = outline.find(str(tmp_path / "pruned"))
    assert found.parameters == unets.parameters(pruned)
    assert outline.costs(found, False, "cpu", backward=False).at(1).macs == pytest.approx(unets.macs(pruned))


def test_prunable_weights_are_those_that_masks_cover(tiny_unet):
    found = planner(tiny(), prune={"target": 0})
    assert found.prunable == sum(bank.weights.numel() for bank in MaskedUNet(tiny_unet, 2, 4).banks)


def storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, and of the gradients that hang on them."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and type(thing) is not FakeTensor]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("label", [label for label in bench.STEPS if label != "evaluate"])
def test_state_of_optimiser_and_masks_is_what_is_held_between_steps(label):
    """Of the bundled model's size, since scalars weigh in small ones."""
    (method, train), planned = bench.STEPS[label], planner(outline.find("bundled"), prune={"target": 0})
    if method is None:
        predicted = planned._finetune().memory
    else:
        predicted = planned._masked(("mask", ""), 1, Mask(method=method, train_weights=train)).memory
    before = storages()
    running = bench.trainer(label, unets.load("bundled").unet, 2, "fp32")
    next(iter(running))
    held = sum(size for place, size in storages().items() if place not in before)
    assert predicted.weights + predicted.state == pytest.approx(held, rel=0.01)


# --- against measured memory -----------------------------------------------------------------------
@pytest.mark.in_turn(4)
@pytest.mark.parametrize("label", ["finetune", *PEAKS])
def test_predicted_memory_is_near_the_measured_peak(label):
    rates = dict.fromkeys(devices.PRODUCTS, 1e11)
    here = devices.Device("here", "cpu", "cpu", "measured", "test", 1 << 34, 1e10, rates)
    predicted = bench.predicted("bundled", 64, "fp32", here, [label])[label].memory.total
    with without_main():
        measured = bench.peaks(label, "bundled", 64, "fp32", True)
    assert 1 / MEMORY_FACTOR < predicted / measured < MEMORY_FACTOR


# --- the benchmark -----------------------------------------------------------------------------------
def test_the_benchmark_builds_its_steps_on_the_device_that_it_is_told(tiny_unet):
    meta = torch.device("meta")
    made = bench.trainer("finetune", tiny_unet.to(meta), 2, "fp32", meta)
    batch = made.task.batch("finetune", 0)
    assert {batch.x_t.device, batch.t.device} | {p.device for p in made.weights.parameters} == {meta}


@pytest.mark.slow
def test_two_ranks_are_predicted_to_be_nearly_twice_as_fast_but_for_gumbel_on_a_slow_link():
    rates = dict.fromkeys(devices.PRODUCTS, 1e11)
    here = devices.Device("here", "cpu", "cpu", "measured", "test", 1 << 34, 1e10, rates, interconnect=1e7)
    rows = [line.split(" | ") for line in bench.ranks(here).splitlines()[-2:]]
    assert [row[0] for row in rows] == ["| reinforce", "| gumbel"]
    reinforce, gumbel = (float(row[3]) for row in rows)
    assert 1.7 < reinforce <= 2 and gumbel < 1


# --- communication ---------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 40))
def test_a_ring_that_sums_sends_what_the_formula_says(ranks, length):
    """Reduce-scatter, then all-gather, with every message counted."""
    rng = np.random.default_rng(0)
    held = rng.integers(0, 100, (ranks, ranks, length)).astype(float)  # rank, its chunk, numbers
    wanted, sent = held.sum(0), np.zeros(ranks)
    for turn in range(2 * (ranks - 1)):
        messages = []
        for rank in range(ranks):
            chunk = (
                (rank - turn + (turn >= ranks - 1)) % ranks
                if turn < ranks - 1
                else (rank + 1 - turn + ranks - 1) % ranks
            )
            messages.append((rank, (rank + 1) % ranks, chunk, held[rank, chunk].copy()))
        for rank, to, chunk, numbers in messages:
            sent[rank] += numbers.nbytes
            held[to, chunk] = numbers + held[to, chunk] if turn < ranks - 1 else numbers
    assert all(np.array_equal(held[rank], wanted) for rank in range(ranks))
    assert np.allclose(sent, plan_model.ring(held[0].nbytes, ranks))


@pytest.mark.parametrize("label", [label for label in bench.STEPS if label != "evaluate"])
def test_ranks_sum_as_many_bytes_as_the_engine_counts(label, tiny_unet, monkeypatch):
    """A step of rank 0 of two, whose sums reach nobody."""
    monkeypatch.setattr(parallel._Ranks, "size", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    counted = next(iter(bench.trainer(label, tiny_unet, 4, "fp32"))).values["bytes_sent"]
    (method, train), planned = bench.STEPS[label], planner(tiny(), prune={"target": 0})
    spec = None if method is None else Mask(method=method, train_weights=train)
    assert plan_model.summed_bytes(spec, planned.structured.parameters, planned.prunable) == counted


@given(st.integers(0, 10**10), st.integers(0, 10**10), st.integers(1, 64))
def test_reinforce_sends_the_same_for_any_model(parameters, prunable, draws):
    spec = Mask(method="reinforce", samples=draws)
    assert plan_model.summed_bytes(spec, parameters, prunable) == plan.FP32 * plan_model.TOLD * draws
    assert plan_model.summed_bytes(Mask(method="gumbel"), parameters, prunable) == plan.FP32 * (1 + prunable)


def _sum_over_gloo(rank: int, file: str, count: int) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.distributed.all_reduce(torch.ones(count))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gloo_sends_what_the_ring_formula_says(tmp_path):
    if "lo" not in psutil.net_io_counters(pernic=True):
        pytest.skip("the loopback device has no counters here")
    count = 64 << 20
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    torch.multiprocessing.spawn(_sum_over_gloo, (str(tmp_path / "meet"), count), nprocs=2)
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    assert 0.95 < sent / (2 * plan_model.ring(count * 4, 2)) < 1.3  # with headers and what else runs here


# --- how costs grow ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def costs():
    return [outline.costs(tiny(block_out_channels=widths), True, "cuda") for widths in ((16, 32), (32, 64), (64, 128))]


@given(st.integers(0, 2), st.integers(1, 4096), st.integers(1, 4096))
def test_time_and_memory_grow_with_images(costs, which, one, other):
    few, many = sorted((one, other))
    low, high = (costs[which].at(size) for size in (few, many))
    setting = plan_model.Setting(H100)
    assert plan_model.seconds(low, setting) <= plan_model.seconds(high, setting)
    assert low.peak <= high.peak and low.saved <= high.saved and low.activations <= high.activations


@given(st.integers(1, 4096))
def test_time_and_memory_grow_with_parameters(costs, batch):
    setting = plan_model.Setting(H100)
    times = [plan_model.seconds(one.at(batch), setting) for one in costs]
    assert times == sorted(times) and len(set(times)) == 3
    peaks = [one.at(batch).peak for one in costs]
    assert peaks == sorted(peaks)


@given(st.floats(1, 1e12), st.integers(1, 1000), st.integers(1, 1000))
def test_bytes_sent_grow_with_ranks_and_size(size, one, other):
    few, many = sorted((one, other))
    assert plan_model.ring(size, few) <= plan_model.ring(size, many) < 2 * size
    assert plan_model.ring(size, many) <= plan_model.ring(2 * size, many)
    setting = plan_model.Setting(H100)
    assert plan_model.link_seconds(plan_model.ring(size, few), setting) <= plan_model.link_seconds(2 * size, setting)


def test_more_ranks_take_less_time_and_more_device_hours():
    recipe, found = recipes.build({"name": "plan", "device": "cpu", "prune": {"target": 0.3}}), tiny()
    plans = [plan.make(recipe, found, plan_model.Setting(H100, count, 2.0, 0.4)) for count in (1, 2, 8, 64)]
    for few, many in itertools.pairwise(plans):
        assert many["seconds"] < few["seconds"] and many["device_hours"] >= few["device_hours"]
        assert many["price"]["total"] == pytest.approx(many["device_hours"] * 2)
        for low, high in zip(few["stages"], many["stages"], strict=True):
            assert high["memory_bytes"] <= low["memory_bytes"] and high["sent"] >= low["sent"]


def test_calls_without_gradients_are_planned_in_trainings_precision():
    reinforce = {"mask": {"method": "reinforce"}, "prune": {"target": 0.3}}
    half, single = (planner(tiny(), train={"precision": name}, **reinforce) for name in ("bf16", "fp32"))
    assert stage(half, "mask").memory.activations < stage(single, "mask").memory.activations
    assert stage(half, "evaluate").memory.activations == stage(single, "evaluate").memory.activations


def test_batches_in_parts_take_less_memory_and_no_less_time():
    whole, parts = (planner(tiny(), prune={"target": 0.3}, train={"accumulate": n}) for n in (1, 8))
    for name in ("finetune", "recover"):
        one, other = stage(whole, name), stage(parts, name)
        assert other.memory.activations < one.memory.activations / 2 and other.compute >= 0.99 * one.compute
        assert other.memory.state == one.memory.state and other.largest_batch > one.largest_batch


@given(st.floats(0, 1e9), st.floats(0.1, 1e6), st.floats(0, 1e12))
def test_the_largest_batch_fits_and_no_larger_one_does(base, slope, room):
    found = plan_model.largest(room, lambda images: base + slope * images)
    if found is None:
        assert base + slope > room
    else:
        assert base + slope * found <= room
        assert found == plan_model.MOST_IMAGES or base + slope * (found + 1) > room


def test_growth_tables_hold_the_plan_itself():
    found = planner(tiny(), 4, prune={"target": 0.3})
    rows, own = found.growth(), stage(found, "finetune")
    at = next(row for row in rows["ranks"] if row["ranks"] == 4)
    assert at["compute"] == pytest.approx(own.compute) and at["sent_finetune"] == own.sent
    assert next(row for row in rows["images"] if row["batch"] == own.batch)["compute"] == pytest.approx(own.compute)
    assert [row["model"] for row in rows["parameters"]] == ["dense", "structured"]
    assert {row["sent_reinforce"] for row in rows["ranks"][1:]} <= {
        plan_model.ring(plan.FP32 * plan_model.TOLD, row["ranks"]) for row in rows["ranks"]
    }


# --- devices -----------------------------------------------------------------------------------------
def test_published_devices_say_where_their_figures_are_from():
    for device in devices.PUBLISHED.values():
        assert device.basis == "published" and device.source and set(device.flops) == set(devices.PRODUCTS)
        assert device.flops["fp32"] <= device.flops["fp32 convolutions"] <= device.flops["bf16"]
    assert "least possible" in plan_model.Setting(H100).words
    assert "assumption" in plan_model.Setting(H100, efficiency=0.4).words
    assert devices.published("RTX-4090").key == "rtx4090"


def test_the_device_at_hand_is_measured_once_and_kept(monkeypatch):
    found = calibration.here(torch.device("cpu"), again=True)
    assert found.basis == "measured" and 0 < found.efficiency <= 1 and found.overhead >= 0
    assert all(0 < low <= high for figure, (low, high) in found.spread.items() if figure != "overhead")
    assert min(found.flops.values()) > 1e8 and found.bandwidth > 1e7  # any processor does as much
    monkeypatch.setattr(calibration, "measure", lambda device: pytest.fail("measured twice"))
    assert calibration.here(torch.device("cpu")) == found


FAULTS = {
    ("--device", "h1000"): "did you mean h100?",
    ("--device", "h100", "--gpus", "0"): "gpus=0",
    ("--device", "h100", "--gpus", "65"): "more than the images of a batch (64)",
    ("--device", "h100", "--efficiency", "0"): "efficiency=0.0 must be above 0",
    ("--device", "h100", "--price-per-hour", "-1"): "price-per-hour=-1.0",
    ("--device", "h100", "--interconnect", "0"): "interconnect=0.0",
    ("--device", "h100", "--recalibrate"): "use here",
    ("--device", "h100", "--model", "/no/such/model"): "is not there",
    ("--device", "h100", "--set", "mask.m=13"): "no layer is eligible",
}


def test_ranks_that_share_a_model_hold_less_and_send_more():
    """Of the state a rank holds its part alone; each weight is gathered twice and its gradient shared out once."""
    alone, shared = (stage(planner(tiny(), 4, train={"shard": shard}), "finetune") for shard in (False, True))
    assert shared.memory.weights == pytest.approx(alone.memory.weights / 4)
    assert shared.memory.state == pytest.approx(alone.memory.state / 4)
    assert shared.memory.total < alone.memory.total and shared.sent == pytest.approx(1.5 * alone.sent)
    one = [stage(planner(tiny(), 1, train={"shard": shard}), "finetune") for shard in (False, True)]
    assert one[0].memory == one[1].memory and one[0].sent == one[1].sent == 0


@pytest.mark.parametrize("given", FAULTS, ids=" ".join)
def test_what_cannot_be_planned_is_one_line(given, capsys):
    assert main(["plan", *given]) == 2
    err = capsys.readouterr().err
    assert FAULTS[given] in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ('{"_class_name": "Transformer2DModel"}', "plans know"),
        ('{"_class_name": "UNet2DModel"}', "no sample_size"),
        ('{"_class_name": "UNet2DModel", "sample_size": 8, "down_block_types": ["Unknown"]}', "cannot be built"),
    ],
)
def test_a_config_that_is_no_unets_is_one_line(config, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert main(["plan", "--device", "h100", "--model", str(tmp_path / "config.json")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_the_command_says_what_its_figures_are(model_folder, capsys):
    options = ["--device", "l4", "--gpus", "2", "--price-per-hour", "0.5", "--set", "mask.method=reinforce"]
    assert main(["plan", "--model", str(model_folder), *options]) == 0
    out = capsys.readouterr().out
    for words in ("published figures (NVIDIA L4", "least possible", "at least", "device-hours", "not counted:"):
        assert words in out, words
    assert main(["plan", "--model", str(model_folder), "--device", "l4"]) == 0
    assert "give --price-per-hour" in capsys.readouterr().out
