"""Consoles that cannot be written to: a session trains on and ends with its own code, a tool ends quietly."""

import contextlib
import errno
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import AE, LATENT, REPO, environment, newest_state, only_run

from common.error_codes import BAD_OUTPUT, STOPPED_EARLY, run_main
from common.progress import progress
from common.ranks import Identity
from common.session import Session

WARNING = "the console cannot be written to"
EPOCHS = 3


@pytest.fixture
def flags(tiny, tmp_path) -> tuple:
    return ("--model", "mlp", "--epochs", EPOCHS, "--outdir", tmp_path, *tiny)


def shell(line: str, *args: object, **options) -> subprocess.CompletedProcess:
    """A line of bash, in which $@ is a training command, run in the trainer's folder."""
    command = ["bash", "-c", line, "bash", sys.executable, "train.py", *map(str, args)]
    return subprocess.run(
        command, cwd=REPO / AE, env=environment(), capture_output=True, text=True, timeout=120, **options
    )


def log_of(outdir) -> str:
    return (outdir / "logs" / f"{only_run(outdir).name}.log").read_text()


def assert_trained(outdir, said: str = WARNING) -> None:
    assert newest_state(only_run(outdir))["epoch"] == EPOCHS
    assert log_of(outdir).count(said) == 1
    assert f"the end: epoch {EPOCHS} of {EPOCHS} is done" in log_of(outdir)


