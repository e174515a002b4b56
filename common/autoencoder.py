"""Loading a trained autoencoder, from its checkpoint or from inside a latent-diffusion checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ckpt, console
from common.args import AUTO, Args, bash_word
from common.data import dataset_of
from common.error_codes import BAD_CHECKPOINT, MODEL_MISMATCH, NO_AE_CHECKPOINT, Exit
from common.flags import MNIST
from common.modules import ROOT, module_of
from common.train_state import TrainState

if TYPE_CHECKING:
    import torch
    from torch import nn

AUTOENCODERS = ("ae-conv", "ae-mlp")  # in the order in which they are looked for
OWN_RUNS = ROOT / "mnist_ae" / "outputs" / "checkpoints"  # where their trainer leaves them by default


def read_autoencoder(path: str | Path | tuple[Path, ckpt.State], warn: ckpt.Warn = console.warn) -> dict[str, Any]:
    """An autoencoder's checkpoint (a file, a run's folder, or RUN/best), reduced to what `build_autoencoder` needs.

    The result is plain and can be stored inside another checkpoint. warn: told of damaged files that are passed over.
    Raises Exit(MODEL_MISMATCH) if the checkpoint holds another kind of model, UnreadableCheckpoint if it cannot be
    read.
    """
    return _reduced(*ckpt.read_model(path, AUTOENCODERS, warn))


def _reduced(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    kept = {key: state.get(key) for key in ("model", "args", "exp_name", "epoch", "val_loss", "best")}
    return kept | {"path": str(path.absolute())}


def is_finished(state: dict[str, Any]) -> bool:
    """Had the run of this checkpoint, or of `read_autoencoder`'s data, nothing left to train?"""
    at = TrainState(state["epoch"], best=state.get("best"))
    return ckpt.is_complete(state) and bool(at.why_ended(state["args"]))


def describe(data: dict[str, Any]) -> str:
    """An autoencoder (from `read_autoencoder`) in a line: file, epoch n of N, validation loss, digits."""
    flags, loss = data["args"], data["val_loss"]
    only, mnist = flags.get("only_digit"), dataset_of(flags) == MNIST
    few = flags.get("data") == "embedded"
    digits = f"all {'embedded ' * few}digits" if mnist else f"all classes of {flags['data']}"
    if only is not None:
        digits = f"only {only}s" if mnist else f"only class {only} of {flags['data']}"
    error = "in mid-epoch" if loss is None else f"val_loss {loss:.6f}"
    return f"{data['path']} ({flags['model']}, epoch {data['epoch']} of {flags.get('epochs', '?')}, {error}, {digits})"


