"""Several processes train one run: the same bits whatever their number, and nobody is left behind when one fails."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import start
from helpers import (
    AE,
    LATENT,
    PIXEL,
    SMALL,
    Result,
    assert_same_training,
    call,
    children,
    finish,
    metrics,
    newest_state,
    only_run,
)
from torch import nn

from common import ckpt, ranks
from common.device import get_device
from common.diffusion import ask
from common.error_codes import (
    NO_DEVICE,
    NO_MODEL_SPECIFIED,
    NON_FINITE_LOSS,
    RANK_FAILED,
    SAVE_FAILED,
    STOPPED_EARLY,
    USAGE,
    Exit,
)
from common.learner import Learner
from common.modules import module_of
from common.threads import available

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"
GONE = 60  # seconds


@pytest.fixture(scope="module")
def flags(tiny, ae_run):
    """flags(folder) -> flags of a small run in four shards.

    Of 405 threes the last batch of 67 leaves one shard empty; of 45 threes to validate on 22 make three batches.
    """
    common = (*tiny, "--epochs", 3, "--lr-scheduler", "cosine", "--shards", 4)
    shown = ("--samples-per-epoch", 4, "--generate-images")
    own = {
        AE: ("--model", "conv", "--latent-dim", 4, "--batch-size", 67),
        LATENT: ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, "--batch-size", 67),
        PIXEL: (*SMALL, "--fine-ch", 0, "--T", 20, "--batch-size", 22, *shown),
    }
    return lambda folder, *more: (*common, *own[folder], *more)


@pytest.fixture(scope="module")
def references(flags, tmp_path_factory):
    """references(folder) -> the run of a single process that nobody touched."""
    known = {}

    def reference(folder):
        if folder not in known:
            outdir = tmp_path_factory.mktemp("alone")
            result = call(folder, "train.py", *flags(folder, "--outdir", outdir))
            assert result.code == 0, result.text
            known[folder] = only_run(outdir)
        return known[folder]

    return reference


class Launched:
    """`size` processes of a trainer that find each other by torchrun's variables, and can be told apart."""

    def __init__(self, folder, size, *args, script="train.py", own=lambda _rank: (), **env):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", **env}
        self.processes = [
            start(
                folder,
                script,
                *args,
                *own(r),
                env={"RANK": str(r), "LOCAL_RANK": str(r), "MASTER_PORT": str(port), **common},
            )
            for r in range(size)
        ]

    def finish(self, timeout=120) -> list[Result]:
        """How each of them ended, and what it said; an older torch's gloo says that it is connected."""
        try:
            results = [finish(process, timeout) for process in self.processes]
            return [result._replace(text=re.sub(r"\[Gloo\] Rank.*\n", "", result.text)) for result in results]
        finally:
            for process in self.processes:
                process.kill()

    def wait_for(self, sign, patience=120.0):
        """Wait until sign() while all of them live."""
        deadline = time.monotonic() + patience
        while not sign():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.finish()
            time.sleep(0.01)


