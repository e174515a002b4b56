"""The pixel experiment: its network, its recipe, its drawing, and the job that a cluster runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import AE, LATENT, PIXEL, REPO, SMALL, call, newest_state, only_run, scalars
from PIL import Image

from common import ckpt
from common.diffusion import precompute_schedules
from common.error_codes import MODEL_MISMATCH, STOPPED_EARLY, USAGE
from common.modules import module_of
from common.rng import generator
from common.sampling import reverse_steps


@pytest.fixture(scope="module")
def flags(tiny):
    """Flags of a small pixel run."""
    return (*tiny, "--batch-size", 32, "--epochs", 2, *SMALL, "--T", 20, "--samples-per-epoch", 4)


@pytest.fixture(scope="module")
def pixel_run(flags, tmp_path_factory):
    """A whole run of the real script."""
    outdir = tmp_path_factory.mktemp("pixel")
    result = call(PIXEL, "train.py", *flags, "--generate-images", "--outdir", outdir)
    assert result.code == 0, result.text
    return only_run(outdir, "ddpm-d3-bs32-lr*-T20-seed42-*")


@pytest.fixture(scope="module", params=[0, 16])
def net(request):
    torch.manual_seed(0)
    net = module_of("ddpm").Denoiser(base_ch=8, schedules=precompute_schedules(50), dense_dim=request.param).eval()
    for weight in net.parameters():  # the output starts at zero, which would hide everything
        torch.nn.init.normal_(weight, std=0.05)
    return net


def test_a_checkpoint_from_before_three_flags_draws_and_resumes(flags, tiny, tmp_path):
    result = call(PIXEL, "train.py", *flags, "--epochs", 1, "--fine-ch", 0, "--dense-dim", 0, "--outdir", tmp_path)
    assert result.code == 0, result.text
    folder = only_run(tmp_path)
    path = ckpt.run_checkpoints(folder)[0][1]
    state = torch.load(path)
    assert not any(name.startswith(("look", "finish", "dense")) for name in state["model"])
    assert [state["args"].pop(name) for name in ("fine_ch", "dense_dim", "attention")] == [0, 0, True]
    torch.save(state, path)
    drawn = call(PIXEL, "infer.py", "--ckpt", folder, "--n", 2, "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.text
    result = call(PIXEL, "train.py", *tiny[:4], "--device", "cpu", "--epochs", 2, "--resume", folder)
    assert result.code == 0, result.text
    assert [newest_state(folder)["args"][name] for name in ("fine_ch", "dense_dim", "attention")] == [0, 0, True]
    for words in (("--fine-ch", 8), ("--dense-dim", 1), ("--seed", 0), ("--no-attention",)):
        refused = call(PIXEL, "train.py", "--resume", folder, *words)
        assert (refused.code, len(refused.errors)) == (MODEL_MISMATCH, 1), refused.text
        assert f"{' '.join(map(str, words))} contradicts the run" in refused.text


def test_without_attention_it_trains_resumes_and_draws(flags, tmp_path):
    own = ("--no-attention", "--fine-ch", 0, "--dense-dim", 8)
    for epochs in (1, 2):
        result = call(PIXEL, "train.py", *flags, *own, "--epochs", epochs, "--auto-resume", "--outdir", tmp_path)
        assert result.code == 0, result.text
        state = newest_state(only_run(tmp_path))
        assert not any(name.startswith("attention") for name in state["model"])
        assert state["args"]["attention"] is False
    drawn = call(PIXEL, "infer.py", "--ckpt", tmp_path / "checkpoints", "--n", 2, "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.text


def test_a_dense_layer_trains_resumes_and_draws(flags, tmp_path):
    for epochs in (1, 2):
        own = (*flags, "--dense-dim", 24, "--epochs", epochs, "--auto-resume", "--outdir", tmp_path)
        result = call(PIXEL, "train.py", *own)
        assert result.code == 0, result.text
        weights = newest_state(only_run(tmp_path))["model"]
        assert weights["dense.first.layer.weight"].shape == (24, 16 * 49)
    drawn = call(PIXEL, "infer.py", "--ckpt", tmp_path / "checkpoints", "--n", 2, "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.text


def test_a_dense_layer_is_what_its_equation_says():
    """x + widen(W2 SiLU((1 + gamma) LayerNorm(W1 few) + beta)), and the network has it behind its attention."""
    torch.manual_seed(0)
    net = module_of("ddpm").Denoiser(base_ch=8, schedules=precompute_schedules(50), dense_dim=16).eval()
    layer, x, cond = net.dense, noise(2, 24, 7, 7), noise(2, 256)
    seen = []
    with torch.no_grad():
        few = layer.narrow(x)
        gamma, beta = layer.film(cond).chunk(2, dim=1)
        h = layer.first(few.flatten(1)).double()
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = (1 + gamma) * h + beta
        h = layer.second((h / (1 + (-h).exp())).float())
        expected = x + layer.widen(h.view(few.shape))
        torch.testing.assert_close(layer(x, lambda it: it.film(cond)), expected, rtol=1e-5, atol=1e-5)
        net.attention.register_forward_hook(lambda *_: seen.append("attention"))
        layer.register_forward_hook(lambda *_: seen.append("dense"))
        net(noise(2, 1, 28, 28), torch.tensor([7, 7]), torch.tensor([3, 10]))
    assert seen == ["attention", "dense"]


def noise(*shape):
    return torch.randn(shape, generator=generator(0, "pixel test"))


def test_the_denoiser(net):
    x, t, labels = noise(4, 1, 28, 28), torch.tensor([7, 7, 7, 7]), torch.tensor([3, 10, 0, 9])
    with torch.no_grad():
        epsilon = net(x, t, labels)
        assert epsilon.shape == x.shape
        torch.testing.assert_close(net.predictor()(x, 7, labels), epsilon, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(net(x, t, labels.flip(0)), epsilon)
        assert not torch.allclose(net(x, t + 20, labels), epsilon)


def test_generate_images_is_ancestral_sampling_in_float64(net):
    """The recomputation draws the same noise and follows Ho et al. 2020, algorithm 2, with the posterior variance."""
    T, seed = 50, 5
    beta = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    z = [torch.randn(2, 1, 28, 28, generator=generator(seed, "sample", i)).double() for i in range(T + 1)]
    x, labels = z[0], torch.tensor([3, 8])
    with torch.no_grad():
        for done, t in enumerate(range(T - 1, -1, -1)):
            epsilon = net(x.float(), torch.full((2,), t), labels).double()
            x = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * epsilon) / (1 - beta[t]).sqrt()
            if t:
                x = x + (beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])).sqrt() * z[done + 1]
    images = module_of("ddpm").generate_images(net, precompute_schedules(T), labels=[3, 8], guidance=1.0, seed=seed)
    torch.testing.assert_close(images.double(), ((x + 1) / 2).clamp(0, 1), rtol=0, atol=1e-4)
    assert len(reverse_steps(precompute_schedules(T))) == T


def test_a_run_leaves_everything(pixel_run):
    state = newest_state(pixel_run)
    assert state["args"]["model"] == "ddpm"
    assert state["val_loss"] is not None
    assert {"loss/train", "loss/validation", "lr"} <= scalars(pixel_run).keys()
    samples = pixel_run.parent.parent / "samples" / pixel_run.name
    assert Image.open(samples / "epoch_000001.png").size == (62, 62)


def test_drawing(pixel_run, latent_run, tmp_path):
    first, second, third = (tmp_path / f"{name}.png" for name in "abc")
    assert call(PIXEL, "infer.py", "--checkpoint", pixel_run, "--n", 5, "--out", first).code == 0
    assert call(PIXEL, "infer.py", "--checkpoint", pixel_run, "--n", 5, "--out", second).code == 0
    assert call(PIXEL, "infer.py", "--checkpoint", pixel_run, "--n", 5, "--out", third, "--seed", 1).code == 0
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    assert Image.open(first).size == (92, 62)
    wrong = call(PIXEL, "infer.py", "--checkpoint", latent_run, "--out", first)
    assert wrong.code == MODEL_MISMATCH
    assert len(wrong.errors) == 1


@pytest.mark.usefixtures("judged")
def test_scoring(pixel_run, cache, tmp_path):
    scores = tmp_path / "scores.json"
    flags = ("--n", 200, "--digit", 3, "--json", scores, "--data", "embedded", "--cache-dir", cache)
    result = call("common", "evaluate.py", "--ckpt", pixel_run, *flags)
    assert result.code == 0, result.text
    written = json.loads(scores.read_text())
    assert {"fid_labelled", "precision_labelled", "agreement_labelled"} <= written.keys()
    assert written["details_labelled"]["settings"]["only_digit"] == 3


def test_a_run_keeps_its_schedule(flags, tmp_path):
    """And is another run than the same with a linear one, which those from before the flag existed are."""
    given = (*flags, "--epochs", 1, "--outdir", tmp_path, "--auto-resume")
    for schedule, runs in ((("--schedule", "cosine"), 1), ((), 2), (("--schedule", "cosine"), 2)):
        assert call(PIXEL, "train.py", *given, *schedule).code == 0
        assert len(list((tmp_path / "checkpoints").iterdir())) == runs
    states = {}
    for folder in (tmp_path / "checkpoints").iterdir():
        state = newest_state(folder)
        states[state["args"].pop("schedule")] = state
    for schedule, state in states.items():
        if schedule == "cosine":
            state["args"]["schedule"] = "cosine"
        draw, _ = module_of("ddpm").load_for_drawing((tmp_path / "a.pt", state))
        wanted = precompute_schedules(state["args"]["T"], schedule=schedule)
        assert torch.equal(draw.args[1].beta, wanted.beta)
        assert draw(count=2, steps=5).isfinite().all()


def test_betas_are_of_the_linear_schedule(flags):
    result = call(PIXEL, "train.py", *flags, "--schedule", "cosine", "--beta-end", 0.01)
    assert result.code == USAGE
    assert "--beta-end shapes the linear schedule, not --schedule cosine: drop it" in result.text


def test_wrong_widths(flags):
    assert call(PIXEL, "train.py", *flags, "--base-ch", 12).code == USAGE
    assert call(PIXEL, "train.py", *flags, "--fine-ch", 12).code == USAGE


SCONTROL = """#!/bin/bash
[ $1 = show ] || { echo REQUEUED $@; exit; }
case $SHOWN,$4 in
yes,*_*) echo "JobId=6 ArrayJobId=5 ArrayTaskId=6 JobName=other UserId=me NumTasks=2 " ;;
yes,*) echo "JobId=7 JobName=an NumTasks=9 UserId=me NumTasks=1 " ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def job(tiny, tmp_path):
    """job(scontrol=…, flags=…) -> job.sh in training, under a stand-in for Slurm."""
    jobs = []

    def begin(*flags: str, scontrol: bool = True, **env: str) -> subprocess.Popen:
        binaries = tmp_path / "bin"
        binaries.mkdir(exist_ok=True)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        if scontrol:
            (binaries / "scontrol").write_text(SCONTROL)
            (binaries / "scontrol").chmod(0o755)
        environment = {
            "HOME": str(tmp_path),
            "PATH": f"{binaries}:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "VIRTUAL_ENV": os.path.dirname(os.path.dirname(sys.executable)),
            "SCRATCH": str(tmp_path / "scratch"),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(REPO / PIXEL),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        command = ["bash", REPO / PIXEL / "job.sh", *map(str, (*tiny, *SMALL)), "--epochs=500", *flags]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs.append(subprocess.Popen(command, env=environment, cwd="/", **output))
        return jobs[-1]

    yield begin
    for started in jobs:
        started.kill()


def until_saved(job, scratch) -> None:
    """Wait until a job has saved something."""
    deadline = time.monotonic() + 120
    while not list(scratch.glob("ddpm-output/checkpoints/ddpm-d3-*/*.pt")):
        assert time.monotonic() < deadline, job.communicate(timeout=10)[0]
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize("scontrol", [True, False])
def test_the_job_saves_and_requeues(scontrol, job, tmp_path):
    """The time-limit signal goes to the batch shell alone. A job of two tasks and an array's submitted it."""
    inherited = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "6", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "2"}
    begun = job(scontrol=scontrol, **({"SHOWN": "yes"} | inherited if scontrol else {}))
    until_saved(begun, tmp_path / "scratch")
    begun.send_signal(signal.SIGUSR1)
    text, _ = begun.communicate(timeout=60)
    assert "stopped by SIGUSR1" in text, text
    if scontrol:
        assert "REQUEUED requeue 7" in text
        assert begun.returncode == 0
    else:
        assert "JOB 7 COULD NOT BE REQUEUED" in text
        assert begun.returncode == STOPPED_EARLY
    newest = only_run(tmp_path / "scratch" / "ddpm-output")
    assert len(list(newest.glob("checkpoint_*.pt"))) <= 4  # the newest three and the best


