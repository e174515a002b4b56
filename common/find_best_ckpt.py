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

from common import ckpt, emoji
from common.args import Parser, number
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, Exit, run_main
from common.evaluate import read_scores, scores_file

_RISING = ("acc", "precision", "recall", "agreement", "confident", "per_second")
COMPARABLE = (
    "epoch",
    "global_step",
    "fid",
    "precision",
    "recall",
    "agreement",
    "imbalance",
    "confident",
)  # between models of any kind
_LOG_LINE = re.compile(r"\bepoch\W+(\d+)")
_LOG_FIELD = re.compile(r"(\w+)[ =:]+(-?\d[\d.,]*(?:e[+-]?\d+)?)")


class Found(NamedTuple):
    """One checkpoint in the ranking."""

    value: float
    path: Path
    model: str
    epoch: int
    measured: str  # how, if it is a score


def default_mode(metric: str) -> str:
    """ "max" for what should grow (epochs, steps, accuracies), "min" for everything else (losses, distances)."""
    return "max" if metric in ("epoch", "global_step") or any(word in metric for word in _RISING) else "min"


@cache
def _written_figures(run_folder: Path) -> dict[int, dict[str, float]]:
    """Figures by epoch from the run's metrics.jsonl, or from its log file where there is none."""
    figures: dict[int, dict[str, float]] = {}
    for line in _lines(run_folder / "metrics.jsonl"):
        with suppress(ValueError, KeyError, TypeError):  # a torn line
            row = json.loads(line)
            figures[row["epoch"]] = row
    if figures:
        return figures
    for line in _lines(run_folder.parent.parent / "logs" / f"{run_folder.name}.log"):
        if match := _LOG_LINE.search(line):
            for name, number in _LOG_FIELD.findall(line[match.end() :]):
                with suppress(ValueError):  # a version, or a sentence's end
                    figures.setdefault(int(match[1]), {})[name] = float(number.replace(",", ""))
    return figures


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def metric_of(state: dict[str, Any], path: Path, metric: str) -> tuple[float, str] | None:
    """(A checkpoint's number, how it was measured if it is a score), None if it does not know it.

    Its own number, `common.evaluate`'s, what its run wrote about the epoch, or a flag's.
    """
    written, scores = _written_figures(path.parent).get(state["epoch"], {}), read_scores(scores_file(path), state)
    for source, measured in (
        (state, ""),
        (scores, _measured(scores, metric)),
        (state.get("scores"), f"--eval-every {state['args'].get('only_digit')} {state['args'].get('data')}"),
        (written, ""),
        (state["args"], ""),
    ):
        value = source.get(metric) if isinstance(source, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value), measured
    return None


def _measured(scores: dict[str, Any], metric: str) -> str:
    """What figures of `common.evaluate` must share to compare: everything but the seed."""
    try:
        details = scores["details_labelled" if metric.endswith("_labelled") else "details"]
        settings = {name: value for name, value in details["settings"].items() if name != "seed"}
        return json.dumps([settings, details["classifier"]])
    except (KeyError, TypeError, AttributeError):
        return ""


def rank(folder: Path, metric: str, mode: str, warn: ckpt.Warn) -> list[Found]:
    """All complete checkpoints below `folder` that know `metric`, best first; of equals the later epoch, then path.

    Unreadable files and NaN values are named through `warn`; checkpoints saved within an epoch are passed over.
    """
    found, unknown = [], 0
    for path in sorted(folder.rglob("*.pt")):
        if path.name.startswith(".") or (path.name in (ckpt.LATEST, ckpt.BEST) and ckpt.run_checkpoints(path.parent)):
            continue  # symlinks to others in the list, or copies of them
        try:
            state = ckpt.peek_checkpoint(path)
            model = ckpt.infer_model_from_checkpoint(state)
        except ckpt.UnreadableCheckpoint as error:
            warn(f"passing over {error}" if str(path) in str(error) else f"passing over {path}: {error}")
            continue
        if "val_loss" in state and not ckpt.is_complete(state):
            continue
        known = metric_of(state, path, metric)
        if known is None:
            unknown += 1
        elif math.isnan(known[0]):
            warn(f"passing over {path}: its {metric} is NaN")
        else:
            found.append(Found(known[0], path, model, state["epoch"], known[1]))
    if unknown:
        warn(f"{unknown} checkpoint(s) do not know {metric}")
    sign = 1 if mode == "min" else -1
    return sorted(found, key=lambda entry: (sign * entry.value, -entry.epoch, str(entry.path)))