def saved(outdir) -> list[int]:
    """When each checkpoint in an output tree was written."""
    times = []
    for path in outdir.glob("checkpoints/*/checkpoint_*.pt"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return times


# --- who takes part ---


@pytest.mark.parametrize(
    ("env", "identity"),
    [
        ({}, (0, 1, 0, 1)),
        (
            {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1},
            (3, 4, 1, 2),
        ),
        ({"RANK": 3}, (0, 1, 0, 1)),  # some other program's
        (  # set by hand in a step, where Slurm knows the rest
            {"RANK": 3, "WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1, "SLURM_PROCID": 3, "SLURM_LOCALID": 1}
            | {"SLURM_NODEID": 1, "SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            (3, 4, 1, 2),
        ),
        # a batch script of two tasks, outside of any step
        ({"SLURM_JOB_ID": 7, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2}, (0, 1, 0, 1)),
        (
            {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_NODEID": 2, "SLURM_STEP_NUM_TASKS": 6}
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),3"},
            (5, 6, 1, 3),
        ),
        # nonsense
        ({"SLURM_STEP_NUM_TASKS": "abc", "SLURM_PROCID": 0, "SLURM_LOCALID": 0}, (0, 1, 0, 1)),
        ({"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 0}, (0, 1, 0, 1)),
        (
            {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 1, "SLURM_NODEID": "x"}
            | {"SLURM_STEP_TASKS_PER_NODE": "x"},
            (1, 2, 1, 1),
        ),
        ({"RANK": 0, "WORLD_SIZE": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}, (0, 1, 0, 1)),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": "abc", "MASTER_ADDR": "a", "MASTER_PORT": 1}, (1, 2, 0, 1)),
    ],
)
def test_a_process_knows_who_it_is(env, identity, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    assert tuple(ranks.identity()) == identity


def test_processes_share_the_cores_of_their_machine(monkeypatch):
    from common import threads

    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_limit", lambda _groups: 8)
    monkeypatch.setattr(threads, "identity", lambda: ranks.Identity(0, 4, 0, 4))
    assert threads.available.__wrapped__() == 2


@pytest.mark.parametrize(
    ("gpus", "slurm", "wanted"), [(4, False, "cuda:2"), (8, False, "cuda:2"), (1, True, "cuda:0"), (2, False, None)]
)
def test_each_process_gets_a_gpu_of_its_own(gpus, slurm, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if slurm:  # which shows a process its own one only
        monkeypatch.setenv("SLURM_PROCID", "6")
    me = ranks.Identity(6, 8, 2, 4)
    for name in (None, "cuda"):
        if wanted:
            assert str(get_device(name, me)) == wanted
        else:
            with pytest.raises(Exit, match="4 processes on a machine with 2 CUDA devices"):
                get_device(name, me)
    assert str(get_device("cpu:0", me)) == "cpu:0"
    with pytest.raises(Exit, match="--device cuda:0: several processes need a device each"):
        get_device("cuda:0", me)
    assert str(get_device("cuda:0", ranks.Identity(1, 2, 0, 1))) == "cuda:0"  # each on a machine of its own


@pytest.mark.parametrize("chips", [("a", "b"), ("a", "a")])
def test_two_processes_on_one_gpu_are_one_line(chips, monkeypatch):
    """Where Slurm shows each process one GPU, only the GPUs themselves tell whether it is the same."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=chips[0]))
    monkeypatch.setattr(ranks.World, "all", lambda _, mine: [mine, (mine[0], chips[1])])
    monkeypatch.setattr(torch.distributed, "new_group", lambda **how: how["backend"])
    world = ranks.World(ranks.Identity(0, 2, 0, 2))
    if len(set(chips)) == 2:
        world.meet_on(torch.device("cuda", 0))
        assert world._gradients == "nccl"
    else:
        with pytest.raises(Exit, match="2 processes have 1 CUDA device") as found:
            world.meet_on(torch.device("cuda", 0))
        assert (found.value.code, found.value.everywhere) == (NO_DEVICE, True)


def test_several_processes_do_not_train_on_mps(monkeypatch):
    """Its tensors cannot be sent."""
    monkeypatch.setattr(ranks, "identity", lambda: ranks.Identity(0, 2, 0, 2))
    with pytest.raises(Exit, match="cannot train on MPS") as found, ranks.joined({}, torch.device("mps")):
        pass
    assert found.value.code == NO_DEVICE


# --- the gradient of a batch in shards ---


@pytest.mark.parametrize("rows", [16, 11, 3])  # 3: two of the five shards are empty
def test_the_gradient_of_shards_is_that_of_the_batch(rows):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)), torch.randn(16, 4)
    learner = Learner(net, torch.device("cpu"), lr_at=lambda _: 1e-2, shards=5)
    edges, seen = [shard * rows // 5 for shard in range(6)], []

    def loss_of(shard, part):
        seen.append((shard, part.start, part.stop))
        return net(x[part]).square().mean()

    loss = learner.gradient(loss_of, rows)
    found = torch.cat([weight.grad.flatten() for weight in net.parameters()])
    wanted, parts = net(x[:rows]).square().mean(), []
    assert seen == [(s, edges[s], edges[s + 1]) for s in range(5) if edges[s] < edges[s + 1]]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    exact = torch.autograd.grad(wanted, net.parameters())
    assert torch.allclose(found, torch.cat([part.flatten() for part in exact]), atol=1e-6)
    for _, begin, end in seen:  # bit for bit: each by itself, added up in order
        share = net(x[begin:end]).square().mean() * ((end - begin) / rows)
        parts.append(torch.cat([part.flatten() for part in torch.autograd.grad(share, net.parameters())]))
    total = torch.zeros_like(found)
    for part in parts:
        total = total + part
    assert torch.equal(found, total)


@pytest.mark.parametrize("kind", ["ddpm", "lddpm", "ae-mlp", "ae-conv", "transposed", "float64"])
def test_shards_train_as_the_whole_batch_does(kind):
    """All layouts of weights in memory: the optimizer must not take one for another."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(6, 4)
            self.weight = nn.Parameter(whole.T if kind == "transposed" else whole.T.contiguous().double())

        def forward(self, x):
            return x.flatten(1)[:, :6] @ self.weight.float().T

    def made():
        torch.manual_seed(0)
        if kind in ("ddpm", "lddpm"):
            net = module_of(kind).Denoiser(8) if kind == "ddpm" else module_of(kind).LatentDenoiser(16, 16)
            return net, lambda rows: ask(net, x[rows], t[rows], t[rows] % 10)
        net = Odd() if kind in ("transposed", "float64") else module_of(kind).Autoencoder(4)
        return net, lambda rows: net(x[rows])

    x, t = torch.rand(12, *((16,) if kind == "lddpm" else (1, 28, 28))), torch.arange(12) * 80
    trained = []
    for shards in (1, 4):
        net, output = made()
        learner = Learner(net, torch.device("cpu"), lr_at=lambda _: 1e-2, shards=shards)
        for number in range(4):
            learner.gradient(lambda _shard, rows, output=output: (output(rows) - 1).square().mean(), 12)
            learner.step(number)
        trained.append((made()[0].state_dict(), net.state_dict()))
    (begun, one), (_, several) = trained
    for name, weight in one.items():
        moved = [(end[name] - begun[name]).flatten().double() for end in (one, several) if weight.is_floating_point()]
        if moved and moved[0].abs().max() > 1e-3:
            assert torch.cosine_similarity(*moved, dim=0) > 0.95, name


# --- the same bits whatever their number ---


@pytest.mark.parametrize(("folder", "size"), [(AE, 4), (PIXEL, 2)])
def test_any_number_of_processes_ends_with_the_same_bits(folder, size, flags, references, tmp_path):
    results = Launched(folder, size, *flags(folder, "--outdir", tmp_path)).finish()
    assert [result.code for result in results] == [0] * size, results
    assert_same_training(only_run(tmp_path), references(folder))
    assert [result.text for result in results[1:]] == [""] * (size - 1)  # only the first one talks
    assert sorted(path.name for path in (tmp_path / "samples").glob("*/epoch_*.png")) == (
        ["epoch_000001.png", "epoch_000002.png", "epoch_000003.png"] if folder == PIXEL else []
    )


WITH_DROPOUT = """
import sys
sys.path.insert(0, ".")
import torch, train
from common.error_codes import run_main
from common.modules import module_of
net = module_of("lddpm").LatentDenoiser
forward = net.forward
net.forward = lambda self, x, *rest: forward(self, torch.dropout(x, 0.5, self.training), *rest)
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


def test_layers_that_draw_draw_the_same_for_any_number_of_processes(flags, references, tmp_path):
    for size in (1, 2):
        given = flags(LATENT, "--outdir", tmp_path / str(size))
        results = Launched(LATENT, size, WITH_DROPOUT, *given, script="-c").finish()
        assert [result.code for result in results] == [0] * size, results
    assert_same_training(only_run(tmp_path / "1"), only_run(tmp_path / "2"))
    assert metrics(only_run(tmp_path / "1")) != metrics(references(LATENT))


@pytest.mark.slow
def test_soak_with_another_number_of_processes_at_each_start(flags, references, tmp_path, pytestconfig):
    """One of them, or all, get a SIGKILL at a random instant; the others are gone soon, and nothing is lost."""
    kills, seed = pytestconfig.getoption("--kills"), random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    epochs = 4 + 6 * kills
    often = ("--epochs", epochs, "--ckpt-every-sec", 0.02)
    assert call(LATENT, "train.py", *flags(LATENT, *often, "--outdir", tmp_path / "untouched")).code == 0
    given = flags(LATENT, *often, "--outdir", tmp_path / "killed", "--auto-resume")
    for done in range(kills):
        launched = Launched(LATENT, size := rng.choice([1, 2, 4]), *given)
        before = set(saved(tmp_path / "killed"))
        launched.wait_for(lambda before=before: set(saved(tmp_path / "killed")) - before)
        time.sleep(rng.uniform(0, 0.25))
        dead = rng.choice([[rng.randrange(size)], range(size)])
        for rank in dead:
            launched.processes[rank].kill()
        started = time.monotonic()
        codes = [result.code for result in launched.finish()]
        assert time.monotonic() - started < GONE
        wanted = [-signal.SIGKILL if rank in dead else RANK_FAILED for rank in range(size)]
        assert codes == wanted, f"after {done} kills, seed {seed}"
    results = Launched(LATENT, size := rng.choice([1, 2, 4]), *given).finish()
    assert [result.code for result in results] == [0] * size, f"seed {seed}: {results}"
    assert_same_training(only_run(tmp_path / "killed"), only_run(tmp_path / "untouched"))


def test_torchrun_starts_again_what_was_killed(flags, references, tmp_path):
    given = flags(LATENT, "--ckpt-every-sec", 0.02, "--outdir", tmp_path, "--auto-resume", "--epochs", 12)
    process = start(LATENT, f"{TORCHRUN} 2 --max-restarts 1 train.py", *given)
    try:
        deadline = time.monotonic() + 120
        while not saved(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = children(process.pid)
        os.kill(workers[-1], signal.SIGKILL)
    finally:
        result = finish(process)
    assert result.code == 0, result.text
    assert "resumed from" in result.text
    assert_same_training(only_run(tmp_path), one_process(flags(LATENT, "--epochs", 12), tmp_path / "alone"))


def one_process(flags, outdir):
    """The run that a process alone makes of a latent training."""
    assert call(LATENT, "train.py", *flags, "--outdir", outdir).code == 0
    return only_run(outdir)


# --- stops ---


LONG = ("--epochs", 100_000, "--ckpt-every-sec", 100_000)


@pytest.mark.parametrize(
    ("drawing", "number", "rank"),
    [
        (False, signal.SIGUSR1, 0),
        (True, signal.SIGTERM, 1),
        pytest.param(False, signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(True, signal.SIGUSR1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_of_them_stops_all_at_the_same_step(number, rank, drawing, flags, tmp_path):
    """drawing: most of the time the first one draws previews, while the other waits."""
    more = ("--generate-images", "--samples-per-epoch", 64, "--T", 500) if drawing else ()
    launched = Launched(LATENT, 2, *flags(LATENT, *LONG, *more, "--outdir", tmp_path))
    launched.wait_for(lambda: saved(tmp_path))
    time.sleep(0.3)
    launched.processes[rank].send_signal(number)
    results = launched.finish(timeout=20)
    assert [result.code for result in results] == [STOPPED_EARLY] * 2, results
    assert results[0].text.count(f"stopped by {number.name}") == 1
    assert "go on with: python train.py --resume" in results[0].text
    assert results[1].text == ""
    state = newest_state(only_run(tmp_path))
    assert f"in epoch {state['epoch']} after {state['batch']:,} batch" in results[0].text


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGKILL]
)
def test_a_signal_to_torchrun_saves_and_leaves_nobody(number, flags, tmp_path):
    process = start(LATENT, f"{TORCHRUN} 2 train.py", *flags(LATENT, *LONG, "--outdir", tmp_path))
    try:
        deadline = time.monotonic() + 120
        while not saved(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = children(process.pid)
        assert len(workers) == 2
        time.sleep(0.3)
        process.send_signal(number)
        deadline = time.monotonic() + GONE
        while any(os.path.exists(f"/proc/{worker}") for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        result = finish(process)
    folder = only_run(tmp_path)
    log = next((tmp_path / "logs").glob("*.log")).read_text()
    assert "and saved; go on with" in log, result.text
    state = newest_state(folder)
    assert f"in epoch {state['epoch']} after {state['batch']:,} batch" in log


# --- failures ---


def test_one_that_hangs_is_not_waited_for_for_ever(flags, tmp_path):
    given = flags(LATENT, *LONG, "--outdir", tmp_path)
    launched = Launched(LATENT, 2, *given, DDPM_RANK_PATIENCE="5")
    launched.wait_for(lambda: saved(tmp_path))
    launched.processes[0].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    result = finish(launched.processes[1])
    assert (result.code, len(result.errors)) == (RANK_FAILED, 1), result.text
    assert "process 1: another process of this run: one does not answer (5 s are waited)" in result.errors[0]
    assert time.monotonic() - started < 30
    launched.processes[0].kill()
    launched.finish()


def test_one_that_never_came_is_not_waited_for_for_ever(flags, tmp_path):
    launched = Launched(LATENT, 2, *flags(LATENT, "--outdir", tmp_path), DDPM_RANK_PATIENCE="3")
    launched.processes[1].kill()
    result = launched.finish()[0]
    assert (result.code, len(result.errors)) == (RANK_FAILED, 1), result.text
    assert "the 2 processes of this run do not find each other" in result.errors[0]
    assert not list(tmp_path.rglob("*lddpm*"))


NEVER_CONNECTED = """
import sys, time
sys.path.insert(0, ".")
import torch.distributed
import train
from common.error_codes import run_main
torch.distributed.init_process_group = lambda *_, **__: time.sleep(100)
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


def test_one_that_cannot_be_reached_is_not_waited_for_for_ever(flags, tmp_path):
    """gloo waits without end for another's connection that a firewall keeps away."""
    given = flags(LATENT, "--outdir", tmp_path)
    apart = {"DDPM_RANK_PATIENCE": "2", "LOCAL_WORLD_SIZE": "1"}
    results = Launched(LATENT, 2, NEVER_CONNECTED, *given, script="-c", **apart).finish()
    assert [(result.code, len(result.errors)) for result in results] == [(RANK_FAILED, 1)] * 2, results
    for word in ("do not find each other", "4 s are waited"):
        assert word in results[0].errors[0]
    assert results[1].errors[0].startswith("error: process 1: ")


def test_processes_that_found_each_other_are_not_ended(monkeypatch):
    ended = []
    monkeypatch.setattr(ranks, "patience", lambda: 0.05)
    monkeypatch.setattr(ranks.os, "_exit", ended.append)
    with ranks._found("they do not find each other"):
        pass
    time.sleep(0.3)
    assert ended == []


@pytest.mark.parametrize(("said", "used"), [("", "wire"), ("mine", "mine")])
def test_an_interface_that_somebody_named_is_taken(said, used, monkeypatch):
    for name, value in {**LAUNCHER, "RANK": "0", "LOCAL_WORLD_SIZE": "1", ranks.INTERFACE: said}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "interface_to_others", lambda *_: "wire")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None,)]))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    for name in ("compare_flags", "leave"):
        monkeypatch.setattr(ranks.World, name, lambda *_: None)
    with ranks.joined({}):
        assert os.environ[ranks.INTERFACE] == used


def test_a_full_disk_ends_all_of_them_with_the_same_code(flags, disk):
    outdir = disk("600k")
    results = Launched(AE, 2, *flags(AE, "--latent-dim", 64, "--outdir", outdir)).finish()
    assert [result.code for result in results] == [SAVE_FAILED] * 2, results
    assert len(results[0].errors) == 4  # three epochs' saves, and the end
    assert results[1].text == ""


AS_RANK_1 = """
import os, sys
sys.path.insert(0, ".")
import train
from common.error_codes import run_main
from common.learner import Learner
step = Learner.step
def other(self, number):
    rate = step(self, number)
    if os.environ["RANK"] == "1" and number == 3:
        next(iter(self.net.parameters())).data.view(-1)[0] += 1e-7
    return rate
Learner.step = other
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


def test_weights_that_went_apart_are_never_saved(flags, tmp_path):
    results = Launched(LATENT, 2, AS_RANK_1, *flags(LATENT, "--outdir", tmp_path), script="-c").finish()
    assert [result.code for result in results] == [RANK_FAILED] * 2, results
    assert len(results[0].errors) == 1
    assert "the weights of process 1 are not those of process 0 in epoch 1" in results[0].errors[0]
    assert not list(tmp_path.rglob("*.pt"))


QUICK_CLOCK = """
import os, sys, time, types
sys.path.insert(0, ".")
import train
from common import session
from common.error_codes import run_main
if os.environ["RANK"] == "0":
    session.time = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: 1e6 * time.monotonic()})
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


