"""Mask methods: gradients against autograd, known best masks, variance, cost, and exact resume."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from prunedm import data, diffusion, learn, mask_methods, masks, pattern, training
from prunedm.diffusion import NoisedBatch, Timesteps
from prunedm.masked_unet import MaskedUNet
from prunedm.recipe import Train
from prunedm.seeds import generator
from prunedm.stage_recipes import Mask
from prunedm.training import Trainer, Weights, Window


@pytest.fixture
def task():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return training.Task(DDPMScheduler(), data.Batches(images, 16, 0), 0, torch.device("cpu"), bf16=False)


def masked_unet(overrides=(), **changes) -> MaskedUNet:
    return MaskedUNet(make_unet(**changes).requires_grad_(False), 2, 4, overrides)


def train(masked, task, steps, weights=None, **spec) -> learn.FixedMasks:
    """Run one mask stage and leave its choice in place."""
    recipe = Mask(train_weights=weights is not None, **spec)
    learner = learn.METHODS[recipe.method](masked, recipe, steps, task.seed)
    for _ in Trainer("mask", steps, task, learner, weights):
        pass
    learner.finish()
    return learner


def spoil(masked: MaskedUNet) -> None:
    """Start from random masks, so that there is something to gain."""
    masked.set_initial([torch.rand(b.weights.shape, generator=generator(0, "bad")) for b in masked.banks])


# --- the estimators' gradients ----------------------------------------------------------------
def test_the_straight_through_gradient_is_autograds(task):
    masked = masked_unet([("mid_block.*", "1:4")])
    learner = learn.GumbelMasks(masked, Mask(), 10, 0)
    tau, batch = 0.7, task.batch("mask", 0)
    keys = [
        ((bank.logits.detach() + torch.rand(bank.logits.shape, generator=generator(i))) / tau).requires_grad_(True)
        for i, bank in enumerate(masked.banks)
    ]
    changed = {}
    for bank, key in zip(masked.banks, keys):
        soft = bank.n * key.softmax(-1)
        mask = pattern.top_n(key.detach(), bank.n) + soft - soft.detach()
        for layer in bank.layers:
            rows = slice(layer.start, layer.stop)
            changed[layer.name] = pattern.ungroup(bank.weights[rows] * mask[rows], layer.shape)
    predict = torch.func.functional_call
    diffusion.loss(lambda x, t: predict(make_unet(), changed, (x, t)).sample, batch).backward()
    learner.prepare(0, False)
    learner._loss(
        task, batch, lambda: masked.wear([pattern.keep(k.detach(), b.n) for k, b in zip(keys, masked.banks)]), True
    )
    for bank, key in zip(masked.banks, keys):
        found = learn.straight_through(bank, key.detach()) * bank.n
        assert torch.allclose(found, key.grad, atol=1e-8, rtol=1e-4)


def test_sr_ste_is_the_papers_gradient(task):
    """Against a straight-through autograd.Function with the decay of pruned weights (arXiv 2102.04010)."""

    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            mask = pattern.ungroup(pattern.top_n(pattern.group(weight.abs(), 4), 2), weight.shape)
            ctx.save_for_backward(weight, mask)
            return weight * mask

        @staticmethod
        def backward(ctx, grad):
            weight, mask = ctx.saved_tensors
            return grad + 0.05 * (1 - mask) * weight

    masked, batch, reference = masked_unet(), task.batch("mask", 0), make_unet()
    names = [layer.name for layer in masked.banks[0].layers]
    leaves = {name: reference.get_parameter(name).detach().clone().requires_grad_(True) for name in names}
    sparse = {name: Sparse.apply(leaf) for name, leaf in leaves.items()}
    predict = torch.func.functional_call
    diffusion.loss(lambda x, t: predict(reference, sparse, (x, t)).sample, batch).backward()
    weights = Weights(masked.trainable(), Train(), Window.of(5))
    learner = learn.SrSteMasks(masked, Mask(method="sr-ste", sr_decay=0.05, train_weights=True), 5, 0)
    learner.prepare(0, True)
    learner.step(task, batch, 0, True)
    for layer in masked.banks[0].layers:
        found = pattern.ungroup(masked.banks[0].grad[layer.start : layer.stop], layer.shape)
        assert torch.allclose(found, leaves[layer.name].grad, atol=1e-7), layer.name
    assert weights.parameters[-1] is masked.banks[0].weights


def test_weights_under_reinforce_get_the_mean_gradient_of_the_samples(task):
    """Two samples, two patterns: against autograd through weight * mask for each sample."""
    masked, reference, batch = masked_unet([("mid_block.*", "1:4")]), make_unet(), task.batch("mask", 0)
    Weights(masked.trainable(), Train(), Window.of(5))
    spec = Mask(method="reinforce", samples=2, train_weights=True, flip_budget=0.2)
    learner = learn.ReinforceMasks(masked, spec, 5, 0)
    leaves = {layer.name: reference.get_parameter(layer.name) for bank in masked.banks for layer in bank.layers}
    for sample in range(2):
        masked.wear(learner._draw(0, sample)[0])
        given = {f"{name}.weight": mask.clone() for name, mask in masked.layer_masks().items()}
        changed = {name: leaf * given[name] for name, leaf in leaves.items()}
        prediction = torch.func.functional_call(reference, changed, (batch.x_t, batch.t)).sample
        (diffusion.loss(lambda x, t, found=prediction: found, batch) / 2).backward()
    learner.prepare(0, True)
    learner.step(task, batch, 0, True)
    for bank in masked.banks:
        for layer in bank.layers:
            found = pattern.ungroup(bank.grad[layer.start : layer.stop], layer.shape)
            assert torch.allclose(found, leaves[layer.name].grad, atol=1e-7), layer.name
    assert torch.allclose(masked.unet.conv_in.weight.grad, reference.conv_in.weight.grad, atol=1e-7)


@pytest.mark.parametrize("method", ["gumbel", "reinforce"])
def test_mask_gradients_that_are_no_number_stop_before_the_logits_move(task, method, monkeypatch):
    masked = masked_unet()
    learner = learn.METHODS[method](masked, Mask(method=method), 5, 0)
    start = masked.banks[0].logits.detach().clone()

    def poison(*args):
        return torch.full_like(start, math.nan)

    monkeypatch.setattr(learn, "straight_through", poison)
    monkeypatch.setattr(masks, "score", poison)
    with pytest.raises(training.Diverged, match=r"masks' gradient norm became nan at step 1 of mask; lower mask.lr"):
        next(iter(Trainer("mask", 5, task, learner, None)))
    assert torch.equal(masked.banks[0].logits.detach(), start)


@pytest.mark.parametrize("method", ["magnitude", "gumbel", "reinforce"])
def test_only_kept_weights_receive_gradient(task, method):
    masked = masked_unet()
    Weights(masked.trainable(), Train(), Window.of(5))
    learner = learn.METHODS[method](masked, Mask(method=method, train_weights=True), 5, 0)
    learner.prepare(0, True)
    learner.step(task, task.batch("mask", 0), 0, True)
    bank = masked.banks[0]
    assert bank.grad[~bank.mask].abs().max() == 0 and bank.grad[bank.mask].abs().max() > 0


# --- a quadratic with a known best mask ---------------------------------------------------------
class Toy(torch.nn.Module):
    """sample = W x: with white x the loss is the squared distance of W * mask to the target's weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x, t):
        return SimpleNamespace(sample=self.layer(x))


