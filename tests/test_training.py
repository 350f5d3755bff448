"""The training loop against a textbook's, schedules and windows, timesteps, distillation."""

import dataclasses

import pytest
import torch
from apptest import open_page
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMScheduler

from prunedm import data, diagnostics, diffusion, learn, pipeline, store, training
from prunedm.diffusion import Timesteps
from prunedm.masked_unet import MaskedUNet
from prunedm.recipe import Train
from prunedm.stage_recipes import Mask
from prunedm.training import Window


@pytest.fixture
def task():
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return training.Task(DDPMScheduler(), data.Batches(images, 16, 0), 0, torch.device("cpu"), bf16=False)


def test_finetuning_is_adamw_with_clipping_and_a_cosine_rate(task):
    """Three steps against the plain loop of a textbook."""
    ours, plain = make_unet(), make_unet()
    weights = training.Weights(ours.parameters(), Train(lr=1e-3, ema=0.9), Window.of(3))
    trainer = training.Trainer("finetune", 3, task, training.DenseLoss(ours), weights)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step, record in enumerate(trainer):
        optimizer.param_groups[0]["lr"] = training.rate_at("cosine", 1e-3, 0.05, step, 3)
        optimizer.zero_grad()
        loss = diffusion.loss(lambda x, t: plain(x, t).sample, task.batch("finetune", step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert record.values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_average_follows_the_weights():
    unet = make_unet()
    weights = training.Weights(unet.parameters(), Train(lr=1e-3, ema=0.5), Window.of(10))
    start = [p.detach().clone() for p in unet.parameters()]
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.update(0)
    moved = [p.detach().clone() for p in unet.parameters()]
    weights.use_average()
    decay = weights.ema.cur_decay_value
    for s, m, p in zip(start, moved, unet.parameters()):
        assert torch.allclose(p, decay * s + (1 - decay) * m, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_warms_up_and_ends_at_zero(schedule):
    rates = [training.rate_at(schedule, 1.0, 0.05, step, 100) for step in range(101)]
    assert rates[0] < rates[4] == max(rates) == 1.0 and rates[100] == pytest.approx(0, abs=1e-12)
    assert {training.rate_at("constant", 0.3, 0.0, step, 100) for step in range(100)} == {0.3}


def test_windows_have_their_own_schedule():
    window = Window.of(100, 0.2, 0.7)
    assert [window.holds(s) for s in (19, 20, 69, 70)] == [False, True, True, False]
    assert window.rate("linear", 1.0, 0.0, 20) == 1.0 and window.rate("linear", 1.0, 0.0, 45) == pytest.approx(0.5)
    assert Window.of(0).last == 1, "a stage without steps still has a window"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_every_prediction_type_trains_towards_its_own_target(kind, scheduler):
    made = scheduler(prediction_type=kind)
    x0 = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = diffusion.noised(made, x0, torch.Generator().manual_seed(2), min_snr=5.0)
    noise = batch.x_t - made.alphas_cumprod[batch.t].sqrt().view(-1, 1, 1, 1) * x0
    noise = noise / (1 - made.alphas_cumprod[batch.t]).sqrt().view(-1, 1, 1, 1)
    wanted = {"epsilon": noise, "v_prediction": made.get_velocity(x0, noise, batch.t), "sample": x0}[kind]
    assert torch.allclose(batch.target, wanted, atol=1e-3)
    objective, error = diffusion.losses(lambda x, t: torch.zeros_like(x), batch)
    assert torch.allclose(objective, error * batch.weight)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_one_loss_on_x0(kind):
    """In every prediction type the weighted loss equals min(SNR, gamma) times the error of x0."""
    made, gamma = DDPMScheduler(prediction_type=kind), 5.0
    t = torch.tensor([1, 50, 400, 900])
    alphas = made.alphas_cumprod[t].double()
    snr = alphas / (1 - alphas)
    error_of_x0 = torch.tensor(0.01, dtype=torch.float64)
    own_error = {"epsilon": error_of_x0 * snr, "v_prediction": error_of_x0 * (snr + 1), "sample": error_of_x0}[kind]
    weighted = diffusion.min_snr_weight(made, t, gamma).double() * own_error
    assert torch.allclose(weighted, snr.clamp(max=gamma) * error_of_x0, rtol=1e-4)


def losses_of(t: torch.Tensor) -> torch.Tensor:
    return 0.01 + (t / 1000) ** 3


def test_importance_timesteps_are_unbiased_and_steadier():
    chosen = Timesteps("importance", 1000)
    gen = torch.Generator().manual_seed(0)
    for _ in range(60):
        t, _ = chosen.draw(64, gen)
        chosen.observe(t, losses_of(t))
    t, weight = chosen.draw(200_000, gen)
    weighted, plain = losses_of(t) * weight, losses_of(torch.randint(1000, (200_000,), generator=gen))
    error = weighted.std().item() / 200_000**0.5
    assert abs(weighted.mean().item() - losses_of(torch.arange(1000)).mean().item()) < 5 * error
    assert weighted.std() < 0.6 * plain.std()
    assert chosen.probabilities().sum().item() == pytest.approx(1.0)


def test_early_is_noisy_and_late_is_clean():
    gen = torch.Generator().manual_seed(0)
    means = {kind: Timesteps(kind, 1000).draw(20_000, gen)[0].float().mean().item() for kind in ("early", "late")}
    assert means["early"] == pytest.approx(667, abs=10) and means["late"] == pytest.approx(333, abs=10)
    with pytest.raises(ValueError, match="timesteps='odd' is not known"):
        Timesteps("odd", 10)


def test_distillation_adds_the_distance_to_the_teacher(task):
    teacher, student = make_unet(), make_unet()
    with torch.no_grad():
        student.conv_out.weight.mul_(1.5)
    with_teacher = dataclasses.replace(task, teacher=teacher, distill=0.7)
    batch = with_teacher.batch("mask", 0)
    with torch.no_grad():
        found = with_teacher.losses(student, batch)
        apart = (student(batch.x_t, batch.t).sample - teacher(batch.x_t, batch.t).sample).square().flatten(1).mean(1)
        plain = diffusion.per_image_loss(lambda x, t: student(x, t).sample, batch)
    assert torch.allclose(found, plain + 0.7 * apart, atol=1e-6) and apart.min() > 0


def test_a_cycle_of_batches_comes_round_again(task):
    cycled = dataclasses.replace(task, cycle=3)
    for step in range(3):
        a, b = cycled.batch("mask", step), cycled.batch("mask", step + 3)
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.t, b.t)
    assert not torch.equal(cycled.batch("mask", 0).x_t, cycled.batch("mask", 1).x_t)


def test_a_compiled_network_is_made_once_and_trains_the_same_weights(task, monkeypatch):
    """With a compiler that changes nothing: what is asked of torch.compile, and that its result does the work."""
    compiled = []

    class Compiled(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.calls = network, 0
            compiled.append(self)

        def forward(self, *given):
            self.calls += 1
            return self.network(*given)

    monkeypatch.setattr(torch, "compile", Compiled)
    unet, batch, found = make_unet(), task.batch("finetune", 0), []
    for task.compiled in (False, True, True):
        unet.zero_grad()
        task.backward(unet, batch)
        found.append([parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None])
    assert len(compiled) == 1 and compiled[0].calls == 2
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "gumbel"])
def test_compiled_training_steps_are_those_of_the_plain_network(task, method, monkeypatch):
    """Through dynamo and its own autograd, with a backend that generates no code: real graphs, and the same weights."""
    real, frames = torch.compile, []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend=backend, **options))
    found = []
    for task.compiled in (False, True):
        unet = make_unet()
        if method is None:
            learner = training.DenseLoss(unet)
            weights = training.Weights(unet.parameters(), Train(lr=1e-3), Window.of(3))
        else:
            masked = MaskedUNet(unet.requires_grad_(False), 2, 4)
            learner, weights = learn.METHODS[method](masked, Mask(method=method, lr=0.15), 3, 0), None
        trainer = training.Trainer("mask", 3, task, learner, weights)
        losses = [step.values["loss"] for step in trainer]
        found.append((losses, trainer.tensors()))
    (plain, expected), (compiled, state) = found
    assert frames, "nothing was compiled"
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert all(torch.allclose(state[name], tensor, atol=1e-5) for name, tensor in expected.items())