def test_all_save_when_the_first_ones_clock_says_so(flags, references, tmp_path):
    """Its clock runs a million times as fast: for it, it is time after every step, for the other never."""
    often = flags(LATENT, "--ckpt-every-sec", 100, "--outdir", tmp_path)
    results = Launched(LATENT, 2, QUICK_CLOCK, *often, script="-c", DDPM_RANK_PATIENCE="60").finish()
    assert [result.code for result in results] == [0, 0], results
    assert_same_training(only_run(tmp_path), references(LATENT))


def test_a_bad_loss_ends_all_of_them_with_one_line(flags, tmp_path):
    results = Launched(AE, 2, *flags(AE, "--lr", 1e20, "--grad-clip", 0, "--outdir", tmp_path)).finish()
    assert [result.code for result in results] == [NON_FINITE_LOSS] * 2, results
    assert [len(result.errors) for result in results] == [1, 0]
    assert not list(tmp_path.rglob("*ae-conv*"))


@pytest.mark.parametrize(
    ("size", "wrong", "says"),
    [
        (2, ("--shards", 3), "2 processes cannot share 3 shards equally"),
        (1, ("--batch-size", 3), "--batch-size 3 is less than a row for each of 4 shards"),
        (1, ("--shards", "many"), "'many' is not a whole number"),
    ],
)
def test_wrong_shards_are_one_line(size, wrong, says, flags, tmp_path):
    results = Launched(LATENT, size, *flags(LATENT, *wrong, "--outdir", tmp_path)).finish()
    assert [result.code for result in results] == [USAGE] * size, results
    assert [len(result.errors) for result in results] == [1, 0][:size]
    assert says in results[0].errors[0]
    assert not list(tmp_path.rglob("*lddpm*"))


