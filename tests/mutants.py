"""Deliberate faults, each by itself in a copy of the repository: which of them does the suite not notice?

    python tests/mutants.py                    # all of mutants.toml (hours on one core)
    python tests/mutants.py --list             # their names, and which no longer apply: at once
    python tests/mutants.py ema_swapped ...    # only these

Exits with 0 if every fault was noticed. A survivor wants a test, a fault that no longer applies a new text.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FAULTS = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())
LEFT_OUT = (".*", "__pycache__", "outputs", "hf_cache", "venv")
PATIENCE = 900  # seconds
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that no test ran


def why_not(fault: dict) -> str:
    """Why the fault cannot be applied to the code as it is; "" if it can."""
    path = REPO / fault["file"]
    count = path.read_text().count(fault["old"]) if path.is_file() else 0
    where = f"in {fault['file']}" if path.is_file() else f"there is no {fault['file']}"
    return "" if count == 1 else f"NO LONGER APPLIES: its text stands {count} times {where}"


@cache
def why_useless(tests: str) -> str:
    """Why the tests could not notice anything: without any fault, they do not pass either."""
    ended, words = end_of(tests, None)
    return "" if ended == "passed" else f"ITS TESTS FAIL WITHOUT IT: {words}"


def end_of(tests: str, fault: dict | None) -> tuple[str, str]:
    """How the tests end in a copy with the fault ("passed", "failed", "late" or "broken"), and their last words."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(REPO, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if fault is not None:
            path = copy / fault["file"]
            path.write_text(path.read_text().replace(fault["old"], fault["new"]))
        chosen = [f"tests/{word}" if ".py" in word else word for word in shlex.split(tests)]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", "--all", *chosen]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return "late", f"still running after {PATIENCE} s"
        finally:
            end_what_is_left(folder)
        last = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        words = (last or done.stdout.splitlines() or done.stderr.splitlines())[-1]
        if "TimeoutExpired" in done.stdout:
            return "late", words
        return {PASSED: "passed", FAILED: "failed"}.get(done.returncode, "broken"), words


def end_what_is_left(folder: str) -> None:
    """Kill what the tests left running (Linux): a faulty trainer may write to the copy for ever."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # not ours, or gone
            if f"TMPDIR={folder}".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of the cleaning up
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults in mutants.toml (default: all)")
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = {name: FAULTS[name] for name in args.names or FAULTS}
    noticed = stale = 0
    for name, fault in chosen.items():
        started = time.monotonic()
        if said := why_not(fault):
            stale += 1
        elif args.list:
            said = f"{fault['file']}; {fault['tests']}"
        elif not (said := why_useless(fault["tests"])):
            ended, words = end_of(fault["tests"], fault)
            noticed += ended == "failed"
            late = "TOO SLOW TO TELL: try again on an idle machine"
            said = {"failed": "noticed", "passed": "SURVIVES", "broken": "BREAKS THE TESTS", "late": late}[ended]
            said += f" ({time.monotonic() - started:.0f} s)  {words}"
        print(f"{name:32} {said}", flush=True)
    print(f"{len(chosen)} faults: {'' if args.list else f'{noticed} noticed, '}{stale} no longer apply")
    return int(stale > 0 if args.list else noticed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
