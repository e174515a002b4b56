"""How command-line flags work: their kinds, where a value came from, and what a resume may change.

Each flag is declared with a kind, which is also its heading in --help:

    place     where things live and run: always today's value, also on resume
    shape     the model and the data: fixed for a run; contradicting it on resume is an error
    training  how to train: a resume keeps the run's value unless the flag is given
    books     how long to train and what to write down: as training, but it does not tell one run from another
    input     a file to begin a run with: what is in it counts, not its path; a resumed run carries its own

A run is what it does: its values of the kinds shape and training (`Args.difference`).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from common import emoji
from common.error_codes import MODEL_MISMATCH, USAGE, Exit
from common.ranks import identity
from common.slurm import lasting_cache

_KINDS = {
    "place": "where things live and run (always today's, also on resume)",
    "shape": "model and data (fixed for a run; taken from the checkpoint on resume)",
    "training": "training (kept on resume unless given)",
    "books": "how long, and what is kept (kept on resume unless given; the same run whatever these say)",
    "input": "what to begin with (its content counts, not its path; a resumed run carries its own)",
}
MOST = 10**6  # of anything that is counted
AUTO = "auto"  # a value that is not known before data or an autoencoder is read: until then it matches anything


class Difference(NamedTuple):
    """A flag, or another thing that is part of what a run is, in which two runs differ."""

    name: str
    recorded: Any
    today: Any


class Args(argparse.Namespace):
    """Parsed flags that remember where each value came from.

    `origin` is "flag", "environment", "default", "checkpoint", "derived", or the flag or variable that it follows from.
    """

    _OWN = ("origin", "kinds", "defaults", "follows", "inputs")

    def __init__(self) -> None:
        self.origin: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        self.follows: dict[str, str] = {}  # {a flag that is AUTO: the recorded value that it would take}
        self.inputs: dict[str, Any] = {}  # what was read from the files that flags name, or that were found

    def flags(self) -> dict[str, Any]:
        """Every flag and derived setting, as plain types: what a checkpoint stores under `args`."""
        return {name: value for name, value in vars(self).items() if name not in self._OWN}

    def kind(self, name: str) -> str:
        """The kind of a flag; derived settings are part of the model or the data."""
        return self.kinds.get(name, "shape")

    def given(self, name: str) -> bool:
        """Did the user ask for this value, by flag or by environment variable?"""
        return self.origin.get(name) in ("flag", "environment")

    def typed(self, *names: str) -> list[str]:
        """Those of these flags that the user gave."""
        return [name for name in names if self.given(name)]

    def derive(self, source: str = "derived", **values: Any) -> None:
        """Set values that no user typed: read from an autoencoder (named by the flag `source`), found, measured."""
        for name, value in values.items():
            setattr(self, name, value)
            self.origin[name] = source

    def difference(self, recorded: dict[str, Any]) -> Difference | None:
        """The first thing in which a run with the `recorded` flags is not the one that today's flags mean.

        A flag that the run did not know yet counts as its default. None: it is that run.
        """
        for name, today in self.flags().items():
            if self.kind(name) not in ("shape", "training"):
                continue
            there = recorded.get(name, self.defaults.get(name, AUTO))
            today = recorded.get(self.follows[name], today) if today == AUTO and name in self.follows else today
            if there != today and AUTO not in (there, today):
                return Difference(name, there, today)
        return None

    def adopt(self, recorded: dict[str, Any]) -> list[str]:
        """Make the flags of a checkpoint the defaults of this start; returns what today's flags change about them.

        A flag of the kinds shape and training that the run did not know yet counts as its default there.
        Raises Exit(MODEL_MISMATCH) if an explicit flag contradicts the recorded model or data.
        """
        changes = []
        unknown = {name: value for name, value in self.defaults.items() if self.kind(name) in ("shape", "training")}
        for name, value in (unknown | recorded).items():
            kind, today, origin = self.kind(name), getattr(self, name, AUTO), self.origin.get(name, "default")
            explicit = origin not in ("default", "environment", "checkpoint") and AUTO not in (today, value)
            if kind == "place" or (kind == "books" and value == AUTO):  # --threads, before the first step
                continue
            if explicit and today != value and kind != "input":
                flag = flag_of(name)
                if kind == "shape":
                    given = _typed(flag, today) if origin == "flag" else f"{origin} ({name} {today})"
                    raise Exit(
                        MODEL_MISMATCH,
                        f"{given} contradicts the run to be resumed, which has {value}; "
                        f"drop {given.split()[0]} to go on with that run, or start a new one",
                    )
                changes.append(f"{flag} {value} -> {today}")
            elif kind == "input" or not explicit:
                setattr(self, name, value)
                self.origin[name] = "checkpoint"
        return changes

    def resume_command(self, path: str | Path, kinds: Collection[str] = ("place",)) -> str:
        """What to type, in the same folder, to go on with the checkpoint at `path`; for bash, whatever the names.

        kinds: of what was typed, that which the checkpoint does not know.
        """
        words = ["--resume", bash_word(path)]
        unneeded = ("resume", "auto_resume", "outdir")  # a checkpoint is resumed in its own run's folder
        for name, value in self.flags().items():
            if self.kinds.get(name) in kinds and self.origin[name] == "flag" and name not in unneeded:
                if name == "cache_dir" and lasting_cache(value).is_dir():  # not one that ends with its job
                    value = lasting_cache(value)
                words.append(_typed(flag_of(name), value if isinstance(value, bool) else bash_word(value)))
        return " ".join(["python train.py", *words])


def _typed(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {value}"


def flag_of(name: str) -> str:
    """--the-flag of an attribute's name."""
    return "--" + name.replace("_", "-")