def test_a_run_keeps_its_shards(ae_run, copy_of, cache):
    """One that was begun by a process alone, or before shards existed, has one."""
    run = copy_of(ae_run)
    again = ("--resume", run, "--epochs", 3, "--cache-dir", cache)
    state = newest_state(run)
    assert state["args"].pop("shards") == 1
    ckpt.save_checkpoint_and_link_latest(run, state)
    results = Launched(AE, 2, *again).finish()
    assert [result.code for result in results] == [USAGE] * 2
    assert "2 processes cannot share 1 shard equally: start a number that divides 1" in results[0].text
    assert call(AE, "train.py", *again).code == 0
    assert metrics(run)[-1]["epoch"] == 3


# --- drawing together ---


def test_processes_draw_together_what_one_draws(latent_run, tmp_path):
    """300 rows are two groups; the filmstrip and the arrays are the same too."""
    flags = ("--ckpt", latent_run, "--num-images", 300, "--guidance", 1.5, "--show-process", "--device", "cpu")
    for size in (1, 2):
        files = ("--output", tmp_path / str(size) / "a.png", "--save-npz", tmp_path / str(size) / "a.npz")
        results = Launched(LATENT, size, *flags, *files, script="infer.py").finish()
        assert [result.code for result in results] == [0] * size, results
        assert [bool(result.text) for result in results] == [True, False][:size]
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["a.npz", "a.png", "a_process.gif", "a_process.png"]
    for name in names:
        one, two = ((tmp_path / size / name).read_bytes() for size in "12")
        assert one == two, name


