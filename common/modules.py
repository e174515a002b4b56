"""Loading an experiment's network module by file: several folders have a `model.py`, so plain imports would clash."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common import ckpt, console
from common.args import flag_of
from common.data import dataset_of
from common.error_codes import MODEL_MISMATCH, NO_MODEL_SPECIFIED, USAGE, Exit
from common.flags import OUR_NETWORK
from common.ranks import identity

if TYPE_CHECKING:
    import torch
    from torch import nn

    from common.diffusion import Schedules

ROOT = Path(__file__).parent.parent
MODULE_FILES = {
    "ae-mlp": "mnist_ae/model.py",
    "ae-conv": "mnist_ae/model_conv.py",
    "lddpm": "mnist_latent_diffusion/model.py",
    "ddpm": "mnist_single_digit/model.py",
}
NETWORKS = {"lddpm": "LatentDenoiser", "ddpm": "Denoiser"}  # the class that a network's module defines


def module_of(model: str, network: str = OUR_NETWORK) -> ModuleType:
    """The module that defines the networks of a model type (a key of `MODULE_FILES`), by its folder's name and its own.

    network: another module beside it, whose faults become an Exit of one line.
    """
    return _module(model, network)


@cache
def _module(model: str, network: str) -> ModuleType:
    path = network_file(model, network)
    name = f"{path.parent.name}.{path.stem}"  # so that another process finds what was pickled in this one
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if network == OUR_NETWORK:
        spec.loader.exec_module(module)
    else:
        with _in_one_line(path):
            spec.loader.exec_module(module)
    return module


# --- networks of one's own --------------------------------------------------------------------------------------------


def network_file(model: str, network: str) -> Path:
    """The file of --network, beside the model.py of a model type. Raises Exit(NO_MODEL_SPECIFIED) if there is none."""
    ours = ROOT / MODULE_FILES[model]
    if network == OUR_NETWORK:
        return ours
    path = ours.parent / f"{network}.py"
    if not network.isidentifier() or not path.is_file() or path.name not in os.listdir(path.parent):
        # a checkpoint may say anything; and some disks find a file by its name in another case
        raise _wrong(f"--network {network}: there is no {network}.py in {ours.parent.name}, beside {ours.name}")
    return path


def named(model: str, network: str) -> str:
    """How the name of a run with this network begins."""
    return model if network == OUR_NETWORK else f"{model}-{network}"


def build_network(
    model: str,
    network: str,
    shape: tuple[int, ...],
    schedules: Schedules,
    *,
    typed: Collection[str] = (),
    recorded: str | None = None,
    **offered: Any,
) -> nn.Module:
    """The network of a diffusion run: the class `NETWORKS[model]` of the module `network` beside model.py.

    Its constructor gets `schedules`, and those of `offered`, that it has parameters for; `typed` are those that the
    user typed as flags. One that is not ours is tried on two rows: x (2, *shape), t (2,) from 0 to T - 1 and labels
    (2,), 0 and its "not told"; or only x and t. It must return epsilon, of x's shape, as must its `predictor`, if it
    has one. `recorded` is the run's `network_digest`: that the file has changed since is logged as a warning.
    Raises Exit(NO_MODEL_SPECIFIED) if it is not as wanted, Exit(USAGE) if it has no use for what was typed.
    """
    module, path = module_of(model, network), network_file(model, network)
    kind = getattr(module, NETWORKS[model], None)
    if kind is None:
        raise _wrong(f"{_short(path)} defines no class {NETWORKS[model]}")
    offered |= {"schedules": schedules}
    if network == OUR_NETWORK:
        return kind(**offered)
    with _in_one_line(path):
        names = inspect.signature(kind).parameters.keys()
        if unused := [name for name in typed if name not in names]:
            raise Exit(USAGE, f"{flag_of(unused[0])} has no effect on --network {network}: drop it", everywhere=True)
        net = kind(**{name: value for name, value in offered.items() if name in names})
        if not callable(getattr(net, "to", None)) or not hasattr(net, "state_dict"):
            raise _wrong(f"{_short(path)}: its {NETWORKS[model]} is no torch.nn.Module")
        net.to(schedules.beta.device)
        _try(net, shape, schedules, path)
    if recorded not in (None, network_digest(model, network)) and not identity().rank:
        changed = f"{_short(path)} has changed since this run was trained with it"
        log = logging.getLogger("train")
        (log.warning if log.handlers else console.warn)(f"{changed}: the weights may mean something else in it")
    return net


def trained_network(
    read: tuple[Path, ckpt.State], build: Callable[..., nn.Module], device: torch.device | str
) -> tuple[nn.Module, Schedules]:
    """The network of a diffusion checkpoint, with its averaged weights, for drawing; and its schedules.

    read: the checkpoint's (path, state); build(flags, schedules): the experiment's.
    Raises Exit(MODEL_MISMATCH) if the weights are another network's.
    """
    from common.diffusion import schedules_of

    path, state = read
    schedules = schedules_of(state["args"], device)
    net = build(state["args"], schedules)
    ckpt.load_averaged(net, state, path)
    return net.to(device).eval().requires_grad_(False), schedules


def guiding_network(
    source: str | Path, guided: ckpt.State, build: Callable[..., nn.Module], device: torch.device | str
) -> nn.Module:
    """The network of the checkpoint at `source`, to guide that of the checkpoint `guided` (see `sampling.guided`).

    Raises Exit(MODEL_MISMATCH) if it knows another noise, other latents or data, or not all of the labels, Exit(USAGE)
    if it is that network.
    """
    path, state = ckpt.read_model(source, (ckpt.infer_model_from_checkpoint(guided),))
    if state["args"]["only_digit"] not in (None, guided["args"]["only_digit"]):
        raise Exit(MODEL_MISMATCH, f"{path} cannot guide: it has seen {state['args']['only_digit']}s only")
    if guided["args"].get("labelled", True) and not state["args"].get("labelled", True):
        raise Exit(MODEL_MISMATCH, f"{path} cannot guide: its network takes no labels")
    for name, before in (("T", None), ("schedule", "linear"), ("beta_start", None), ("beta_end", None)):
        here, there = (flags.get(name, before) for flags in (guided["args"], state["args"]))
        if here != there:
            raise Exit(MODEL_MISMATCH, f"{path} cannot guide: its run has {flag_of(name)} {there}, this one {here}")
    if guided["args"].get("ae_weights") != state["args"].get("ae_weights"):
        raise Exit(MODEL_MISMATCH, f"{path} cannot guide: its latents are those of another autoencoder")
    if dataset_of(guided["args"]) != dataset_of(state["args"]):
        raise Exit(MODEL_MISMATCH, f"{path} cannot guide: it has learned from other data")
    weights, own = ckpt.averaged_weights(guided), ckpt.averaged_weights(state)
    tensors = {name: value for name, value in weights.items() if hasattr(value, "equal")}  # beside a net's extra state
    if weights.keys() == own.keys() and all(value.equal(own[name]) for name, value in tensors.items()):
        raise Exit(USAGE, f"{path} cannot guide: it is what is to be guided; name a weaker one, such as an early epoch")
    if _apart(weights, own):
        raise Exit(MODEL_MISMATCH, f"{path} cannot guide: it standardises latents by those of other digits")
    return trained_network((path, state), build, device)[0]


def _apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Do two latent networks standardise differently? (Another split of the same digits moves it a little.)"""
    if "latent_mean" not in one:
        return False
    (mean, std), (mean2, std2) = ((each["latent_mean"].float(), each["latent_std"].float()) for each in (one, other))
    return bool((((mean2 - mean) / std).abs() > 0.3).any() or ((std2 / std).log().abs() > 0.3).any())