def test_plain_attention_is_the_same_attention():
    unet = make_unet()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    processors = [m.processor for m in unet.modules() if m.__class__.__name__ == "Attention"]
    with torch.no_grad(), training._plain_attention(unet):
        plain = unet(x, t).sample
    with torch.no_grad():
        assert torch.allclose(plain, unet(x, t).sample, atol=1e-5)
    assert [m.processor for m in unet.modules() if m.__class__.__name__ == "Attention"] == processors


def test_a_loss_or_gradient_that_is_no_number_stops_at_once(task, monkeypatch):
    unet = make_unet()
    weights = training.Weights(unet.parameters(), Train(), Window.of(3))
    monkeypatch.setattr(weights, "update", lambda step: {"lr": 0.0, "grad_norm": float("inf")})
    with pytest.raises(training.Diverged, match="gradient norm became inf at step 1 of finetune"):
        list(training.Trainer("finetune", 3, task, training.DenseLoss(unet), weights))


def test_a_loss_that_runs_away_raises_an_alert_with_the_rates_to_try(runs, micro, monkeypatch):
    """Once, and the Monitor offers to fill the Launch form with them; the run goes on."""
    monkeypatch.setattr(diagnostics, "SPAN", 2)
    monkeypatch.setattr(diagnostics, "RISEN", 0.5)  # any mean is above half of the lowest
    recipe = micro(mask={"method": "none"}, train={"lr": 3e-4})
    run = store.create(runs, recipe)
    seen = []
    assert pipeline.execute(run, on_step=seen.append, stop=lambda: seen and seen[-1].stage == "evaluate") == "stopped"
    (alert,) = (event for event in run.events() if event["kind"] == "alert")
    assert (alert["what"], alert["stage"], alert["step"]) == ("rising loss", "finetune", 2)
    assert alert["changes"] == {"train.lr": 1e-4} and alert["remedy"] == "stop the run and lower train.lr to 0.0001"
    app = open_page("monitor", run=run.id)
    assert "Try again with train.lr = 0.0001" in [button.label for button in app.button]