THEN_A_NEWER = """
import os, sys, time
sys.path.insert(0, ".")
import infer
from common import ckpt
from common.error_codes import run_main
read = ckpt.read_model
def then_a_newer(*what):
    while os.environ["RANK"] != "0" and not os.path.exists(os.environ["NOW"]):
        time.sleep(0.01)
    found = read(*what)
    if os.environ["RANK"] == "0" and os.path.exists(os.environ["LATER"]):
        os.rename(os.environ["LATER"], os.environ["NOW"])
    return found
ckpt.read_model = then_a_newer
sys.exit(run_main(lambda: infer.main(sys.argv[1:])))
"""


def test_all_draw_with_the_checkpoint_that_the_first_one_found(latent_run, copy_of, tmp_path):
    """A training goes on meanwhile: once the first has looked, its folder has a newer one."""
    run, later = copy_of(latent_run), tmp_path / "later.pt"
    newest = run / "checkpoint_epoch_000002.pt"
    newest.rename(later)
    flags = ("--num-images", 300, "--device", "cpu", "--output", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz")
    alone = call(LATENT, "infer.py", "--ckpt", run, *flags)
    assert alone.code == 0, alone.text
    with np.load(tmp_path / "a.npz") as one:
        wanted, settings = one["images"], json.loads(str(one["settings"]))
    assert settings["ckpt"] == str(run / "checkpoint_epoch_000001.pt")
    moved = {"LATER": str(later), "NOW": str(newest)}
    results = Launched(LATENT, 2, THEN_A_NEWER, "--ckpt", run, *flags, script="-c", **moved).finish()
    assert [result.code for result in results] == [0, 0], results
    assert newest.exists()
    with np.load(tmp_path / "a.npz") as two:
        assert np.array_equal(two["images"], wanted)


SLOW_TO_JUDGE = """
import os, sys, time
import torch
from common import classifier, evaluate
from common.error_codes import run_main
def slowly(_digits, *, progress, poll):
    for _ in range(60):
        time.sleep(0.1)
        poll()
    if os.environ["RANK"] == "0":
        os.rename(os.environ["LATER"], os.environ["NOW"])
    torch.manual_seed(0)
    return classifier.DigitClassifier().eval()
classifier.train_classifier = slowly
sys.exit(run_main(lambda: (evaluate.main(sys.argv[1:]), print("threads:", torch.get_num_threads()))))
"""


def test_all_wait_while_the_first_one_trains_the_classifier(latent_run, copy_of, cache, tmp_path):
    """Longer than they would wait for one that says nothing; and then all draw with what was newest before."""
    run, later = copy_of(latent_run), tmp_path / "later.pt"
    (run / "checkpoint_epoch_000002.pt").rename(later)
    moved = {"LATER": str(later), "NOW": str(run / "checkpoint_epoch_000002.pt")}
    own = shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("classifier-*"))
    flags = ("--n", 300, "--data", "embedded", "--cache-dir", own, "--device", "cpu", "--json")
    given = ("--ckpt", run, *flags, tmp_path / "two.json", "--threads", 2)
    env = {"DDPM_RANK_PATIENCE": "4", "SLURM_CPUS_PER_TASK": "2", **moved}
    results = Launched(".", 2, SLOW_TO_JUDGE, *given, script="-c", **env).finish()
    assert [result.code for result in results] == [0, 0], results
    threads = min(2, available())
    assert [result.text.splitlines()[-1] for result in results] == [f"threads: {threads}"] * 2
    same = ("--threads", threads)  # else some processors give other last bits
    given = ("--ckpt", run / "checkpoint_epoch_000001.pt", *flags, tmp_path / "one.json", *same)
    alone = call("common", "evaluate.py", *given)
    assert alone.code == 0, alone.text
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["fid"] == two["fid"]