def test_a_job_that_would_begin_anew_at_each_requeue_is_refused(job):
    text, _ = (begun := job("--no-auto-resume")).communicate(timeout=60)
    assert (begun.returncode, len(text.splitlines())) == (2, 1), text
    assert "--seed" in text


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_a_file_that_goes_while_the_cache_is_copied_ends_no_job(job, tmp_path):
    """As the temporary file of another job that keeps its classifier there."""
    (tmp_path / "scratch" / "hf_cache").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cp").write_text("#!/bin/bash\necho 'cp: cannot stat' >&2\nexit 1\n")
    (tmp_path / "bin" / "cp").chmod(0o755)
    begun = job()
    until_saved(begun, tmp_path / "scratch")
    begun.send_signal(signal.SIGUSR1)
    text, _ = begun.communicate(timeout=60)
    assert (begun.returncode, "warning: not all of" in text) == (0, True), text


SRUN = """#!/bin/bash
while [ "$1" != python ]; do shift; done
shift
exec torchrun --standalone --nproc-per-node 2 --signals-to-handle SIGTERM,SIGUSR1 "$@"
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_a_job_of_two_tasks_requeues_whatever_its_launchers_exit_code_is(job, tmp_path):
    """torchrun stands in for srun: it exits with 1 where the trainers exit with 11."""
    from torch.distributed.run import get_args_parser

    if "--signals-to-handle" not in get_args_parser().format_help():
        pytest.skip("this torchrun passes no SIGUSR1 on")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    begun = job(SLURM_NTASKS="2")
    until_saved(begun, tmp_path / "scratch")
    begun.send_signal(signal.SIGUSR1)
    text, _ = begun.communicate(timeout=60)
    assert "stopped by SIGUSR1" in text, text
    assert "REQUEUED requeue 7" in text
    assert begun.returncode == 0
    config = only_run(tmp_path / "scratch" / "ddpm-output") / "config.json"
    assert json.loads(config.read_text())["starts"][0]["processes"] == 2


SOON = """#!/bin/bash
if [ "$1" = "$LIMIT_AT" ] && [[ "$2" != *prefix* ]]; then
    kill -USR1 $PPID
    sleep 5
