"""Other devices than the CPU: what a stand-in for them can show anywhere (see fake_device.py), and CUDA itself."""

import json
import signal
from itertools import pairwise
from unittest import mock

import pytest
import torch
from fake_device import FakeDevice
from helpers import (
    AE,
    LATENT,
    PIXEL,
    SMALL,
    assert_same,
    assert_same_training,
    call,
    newest_state,
    only_run,
    run,
)
from torch import nn
from torch.nn import functional as F

from common import drawing, evaluate, session
from common.device import get_device, move, seed_everything
from common.diffusion import precompute_schedules, timestep_distribution
from common.error_codes import NON_FINITE_LOSS, OUT_OF_MEMORY, STOPPED_EARLY, run_main
from common.learner import Learner
from common.sampling import reverse_steps
from common.session import LOOK_EVERY, Session

RECIPES = {
    "ae-mlp": (AE, "--model", "mlp"),
    "ae-conv": (AE, "--model", "conv"),
    "latent": (LATENT, "--T", 20, "--hidden-dim", 16, "--samples-per-epoch", 4),
    "pixel": (PIXEL, *SMALL, "--T", 20, "--samples-per-epoch", 4),
}
KINDS = ("mps", "cuda")
STEPS = 13  # an epoch: 405 threes in batches of 32
LOOKS = 10  # steps between looks at the loss, instead of LOOK_EVERY, in the runs that `trained` makes
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
stands_in = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a real device, not to be faked"
)


@pytest.fixture(scope="module")
def train(tiny, ae_run):
    """train(recipe, device, outdir, *flags): a run of the script, in this process."""

    def train(recipe, device, outdir, *flags):
        folder, *own = RECIPES[recipe]
        own += ["--ae-ckpt", ae_run] if recipe == "latent" else []
        return call(folder, "train.py", *own, *tiny, "--batch-size", 32, "--device", device, "--outdir", outdir, *flags)

    return train


class Watched:
    """A finished run, what it copied at all, and what in each of its steps and between them."""

    def __init__(self, kind):
        self.device, self.steps, self.folder = FakeDevice(kind), [], None

    def step(self, session, *what):
        first = len(self.device.transfers)
        self.original(session, *what)
        self.steps.append((session.at.global_step - 1, first, len(self.device.transfers)))

    def run(self, train, *what):
        self.original = Session.step
        with self.device, mock.patch.object(Session, "step", lambda *args: self.step(*args)):
            result = train(*what)
        assert result.code == 0, result.text
        return self


@pytest.fixture(scope="module")
def trained(train, judged, tmp_path_factory):
    """trained(recipe, kind) -> a Watched run of two epochs with pictures and scores, made once.

    The classifier is trained beforehand, on the CPU, because the stand-in would slow it down.
    """
    done = {}

    def get(recipe, kind):
        if (recipe, kind) not in done:
            outdir = tmp_path_factory.mktemp(f"{recipe}-{kind}")
            flags = ("--epochs", 2, "--generate-images", "--eval-every", 2, *(["--amp"] if kind == "cuda" else []))
            with mock.patch.object(drawing, "EVAL_IMAGES", 20), mock.patch.object(session, "LOOK_EVERY", LOOKS):
                done[recipe, kind] = Watched(kind).run(train, recipe, kind, outdir, *flags)
            done[recipe, kind].folder = only_run(outdir)
        return done[recipe, kind]

    return get


# --- the stand-in itself ---


@stands_in
def test_the_stand_in_has_no_float64_on_mps():
    with FakeDevice("mps"):
        x = torch.ones(3).to("mps")
        for attempt in (
            x.double,
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.ones(2, dtype=torch.float64).to("mps"),
            lambda: torch.tensor([1.0], dtype=torch.float64, device=x.device),
        ):
            with pytest.raises(TypeError, match="float64"):
                attempt()
        assert x.cpu().double().dtype == torch.float64
    with FakeDevice("cuda"):
        assert torch.ones(2).to("cuda").double().dtype == torch.float64


