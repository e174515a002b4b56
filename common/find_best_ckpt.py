"""Find the best checkpoint below a folder: `python -m common.find_best_ckpt DIR --metric val_loss`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from common import ckpt, console, emoji, peek
from common.args import Parser, flag_of, named_path, number
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, Exit, run_main
from common.files import atomic_write
from common.flags import MNIST
from common.inspect_ckpt import files_below, verify
from common.record import rows_in
from common.scores import ORDER, read_scores, scores_file

_RISING = ("acc", "precision", "recall", "agreement", "confident", "tstr", "per_second")
COMPARABLE = ("epoch", "global_step", *ORDER, "tstr")  # between models of any kind
_LOG_LINE = re.compile(r"\bepoch\W+(\d+)", re.IGNORECASE)
_LOG_FIELD = re.compile(r"(\w+)[ =:]+(-?\d[\d.,]*(?:e[+-]?\d+)?)")


# flags in which runs differ whose losses do not compare; with what those from before they existed had
DECIDES = {
    **{"dataset": MNIST, "only_digit": None, "ae_weights": None, "min_snr_gamma": 0.0},
    **{"T": None, "schedule": "linear", "beta_start": None, "beta_end": None},
}


class Found(NamedTuple):
    """One checkpoint in the ranking."""

    value: float
    path: Path
    model: str  # "?" of a checkpoint that is not this project's
    epoch: int  # -1 where none is recorded
    measured: str  # how, if it is a score
    learned: dict[str, Any]  # the flags of DECIDES


def default_mode(metric: str) -> str:
    """ "max" for what should grow (epochs, steps, accuracies), "min" for everything else (losses, distances)."""
    return "max" if metric in ("epoch", "global_step") or any(word in metric for word in _RISING) else "min"


@cache
def _written_figures(run_folder: Path) -> dict[int, dict[str, float]]:
    """Figures by epoch from the run's metrics.jsonl, or from its log file where there is none."""
    figures = {row["epoch"]: row for row in rows_in(run_folder) if isinstance(row.get("epoch"), int | float)}
    log = run_folder.parent.parent / "logs" / f"{run_folder.name}.log"
    with suppress(OSError):
        for line in () if figures else log.read_text(errors="replace").splitlines():
            if match := _LOG_LINE.search(line):
                for name, number in _LOG_FIELD.findall(line[match.end() :]):
                    with suppress(ValueError):  # a version, or a sentence's end
                        figures.setdefault(int(match[1]), {})[name] = float(number.replace(",", ""))
    return figures


def figures_of(state: dict[str, Any], path: Path) -> dict[str, tuple[float, str]]:
    """Every number known of a checkpoint, as {metric: (value, how it was measured if it is a score)}.

    Its own numbers, `common.evaluate`'s, what its run wrote about the epoch, and its flags; of equal names the first.
    """
    flags = _plain(state.get("args"))
    scores = read_scores(scores_file(path), state)
    live = _measured_in_training(_plain(state.get("scores")), flags)
    epoch = state.get("epoch")
    written = _written_figures(path.parent).get(epoch, {}) if isinstance(epoch, int | float) else {}
    figures: dict[str, tuple[float, str]] = {}
    for source, measured in (
        (state, lambda _: ""),
        (scores, lambda metric: _measured(scores, metric)),
        (_plain(state.get("scores")), lambda _: live),
        (written, lambda _: ""),
        (flags, lambda _: ""),
    ):
        for name, value in source.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(name, str):
                with suppress(OverflowError):  # a whole number of hundreds of digits
                    figures.setdefault(name, (float(value), measured(name)))
    return figures


def _plain(value: Any) -> dict[str, Any]:
    """The contents of a dict, or of an object that stands for flags (argparse.Namespace), else {}."""
    value = value.contents if isinstance(value, peek.Stranger) else value
    return value if isinstance(value, dict) else {}