@pytest.mark.parametrize("reader", ["head -5", pytest.param("true", marks=pytest.mark.slow)])
def test_a_pipe_whose_reader_leaves(reader, flags, tmp_path):
    result = shell(f'"$@" | {reader}; exit ${{PIPESTATUS[0]}}', *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert_trained(tmp_path)


def test_stderr_leaves_too(flags, tmp_path):
    assert shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', *flags).returncode == 0
    assert_trained(tmp_path)


def test_a_disk_that_is_full_behind_the_console(disk, flags, tmp_path):
    """As every Slurm job's log may be."""
    full = disk("16k")
    with contextlib.suppress(OSError), open(full / "filler", "wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    result = shell(f'"$@" >{full}/log 2>&1', *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert_trained(tmp_path, f"{WARNING} (No space left on device)")


ALL_CLOSED = '"$@" <&- >&- 2>&-'


@pytest.mark.parametrize(
    "command", ['"$@" >&-', *(pytest.param(c, marks=pytest.mark.slow) for c in ('"$@" 2>&-', ALL_CLOSED))]
)
def test_a_console_that_is_closed_from_the_start(command, flags, tmp_path):
    result = shell(command, *flags)
    assert result.returncode == 0
    assert "Traceback" not in result.stdout + result.stderr
    assert newest_state(only_run(tmp_path))["epoch"] == EPOCHS


def test_a_closed_consoles_numbers_are_given_to_no_file(flags, tmp_path):
    """What C code writes to number 1 or 2 must not end up in a checkpoint, a log or a lock."""
    junk = """
import os, sys
sys.path.insert(0, ".")
import train
from common.error_codes import run_main
from common.session import Session
step = Session.step
def noisy(*args):
    for number in (1, 2):
        os.write(number, b"JUNK")
    step(*args)
Session.step = noisy
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""
    command = ["bash", "-c", ALL_CLOSED, "bash", sys.executable, "-c", junk, *map(str, flags)]
    assert subprocess.run(command, cwd=REPO / AE, env=environment(), timeout=120).returncode == 0
    assert newest_state(only_run(tmp_path))["epoch"] == EPOCHS
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"JUNK" in path.read_bytes()]


@pytest.mark.parametrize("closed", [pytest.param(">&-", marks=pytest.mark.slow), "2>&-"])
def test_drawing_with_a_closed_console(closed, latent_run, tmp_path):
    command = f"{sys.executable} infer.py --ckpt {latent_run} --output {tmp_path / 'x.png'} {closed}"
    result = subprocess.run(command, shell=True, cwd=REPO / LATENT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_reader_that_leaves_costs_no_file(ae_run, cache, tmp_path):
    """Each line is written at once, so the first one meets a pipe without a reader in the middle of the work."""
    flags = f"--ckpt {ae_run} --data embedded --cache-dir {cache} --num-images 4 --output {tmp_path / 'x.png'}"
    command = f"({sys.executable} infer.py {flags}; echo $? >{tmp_path / 'code'}) | true"
    env = environment(PYTHONUNBUFFERED="1")
    result = subprocess.run(command, shell=True, cwd=REPO / AE, env=env, capture_output=True, text=True)
    assert result.stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "x.png").stat().st_size > 0


def until(condition, process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trains(outdir):
    """Has a first epoch been saved?"""
    return lambda: list(outdir.glob("checkpoints/*/checkpoint_epoch_000001.pt"))


def test_ctrl_c_under_tee_still_says_how_to_go_on(flags, tmp_path):
    """The terminal's Ctrl-C goes to the whole pipeline, and tee dies of it before the trainer has saved."""
    line = 'trap : INT; "$@" | tee log >/dev/null; exit ${PIPESTATUS[0]}'  # bash must live to report
    command = ["bash", "-c", line, "bash", sys.executable, str(REPO / AE / "train.py"), *map(str, flags)]
    process = subprocess.Popen(
        [*command, "--epochs", "100000"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(trains(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    result = finish_errors(process)
    assert process.returncode == STOPPED_EARLY
    assert re.search(r"stopped by SIGINT .* go on with: python train.py --resume \S*epoch_\d+\.pt", result), result


def test_ctrl_c_under_run_sh(cache, tmp_path):
    """The trainer's last lines are shown, and run.sh ends as it did; started again, it goes on."""
    places = {"SLURM_TMPDIR": str(shutil.copytree(cache, tmp_path / "cache")), "SCRATCH": str(tmp_path)}
    env = environment(**places, VIRTUAL_ENV=sys.prefix, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for start_again in (False, True):
        process = subprocess.Popen(
            ["bash", REPO / LATENT / "run.sh"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        said = []
        until(
            lambda said=said, it=process: any("train_loss" in line for line in said) or said.append(_line(it)), process
        )
        os.killpg(process.pid, signal.SIGINT)
        text = "".join(said) + finish_errors(process)
        assert process.returncode == STOPPED_EARLY, text
        assert "stopped by SIGINT" in text
        assert "go on with: python train.py --resume" in text
        assert text.splitlines()[-1] == "stopped and saved: start run.sh again, and it goes on"
        assert ("resumed from" in text) == start_again
        assert "warning: full MNIST is not in" not in text


def _line(process) -> str:
    return process.stderr.readline()


def finish_errors(process) -> str:
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


def test_of_several_processes_one_talks_of_progress(monkeypatch):
    monkeypatch.setattr("common.progress.PLAIN_LINE_EVERY", 0.0)
    for rank, lines in ((0, 3), (1, 0)):
        monkeypatch.setattr("common.progress.identity", lambda rank=rank: Identity(rank, 2, rank, 2))
        said = []
        with progress("drawing", 3, "step", said.append) as tick:
            for _ in range(3):
                tick()
        assert len(said) == lines


def test_a_bar_begins_where_the_work_does(monkeypatch):
    """In the middle of an epoch that is resumed."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("epoch 1/2", 10, "batch", pytest.fail, done=4):
        pass
    assert "| 4/10 [" in sys.stderr.getvalue()


@pytest.fixture
def terminal(flags, tmp_path):
    """terminal(*words) -> (a process that trains for very long on a terminal of its own, the terminal's other end)."""
    if shutil.which("setsid") is None:
        pytest.skip("no setsid on this machine")
    open_ends, processes = [], []

    def begin(*words: str, epochs: int = 100_000) -> tuple[subprocess.Popen, int]:
        ours, theirs = pty.openpty()
        command = [*words, sys.executable, "train.py", *map(str, flags), "--epochs", str(epochs)]
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            cwd=REPO / AE,
            env=environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        open_ends.append(ours)
        processes.append(process)
        return process, ours

    yield begin
    for process in processes:
        process.kill()
        process.wait()
    for end in open_ends:
        with contextlib.suppress(OSError):
            os.close(end)


def drained(terminal: int) -> None:
    """Read what there is, so that the process never waits for its terminal."""
    os.set_blocking(terminal, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(terminal, 65536):
            pass


def test_a_terminal_that_is_closed_stops_the_run_like_sigterm(terminal, tmp_path):
    process, ours = terminal("env", "--default-signal=HUP")  # the suite itself may run under nohup
    until(lambda: (drained(ours), trains(tmp_path)())[1], process)
    os.close(ours)
    assert process.wait(60) == STOPPED_EARLY
    assert "stopped by SIGHUP" in log_of(tmp_path)
    assert log_of(tmp_path).count(WARNING) <= 1
    assert newest_state(only_run(tmp_path))["epoch"] >= 1


def test_nohup_is_obeyed(terminal, tmp_path):
    """The terminal is gone (nohup redirects stdout only), SIGHUP stays ignored: the run trains to its end."""
    process, ours = terminal("env", "--ignore-signal=HUP", epochs=20)
    until(lambda: (drained(ours), trains(tmp_path)())[1], process)
    os.close(ours)
    assert process.wait(100) == 0
    assert newest_state(only_run(tmp_path))["epoch"] == 20
    assert log_of(tmp_path).count(WARNING) == 1
    assert "SIGHUP" not in log_of(tmp_path)


@pytest.mark.parametrize("error", [ZeroDivisionError("unforeseen"), BrokenPipeError(32, "a worker")], ids=repr)
def test_an_unforeseen_exception_is_in_the_log(error, flags, tmp_path, monkeypatch, capsys):
    """Also one that looks like the console's. On the console Python itself shows it, as it ends the process."""
    step = Session.step

    def faulty(session, *args):
        if session.epoch == 2:
            raise error
        step(session, *args)

    monkeypatch.setattr(Session, "step", faulty)
    with pytest.raises(type(error)):
        run_main(lambda: _train(flags))
    assert "Traceback" not in "".join(capsys.readouterr())
    log = log_of(tmp_path)
    assert log.count("Traceback (most recent call last)") == 1
    assert type(error).__name__ in log.splitlines()[-1]


FAULT = """
import sys
sys.path.insert(0, ".")
import train
from common.error_codes import run_main
from common.session import Session
def faulty(*args):
    raise BrokenPipeError(32, "a worker")
Session.step = faulty
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_an_unforeseen_exception_where_nobody_reads_stdout(flags, tmp_path):
    """Even then it is in the log, once on stderr, and in the exit code."""
    command = ["bash", "-c", '"$@" >/dev/full', "bash", sys.executable, "-c", FAULT, *map(str, flags)]
    result = subprocess.run(command, cwd=REPO / AE, env=environment(), capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr.count("Traceback")) == (1, 1), result.stderr
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "BrokenPipeError" in log.read_text().splitlines()[-1]


class Full(io.StringIO):
    """A console behind which a quota is used up."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_whatever_is_wrong_with_stdout_a_tool_ends_with_one_line(number, monkeypatch):
    def write(_text):
        raise OSError(number, os.strerror(number))

    stdout, stderr = io.StringIO(), io.StringIO()
    stdout.write = write
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    code = run_main(lambda: print("a line"))
    monkeypatch.undo()
    assert code == (0 if number == errno.EPIPE else BAD_OUTPUT)
    assert len(stderr.getvalue().splitlines()) == (number != errno.EPIPE)


def test_over_quota(flags, tmp_path, monkeypatch):
    with contextlib.redirect_stdout(Full()), contextlib.redirect_stderr(Full()):
        code = run_main(lambda: _train(flags))
    assert code == 0
    assert_trained(tmp_path, f"{WARNING} (Disk quota exceeded)")


def _train(flags) -> None:
    from helpers import inside, recipe

    with inside(AE):
        recipe(AE, "train.py").main([str(flag) for flag in flags])