@stands_in
@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_in_keeps_devices_apart(kind):
    with FakeDevice(kind) as fake:
        x = torch.ones(3, 2, device=kind)
        assert (x.device, (2 * x + torch.tensor(1.0)).device) == (fake.device, fake.device)
        for attempt in (
            lambda: x + torch.ones(2),
            lambda: torch.ones(2).add_(x[0]),
            lambda: torch.tensor(1.0).add_(x[0, 0]),
            lambda: F.linear(x, torch.ones(4, 2)),
            lambda: torch.ones(3)[torch.tensor([0]).to(kind)],
            lambda: torch.randn(3, device=kind, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="device"):
                attempt()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


@stands_in
@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_in_counts_what_the_host_waits_for(kind):
    with FakeDevice(kind) as fake:
        x = torch.ones(4, device=kind)
        x.mul_(2).clamp(max=1)
        assert fake.transfers == []
        waits = (x.sum().item, lambda: bool(x.sum() > 1), x.tolist, x.cpu, lambda: x[x > 1], x.nonzero)
        for number, wait in enumerate((*waits, lambda: torch.equal(x, x), lambda: torch.zeros(4).copy_(x)), start=1):
            wait()
            assert len(fake.counted("to host")) == number, fake.counted()
        before = len(fake.transfers)
        x.copy_(torch.zeros(4))
        x[torch.tensor([1])]
        move(torch.zeros(4), fake.device)
        kinds = [transfer.kind for transfer in fake.transfers[before:]]
        assert kinds == ["to device", "to device", "to device" if kind == "mps" else "to device, pinned"]
        assert "test_devices.py" in fake.transfers[0].line
    assert not torch.backends.mps.is_available()
    assert not torch.cuda.is_available()


# --- everything a user starts, once through it ---


@stands_in
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_validates_previews_and_scores(recipe, kind, trained):
    run = trained(recipe, kind)
    state = newest_state(run.folder)
    assert state["epoch"] == 2
    assert state["scores"]["fid"] > 0
    assert len(list((run.folder.parent.parent / "samples" / run.folder.name).glob("epoch_*.png"))) == 2


@stands_in
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_makes_the_host_wait(recipe, kind, trained):
    """But for a look at the losses, now and then. CUDA copies noise and timesteps from pinned memory."""
    run = trained(recipe, kind)
    assert [step for step, _, _ in run.steps] == list(range(2 * STEPS))
    for step, first, last in run.steps:
        copies = run.device.counted()[first:last]
        # torch's own EMA copies its counter, a number, to where the weights lie
        copies = [copy for copy in copies if not (copy.startswith("to device:") and "of 1 at learner.py" in copy)]
        assert len([copy for copy in copies if copy.startswith("to host")]) == (step % LOOKS == 1), copies
        assert kind == "mps" or not [copy for copy in copies if copy.startswith("to device:")], copies
        assert len(copies) <= 4
    for (step, _, last), (_, first, _) in pairwise(run.steps):
        if step % STEPS != STEPS - 1:  # between epochs there is much to copy, between two batches nothing
            assert run.device.counted()[last:first] == []


@stands_in
@pytest.mark.parametrize(
    "recipe", [pytest.param(it, marks=() if it == "latent" else pytest.mark.slow) for it in RECIPES]
)
def test_the_way_over_cuda_changes_nothing_else(recipe, train, tmp_path):
    """The same arithmetic: the weights are the CPU's, bit for bit, and so is the mean loss."""
    flags = ("--epochs", 2)
    assert train(recipe, "cpu", tmp_path / "cpu", *flags).code == 0
    with FakeDevice("cuda"):
        assert train(recipe, "cuda", tmp_path / "cuda", *flags).code == 0
    assert_same_training(only_run(tmp_path / "cpu"), only_run(tmp_path / "cuda"))


@stands_in
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["latent", "pixel"])
def test_drawing(model, kind, trained, tmp_path):
    folder, checkpoint = RECIPES[model][0], trained(model, kind).folder
    for sampler in (
        ("--sampler", "ddpm"),
        ("--sampler", "ddim", "--steps", 7, "--guidance", 2),
        ("--sampler", "dpm-sde"),
    ):
        flags = ("--ckpt", checkpoint, "--digit", 3, "--num-images", 5, "--show-process", *sampler)
        pictures = {}
        for device in ("cpu", kind):
            output = tmp_path / f"{device}.png"
            with FakeDevice(kind):
                result = call(folder, "infer.py", *flags, "--output", output, "--device", device)
            assert result.code == 0, result.text
            pictures[device] = output.read_bytes()
        assert pictures["cpu"] == pictures[kind]