def _measured(scores: dict[str, Any], metric: str) -> str:
    """What figures of `common.evaluate` must share to compare: everything but the seed."""
    try:
        details = scores["details" + "".join(metric.partition("_")[1:])]  # fid_labelled is in details_labelled
        settings = {name: value for name, value in details["settings"].items() if name != "seed"}
        return json.dumps([settings, details["classifier"]])
    except (KeyError, TypeError, AttributeError):
        return ""


def _measured_in_training(scores: dict[str, Any], flags: dict[str, Any]) -> str:
    """What figures of `train.py --eval-every` must share to compare; older ones do not name their classifier."""
    drawn = [flags.get(name) for name in ("only_digit", "data", "class_counts")]
    return json.dumps(["--eval-every", *drawn, scores.get("classifier")], default=str)


def rank(folder: Path, metric: str, mode: str, warn: ckpt.Warn) -> tuple[list[Found], str]:
    """(all complete checkpoints below `folder` that know `metric`, best first; the metric's name there).

    Of equals the later epoch, then path. Of any project: a PyTorch file whose top level, or whose `args`, hold it as a
    number. `NAME` also means `NAME_labelled`, where only that is known. Unreadable files and NaN values are named
    through `warn`; checkpoints saved within an epoch are passed over. Raises Exit(BAD_CHECKPOINT) if none knows it.
    """
    known: list[tuple[Path, dict[str, Any], dict[str, tuple[float, str]]]] = []
    try:
        files = files_below(folder)
    except OSError as error:
        raise Exit(BAD_CHECKPOINT, f"{folder}: {error.strerror or error}") from None
    for path in files:
        if path.name.startswith(".") or (path.name in (ckpt.LATEST, ckpt.BEST) and ckpt.run_checkpoints(path.parent)):
            continue  # symlinks to others in the list, or copies of them
        try:
            state, _ = ckpt.peek(path)
        except ckpt.UnreadableCheckpoint as error:
            if not error.gone:  # pruned by the run that trains there
                warn(f"passing over {error}")
            continue
        if ckpt.is_ours(state) and ckpt.EXPORTED in state:
            warn(f"passing over {path}: it {ckpt.exported_text(state)}")
            continue
        if not isinstance(state, dict) or ("val_loss" in state and not ckpt.is_complete(state)):
            continue
        known.append((path, state, figures_of(state, path)))
    names = {name for _, _, figures in known for name in figures}
    if metric not in names and f"{metric}_labelled" in names:
        warn(f"{metric} is known only of drawings with labels: ranking by {metric}_labelled")
        metric = f"{metric}_labelled"
    if metric not in names:
        which = f"known are {', '.join(sorted(names))}" if names else "there is none with any number"
        raise Exit(BAD_CHECKPOINT, f"{folder}: no complete checkpoint with {metric} here; {which}")
    found = []
    for path, state, figures in known:
        value, measured = figures.get(metric, (math.nan, ""))
        if metric in figures and math.isnan(value):
            warn(f"passing over {path}: its {metric} is NaN")
        elif metric in figures:
            flags = ckpt.in_full(_plain(state.get("args"))) if ckpt.is_ours(state, None) else {}
            learned = {name: flags.get(name, before) for name, before in DECIDES.items()}
            epoch = state.get("epoch")
            epoch = epoch if isinstance(epoch, int) else -1
            found.append(Found(value, path, str(flags.get("model", "?")), epoch, measured, learned))
    if len(found) < len(known):
        warn(f"{len(known) - len(found)} checkpoint(s) do not know {metric}, or not as a number")
    if not found:
        raise Exit(BAD_CHECKPOINT, f"{folder}: no complete checkpoint with a {metric} that is a number")
    sign = 1 if mode == "min" else -1
    return sorted(found, key=lambda entry: (sign * entry.value, -entry.epoch, str(entry.path))), metric