def _copy(source: Path, target: Path, force: bool) -> None:
    if target.is_dir():
        raise Exit(BAD_OUTPUT, f"{target} is a folder; --copy-to wants a file's name")
    if os.path.lexists(target) and not force:
        raise Exit(BAD_OUTPUT, f"{target} exists; --force overwrites it")
    try:
        with open(source, "rb") as file:
            ckpt.atomic_write(target, lambda out: shutil.copyfileobj(file, out))
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write {target}: {error.strerror or error}") from None


def main(argv: list[str] | None = None) -> None:
    example = "python -m common.find_best_ckpt outputs/checkpoints --metric val_loss"
    parser = Parser("Find the best checkpoint below a folder.", example)
    parser.add_argument("folder", type=Path, help="a run's folder, or a whole checkpoints/ tree")
    metric_help = "val_loss, train_loss, epoch, global_step, or any number recorded (default: val_loss)"
    parser.add_argument("--metric", default="val_loss", help=metric_help)
    parser.add_argument("--mode", choices=("min", "max"), help="what is best (default: follows the metric)")
    parser.add_argument("--top", type=number(int, 1), default=10, metavar="N", help="rows of the table (default: 10)")
    parser.add_argument("--copy-to", type=Path, metavar="FILE", help="copy the best checkpoint there")
    parser.add_argument("--force", action="store_true", help="let --copy-to overwrite")
    parser.add_argument("--print-path-only", action="store_true", help="print just the best one's path")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder):  # False also for names that are too long
        raise Exit(BAD_CHECKPOINT, f"{args.folder}: no such folder")
    mode = args.mode or default_mode(args.metric)
    ranking = rank(args.folder, args.metric, mode, lambda text: print(f"{emoji.warning} {text}", file=sys.stderr))
    if not ranking:
        raise Exit(BAD_CHECKPOINT, f"{args.folder}: no complete checkpoint with {args.metric} here")
    kinds = sorted({entry.model for entry in ranking})
    if len(kinds) > 1 and not args.metric.startswith(COMPARABLE):
        text = f"{args.metric} of {', '.join(kinds)} do not compare; give the folder of one experiment"
        print(f"{emoji.warning} {text}", file=sys.stderr)
    if len({(entry.measured, entry.measured != "" and entry.model.startswith("ae-")) for entry in ranking}) > 1:
        text = f"{args.metric} was not measured alike everywhere (images, sampler, classifier, reconstructions …)"
        print(f"{emoji.warning} {text}; score with the same flags", file=sys.stderr)
    best = ranking[0]
    if args.copy_to:
        _copy(best.path, args.copy_to, args.force)
    if args.print_path_only:
        sys.stdout.buffer.write(os.fsencode(best.path) + b"\n")  # exactly the name, whatever the locale
        return
    print(f"{'rank':>4}  {args.metric:>14}  {'epoch':>5}  {'model':<7}  checkpoint")
    for place, entry in enumerate(ranking[: args.top], 1):
        print(f"{place:>4}  {entry.value:>14.6g}  {entry.epoch:>5}  {entry.model:<7}  {entry.path}")
    print(f"{emoji.ok} best by {mode} {args.metric}: {best.path}")
    if args.copy_to:
        print(f"{emoji.ok} copied to {args.copy_to}")


if __name__ == "__main__":
    sys.exit(run_main(main))