class ToyTask(training.Task):
    """The target keeps the *smallest* weights of each group, so that magnitude is as wrong as can be."""

    def batch(self, stage, step):
        x = torch.randn(64, 16, generator=generator(self.seed, stage, step))
        t = torch.randint(1000, (64,), generator=generator(self.seed, stage, "t", step))
        return NoisedBatch(x, t, x @ self.truth.T)


def toy(n: int) -> tuple[MaskedUNet, ToyTask, torch.Tensor]:
    torch.manual_seed(0)
    net = Toy().requires_grad_(False)
    net.layer.weight.copy_(torch.randn(8, 16).sign() * (0.5 + torch.rand(8, 16)))
    best = pattern.keep(-pattern.group(net.layer.weight, 4).abs(), n)
    task = ToyTask(DDPMScheduler(), None, 0, torch.device("cpu"), False)
    task.truth = net.layer.weight * pattern.ungroup(best, (8, 16))
    masked = MaskedUNet(net, n, 4)
    spoil(masked)
    return masked, task, best


@pytest.mark.parametrize(
    ("n", "steps", "spec"),
    [
        (1, 150, {"method": "gumbel", "lr": 0.1, "flip_budget": 0.5}),
        (2, 150, {"method": "gumbel", "lr": 0.1, "flip_budget": 0.5}),
        (2, 150, {"method": "gumbel", "lr": 0.1, "flip_budget": 0.5, "temperature": "adaptive"}),
        (2, 900, {"method": "reinforce", "lr": 0.3, "flip_budget": 0.5, "samples": 4, "antithetic": True}),
        (1, 900, {"method": "reinforce", "lr": 0.3, "flip_budget": 0.5, "samples": 4, "antithetic": True}),
        (3, 900, {"method": "reinforce", "lr": 0.3, "flip_budget": 0.5, "samples": 4, "antithetic": True}),
    ],
)
def test_the_known_best_mask_is_found_from_a_random_start(n, steps, spec):
    masked, task, best = toy(n)
    assert pattern.flips(masked.banks[0].mask, best) > 0.4
    train(masked, task, steps, n=n, m=4, **spec)
    assert torch.equal(masked.banks[0].mask, best), pattern.flips(masked.banks[0].mask, best)