def bash_word(value: Any) -> str:
    """`value` as one word of a bash command line, also where it holds what no terminal can show."""
    text = str(value)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{escaped}'"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags have a kind and whose errors are one line."""

    def __init__(self, description: str, example: str = "") -> None:
        super().__init__(
            description=description,
            epilog=f"example: {example}" if example else None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.kinds: dict[str, str] = {}
        self._declared: list[argparse.Action] = []
        self._environment: set[str] = set()
        self._wrong: dict[str, str] = {}  # by flag, what is wrong with its variable
        self._by_kind: dict[str, argparse._ArgumentGroup] = {}
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -5e-1 for a flag

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, but a --help that cannot be written is no success."""
        if message:
            (file or sys.stderr).write(message)

    def flag(self, kind: str, *names: str, env: str = "", **options: Any) -> None:
        """Declare a flag of the given kind. If the variable `env` is set and not empty, it is the default."""
        if kind not in self._by_kind:
            self._by_kind[kind] = self.add_argument_group(_KINDS[kind])
        if text := os.environ.get(env):
            try:
                options["default"] = options.get("type", str)(text)
            except argparse.ArgumentTypeError as error:
                self._wrong[names[0].removeprefix("--").replace("-", "_")] = f"${env}: {error}"
        action = self._by_kind[kind].add_argument(*names, **options)
        self._declared.append(action)
        self.kinds[action.dest] = kind
        if os.environ.get(env):
            self._environment.add(action.dest)

    def parse(self, argv: list[str] | None = None) -> Args:
        """Parse `argv` (default: the command line) and record where each value came from."""
        argv = sys.argv[1:] if argv is None else argv
        args = self.parse_args(argv, namespace=Args())
        args.kinds = self.kinds
        args.defaults = {action.dest: action.default for action in self._declared}
        typed = self.typed(argv)
        for name, complaint in self._wrong.items():
            if name not in typed:
                self.error(complaint)
        for name in self.kinds:
            is_env = name in self._environment
            args.origin[name] = "flag" if name in typed else "environment" if is_env else "default"
        return args

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does it, but an empty value, of a shell's variable that is not set, is an error.

        In --flag=~/path the shell leaves the ~, which nobody means as a folder of that name.
        """
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.option_strings and value == "":
                self.error(f"argument {'/'.join(action.option_strings)}: the value is empty")
            if isinstance(value, str | Path) and str(value).startswith("~/") and value != action.default:
                setattr(found, action.dest, type(value)(os.path.expanduser(value)))
        return found, rest

    def format_help(self) -> str:
        """As argparse does it, but of a tool, which resumes nothing, the headings do not speak of that."""
        if "resume" not in self.kinds:
            for group in self._by_kind.values():
                group.title = group.title.split(" (")[0]
        return super().format_help()

    def typed(self, argv: list[str] | None = None) -> dict[str, Any]:
        """The flags that `argv` really has, with their values; to be asked after everything else."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return vars(self.parse_args(argv))

    def error(self, message: str) -> NoReturn:
        line = f"{emoji.error} {self.prog}: {message} (--help lists the flags)\n"
        self.exit(USAGE, line if identity().rank == 0 else None)  # of several processes one talks


def named_path(text: str) -> Path:
    """An argparse type: a path, which an empty word, such as a shell's variable that is not set, is not."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    return Path(text)


def number(
    kind: type, low: float | None = None, high: float | None = None, *, above: float | None = None
) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` (int or float) in [low, high], and greater than `above`.

    An int without a `high` is at most MOST, which nothing needs, and which torch can still count.
    """
    limits = [f"at least {low}"] if low is not None else []
    limits += [f"greater than {above}"] if above is not None else []
    limits += [f"at most {high}"] if high is not None else []
    wanted = ("a whole number" if kind is int else "a number") + "".join(f" {limit}," for limit in limits).rstrip(",")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if kind is int and high is None and value > MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST:,}")
        inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        if not inside or value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse
