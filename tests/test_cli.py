"""The command line: wrong input is one clear line and a documented exit code; help is quick."""

import os
import re
import shutil
import sys

import pytest
from helpers import (
    AE,
    LATENT,
    PIXEL,
    REPO,
    SMALL,
    call,
    environment,
    finish,
    inside,
    make_run,
    only_run,
    recipe,
    run,
    start,
)

from common import error_codes, slurm
from common.args import Parser, named_path
from common.error_codes import (
    BAD_CHECKPOINT,
    BAD_OUTPUT,
    NO_AE_CHECKPOINT,
    NO_DEVICE,
    NO_MODEL_SPECIFIED,
    NOT_INSTALLED,
    USAGE,
    Exit,
    run_main,
)
from common.flags import add_training_arguments

SCRIPTS = [(folder, script) for folder in (AE, LATENT, PIXEL) for script in ("train.py", "infer.py")]
SCRIPTS.append((AE, "run_tsne.py"))
TOOLS = ["common.data", "common.find_best_ckpt", "common.inspect_ckpt", "common.evaluate", "common.play"]

WRONG = [
    # (folder, script, flags, exit code, what the line names)
    (AE, "train.py", "", NO_MODEL_SPECIFIED, "--model"),
    (AE, "train.py", "--model vae", NO_MODEL_SPECIFIED, "vae"),
    (AE, "train.py", "--model mlp --only-digit 10", USAGE, "10"),
    (AE, "train.py", "--model mlp --only-digit -1", USAGE, "--only-digit"),
    (AE, "train.py", "--model mlp --epochs 0", USAGE, "--epochs"),
    (AE, "train.py", "--model mlp --epochs 2.5", USAGE, "--epochs"),
    (AE, "train.py", "--model mlp --batch-size 0", USAGE, "--batch-size"),
    (AE, "train.py", "--model mlp --batch-size -5", USAGE, "--batch-size"),
    (AE, "train.py", "--model mlp --batch-size 100000000000000000000", USAGE, "more than 1,000,000"),
    (AE, "train.py", "--model mlp --latent-dim 100000000000000000000", USAGE, "more than 1,000,000"),
    (AE, "train.py", "--model mlp --logdir=", USAGE, "the value is empty"),
    (AE, "train.py", "--resume=", USAGE, "the value is empty"),
    (AE, "train.py", "--model mlp --latent-dim 0", USAGE, "--latent-dim"),
    (AE, "train.py", "--model mlp --lr 0", USAGE, "--lr"),
    (AE, "train.py", "--model mlp --lr nan", USAGE, "--lr"),
    (AE, "train.py", "--model mlp --lr inf", USAGE, "--lr"),
    (AE, "train.py", "--model mlp --lr fast", USAGE, "fast"),
    (AE, "train.py", "--model mlp --lr-scheduler linear", USAGE, "linear"),
    (AE, "train.py", "--model mlp --num-workers -1", USAGE, "--num-workers"),
    (AE, "train.py", "--model mlp --seed -1", USAGE, "--seed"),
    (AE, "train.py", "--model mlp --data mnist", USAGE, "mnist"),
    (AE, "train.py", "--model mlp --epoch 3", USAGE, "--epoch"),  # no abbreviations
    (AE, "train.py", "--model mlp --device cuda", NO_DEVICE, "cuda"),
    (AE, "train.py", "--model mlp --device cuda:7", NO_DEVICE, "cuda:7"),
    (AE, "train.py", "--model mlp --device gpu", NO_DEVICE, "gpu"),
    (AE, "train.py", "--model mlp --device meta", NO_DEVICE, "meta"),
    (AE, "train.py", "--model mlp --outdir {file}/out", BAD_OUTPUT, "{file}"),
    (AE, "train.py", "--model mlp --outdir {file}", BAD_OUTPUT, "{file}"),
    (AE, "train.py", "--model mlp --outdir /proc/out", BAD_OUTPUT, "/proc/out"),
    (AE, "train.py", "--model mlp --logdir {file}/logs", BAD_OUTPUT, "{file}"),
    (AE, "train.py", "--resume {tmp}/nothing.pt", BAD_CHECKPOINT, "nothing.pt"),
    (AE, "train.py", "--resume {file}", BAD_CHECKPOINT, "{file}"),
    (AE, "train.py", "--resume {tmp}", BAD_CHECKPOINT, "{tmp}"),
    (AE, "infer.py", "", USAGE, "--ckpt"),
    (AE, "infer.py", "--ckpt {file}", BAD_CHECKPOINT, "{file}"),
    (AE, "infer.py", "--ckpt {tmp}/nothing.pt", BAD_CHECKPOINT, "nothing.pt"),
    (AE, "infer.py", "--ckpt {ae} --num-images 0", USAGE, "--num-images"),
    (AE, "infer.py", "--ckpt {ae} --walk-steps 5", USAGE, "--interpolate"),
    (AE, "infer.py", "--ckpt {ae} --export=", USAGE, "the value is empty"),
    (AE, "infer.py", "--ckpt {ae} --output {tmp}/a.jpg", BAD_OUTPUT, "ends in .png"),
    (AE, "infer.py", "--ckpt {ae} --device cuda", NO_DEVICE, "cuda"),
    (LATENT, "train.py", "--T 0", USAGE, "--T"),
    (LATENT, "train.py", "--hidden-dim 0", USAGE, "--hidden-dim"),
    (LATENT, "train.py", "--beta-start 0.02 --beta-end 0.02", USAGE, "--beta-start"),
    (LATENT, "train.py", "--beta-start 0.5", USAGE, "--beta-start"),
    (LATENT, "train.py", "--beta-start 0", USAGE, "--beta-start"),
    (LATENT, "train.py", "--beta-end 1", USAGE, "--beta-end"),
    (PIXEL, "train.py", "--beta-end 0.999", USAGE, "leave no trace of the image"),
    (PIXEL, "train.py", "--network=", USAGE, "the value is empty"),
    (PIXEL, "train.py", "--T 18000", USAGE, "leave no trace of the image"),
    (PIXEL, "train.py", "--beta-start 1e-17", USAGE, "--beta-start"),
    (LATENT, "train.py", "--outdir {tmp}/fresh", NO_AE_CHECKPOINT, "--ae-ckpt"),
    (LATENT, "train.py", "--ae-ckpt-dir {tmp}", NO_AE_CHECKPOINT, "{tmp}"),
    (LATENT, "train.py", "--ae-ckpt {ae} --ae-ckpt-dir {tmp}", USAGE, "leave out --ae-ckpt-dir"),
    (LATENT, "train.py", "--auto-resume --outdir {tmp}/fresh", NO_AE_CHECKPOINT, "--ae-ckpt"),
    (LATENT, "train.py", "--ae-ckpt {tmp}/nothing.pt", BAD_CHECKPOINT, "nothing.pt"),
    (LATENT, "train.py", "--ae-ckpt {file}", BAD_CHECKPOINT, "{file}"),
    (LATENT, "train.py", "--ae-ckpt {ae} --device cuda", NO_DEVICE, "cuda"),
    (LATENT, "infer.py", "", USAGE, "--ckpt"),
    (LATENT, "infer.py", "--ckpt {file}", BAD_CHECKPOINT, "{file}"),
    (LATENT, "infer.py", "--ckpt {latent} --num-images 0", USAGE, "--num-images"),
    (LATENT, "infer.py", "--ckpt {latent} --digit 10", USAGE, "--digit"),
    (LATENT, "infer.py", "--ckpt {latent} --digit 3 --guidance -1", USAGE, "--guidance"),
    (LATENT, "infer.py", "--ckpt {latent} --digit 3 --guidance 1e39", USAGE, "at most 1000"),
    (LATENT, "infer.py", "--ckpt {latent} --guide {latent} --guide-scale 1e39", USAGE, "at most 1000"),
    (LATENT, "infer.py", "--ckpt {latent} --digit 3 --guidance 2 --guidance-interval -5e-1 -1e1", USAGE, "-0.5 -10"),
    (LATENT, "infer.py", "--ckpt {latent} --num-images 100000000000000000000", USAGE, "more than 1,000,000"),
    (LATENT, "infer.py", "--ckpt {latent} --save-npz=", USAGE, "the value is empty"),
    (LATENT, "infer.py", "--ckpt {latent} --sampler euler", USAGE, "euler"),
    (LATENT, "infer.py", "--ckpt {latent} --steps 0", USAGE, "--steps"),
    (LATENT, "infer.py", "--ckpt {latent} --device cuda", NO_DEVICE, "cuda"),
    (LATENT, "infer.py", "--ckpt {latent} --ae-ckpt {file}", BAD_CHECKPOINT, "{file}"),
]