def network_digest(model: str, network: str) -> str:
    """12 hex digits of the SHA-256 of the file of --network."""
    return hashlib.sha256(network_file(model, network).read_bytes()).hexdigest()[:12]


def _try(net: nn.Module, shape: tuple[int, ...], schedules: Schedules, path: Path) -> None:
    import torch

    from common.diffusion import ask, null_label_of, predictor_of

    where, last = schedules.beta.device, schedules.T - 1
    x, t = torch.zeros(2, *shape, device=where), torch.tensor([0, last], device=where)
    labels = torch.tensor([0, null_label_of(net)], device=where)
    net.eval()
    with torch.enable_grad():
        epsilon = ask(net, x.clone(), t, labels)
    let_go(net)
    if getattr(epsilon, "shape", None) != x.shape:
        given = getattr(epsilon, "shape", None)
        given = type(epsilon).__name__ if given is None else tuple(given)
        raise _wrong(f"{_short(path)}: for x of shape {tuple(x.shape)} it returns {given}; the noise has x's shape")
    if not (epsilon.requires_grad or torch.is_inference_mode_enabled()):
        raise _wrong(f"{_short(path)}: what it returns depends on no parameter of it, so there is nothing to train")
    if hasattr(net, "predictor"):
        with torch.no_grad():
            drawn = predictor_of(net)(x, last, labels)
        if getattr(drawn, "shape", None) != x.shape:
            raise _wrong(f"{_short(path)}: what its predictor() draws with has another shape than x")
    copy.deepcopy(net)  # as training does, for its average
    net.train()


def let_go(net: nn.Module) -> None:
    """Detach what a forward kept in attributes of its graph, of which no copy can be made as of the network."""
    for module in net.modules():
        _detached(vars(module), set())


def _detached(kept: Any, seen: set[int]) -> Any:
    """What was kept, with its tensors detached: those of lists and dicts, each looked into once, in place."""
    import torch

    if isinstance(kept, torch.Tensor):
        return kept if kept.is_leaf else kept.detach()
    if type(kept) is tuple:
        return tuple(_detached(one, seen) for one in kept)
    if type(kept) not in (list, dict) or id(kept) in seen:
        return kept
    seen.add(id(kept))
    for place, one in list(kept.items() if type(kept) is dict else enumerate(kept)):
        kept[place] = _detached(one, seen)
    return kept


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _wrong(text: str) -> Exit:
    return Exit(NO_MODEL_SPECIFIED, text, everywhere=True)  # several processes build the same network


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Whatever goes wrong in somebody's module becomes one line, with the place in the module where it did."""
    try:
        yield
    except Exit:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        place = f", line {lines[-1]}" if lines else ""
        said = next(iter(str(error).splitlines()), "")
        raise _wrong(f"{_short(path)}{place}: {type(error).__name__}: {said}") from None