def test_a_wrong_drawing_is_one_line(latent_run, tmp_path):
    flags = ("--ckpt", latent_run, "--steps", 21, "--device", "cpu", "--output", tmp_path / "a.png")
    results = Launched(LATENT, 2, *flags, script="infer.py").finish()
    assert [result.code for result in results] == [USAGE] * 2, results
    assert [len(result.errors) for result in results] == [1, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("judged")
def test_processes_score_together_as_one_does(latent_run, cache, tmp_path):
    flags = ("--ckpt", latent_run, "--n", 300, "--data", "embedded", "--cache-dir", cache, "--device", "cpu")
    flags += ("--guide", latent_run / "checkpoint_epoch_000001.pt", "--guide-scale", 50)
    scores = []
    for size in (1, 2):
        results = Launched(".", size, *flags, "--json", tmp_path / f"{size}.json", script="-m common.evaluate").finish()
        assert [result.code for result in results] == [0] * size, results
        assert [bool(result.text) for result in results] == [True, False][:size]
        scores.append(json.loads((tmp_path / f"{size}.json").read_text()))
        scores[-1]["details"].pop("images_per_second")
    assert scores[0] == scores[1]


@pytest.mark.usefixtures("judged")
def test_what_the_first_one_alone_finds_wrong_ends_all_alike(latent_run, cache, tmp_path):
    """Also where it is found by code that all run together elsewhere."""
    state = ckpt.read_checkpoint(latent_run / "checkpoint_epoch_000001.pt")
    ckpt.save_checkpoint(tmp_path / "guide.pt", state | {"args": state["args"] | {"network": "missing"}})
    flags = ("--ckpt", latent_run, "--guide", tmp_path / "guide.pt", "--data", "embedded", "--cache-dir", cache)
    results = Launched(".", 2, *flags, "--device", "cpu", script="-m common.evaluate").finish()
    assert [result.code for result in results] == [NO_MODEL_SPECIFIED] * 2, results
    assert [len(result.errors) for result in results] == [1, 0]


@pytest.mark.parametrize(
    ("size", "port", "said"), [(1, 29500, "ranks count from 0"), (2, 99999999, "MASTER_PORT is 99999999")]
)
def test_what_is_wrong_with_the_launchers_variables_is_one_line(size, port, said, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Exit, match=said) as caught, ranks.joined({}):
        pass
    assert caught.value.code == RANK_FAILED


LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: ""} for name in LAUNCHER),
        *({name: "two"} for name in LAUNCHER if name != "MASTER_ADDR"),
        {"WORLD_SIZE": "0", "RANK": "0"},
    ],
    ids=str,
)
def test_processes_that_are_not_told_all_do_not_train_alone_each(wrong, monkeypatch):
    for name, value in (LAUNCHER | wrong).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exit, match="the variables of a launcher, but not all") as caught, ranks.joined({}):
        pass
    assert caught.value.code == RANK_FAILED


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "1"},
        {"RANK": "3"},
        {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {
            "WORLD_SIZE": "8",
            "MASTER_ADDR": "a",
            "MASTER_PORT": "1",
            "SLURM_JOB_ID": "5",
        },  # a job's script, for its srun
    ],
    ids=str,
)
def test_a_process_that_is_told_of_no_others_is_alone(env, monkeypatch):
    for name in (*LAUNCHER, "SLURM_JOB_ID"):
        monkeypatch.setenv(name, env.get(name, ""))
    with ranks.joined({}) as world:
        assert world.size == 1