def test_a_home_that_the_shell_left_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser("What it does.", "python it.py")
    parser.add_argument("--file", type=named_path)
    parser.add_argument("--text")
    parser.add_argument("--kept", default="~/c")  # as the environment has it, for all who read it there
    args = parser.parse_args(["--file=~/a.png", "--text=~/b"])
    assert (args.file, args.text, args.kept) == (tmp_path / "a.png", str(tmp_path / "b"), "~/c")


@pytest.mark.parametrize(("folder", "script", "flags", "code", "named"), WRONG, ids=lambda value: str(value))
def test_wrong_input(folder, script, flags, code, named, tmp_path, ae_run, latent_run, cache, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a-file").write_text("not a checkpoint\n")
    places = {"file": tmp_path / "a-file", "tmp": tmp_path, "ae": ae_run, "latent": latent_run}
    given = [word.format(**places) for word in flags.split()]
    if script == "train.py" and "--outdir" not in given:
        given += ["--outdir", tmp_path / "out"]
    result = call(folder, script, *given, *(("--cache-dir", cache) if script == "train.py" else ()))
    assert result.code == code, result.text
    assert len(result.errors) == 1, result.text
    assert len(result.text.splitlines()) <= (2 if "--auto-resume" in flags else 1), result.text
    assert named.format(**places) in result.errors[0]
    assert "Traceback" not in result.text
    assert not list(tmp_path.glob("*/checkpoints/*/*.pt"))


@pytest.mark.parametrize(
    ("folder", "flags", "code"),
    [(AE, ("--device", "cuda", "--model", "mlp"), NO_DEVICE), (LATENT, ("--T", "0"), USAGE)],
)
def test_wrong_input_in_a_real_process(folder, flags, code, tmp_path):
    result = run(folder, "train.py", *flags, "--outdir", tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert (result.code, len(result.text.splitlines()), len(result.errors)) == (code, 1, 1), result.text


@pytest.mark.parametrize(
    ("folder", "script", "flags", "package"),
    [
        (AE, "train.py", "--model mlp --outdir {tmp}", "torch"),
        (LATENT, "infer.py", "--ckpt {latent}", "torch"),
        ("common", "evaluate.py", "--ckpt {latent}", "torch"),
        ("common", "play/__main__.py", "{latent}", "tornado"),
        (AE, "train.py", "--model mlp --outdir {tmp}", "matplotlib"),  # which is needed after an epoch
        (LATENT, "infer.py", "--ckpt {latent}", "torchvision"),
        (AE, "run_tsne.py", "--ckpt {ae}", "sklearn"),
    ],
)
def test_a_package_that_is_missing_is_one_line(
    folder, script, flags, package, latent_run, ae_run, tmp_path, monkeypatch
):
    """As where nobody activated the environment: before any work, of which nothing is left."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tornado" or name == "common.play.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = call(folder, script, *flags.format(tmp=tmp_path, latent=latent_run, ae=ae_run).split())
    assert (result.code, len(result.text.splitlines())) == (NOT_INSTALLED, 1), result.text
    assert result.errors[0].startswith(f"error: {package} is not installed in {sys.executable}: activate")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment"), "a package cannot be loaded (libtorch_cpu.so: failed"),
        (ImportError("numpy.core failed", name="matplotlib.x"), "matplotlib cannot be loaded (numpy.core failed)"),
        (ImportError("cannot import name", name="common.files"), None),
        (ModuleNotFoundError("no", name="torch.no_such"), None),  # torch is there
        (ModuleNotFoundError("no", name="model_typo"), None),
        (ModuleNotFoundError("neither is there"), None),
    ],
    ids=str,
)
def test_a_broken_package_is_one_line_and_a_bug_here_is_none(error, said, capsys):
    def main():
        raise error

    if said is None:
        with pytest.raises(type(error)):
            run_main(main)
    else:
        assert run_main(main) == NOT_INSTALLED
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", ["sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'", "sys.platform = 'win32'"]
)
def test_an_old_python_or_windows_is_one_line(other):
    code = f"import sys; sys.path.insert(0, '..'); {other}; import common.args"  # as every script begins
    result = run(AE, "-c", code)
    assert (result.code, len(result.text.splitlines())) == (NOT_INSTALLED, 1), result.text
    assert "Python 3.11 or newer is needed, on Linux or macOS" in result.text


def test_exit_codes_are_small_distinct_and_listed():
    codes = {name: value for name, value in vars(error_codes).items() if name.isupper() and isinstance(value, int)}
    assert len(set(codes.values())) == len(codes)
    assert all(0 < code < 128 for name, code in codes.items() if name not in ("OK", "INTERRUPTED"))
    listed = dict(re.findall(r"\| (\d+) \| `(\w+)`", (REPO / "CLAUDE.md").read_text()))
    assert {name: int(code) for code, name in listed.items()} == codes


def test_run_main_shows_an_exit_once_and_hides_no_bug(capsys):
    def end():
        raise Exit(7, "the reason")

    assert run_main(end) == 7
    assert capsys.readouterr().err == "error: the reason\n"

    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(bug)


# --- one spelling, and no spelling ---

TAKES_A_CHECKPOINT = [  # (folder, script, which of the runs below is its newest, what else it takes)
    (AE, "infer.py", "ae-mlp", ("count", "output")),
    (AE, "run_tsne.py", "ae-mlp", ("count", "output")),
    (LATENT, "infer.py", "lddpm", ("count", "output")),
    (PIXEL, "infer.py", "ddpm", ("count", "output")),
    ("common", "evaluate.py", "ddpm", ("count",)),
]
SPELLINGS = {"count": ("--num-images", "--n", "--n-samples"), "output": ("--output", "--out")}


@pytest.mark.parametrize(("folder", "script", "takes"), [(a, b, d) for a, b, _, d in TAKES_A_CHECKPOINT])
@pytest.mark.parametrize("checkpoint", ["--ckpt", "--checkpoint"])
def test_every_tool_takes_every_spelling(folder, script, takes, checkpoint, tmp_path):
    """A checkpoint that is not there is the only complaint, and a number that is too small is one about the number."""
    for notion in takes:
        for flag in SPELLINGS[notion]:
            value = 300 if notion == "count" else tmp_path / "a.png"
            result = call(folder, script, checkpoint, tmp_path / "nothing.pt", flag, value)
            assert (result.code, len(result.errors)) == (BAD_CHECKPOINT, 1), result.text
            if notion == "count":
                result = call(folder, script, checkpoint, tmp_path / "nothing.pt", flag, 0)
                assert (result.code, len(result.errors)) == (USAGE, 1), result.text


@pytest.mark.parametrize(("folder", "script", "newest"), [(a, b, c) for a, b, c, _ in TAKES_A_CHECKPOINT])
def test_without_a_checkpoint_the_newest_run_is_named(folder, script, newest, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "my out"))
    runs = tmp_path / "my out" / "checkpoints"
    empty = call(folder, script)
    assert (empty.code, len(empty.errors)) == (USAGE, 1), empty.text
    jobs = tmp_path / "my out" / "ddpm-output" / "checkpoints"
    assert f"in {runs} or {jobs}: train one" in empty.errors[0]
    for day, kind in enumerate(("ae-mlp", "lddpm", "ddpm", "vae"), 1):
        for month, age in ((1, "old"), (2, "new")):
            time = f"2026-{month:02}-{day:02}T00:00:00+00:00"
            make_run(runs / f"{age}-{kind}", [1], time=time, args={"model": kind})
    result = call(folder, script)
    assert (result.code, len(result.errors)) == (USAGE, 1), result.text
    assert result.errors[0].endswith(f"--ckpt '{runs / f'new-{newest}'}'")


# --- help ---

HELP = """
import runpy, sys
try:
    {start}
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "torchvision", "numpy", "datasets", "tensorboard", "sklearn", "matplotlib"}} & sys.modules.keys()
assert not heavy, f"--help imported {{heavy}}"
"""


@pytest.mark.parametrize(("folder", "script"), SCRIPTS)
def test_help_of_a_script_imports_nothing_heavy(folder, script):
    path = str(REPO / folder / script)
    code = f"sys.argv = [{path!r}, '--help']; runpy.run_path({path!r}, run_name='__main__')"
    result = finish(start(folder, "-c", HELP.format(start=code)))
    assert result.code == 0, result.text
    assert "usage:" in result.text
    assert "--device" in result.text


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_a_tool_imports_nothing_heavy(tool):
    code = f"sys.argv = [{tool!r}, '--help']; runpy.run_module({tool!r}, run_name='__main__')"
    result = finish(start(".", "-c", HELP.format(start=code)))
    assert result.code == 0, result.text
    assert "usage:" in result.text
    assert "on resume" not in result.text


def test_help_shows_every_flag_of_the_specification():
    shared = "--cache-dir --outdir --logdir --device --num-workers --resume --auto-resume --debug --only-digit --seed"
    shared += " --batch-size --epochs --lr --lr-scheduler --grad-clip --early-stopping-patience --amp --generate-images"
    shared += " --ckpt-every-sec --ckpt-save-every --data"
    own = {AE: "--model --latent-dim", LATENT: "--ae-ckpt --ae-ckpt-dir --T --beta-start --beta-end --hidden-dim"}
    for folder, flags in own.items():
        text = call(folder, "train.py", "--help").text
        assert "training (kept on resume unless given)" in text
        assert [
            flag for flag in f"{shared} {flags}".split() if f"  {flag}" not in text and f", {flag}" not in text
        ] == []


# --- ways to start ---


def started(folder, way, tiny, ae_run, outdir) -> list[tuple[int, str]]:
    """Training and drawing in an experiment, started in one of the ways that Python has."""
    trainers = {AE: ("--model", "mlp"), LATENT: ("--ae-ckpt", ae_run, "--T", 20), PIXEL: (*SMALL, "--T", 20)}
    steps = [("train", (*trainers[folder], *tiny, "--epochs", 1, "--outdir", outdir))]
    steps.append(("infer", ("--ckpt", outdir, "--output", outdir / "x.png", *(tiny[:4] if folder == AE else ()))))
    steps += [("run_tsne", ("--help",))] if folder == AE else []
    results = []
    for script, flags in steps:
        flags = [only_run(outdir) if flag == outdir and script == "infer" else flag for flag in flags]
        if way == "-m":
            results.append(run(".", f"-m {folder}.{script}", *flags))
        else:
            results.append(run(folder, f"{script}.py", *flags, env={"PYTHONSAFEPATH": "1"}))
    return results


@pytest.mark.parametrize(
    ("folder", "way"),
    [
        (AE, "-m"),
        (LATENT, "PYTHONSAFEPATH"),
        *(pytest.param(PIXEL, way, marks=pytest.mark.slow) for way in ("-m", "PYTHONSAFEPATH")),
    ],
)
def test_every_way_of_starting_works(folder, way, tiny, ae_run, tmp_path):
    for result in started(folder, way, tiny, ae_run, tmp_path):
        assert result.code == 0, result.text


@pytest.mark.usefixtures("judged")
def test_paths_that_are_not_utf8(tiny, ae_run, tmp_path):
    """From the first line to TensorBoard's hyperparameters, and drawing from there."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(ae_run, odd / "ae", symlinks=True)
    cache = shutil.copytree(tiny[3], odd / "cache")
    own = ("--ae-ckpt", odd / "ae", "--T", 20)
    places = ("--cache-dir", cache, "--outdir", odd / "out", "--logdir", odd / "logs")
    result = run(LATENT, "train.py", *own, *tiny, *places, "--epochs", 1)
    assert result.code == 0, result.text
    assert "Traceback" not in result.text
    ckpt = only_run(odd / "out")
    assert "caf\\udce9" in next((odd / "logs").glob("*.log")).read_text()
    data = ("--data", "embedded", "--cache-dir", cache)
    result = call(LATENT, "infer.py", "--ckpt", ckpt, "--output", odd / "x.png")
    assert result.code == 0, result.text
    assert (odd / "x.png").stat().st_size > 0
    result = call("common", "evaluate.py", "--ckpt", ckpt, "--n", 200, *data, "--json", odd / "scores.json")
    assert result.code == 0, result.text
    result = call(LATENT, "train.py", "--resume", ckpt, "--epochs", 2, *places)
    assert result.code == 0, result.text