def test_the_paired_residual_with_tracker_varies_less_than_the_plain_loss(task):
    """Same draws of masks: the spread of what multiplies the score, plain loss against advantage."""
    masked = masked_unet()
    spec = Mask(method="reinforce", normalize_advantage=False, flip_budget=0.05, lr=1e-9, refresh=False)
    learner = learn.ReinforceMasks(masked, spec, 200, 0)
    records = [s.values for s in Trainer("mask", 200, task, learner, None)][100:]
    plain = torch.tensor([r["loss"] for r in records]).var()
    paired = torch.tensor([r["advantage"] for r in records]).var()
    assert paired < 0.25 * plain, (paired / plain).item()


# --- the methods at work -----------------------------------------------------------------------
def test_gumbel_lowers_the_loss_of_a_bad_initial_mask(task):
    masked = masked_unet()
    spoil(masked)
    batches = [task.batch("check", step) for step in range(4)]

    def loss():
        with torch.no_grad():
            return sum(diffusion.loss(lambda x, t: masked(x, t).sample, b).item() for b in batches)

    before, m0 = loss(), masked.masks()[0]
    train(masked, task, 40, method="gumbel", lr=0.3, flip_budget=0.3)
    assert loss() < before and pattern.flips(masked.banks[0].mask, m0) > 0.01
    assert (masked.banks[0].mask.sum(-1) == 2).all()


def test_frozen_weights_stay_bitwise(task):
    masked = masked_unet()
    before = {k: v.clone() for k, v in make_unet().state_dict().items()}
    for method in ("gumbel", "reinforce", "offset"):
        train(masked, task, 3, method=method)
        masked.undress()
        assert all(torch.equal(before[k], v) for k, v in masked.unet.state_dict().items()), method
        masked.wear()


def test_pruned_weights_stay_zero_and_others_move_while_fixed_masks_train(task):
    masked = masked_unet()
    m0, start = masked.masks()[0], masked.unet.conv_in.weight.detach().clone()
    weights = Weights(masked.trainable(), Train(lr=1e-3), Window.of(4))
    train(masked, task, 4, weights, method="magnitude")
    weights.use_average()
    masked.wear()
    assert torch.equal(masked.banks[0].mask, m0) and not torch.equal(masked.unet.conv_in.weight, start)
    for report in masked.layer_reports():
        assert not report.eligible or report.compliance == 1.0


def test_windows_freeze_masks_and_weights(task):
    """Masks learn in the first half and are frozen then; the weights train in the second half only."""
    masked = masked_unet()
    spoil(masked)
    weights = Weights(masked.trainable(), Train(lr=1e-3), Window.of(12, 0.5, 1.0))
    spec = Mask(method="offset", lr=1.0, train_weights=True, masks_until=0.5, weights_from=0.5)
    learner = learn.OffsetMasks(masked, spec, 12, 0)
    start, seen, dense = masked.masks()[0], [], []
    for _ in Trainer("mask", 12, task, learner, weights):
        seen.append(learner.choice()[0].clone())
        dense.append(masked.banks[0].weights.detach().clone())
    assert not torch.equal(seen[5], start), "masks have moved in their window"
    assert all(torch.equal(seen[i], seen[6]) for i in range(6, 12)), "and are frozen after it"
    assert torch.equal(dense[0], dense[5]) and not torch.equal(dense[6], dense[11])
    learner.finish()
    assert torch.equal(masked.banks[0].mask, seen[6]), "finishing does not choose again"