fi
exec {python} "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_a_job_whose_limit_always_comes_too_soon_gives_up(job, tmp_path):
    """Three starts without a step end it; a start that trains begins the count anew, and another job has its own.

    A stand-in for Python sends the signal: before there is a trainer (while job.sh looks at Python's version, `-c`),
    or before the trainer could take it.
    """
    texts = []
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(SOON.format(python=sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)

    def limited(at: str, number: str = "7"):
        begun = job(SLURM_JOB_ID=number, LIMIT_AT=at)
        if not at:
            until_saved(begun, tmp_path / "scratch")
            begun.send_signal(signal.SIGUSR1)
        texts.append(begun.communicate(timeout=60)[0])
        return begun.returncode, "REQUEUED" in texts[-1]

    assert [limited("-c"), limited("train.py"), limited("-c", "8"), limited("")] == [(0, True)] * 4, texts
    assert "BEFORE A STEP COULD BE TRAINED, 2 in a row" in texts[1]
    assert "time limit: saved; requeueing job 7" in texts[3]
    ends = [limited("train.py"), limited("-c"), limited("train.py")]
    assert ends == [(0, True), (0, True), (STOPPED_EARLY, False)], texts
    assert "GIVING UP JOB 7" in texts[-1]
    assert "submit with a longer --time" in texts[-1]
    assert [path.name for path in (tmp_path / "scratch" / "ddpm-output").glob(".no*")] == [".no-progress-8"]


@pytest.mark.parametrize("folder", [AE, LATENT, PIXEL])
def test_a_job_from_the_wrong_folder(folder, tmp_path):
    environment = {"PATH": os.environ["PATH"], "SCRATCH": str(tmp_path), "SLURM_SUBMIT_DIR": str(REPO)}
    job = subprocess.run(["bash", REPO / folder / "job.sh"], env=environment, capture_output=True, text=True)
    assert job.returncode == 1
    assert job.stderr == f"error: submit job.sh from its own folder: (cd {folder} && sbatch job.sh)\n"


def test_an_interrupted_environment_is_made_again(tmp_path):
    """venv writes bin/python first and bin/activate last; the `python` here stands in for both, and for pip."""
    binaries = tmp_path / "venv" / "ddpm" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").touch(mode=0o755)
    stand_in = tmp_path / "python3"
    stand_in.write_text(f'#!/bin/bash\n[ "$2" != venv ] || touch "{binaries}/activate"\necho "{tmp_path}"\n')
    stand_in.chmod(0o755)
    (tmp_path / "python").symlink_to(stand_in)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    words = ["bash", "-c", "source common/setup_env.sh requirements.txt"]
    first, second = (subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True) for _ in "12")
    assert (first.returncode, first.stderr, second.returncode, second.stderr) == (0, "", 0, "")
    assert "creating" in first.stdout
    assert "creating" not in second.stdout


