"""Loading a trained autoencoder, from its checkpoint or from inside a latent-diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ckpt
from common.modules import ROOT, module_of

if TYPE_CHECKING:
    import torch
    from torch import nn

AUTOENCODERS = ("ae-conv", "ae-mlp")  # in the order in which they are looked for
OWN_RUNS = ROOT / "mnist_ae" / "outputs" / "checkpoints"  # where their trainer leaves them by default


def read_autoencoder(path: str | Path) -> dict[str, Any]:
    """An autoencoder's checkpoint (a file, a run's folder, or FOLDER/best), reduced to what `build_autoencoder` needs.

    The result is plain and can be stored inside another checkpoint. Raises Exit(MODEL_MISMATCH) if the checkpoint
    holds another kind of model, UnreadableCheckpoint if it cannot be read.
    """
    path = ckpt.resolve_checkpoint(path)
    state = ckpt.read_model(path, AUTOENCODERS)
    kept = {key: state.get(key) for key in ("model", "args", "exp_name", "epoch", "val_loss")}
    return kept | {"path": str(path.absolute())}


def build_autoencoder(data: dict[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The frozen autoencoder in `data` (from `read_autoencoder`), in eval mode, rebuilt as its own flags say."""
    module = module_of(ckpt.infer_model_from_checkpoint(data))
    autoencoder = module.Autoencoder(latent_dim=data["args"]["latent_dim"], use_sigmoid=True)
    try:
        autoencoder.load_state_dict(data["model"])
    except RuntimeError as error:
        source = data.get("path", data["exp_name"])
        raise ckpt.UnreadableCheckpoint(source, f"its weights do not fit: {str(error).splitlines()[0]}") from None
    return autoencoder.to(device).eval().requires_grad_(False)


def find_autoencoder(folders: list[Path], warn: ckpt.Warn) -> Path | None:
    """The newest checkpoint of a convolutional autoencoder below `folders`, else of an MLP one, else None.

    A folder may hold runs, or be a run's own folder.
    """
    for model in AUTOENCODERS:
        for folder in folders:
            if found := ckpt.find_latest_checkpoint(folder, f"{model}-", warn):
                return found
    for folder in folders:
        if found := ckpt.newest_readable(folder, warn, verify=False):
            return found[0]
    return None