def test_masks_that_follow_the_weights_begin_as_the_learned_ones(task):
    """then=sr-ste: at the end of the window the model is unchanged and magnitude chooses the learned masks."""
    masked = masked_unet([("mid_block.*", "1:4")])
    weights = Weights(masked.trainable(), Train(lr=1e-2), Window.of(12, 0.5, 1.0))
    spec = Mask(method="gumbel", lr=1.0, train_weights=True, masks_until=0.5, weights_from=0.5, then="sr-ste")
    learner = learn.GumbelMasks(masked, spec, 12, 0)
    running = iter(Trainer("mask", 12, task, learner, weights))
    for _ in range(6):
        next(running)
    learned = learner.choice()
    assert not all(torch.equal(a, bank.initial) for a, bank in zip(learned, masked.banks))
    masked.wear(learned)
    before = {k: v.clone() for k, v in masked.unet.state_dict().items()}
    learner.prepare(6, True)
    assert all(torch.equal(a, b) for a, b in zip(mask_methods.by_magnitude(masked), learned))
    masked.wear(mask_methods.by_magnitude(masked))
    assert all(torch.equal(before[k], v) for k, v in masked.unet.state_dict().items())
    list(running)
    learner.finish()
    assert all(torch.equal(a, bank.mask) for a, bank in zip(mask_methods.by_magnitude(masked), masked.banks))
    assert not all(torch.equal(a, bank.mask) for a, bank in zip(learned, masked.banks)), "they have followed"


def test_temperature_schedules():
    def at(kind: str, step: int) -> float:
        return learn.GumbelMasks(masked_unet(), Mask(temperature=kind), 101, 0).temperature(step)

    for kind in ("linear", "cosine", "exponential"):
        assert at(kind, 0) == pytest.approx(1.0) and at(kind, 100) == pytest.approx(0.1), kind
    assert at("linear", 50) == at("cosine", 50) == pytest.approx(0.55)
    assert at("exponential", 50) == pytest.approx(0.1**0.5)
    assert at("constant", 100) == 1.0
    adaptive = learn.GumbelMasks(masked_unet(), Mask(temperature="adaptive", tau_start=2, tau_end=0.2), 100, 0)
    adaptive.entropy[1] = 0.5
    assert adaptive.temperature(7) == pytest.approx(1.1)


def test_the_adaptive_temperature_falls_with_the_entropy(task):
    masked = masked_unet()
    spoil(masked)
    spec = Mask(temperature="adaptive", lr=0.5, flip_budget=0.5)
    learner = learn.GumbelMasks(masked, spec, 60, 0)
    taus = [s.values["tau"] for s in Trainer("mask", 60, task, learner, None)]
    assert taus[0] == pytest.approx(1.0) and taus[-1] < 0.97 and len(set(taus)) <= 6


def test_the_reference_is_refreshed_once_samples_are_better():
    masked = masked_unet()
    learner = learn.ReinforceMasks(masked, Mask(method="reinforce", cached_batches=2), 1, 0)
    masked.banks[0].logits = torch.randn(masked.banks[0].logits.shape, generator=torch.Generator().manual_seed(1))
    learner.cached = {0: torch.ones(3)}
    learner.tracker -= 0.1
    learner.since += 100  # the memory of a tracker that decays by 0.99
    learner._refresh()
    assert torch.equal(learner.reference[0], learner.choice()[0]) and learner.tracker.abs().sum() == 0
    assert not learner.cached, "losses of the old reference are of no use"
    assert not torch.equal(learner.reference[0], masked.banks[0].initial), "flips are still counted from m0"


def test_without_normalising_the_advantage_is_the_papers():
    learner = learn.ReinforceMasks(masked_unet(), Mask(method="reinforce", normalize_advantage=False), 1, 0)
    residual, bins = torch.tensor([0.2, 0.4]), torch.tensor([0, 9])
    learner.tracker[0] = 0.1
    batch = diffusion.NoisedBatch(residual, bins, residual)
    counts = torch.bincount(bins, minlength=10)
    found = learner._measure(batch, residual, residual + 1, bins, counts)
    assert found == pytest.approx((1.3, 0.3, (0.2 - 0.1 + 0.4) / 2))
    assert learner.tracker[0].item() == pytest.approx(0.1 + 0.01 * 0.1)
    assert learner.tracker[9].item() == pytest.approx(0.01 * 0.4)