def test_an_old_python_makes_no_environment_and_says_what_to_do(tmp_path):
    """`python3` may be old where newer ones are; PYTHON names one and no other; an upgrade may take one away."""

    def write(name: str, code: int) -> None:
        making = (
            f'[ "$2" != venv ] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "# {name}" >"$3/bin/activate"; }}'
        )
        (tmp_path / name).write_text(f'#!/bin/bash\n[ "$1" != -c ] || exit {code}\n{making}\n')
        (tmp_path / name).chmod(0o755)

    def setup(**env: str) -> tuple[int, str]:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **env}
        words = ["bash", "-c", "source common/setup_env.sh requirements.txt"]
        done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr

    ours = tmp_path / "venv" / "ddpm"
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python"):
        write(name, 1)
    old = "is not there or too old: install Python 3.11 or newer, or set PYTHON to its path\n"
    assert setup() == (1, f"error: python3 {old}")
    write("python3.12", 0)
    assert setup(PYTHON="python3.13") == (1, f"error: python3.13 {old}")
    assert setup(PYTHON="/not/there") == (1, f"error: /not/there {old}")
    assert not ours.exists()
    setup()
    assert (ours / "bin" / "activate").read_text() == "# python3.12\n"
    (ours / "bin" / "python").unlink()
    gone = "error: the Python of ~/venv/ddpm is gone or older than 3.11: remove that folder, and start again\n"
    assert setup() == (1, gone)
    active = "error: the Python of the active environment is not there or older than 3.11: activate another\n"
    assert setup(VIRTUAL_ENV=str(tmp_path)) == (1, active)