def build_autoencoder(data: dict[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The frozen autoencoder in `data` (from `read_autoencoder`), in eval mode, rebuilt as its own flags say.

    Raises UnreadableCheckpoint if its weights do not fit.
    """
    module = module_of(ckpt.infer_model_from_checkpoint(data))
    autoencoder = module.Autoencoder(latent_dim=data["args"]["latent_dim"], use_sigmoid=True)
    try:
        autoencoder.load_state_dict(data["model"])
    except RuntimeError as error:
        source = data.get("path", data["exp_name"])
        raise ckpt.UnreadableCheckpoint(source, f"its weights do not fit: {str(error).splitlines()[0]}") from None
    return autoencoder.to(device).eval().requires_grad_(False)


def find_autoencoder(
    folders: list[Path], digit: int | str | None, warn: ckpt.Warn, dataset: str = MNIST
) -> dict[str, Any] | None:
    """The autoencoder to take from `folders` (of runs, or a run's own) where none is named; None if there is none.

    Finished runs before unfinished ones, then those of full MNIST before the embedded digits'; conv before mlp; the
    newest first. digit: it must have seen that digit; None: all of them; AUTO: those of all digits come first. dataset:
    what it must have learned from (`dataset_of`). The result is as from `read_autoencoder`.
    """
    found = []
    for folder in folders:
        runs = ckpt.recorded_runs([folder], warn)
        own = ckpt.glance(folder, warn)
        for run, state in [*runs, *([(folder, own)] if own else [])]:
            model, seen = state["args"].get("model"), state["args"].get("only_digit")
            fits = model in AUTOENCODERS and dataset_of(state["args"]) == dataset
            if fits and (digit == AUTO or seen in (None, digit)):
                few = digit == AUTO and seen is not None
                embedded = state["args"].get("data") == "embedded"
                found.append(((not is_finished(state), few, embedded, AUTOENCODERS.index(model)), run))
    for _, run in sorted(found, key=lambda entry: entry[0]):  # stable: of equals the first folder's newest
        if readable := ckpt.newest_readable(run, warn):
            return _reduced(*readable)
    return None


# --- which autoencoder a latent training takes ------------------------------------------------------------------------


def read_named_autoencoder(args: Args) -> None:
    """Set the flags that follow from the autoencoder that --ae-ckpt or --ae-ckpt-dir means, where one is given.

    What cannot be read is put off where a run is resumed: it carries its own.
    """
    try:
        if args.ae_ckpt or args.ae_ckpt_dir:
            choose_autoencoder(args)
    except Exit as error:
        if error.code not in (BAD_CHECKPOINT, NO_AE_CHECKPOINT) or not (args.resume or args.auto_resume):
            raise
        for name in ("ae_ckpt", "ae_ckpt_dir"):
            if getattr(args, name):
                args.kinds[name] = "shape"  # the path is all that still tells which autoencoder is meant


def choose_autoencoder(args: Args) -> None:
    """Take the autoencoder that a flag names; where none does, one from where their trainer leaves them.

    Raises Exit(NO_AE_CHECKPOINT) if there is none, UnreadableCheckpoint if the one that is named cannot be read.
    """
    if "autoencoder" in args.inputs:
        return
    said = args.inputs.setdefault("said", set())  # where this is tried a second time, nothing is said twice

    def warn(text: str) -> None:
        if text not in said:
            said.add(text)
            logging.getLogger("train").warning(text)

    if args.ae_ckpt:
        args.ae_ckpt = str(Path(args.ae_ckpt).absolute())
        return _take(args, read_autoencoder(args.ae_ckpt, warn), "--ae-ckpt")
    folders = [Path(args.ae_ckpt_dir or Path(args.outdir) / "checkpoints")]
    if not args.ae_ckpt_dir and not args.given("outdir"):
        folders.append(OWN_RUNS)
    data = find_autoencoder(folders, args.only_digit, warn, args.dataset)
    if data is None:
        where, seen = " or ".join(map(str, folders)), "" if args.only_digit == AUTO else " of the wanted digits"
        seen += "" if args.dataset == MNIST else f" that learned from {args.data}"
        raise Exit(NO_AE_CHECKPOINT, f"no autoencoder{seen} in {where}; train one in mnist_ae, or give --ae-ckpt PATH")
    _take(args, data, "--ae-ckpt-dir" if args.ae_ckpt_dir else "derived")
    args.derive(ae_ckpt=data["path"])


def _take(args: Args, data: dict[str, Any], flag: str) -> None:
    """Set what follows from an autoencoder, which is its weights; `flag` led to it."""
    trained, digit = data["args"], data["args"].get("only_digit")
    if dataset_of(trained) != args.dataset and not args.resume:  # then the data are the run's
        theirs = trained.get("data", "hub")
        raise Exit(
            MODEL_MISMATCH,
            f"{describe(data)} learned from other data: give --data {bash_word(theirs)}, or name another --ae-ckpt",
        )
    args.inputs["autoencoder"] = data
    args.derive(flag, ae_model=trained["model"], ae_latent_dim=trained["latent_dim"], ae_only_digit=digit)
    args.derive(flag, ae_weights=ckpt.weights_digest(data["model"]))
    if args.only_digit == AUTO:
        if not args.resume:  # then it is the run's
            args.derive(flag, only_digit=digit)
    elif digit not in (None, args.only_digit):
        wanted = "all are" if args.only_digit is None else f"--only-digit {args.only_digit} is"
        raise Exit(MODEL_MISMATCH, f"{describe(data)} has seen no others, but {wanted} wanted; name another --ae-ckpt")
    if not is_finished(data):
        logging.getLogger("train").warning(f"this autoencoder has not finished its training: {describe(data)}")