def test_a_cached_reference_changes_nothing_but_the_cost(task, monkeypatch):
    """Over a fixed cycle of batches, with and without keeping f(m0)."""
    cycled = dataclasses.replace(task, cycle=4)
    found, calls = [], []
    for cached in (4, 0):
        masked, count = masked_unet(), [0]

        def counted(unet, batch, count=count):
            count[0] += 1
            return training.Task.losses(cycled, unet, batch)

        monkeypatch.setattr(cycled, "losses", counted)
        train(masked, cycled, 12, method="reinforce", cached_batches=cached, flip_budget=0.1)
        found.append(masked.banks[0].logits.clone())
        calls.append(count[0])
    assert torch.equal(*found) and calls == [12 + 4, 24]


def test_opposite_pairs_are_opposite():
    masked = masked_unet()
    learner = learn.ReinforceMasks(masked, Mask(method="reinforce", samples=4, antithetic=True), 1, 0)
    bank = masked.banks[0]
    bank.logits = torch.zeros_like(bank.logits)
    (first,), _ = learner._draw(0, 0)
    (opposite,), _ = learner._draw(0, 1)
    (other,), _ = learner._draw(0, 2)
    assert not (first & opposite).any(), "with even logits 2:4 keeps the other two"
    assert (first & other).any()


def test_several_samples_are_averaged(task):
    """Four samples a step move the logits by the mean of what each would move them."""
    spec = {"method": "reinforce", "normalize_advantage": False, "tracker_decay": 0.0, "lr": 1.0, "flip_budget": 0.2}
    masked, batch = masked_unet(), task.batch("mask", 0)
    learner = learn.ReinforceMasks(masked, Mask(samples=4, **spec), 1, 0)
    bank, start = masked.banks[0], masked.banks[0].logits.clone()
    base = learner._base(task, batch, 0)
    wanted, tracker = torch.zeros_like(start), torch.zeros(10)
    bins = diffusion.bin_of(batch.t, 1000)
    for sample in range(4):
        (mask,), _ = learner._draw(0, sample)
        masked.wear([mask])
        with torch.no_grad():
            residual = task.losses(masked.unet, batch) - base
        advantage = (residual - tracker[bins]).mean()
        for b in bins.unique():
            tracker[b] = residual[bins == b].mean()
        wanted += advantage * masks.score(start, mask.float()) / 4
    learner.prepare(0, False)
    learner.step(task, batch, 0, False)
    assert torch.allclose(start - bank.logits, wanted, atol=1e-6)


