"""One update path: learning rate, EMA, clipping, mixed precision, and a loss that is no longer a number."""

import copy
import math

import pytest
import torch
from forks import run
from helpers import AE, LATENT, assert_same, call, newest_state, only_run
from torch import nn

from common.ckpt import run_checkpoints
from common.error_codes import NO_DEVICE, NON_FINITE_LOSS, Exit
from common.learner import Learner, ema_decay, learning_rate
from common.modules import module_of
from common.rng import generator

CPU = torch.device("cpu")


def make_learner(device=CPU, lr=1e-2, **options) -> Learner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    return Learner(net, device, lr_at=lambda _step: lr, **options)


def loss_of(learner: Learner, step: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(16, 4, generator=generator(0, step)).to(learner.device)
    with learner.autocast():
        return scale * ((learner.net(x).squeeze(1) - x.sum(1)) ** 2).mean()


def learn(learner: Learner, step: int, scale: float = 1.0) -> torch.Tensor:
    loss = learner.gradient(lambda _shard, _rows: loss_of(learner, step, scale), 16)
    learner.lr = learner.step(step)
    return loss


def train(learner: Learner, steps: range, scale: float = 1.0) -> list[float]:
    losses = []
    for step in steps:
        losses.append(learn(learner, step, scale).item())
    return losses


# --- learning rate ---


def test_learning_rate_curves():
    total, base = 300, 1e-3
    assert [learning_rate(s, total, base, "none") for s in (0, 150, 300)] == [base] * 3
    cosine = [learning_rate(s, total, base, "cosine") for s in range(total + 1)]
    assert cosine == pytest.approx([base * (1 + math.cos(math.pi * s / total)) / 2 for s in range(total + 1)])
    assert cosine[0] == base
    assert cosine[-1] == pytest.approx(0, abs=1e-12)
    step = [learning_rate(s, total, base, "step") for s in (0, 99, 100, 199, 200, 299, 300)]
    assert step == pytest.approx([base, base, base / 10, base / 10, base / 100, base / 100, base / 100])


def test_learning_rate_warms_up_from_the_first_step_on():
    rates = [learning_rate(s, 1000, 1.0, "none", warmup=10) for s in range(20)]
    assert 0 < rates[0] < 0.2
    assert rates == sorted(rates)
    assert rates[10:] == [1.0] * 10


def test_every_step_uses_its_learning_rate():
    learner = make_learner()
    learner.lr_at = lambda step: 10.0 ** -(step + 2)
    before = copy.deepcopy(learner.net.state_dict())
    learn(learner, 3)
    assert learner.lr == 1e-5
    moved = max((v - before[k]).abs().max().item() for k, v in learner.net.state_dict().items())
    assert 0 < moved < 2e-5  # Adam's first step is about the learning rate


# --- EMA ---


def test_ema_warms_up():
    decays = [ema_decay(updates, 0.999) for updates in range(1, 20_000)]
    assert decays == sorted(decays)
    assert decays[0] < 0.2
    assert decays[-1] == 0.999


def test_ema_against_float64():
    learner = make_learner(ema=0.9)
    wanted = None
    for step in range(150):
        learn(learner, step)
        weights = {name: value.double() for name, value in learner.net.state_dict().items()}
        if wanted is None:
            wanted = weights  # the first update forgets the random start entirely
        else:
            decay = ema_decay(step, 0.9)
            wanted = {name: decay * wanted[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in learner.averaged_net.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, learner.net.state_dict()[name])


def test_without_ema_the_averaged_net_is_the_net():
    learner = make_learner()
    assert learner.averaged_net is learner.net
    assert learner.state_dict()["ema"] is None


# --- clipping ---


def gradient_norm(learner: Learner) -> float:
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in learner.net.parameters()))


@pytest.mark.parametrize("amp", [False, True])
def test_gradients_are_clipped_to_the_norm(amp):
    learner = make_learner(grad_clip=0.5, amp=amp)
    train(learner, range(1), scale=1000.0)
    assert gradient_norm(learner) == pytest.approx(0.5, rel=1e-3)  # of the true gradients, not of scaled ones
    train(learner, range(1), scale=1e-4)
    assert gradient_norm(learner) < 0.01


def test_zero_means_no_clipping():
    learner = make_learner(grad_clip=0)
    train(learner, range(1), scale=1000.0)
    assert gradient_norm(learner) > 10


# --- state, mixed precision ---


@pytest.mark.parametrize("amp", [False, True])
def test_training_continues_bit_for_bit_from_the_state(amp):
    options = {"ema": 0.99, "grad_clip": 1.0, "amp": amp}
    whole, first, second = (make_learner(**options) for _ in range(3))
    losses = train(whole, range(40))
    train(first, range(17))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(second, range(17, 40)) == losses[17:]
    assert_same(whole.state_dict(), second.state_dict())


def test_amp_on_the_cpu_computes_in_bfloat16_and_learns():
    learner = make_learner(amp=True, grad_clip=1.0, ema=0.99)
    with learner.autocast():
        assert learner.net(torch.ones(2, 4)).dtype == torch.bfloat16
    assert learner.scaler.is_enabled()
    losses = train(learner, range(400))
    assert losses[-1] < 0.2 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in learner.net.parameters())


def test_amp_skips_a_step_whose_gradients_overflow():
    learner = make_learner(amp=True, grad_clip=1.0)
    before, scale = copy.deepcopy(learner.net.state_dict()), learner.scaler.get_scale()
    learn(learner, 0, float("inf"))
    assert_same(learner.net.state_dict(), before)
    assert learner.scaler.get_scale() < scale
    assert_same(learner.scaler.state_dict()["scale"], learner.state_dict()["scaler"]["scale"])


