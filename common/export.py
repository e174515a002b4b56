"""`infer.py --export FILE`: of a run what drawing needs, in a small file to pass on or to keep.

Such a file is a checkpoint (see `common.ckpt`) whose `model` holds the averaged weights, in float16, and that lacks the
optimizer. Networks compute with it in float32, as ever. Beside the usual keys it has `exported`: `time` (UTC),
`commands` (those that trained it, if its run's config.json was there) and `scores` (`common.evaluate`'s, if they were).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import ckpt, emoji
from common.args import bash_word, flag_of
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, USAGE, Exit
from common.flags import HUB, is_own
from common.images import check_output, one_line
from common.modules import MODULE_FILES
from common.ranks import identity
from common.record import starts_in
from common.run import require_checkpoint
from common.scores import read_scores, scores_file

KEPT = ("args", "epoch", "global_step", "batch", "exp_name", "timestamp", "train_loss", "val_loss", "best", "format")
# flags that say where something lay or ran; nobody else has use for them
PLACES = ("ae_ckpt", "ae_ckpt_dir", "auto_resume", "cache_dir", "debug", "device", "logdir", "num_workers", "outdir")
PLACES += ("resume",)


def export(source: str | None, file: str, typed: Iterable[str], types: tuple[str, ...]) -> None:
    """Write `file` from the checkpoint that `source` means, of one of the `types`. typed: the flags that were given.

    Raises Exit: for other flags, which would have no effect, for a `file` that is something else, or cannot be written.
    """
    if identity().rank:  # one process writes
        return
    if more := sorted(set(typed) - {"ckpt", "export"}):
        raise Exit(USAGE, f"--export only writes {file}, and draws nothing: leave out {flag_of(more[0])}")
    require_checkpoint(source, types)
    target = check_output(file, ".pt")
    if target.name in (ckpt.LATEST, ckpt.BEST) or ckpt.is_epochs_name(target.name):
        raise Exit(BAD_OUTPUT, f"{target}: that is how runs name their own checkpoints; give another name")
    if target.exists() and not _is_exported(target):
        raise Exit(BAD_OUTPUT, f"{target} exists, and is no exported file; give another name, or remove it")
    path, state = ckpt.read_model(source, types)
    if ckpt.EXPORTED in state:
        raise Exit(MODEL_MISMATCH, f"{path} {ckpt.exported_text(state)}: copy it")
    with one_line(target):
        ckpt.save_checkpoint(target, reduced(path, state))
    print(f"{emoji.ok} {state['exp_name']}, epoch {state['epoch']}: {target} ({target.stat().st_size / 1e6:.2f} MB)")


def _is_exported(path: Path) -> bool:
    try:
        return ckpt.EXPORTED in ckpt.peek_checkpoint(path)
    except ckpt.UnreadableCheckpoint:
        return False


def reduced(path: Path, state: ckpt.State) -> ckpt.State:
    """What is exported of the checkpoint's state in `path`. Raises Exit for weights that are no numbers."""
    commands = _commands(path.parent, ckpt.infer_model_from_checkpoint(state))
    kept = {key: state[key] for key in KEPT if key in state} | {"args": _without_places(state["args"])}
    kept["model"] = _in_half(ckpt.averaged_weights(state), path)
    if autoencoder := state.get("ae_ckpt_data"):
        inner = {key: value for key, value in autoencoder.items() if key != "path"}
        weights = _in_half(inner["model"], path)
        kept["ae_ckpt_data"] = inner | {"model": weights, "args": _without_places(inner["args"])}
        of_it = Path(autoencoder.get("path", "")).parent
        if of_it.name == inner["exp_name"]:
            commands = _commands(of_it, ckpt.infer_model_from_checkpoint(inner)) + commands
    now = datetime.now(UTC).isoformat()
    scores = read_scores(scores_file(path.resolve()), state)
    return kept | {ckpt.EXPORTED: {"time": now, "commands": commands, "scores": scores}}


def _without_places(flags: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in flags.items() if name not in PLACES}
    return kept | ({"data": _file_name(kept["data"])} if "data" in kept else {})


def _file_name(source: str) -> str:
    """Of --data FILE.npz the name alone; where it lies now, whoever looks at the file must say."""
    return source if source.startswith(HUB) or not is_own(source) else Path(source).name


def _in_half(weights: dict[str, Any], path: Path) -> dict[str, Any]:
    """Matrices and filters in float16; vectors, which are few, whole numbers, and what is too large for it as it is."""

    def smaller(value: Any) -> Any:
        if value.ndim < 2 or not value.is_floating_point():
            return value
        half = value.half()
        return half if (half.isfinite() == value.isfinite()).all() else value

    if any(value.isnan().any() for value in weights.values()):
        raise Exit(BAD_CHECKPOINT, f"{path}: some of its weights are no numbers (NaN)")
    return {key: smaller(value) for key, value in weights.items()}


def _commands(run: Path, model: str) -> list[str]:
    """The commands that a run's config.json tells of, without the flags of PLACES; [] if there is none."""
    starts = [start.get("command") for start in starts_in(run)]
    starts = [words for words in starts if isinstance(words, list) and words and all(isinstance(w, str) for w in words)]
    places, commands = [flag_of(name) for name in PLACES], []
    for script, *words in starts:
        if Path(script).name != "train.py":  # a program that called its main
            continue
        kept: list[str] = []
        skipping = False
        for word in words:
            flag, equals, value = word.partition("=")
            if word.startswith("--"):
                skipping = flag.replace("--no-", "--", 1) in places
            if kept[-1:] == ["--data"]:
                word = _file_name(word)
            elif flag == "--data" and equals:
                word = f"--data={_file_name(value)}"
            if not skipping:
                kept.append(bash_word(word) if not word.startswith("--") else word)
        commands.append(" ".join([f"cd {Path(MODULE_FILES[model]).parent} && python train.py", *kept]))
    return list(dict.fromkeys(commands))