def _copy(source: Path, target: Path, force: bool) -> None:
    if target.is_dir():
        raise Exit(BAD_OUTPUT, f"{target} is a folder; --copy-to wants a file's name")
    if os.path.lexists(target) and not force:
        raise Exit(BAD_OUTPUT, f"{target} exists; --force overwrites it")
    try:
        file = open(source, "rb")  # noqa: SIM115 - what is wrong with it is not the target's fault
    except OSError as error:
        why = "its run, in training, removed it: try again" if not source.exists() else error.strerror or error
        raise Exit(BAD_CHECKPOINT, f"cannot copy {source}: {why}") from None
    try:
        with file:
            verify(source)
            atomic_write(target, lambda out: shutil.copyfileobj(file, out))
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write {target}: {error.strerror or error}") from None


def main(argv: list[str] | None = None) -> None:
    example = "python -m common.find_best_ckpt outputs/checkpoints --metric val_loss"
    parser = Parser("Find the best checkpoint below a folder.", example)
    parser.add_argument("folder", type=named_path, help="a run's folder, or a whole checkpoints/ tree")
    metric_help = "val_loss, train_loss, epoch, global_step, or any number recorded (default: val_loss)"
    parser.add_argument("--metric", default="val_loss", help=metric_help)
    parser.add_argument("--mode", choices=("min", "max"), help="what is best (default: follows the metric)")
    parser.add_argument("--top", type=number(int, 1), default=10, metavar="N", help="rows of the table (default: 10)")
    parser.add_argument("--copy-to", type=named_path, metavar="FILE", help="copy the best checkpoint there")
    parser.add_argument("--force", action="store_true", help="let --copy-to overwrite")
    parser.add_argument("--print-path-only", action="store_true", help="print just the best one's path")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder):  # False also for names that are too long
        with suppress(ckpt.UnreadableCheckpoint):
            if ckpt.EXPORTED in (state := ckpt.peek_checkpoint(args.folder)):
                raise Exit(BAD_CHECKPOINT, f"{args.folder} {ckpt.exported_text(state)}: give a folder of runs")
        why = "a file: give the folder of its run, or of runs" if os.path.isfile(args.folder) else "no such folder"
        raise Exit(BAD_CHECKPOINT, f"{args.folder}: {why}")
    mode = args.mode or default_mode(args.metric)
    ranking, args.metric = rank(args.folder, args.metric, mode, console.warn)
    kinds = sorted({"autoencoders" if entry.model.startswith("ae-") else entry.model for entry in ranking})
    if len(kinds) > 1 and not args.metric.startswith(COMPARABLE):
        text = f"{args.metric} of {', '.join(kinds)} do not compare; give the folder of one experiment"
        console.warn(text)
    elif "loss" in args.metric and (
        apart := [name for name in DECIDES if len({repr(entry.learned[name]) for entry in ranking}) > 1]
    ):
        called = {"ae_weights": "autoencoder", "dataset": "--data"}
        what = ", ".join(called.get(name) or flag_of(name) for name in apart)
        console.warn(f"{args.metric} of runs that differ in {what} do not compare")
    if len({(entry.measured, entry.measured != "" and entry.model.startswith("ae-")) for entry in ranking}) > 1:
        text = f"{args.metric} was not measured alike everywhere (images, sampler, classifier, reconstructions …)"
        console.warn(f"{text}; score with the same flags")
    best = ranking[0]
    if args.copy_to:
        _copy(best.path, args.copy_to, args.force)
    if args.print_path_only:
        sys.stdout.buffer.write(os.fsencode(best.path) + b"\n")  # exactly the name, whatever the locale
        return
    print(f"{'rank':>4}  {args.metric:>14}  {'epoch':>5}  {'model':<7}  checkpoint")
    for place, entry in enumerate(ranking[: args.top], 1):
        epoch = entry.epoch if entry.epoch >= 0 else "-"
        print(f"{place:>4}  {entry.value:>14.6g}  {epoch:>5}  {entry.model:<7}  {entry.path}")
    print(f"{emoji.ok} best by {mode} {args.metric}: {best.path}")
    if args.copy_to:
        print(f"{emoji.ok} copied to {args.copy_to}")


if __name__ == "__main__":
    sys.exit(run_main(main))