def test_amp_off_is_the_plain_path():
    learner = make_learner(amp=False)
    with learner.autocast():
        assert learner.net(torch.ones(2, 4)).dtype == torch.float32
    assert not learner.scaler.is_enabled()


def test_a_checkpoint_without_amp_continues_with_amp():
    plain, mixed = make_learner(ema=0.99), make_learner(ema=0.99, amp=True)
    train(plain, range(5))
    mixed.load_state_dict(plain.state_dict())
    assert_same(mixed.state_dict()["model"], plain.state_dict()["model"])
    train(mixed, range(5, 10))


def test_weights_of_another_shape_do_not_load():
    other = Learner(nn.Linear(4, 1), CPU, lr_at=lambda _: 1e-3)
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        make_learner().load_state_dict(other.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_amp_on_cuda():
    learner = make_learner(torch.device("cuda"), amp=True, grad_clip=1.0, ema=0.99)
    with learner.autocast():
        assert learner.net(torch.ones(2, 4, device="cuda")).dtype == torch.float16
    losses = train(learner, range(400))
    assert losses[-1] < 0.2 * losses[0]
    other = make_learner(torch.device("cuda"), amp=True, grad_clip=1.0, ema=0.99)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert train(learner, range(400, 410)) == train(other, range(400, 410))


def test_amp_is_asked_for_where_there_is_cuda(tiny, tmp_path, monkeypatch):
    """It is enough to see how the learner is set up."""
    asked = []

    def set_up(_net, where, **options):
        asked.append((where.type, options["amp"]))
        raise Exit(NO_DEVICE, "enough")

    monkeypatch.setattr("common.session.Learner", set_up)
    monkeypatch.setattr("common.session.Session.data_device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for kind, flags in (("cuda", ("--amp",)), ("cuda", ()), ("cpu", ("--amp",))):
        call(AE, "train.py", "--model", "mlp", "--outdir", tmp_path, *tiny, "--device", kind, *flags)
    assert asked == [("cuda", True), ("cuda", False), ("cpu", False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_amp_through_the_script_on_cuda(tiny_latent, tmp_path):
    result = run(LATENT, "train.py", "--epochs", 2, "--amp", "--outdir", tmp_path, *tiny_latent, "--device", "cuda")
    assert result.code == 0, result.text
    assert newest_state(only_run(tmp_path))["scaler"]["scale"] > 0


def test_amp_on_the_cpu_warns_and_trains(latent_run):
    """The fixture's run was started with --amp."""
    log = (latent_run.parent.parent / "logs" / f"{latent_run.name}.log").read_text()
    assert "--amp needs CUDA" in log
    assert newest_state(latent_run)["scaler"] == {}


# --- a loss that is not finite ---


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(copy_of, ae_run, cache):
    run_folder = copy_of(ae_run)
    good = (run_folder / "checkpoint_epoch_000002.pt").read_bytes()
    flags = ("--cache-dir", cache, "--epochs", 6, "--lr", 1e20, "--grad-clip", 0, "--lr-scheduler", "none")
    result = run(AE, "train.py", "--resume", run_folder, *flags)
    assert (result.code, len(result.errors)) == (NON_FINITE_LOSS, 1), result.text
    assert "smaller --lr" in result.errors[0] or "not saved" in result.errors[0]
    assert [epoch for epoch, _ in run_checkpoints(run_folder)] == [2, 1]
    assert (run_folder / "checkpoint_epoch_000002.pt").read_bytes() == good
    resumed = call(AE, "train.py", "--resume", run_folder, "--cache-dir", cache, "--epochs", 3)
    assert resumed.code == 0, resumed.text
    assert newest_state(run_folder)["epoch"] == 3


def test_a_nan_before_anything_was_saved_names_no_checkpoint_and_leaves_no_folder(tiny, tmp_path):
    flags = ("--model", "mlp", *tiny, "--lr", 1e20, "--grad-clip", 0, "--lr-scheduler", "none")
    result = run(AE, "train.py", *flags, "--outdir", tmp_path)
    assert (result.code, len(result.errors)) == (NON_FINITE_LOSS, 1), result.text
    assert "Start again with a smaller --lr" in result.errors[0]
    assert not [path for path in tmp_path.rglob("*") if "ae-mlp" in path.name]


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    """The loss was still finite, but its gradient was not, and a save is due before the next loss is known."""

    def poison(self, number):
        next(iter(self.net.parameters())).data[0] = float("nan")
        return 0.0

    monkeypatch.setattr(Learner, "step", poison)
    flags = ("--model", "mlp", "--epochs", 2, "--ckpt-every-sec", 1e-6, "--outdir", tmp_path)
    result = call(AE, "train.py", *flags, *tiny)
    assert (result.code, len(result.errors)) == (NON_FINITE_LOSS, 1), result.text
    assert not list(tmp_path.rglob("*.pt"))


def test_moments_that_were_saved_in_another_layout_stay_those_of_their_weights():
    """A fused optimizer goes through weights and moments as they lie in memory."""

    def trained(learner, steps):
        for number in steps:
            learner.gradient(lambda _shard, rows: (learner.net(x, t, t % 10)[rows] - 1).square().mean(), 4)
            learner.step(number)

    def made():
        torch.manual_seed(0)
        return Learner(module_of("ddpm").Denoiser(8), torch.device("cpu"), lr_at=lambda _: 1e-2)

    x, t = torch.rand(4, 1, 28, 28), torch.arange(4) * 200
    one, other = made(), made()
    trained(one, range(2))
    state = copy.deepcopy(one.state_dict())
    for moments in state["optimizer"]["state"].values():
        moments |= {name: moment.contiguous() for name, moment in moments.items()}
    other.load_state_dict(state)
    for learner in (one, other):
        trained(learner, range(2, 4))
    assert_same(other.net.state_dict(), one.net.state_dict())