def test_the_active_environment_comes_before_a_modules_python(tmp_path):
    """Lmod puts a Python that it loads again before all; pip must not install into that."""
    environment, module = tmp_path / "environment", tmp_path / "module"
    stand_in = '#!/bin/bash\n[ "$1" = -m ] && echo "$0 $*" >>{log} || [ "$1" != -c ] || echo {prefix}\n'
    for folder, prefix in ((environment / "bin", environment), (module, module)):
        folder.mkdir(parents=True)
        (folder / "python").write_text(stand_in.format(log=tmp_path / "log", prefix=prefix))
        (folder / "python").chmod(0o755)
    path = f"{module}:{environment / 'bin'}:{os.environ['PATH']}"
    words = ["bash", "-c", "source common/setup_env.sh requirements.txt && command -v python"]
    env = {"PATH": path, "HOME": str(tmp_path), "VIRTUAL_ENV": str(environment)}
    conda = subprocess.run(words, cwd=REPO, env=env | {"CONDA_PREFIX": str(module)}, capture_output=True, text=True)
    assert conda.stdout.splitlines()[-1] == str(module / "python")  # activated after the other environment
    (tmp_path / "log").unlink()
    done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(environment / "bin" / "python")
    assert [line.split()[:3] for line in (tmp_path / "log").read_text().splitlines()] == [
        [str(environment / "bin" / "python"), "-m", "pip"]
    ]


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")
def test_starts_at_once_set_up_once(tmp_path):
    """As the tasks of `sbatch --array` do on a cluster's shared home; `python` stands in for venv and pip."""
    binaries, log = tmp_path / "venv" / "ddpm" / "bin", tmp_path / "log"
    stand_in = tmp_path / "python3"
    making = f'echo "$2" >>"{log}"; sleep 0.5; mkdir -p "{binaries}"; cp "$0" "{binaries}/python"'
    making += f'; touch "{binaries}/activate"'
    stand_in.write_text(f'#!/bin/bash\n[ "$1" != -m ] || {{ {making}; }}\necho "{tmp_path}"\n')
    stand_in.chmod(0o755)
    (tmp_path / "python").symlink_to(stand_in)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    words = ["bash", "-c", "source common/setup_env.sh requirements.txt"]
    starts = [subprocess.Popen(words, cwd=REPO, env=environment, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(start.communicate(timeout=60)[1], start.returncode) for start in starts] == [(b"", 0)] * 4
    assert log.read_text().split() == ["venv", "pip"]