@stands_in
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["ae-mlp", "latent", "pixel"])
def test_scoring(model, kind, trained, cache, tmp_path, capsys):
    target = tmp_path / "scores.json"
    flags = ("--ckpt", trained(model, kind).folder, "--n", 200, "--json", target, "--device", kind)
    with FakeDevice(kind):
        argv = [str(flag) for flag in (*flags, "--cache-dir", cache, "--data", "embedded")]
        assert run_main(lambda: evaluate.main(argv)) == 0, capsys.readouterr()
    assert json.loads(target.read_text())["fid"] > 0


@stands_in
@pytest.mark.parametrize("kind", KINDS)
def test_tsne_and_reconstructions(kind, tmp_path, cache, train, ae_run, tiny):
    data = ("--cache-dir", cache, "--data", "embedded", "--device", kind)
    flags = ("--epochs", 1, "--only-digit", "all", "--batch-size", 450)
    assert train("ae-mlp", "cpu", tmp_path, *flags).code == 0
    of_all_digits = only_run(tmp_path)
    for script, *flags in (
        (
            "run_tsne.py",
            "--checkpoint",
            of_all_digits,
            "--output",
            tmp_path / "tsne",
            "--n-samples",
            60,
            "--perplexity",
            5,
        ),
        ("infer.py", "--ckpt", of_all_digits, "--output", tmp_path / "over.png"),
        ("infer.py", "--ckpt", of_all_digits, "--output", tmp_path / "walks.png", "--interpolate"),
    ):
        with FakeDevice(kind):
            result = call(AE, script, *flags, *data)
        assert result.code == 0, result.text


@stands_in
def test_the_schedules_do_not_need_float64_on_the_device():
    with FakeDevice("mps"):
        there, here = precompute_schedules(50, device="mps"), precompute_schedules(50)
        assert reverse_steps(there, 10) == reverse_steps(here, 10)
        assert torch.equal(timestep_distribution(there), timestep_distribution(here))


# --- a loss that is not finite, where nobody looks at each ---


def with_a_bad_loss(monkeypatch, number: int) -> None:
    """The loss of step `number` is infinite; its gradient, and so the weights, are as ever."""
    original = Session.step

    def step(self, loss_of, batch, draws_of):
        bad = float("inf") if self.at.global_step == number else 0.0
        original(self, lambda *what: loss_of(*what) + bad, batch, draws_of)

    monkeypatch.setattr(Session, "step", step)


@stands_in
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("often", [True, False])
def test_a_bad_loss_never_reaches_a_checkpoint(kind, often, train, tmp_path, monkeypatch):
    with_a_bad_loss(monkeypatch, 7)
    with FakeDevice(kind):
        result = train("ae-mlp", kind, tmp_path, "--epochs", 2, "--ckpt-every-sec", 1e-6 if often else 300)
    assert (result.code, len(result.errors)) == (NON_FINITE_LOSS, 1), result.text
    assert "the loss became inf in epoch 1, step 7" in result.errors[0]
    if often:
        state = newest_state(only_run(tmp_path))
        assert state["global_step"] == 7
        assert 0 < state["train_loss"] < 1
    else:
        assert not list(tmp_path.rglob("*.pt"))


@stands_in
def test_a_bad_loss_is_found_before_the_epoch_ends(train, tmp_path, monkeypatch):
    with_a_bad_loss(monkeypatch, 2)
    steps, learn = [], Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, number: steps.append(number) or learn(self, number))
    with FakeDevice("cuda"):
        result = train("ae-mlp", "cuda", tmp_path, "--batch-size", 2)
    assert result.code == NON_FINITE_LOSS, result.text
    assert steps[-1] == LOOK_EVERY + 1


def test_on_the_cpu_a_bad_loss_changes_no_weight(train, tmp_path, monkeypatch):
    with_a_bad_loss(monkeypatch, 7)
    steps = []
    monkeypatch.setattr(Learner, "step", lambda self, number: steps.append(number) or 0.0)
    result = train("ae-mlp", "cpu", tmp_path)
    assert (result.code, steps) == (NON_FINITE_LOSS, list(range(7))), result.text


# --- state that moves to another device ---


def learner_on(device, **options) -> Learner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    return Learner(net, torch.device(device), lr_at=lambda _: 1e-2, grad_clip=1.0, ema=0.99, **options)


def steps_of(learner, steps) -> None:
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(learner.device)
        learner.gradient(lambda _shard, rows, x=x: (learner.net(x[rows]).squeeze(1) - x.sum(1)).square().mean(), 16)
        learner.step(step)