@pytest.mark.parametrize("said", ["0", "five", "-1", "1.5", "99999999999999"])
def test_a_patience_that_is_no_number_of_seconds_is_one_line(said, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DDPM_RANK_PATIENCE", said)
    with pytest.raises(Exit, match=f"DDPM_RANK_PATIENCE is '{said}'") as caught, ranks.joined({}):
        pass
    assert caught.value.code == USAGE
    monkeypatch.setenv("DDPM_RANK_PATIENCE", "")
    assert ranks.patience() == ranks.PATIENCE


def test_slurms_processes_meet_though_variables_are_missing_or_nonsense(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES"):
        monkeypatch.setenv(name, "")
    assert ranks._meeting_point() == ("127.0.0.1", 20_000)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    assert ranks._meeting_point() == ("127.0.0.1", 20_058)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "x")
    assert ranks._meeting_point() == ("127.0.0.1", 20_058)


@pytest.mark.parametrize("more", [{"MASTER_PORT": "29500"}, {"MASTER_PORT": "abc", "MASTER_ADDR": "127.0.0.1"}])
def test_half_a_meeting_point_in_the_environment_is_none(more, latent_run, tmp_path):
    """A cluster's profile that sets one of the variables."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "", **more}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2"}
    flags = ("--ckpt", latent_run, "--steps", 2, "--device", "cpu", "--output", tmp_path / "a.png")
    processes = [
        start(LATENT, "infer.py", *flags, env=step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    results = [finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert (tmp_path / "a.png").exists()


def test_a_scontrol_that_does_not_tell_is_one_line(monkeypatch):
    for name, value in {"NUM_NODES": "2", "NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Exit) as found:
        ranks._meeting_point()
    assert found.value.code == RANK_FAILED
    assert "scontrol show hostnames n[1-2]" in str(found.value)
    assert "MASTER_ADDR" in str(found.value)


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_a_sweep_packed_into_one_step_is_refused(script, flags, pixel_run, tmp_path):
    """Each would train, or draw, what the first was told to, and all but one result would be missing."""
    told = flags(PIXEL, "--outdir", tmp_path) if script == "train.py" else ("--ckpt", pixel_run, "--steps", 2)
    results = Launched(PIXEL, 2, *told, script=script, own=lambda rank: ("--seed", rank)).finish()
    assert [result.code for result in results] == [USAGE] * 2
    said = [line for result in results for line in result.text.splitlines() if "share one run" in line]
    assert len(said) == 1
    assert "process 1 has --seed 1, process 0 --seed 0, but" in said[0]
    assert not list(tmp_path.glob("checkpoints/*"))


def test_what_only_concerns_a_machine_may_differ(monkeypatch):
    """As cores do: of all other flags the processes tell each other."""
    world, told = ranks.World(ranks.Identity(0, 2)), []
    monkeypatch.setattr(world, "all", lambda flags: told.append(flags) or [flags])
    own = ("cache_dir", "debug", "device", "logdir", "num_workers", "threads")
    world.compare_flags({**dict.fromkeys(own, "here"), "seed": 42, "shards": 2})
    assert told == [{"seed": "42", "shards": "2"}]


def test_paths_of_a_machine_may_differ(flags, cache, tmp_path):
    """As $TMPDIR does between nodes; only the first process reads the digits."""
    places = {0: cache, 1: tmp_path / "empty"}
    results = Launched(
        LATENT, 2, *flags(LATENT, "--outdir", tmp_path / "out"), own=lambda rank: ("--cache-dir", places[rank])
    ).finish()
    assert [result.code for result in results] == [0, 0], results[0].text