# --- flags ---


def test_defaults_of_the_trainers():
    with inside(AE):
        args = recipe(AE, "train.py").parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.latent_dim, args.seed) == (25, 128, 2e-4, 16, 42)
    assert (args.cache_dir, args.outdir, args.num_workers, args.only_digit) == ("./hf_cache", "./outputs", 1, None)
    with inside(LATENT):
        args = recipe(LATENT, "train.py").parse_args([])
    assert (args.epochs, args.T, args.beta_start, args.beta_end, args.hidden_dim) == (30, 1000, 1e-4, 2e-2, 256)


def parse_training(*argv):
    parser = Parser("test")
    add_training_arguments(parser, epochs=3)
    return parser.parse(list(argv))


def test_the_clusters_variables_are_defaults_that_flags_override(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("SLURM_TMPDIR", "/local")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    args = parse_training()
    assert (args.outdir, args.cache_dir, args.num_workers) == ("/scratch/me", "/local", 6)
    assert args.given("outdir")
    args = parse_training("--outdir", "here", "--num-workers", "0")
    assert (args.outdir, args.num_workers, args.origin["outdir"], args.origin["lr"]) == ("here", 0, "flag", "default")
    monkeypatch.setenv("SCRATCH", "")
    assert parse_training().outdir == "./outputs"


@pytest.mark.parametrize("word", ["all", "none", "All"])
def test_only_digit_all(word):
    assert parse_training("--only-digit", word).only_digit is None


def test_adopting_a_checkpoints_flags():
    recorded = {"lr": 0.5, "epochs": 9, "seed": 1, "outdir": "/there", "batch_size": 8, "data": "embedded"}
    args = parse_training("--epochs", "12", "--data", "auto")
    assert args.adopt(recorded) == ["--epochs 9 -> 12"]
    assert (args.lr, args.epochs, args.seed, args.outdir, args.batch_size) == (0.5, 12, 1, "./outputs", 8)
    assert args.data == "embedded"
    later = parse_training("--grad-clip", "3")  # a flag that the run did not know: it had its default
    assert later.adopt(recorded) == ["--grad-clip 1.0 -> 3.0"]
    with pytest.raises(Exit, match=r"--batch-size 16 .* 8"):
        parse_training("--batch-size", "16").adopt(recorded)


def test_a_second_ctrl_c_leaves_at_once_but_a_second_sigterm_does_not():
    import signal

    before = slurm.install_signal_handlers()
    try:
        assert not slurm.stop_requested()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
            assert slurm.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        slurm.restore_signal_handlers(before)
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_output_may_be_piped_and_cut_off(latent_run):
    import subprocess

    command = f"{sys.executable} -m common.inspect_ckpt {latent_run} | true"
    env = environment()
    env.pop("PYTHONUNBUFFERED", None)
    result = subprocess.run(command, shell=True, cwd=REPO, env=env, capture_output=True, text=True)
    assert result.stderr == ""
    for what, place, code in (
        (latent_run, ">/dev/full", BAD_OUTPUT),
        ("--help", ">/dev/full", BAD_OUTPUT),
        ("--help", ">/dev/full # unbuffered", BAD_OUTPUT),
        (latent_run, ">&-", 0),
        (f"{latent_run} --print-path-only", ">/dev/full", BAD_OUTPUT),
        (f"{latent_run} --print-path-only", ">/dev/full # unbuffered", BAD_OUTPUT),
        (f"{latent_run} --print-path-only", "| true # unbuffered", 0),
    ):
        tool = "find_best_ckpt" if "--print-path-only" in str(what) else "inspect_ckpt"
        command = f"{sys.executable} {'-u' * ('#' in place)} -m common.{tool} {what} {place}"
        result = subprocess.run(command, shell=True, cwd=REPO, env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert len(result.stderr.splitlines()) == bool(code), result.stderr
