"""Loading an experiment's network module by file: several folders have a `model.py`, so plain imports would clash."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
MODULE_FILES = {
    "ae-mlp": "mnist_ae/model.py",
    "ae-conv": "mnist_ae/model_conv.py",
    "lddpm": "mnist_latent_diffusion/model.py",
    "ddpm": "mnist_single_digit/model.py",
}


@cache
def module_of(model: str) -> ModuleType:
    """The module that defines the networks of a model type (a key of `MODULE_FILES`), under a name of its own."""
    name = f"{model.replace('-', '_')}_module"
    spec = importlib.util.spec_from_file_location(name, ROOT / MODULE_FILES[model])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be found by name, as dataclasses and pickling want
    spec.loader.exec_module(module)
    return module