def moved(state):
    """A state as a checkpoint hands it over: on the CPU."""
    if isinstance(state, dict):
        return {key: moved(value) for key, value in state.items()}
    return [moved(value) for value in state] if isinstance(state, list) else getattr(state, "cpu", lambda: state)()


@stands_in
@pytest.mark.parametrize(("source", "target"), [("mps", "cuda"), ("cuda", "mps"), ("mps", "cpu"), ("cpu", "mps")])
def test_the_optimizers_options_are_those_of_the_device(source, target):
    """Saved where the optimizer is not fused and resumed where it is, with mixed precision; and the other way round."""

    def on(device, amp=False):
        return learner_on(device, amp=amp and device == "cuda")

    def within(device):
        return FakeDevice(device if device != "cpu" else "mps")

    with within(source):
        learner = on(source)
        steps_of(learner, range(5))
        state = moved(learner.state_dict())
    with within(target):
        learner, fresh = on(target, amp=True), on(target, amp=True)
        learner.load_state_dict(state)
        for name in ("fused", "foreach", "capturable"):
            assert learner.optimizer.param_groups[0][name] == fresh.optimizer.param_groups[0][name]
        assert_same(moved(learner.state_dict())["optimizer"]["state"], state["optimizer"]["state"])
        assert learner.ema.n_averaged == 5
        steps_of(learner, range(5, 8))
        assert learner.is_finite()


# --- memory ---


def test_cuda_out_of_memory_is_one_line(train, tmp_path, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    monkeypatch.setattr(Learner, "step", too_much)
    result = train("ae-mlp", "cpu", tmp_path)
    assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
    assert "--batch-size" in result.errors[0]
    assert "Traceback" not in result.text


LITTLE_MEMORY = """
import re, resource, runpy, sys
sys.path.insert(0, "..")
from common import {module} as module
real = module.{name}
def limited(*args, **kwargs):
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + {room}, resource.RLIM_INFINITY))
    return real(*args, **kwargs)
module.{name} = limited
sys.argv[0] = "{script}"
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="needs Linux's address space limits")
def test_the_cpu_out_of_memory_is_one_line(cache, tmp_path, latent_run):
    """Real allocations that fail, in processes that may not grow."""
    driver = LITTLE_MEMORY.format(module="session", name="_rows", room=20 << 20, script="train.py")
    data = ("--data", "embedded", "--cache-dir", cache, "--device", "cpu")
    trained = run(AE, "-c", driver, "--model", "conv", "--batch-size", 4000, "--outdir", tmp_path, *data)
    drew = LITTLE_MEMORY.format(module="drawing", name="draw_with_progress", room=20 << 20, script="infer.py")
    drawn = run(LATENT, "-c", drew, "--ckpt", latent_run, "--num-images", 20000, "--output", tmp_path / "x.png")
    for result, flag in ((trained, "--batch-size than 4000"), (drawn, "--num-images 20000")):
        assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
        assert flag in result.errors[0]
        assert "Traceback" not in result.text


# --- CUDA ---


def test_cudnn_is_kept_to_kernels_that_repeat():
    seed_everything(1)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@needs_cuda
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_on_cuda_resumes_bit_for_bit(recipe, amp, train, tmp_path, monkeypatch):
    flags = ("--epochs", 3, *(["--amp"] if amp else []))
    assert train(recipe, "cuda", tmp_path / "whole", *flags).code == 0
    with monkeypatch.context() as patch:
        calls, original = [], Session.step

        def step(self, *what):
            original(self, *what)
            calls.append(what)
            if len(calls) == STEPS + 7:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Session, "step", step)
        stopped = train(recipe, "cuda", tmp_path / "stopped", *flags)
        assert stopped.code == STOPPED_EARLY, stopped.text
    assert train(recipe, "cuda", tmp_path / "stopped", *flags, "--auto-resume").code == 0
    assert_same_training(only_run(tmp_path / "whole"), only_run(tmp_path / "stopped"))


@needs_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_moves_between_the_cpu_and_cuda(recipe, train, tmp_path):
    assert train(recipe, "cpu", tmp_path, "--epochs", 1).code == 0
    for epochs, device, more in ((2, "cuda", ["--amp"]), (3, "cpu", ["--no-amp"])):
        result = train(recipe, device, tmp_path, "--epochs", epochs, "--resume", only_run(tmp_path), *more)
        assert result.code == 0, result.text


@pytest.mark.parametrize("name", [None, "none", "None"])
def test_no_name_is_the_best_there_is(name):
    assert get_device(name).type == get_device().type
