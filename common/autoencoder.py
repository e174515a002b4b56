"""Loading a trained autoencoder, from its checkpoint or from inside a latent-diffusion checkpoint.

Three folders have a `model.py`, so the autoencoders' modules are loaded by file, under names of their own.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common import ckpt
from common.error_codes import MODEL_MISMATCH, Exit

if TYPE_CHECKING:
    import torch
    from torch import nn

AE_FOLDER = Path(__file__).parent.parent / "mnist_ae"
MODULE_FILES = {"ae-mlp": "model.py", "ae-conv": "model_conv.py"}


@cache
def autoencoder_module(model: str) -> ModuleType:
    """The module that defines `Autoencoder` for "ae-mlp" or "ae-conv"."""
    spec = importlib.util.spec_from_file_location(f"ae_module_{model[3:]}", AE_FOLDER / MODULE_FILES[model])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_autoencoder(path: str | Path) -> dict[str, Any]:
    """An autoencoder's checkpoint (a file, a run's folder, or FOLDER/best), reduced to what `build_autoencoder` needs.

    The result is plain and can be stored inside another checkpoint. Raises Exit(MODEL_MISMATCH) if the checkpoint
    holds another kind of model, UnreadableCheckpoint if it cannot be read.
    """
    path = ckpt.resolve_checkpoint(path)
    state = ckpt.read_checkpoint(path)
    model = ckpt.infer_model_from_checkpoint(state)
    if model not in MODULE_FILES:
        raise Exit(MODEL_MISMATCH, f"{path} holds a {model} model, not an autoencoder (ae-mlp or ae-conv)")
    kept = {key: state.get(key) for key in ("model", "args", "exp_name", "epoch", "val_loss")}
    return kept | {"path": str(path.absolute())}


def build_autoencoder(data: dict[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The frozen autoencoder in `data` (from `read_autoencoder`), in eval mode, rebuilt as its own flags say."""
    module = autoencoder_module(ckpt.infer_model_from_checkpoint(data))
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
    for model in ("ae-conv", "ae-mlp"):
        for folder in folders:
            if found := ckpt.find_latest_checkpoint(folder, f"{model}-", warn):
                return found
    for folder in folders:
        if found := ckpt.newest_readable(folder, warn, verify=False):
            return found[0]
    return None