# --- cost ----------------------------------------------------------------------------------------
class Counted(TorchDispatchMode):
    """Counts tensor operations, those of a UNet's own forward and backward set aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(task, method: str, layers: int, train: bool) -> int:
    """Dispatched operations of a mask step beyond those of the same passes through the bare UNet."""
    masked = masked_unet(layers_per_block=layers)
    learner = learn.METHODS[method](masked, Mask(method=method, train_weights=True), 10, 0)
    learner.prepare(0, train)
    batch = task.batch("mask", 0)
    with Counted() as step:
        learner.step(task, batch, 0, train)
    with Counted() as passes:
        if method == "reinforce":
            with torch.no_grad():
                task.losses(masked.unet, batch)
            with torch.set_grad_enabled(train):
                losses = task.losses(masked.unet, batch)
            if train:
                losses.mean().backward()
        else:
            with torch.enable_grad():
                task.losses(masked.unet, batch).mean().backward()
    return step.count - passes.count


@pytest.mark.parametrize("train", [False, True], ids=["frozen", "training"])
@pytest.mark.parametrize("method", ["gumbel", "reinforce", "offset", "sr-ste"])
def test_the_operations_of_a_mask_step_do_not_grow_with_the_layers(task, method, train):
    """Dispatched ones: a foreach operation counts once, as it is asked for once."""
    few, many = operations(task, method, 1, train), operations(task, method, 3, train)
    assert few == many and few < 300, (few, many)


def test_state_between_steps_is_a_logit_and_an_adam_pair(task):
    """Floats per prunable weight that a checkpoint of frozen weights holds; masks are one byte each."""
    for method, floats in (("gumbel", 3), ("reinforce", 1)):
        masked = masked_unet()
        learner = train(masked, task, 2, method=method)
        state = learner.tensors()
        size = sum(v.numel() for v in state.values() if v.is_floating_point())
        weights = sum(bank.weights.numel() for bank in masked.banks)
        assert floats * weights <= size <= floats * weights + 64, method
        flags = sum(v.numel() for v in state.values() if v.dtype == torch.bool)
        assert flags <= 2 * weights


def test_reinforce_keeps_no_activations(task):
    kept = []
    masked = masked_unet()
    learner = learn.ReinforceMasks(masked, Mask(method="reinforce"), 5, 0)
    learner.prepare(0, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        learner.step(task, task.batch("mask", 0), 0, False)
    assert not kept


# --- resume --------------------------------------------------------------------------------------
RESUMED = [
    {"method": "magnitude"},
    {"method": "sr-ste"},
    {"method": "offset", "masks_until": 0.34},
    {"method": "gumbel", "schedule": "cosine", "warmup": 0.3},
    {"method": "gumbel", "temperature": "adaptive", "masks_from": 0.2, "weights_until": 0.6},
    {"method": "gumbel", "masks_from": 0.2, "masks_until": 0.34},
    {"method": "gumbel", "masks_until": 0.34, "weights_from": 0.34, "then": "sr-ste"},
    {"method": "gumbel", "masks_until": 0.34, "weights_until": 0.6, "then": "sr-ste"},
    {"method": "reinforce"},
    {"method": "reinforce", "samples": 2, "antithetic": True},
    {"method": "reinforce", "cached_batches": 2, "train_weights": False, "masks_until": 0.6},
]


@pytest.mark.in_turn(4)
@pytest.mark.parametrize("spec", RESUMED, ids=lambda spec: "-".join(map(str, spec.values())))
def test_a_trainer_round_trips_at_any_step(task, spec):
    def fresh():
        masked = masked_unet([("mid_block.*", "1:4")])
        mask = Mask(**{"train_weights": True} | spec)
        window = Window.of(9, mask.weights_from, mask.weights_until)
        weights = Weights(masked.trainable(), Train(lr=1e-3, ema=0.9), window) if mask.train_weights else None
        timesteps = None if mask.cached_batches else Timesteps("importance", 1000)
        ours = dataclasses.replace(task, timesteps=timesteps, cycle=mask.cached_batches)
        return Trainer("mask", 9, ours, learn.METHODS[mask.method](masked, mask, 9, 0), weights)

    whole = fresh()
    for _ in whole:
        pass
    whole.learner.finish()
    for stop in (1, 2, 3, 4, 5, 8, 9):
        first, second = fresh(), fresh()
        for record in first:
            if record.step == stop:
                break
        second.load({k: v.detach().clone() for k, v in first.tensors().items()}, first.done)
        for _ in second:
            pass
        second.learner.finish()
        a, b = whole.tensors(), second.tensors()
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a), stop
        unets = (whole.learner.masked.unet, second.learner.masked.unet)
        assert all(torch.equal(p, q) for p, q in zip(*(u.parameters() for u in unets)))


def test_confidence_of_the_start_gives_the_flip_budget(task):
    masked = masked_unet()
    learn.GumbelMasks(masked, Mask(flip_budget=0.2), 10, 0)
    bank = masked.banks[0]
    drawn = masks.sample_masks(bank.logits.detach(), 2, torch.Generator().manual_seed(0)).bool()
    share, count = pattern.flips(drawn, bank.initial), len(drawn)
    assert abs(share - 0.2) < 5 * math.sqrt(0.16 / count)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spec", RESUMED, ids=lambda spec: "-".join(map(str, spec.values())))
def test_every_method_works_on_a_gpu_and_draws_what_the_cpu_draws(task, spec):
    chosen = []
    for device in ("cpu", "cuda"):
        mask = Mask(**{"train_weights": True} | spec)
        ours = dataclasses.replace(task, device=torch.device(device), cycle=mask.cached_batches)
        masked = MaskedUNet(make_unet().requires_grad_(False).to(device), 2, 4)
        learner = learn.METHODS[mask.method](masked, mask, 4, 0)
        for _ in Trainer("mask", 4, ours, learner, None):
            pass
        learner.finish()
        chosen.append([bank.mask.cpu() for bank in masked.banks])
    assert all(pattern.flips(a, b) < 0.02 for a, b in zip(*chosen))
