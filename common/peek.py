"""A look into any PyTorch or safetensors file: no torch, no tensors read, its pickle never run.

A pickle is a small program that may call anything. Here it is executed with inert stand-ins for everything it names:
tensors become their type and shape, and every other object a `Stranger` that remembers its name and contents.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.files import no_file

_MAGIC = 0x1950A86A20F9469CFC6C  # opens a file of torch's old format, before it wrote zip archives
_BYTES = {
    "ComplexDouble": 16,
    "Double": 8,
    "Long": 8,
    "ComplexFloat": 8,
    "Float": 4,
    "Int": 4,
    "QInt32": 4,
    "Half": 2,
    "BFloat16": 2,
    "Short": 2,
    "QUInt4x2": 0.5,
    "QUInt2x4": 0.25,
}
_NAMES = {"Double": "float64", "Float": "float32", "Half": "float16", "Long": "int64", "Int": "int32", "Short": "int16"}
_NAMES |= {"Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128", "ComplexFloat": "complex64"}
_DTYPE = re.compile(r"bool|[a-z]+(\d+)\w*")  # uint16, float8_e4m3fn: types that have no storage class of their own
_PLAIN = re.compile(r"\w*Storage|Tensor|per_\w+_affine\w*|" + _DTYPE.pattern)  # names in torch that only describe
_SAFE = re.compile(r"(BOOL|BF|F|I|U|C)(\d*)(\w*)")  # safetensors' F32, BF16, F8_E4M3
_SAFE_NAMES = {"BOOL": "bool", "BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex"}
SAFETENSORS = "a safetensors file"
_OTHERS = {b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file"}  # by their first bytes


class Tensor(NamedTuple):
    """Stands for a tensor: type, shape, and what its elements would take in memory.

    held: of a sparse tensor the tensors that it consists of, its elements before their indices.
    """

    dtype: str
    shape: tuple[int, ...]
    element_size: float
    held: tuple[Tensor, ...] = ()

    def numel(self) -> int:
        return self.held[0].numel() if self.held else math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.held) if self.held else math.ceil(self.numel() * self.element_size)


class Safetensors(dict):
    """The tensors in a safetensors file and the notes in its metadata, by their names."""


class Stranger:
    """Stands for an object of a class that is neither a tensor nor a plain type: it can be filled, but does nothing."""

    qualified_name = "?"

    contents: dict[str, Any]

    def __new__(cls, *args: Any, **_kwargs: Any) -> Stranger:  # pickle may call only this, and not __init__
        self = super().__new__(cls)
        self.contents = {f"argument {i}": value for i, value in enumerate(args)}
        return self

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # what classes with __slots__ give
            state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, dict | None) for s in state) else {}
        self.contents.update(state if isinstance(state, dict) else {"state": state})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.contents[str(key)] = value

    def append(self, value: Any) -> None:
        self.contents[f"item {len(self.contents)}"] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append

    def __hash__(self) -> int:
        return id(self)


class _Storage(NamedTuple):
    kind: str


def _rebuild_tensor(storage: Any, _offset: int, shape: Any, *_rest: Any) -> Tensor:
    kind = storage.kind.removesuffix("Storage") if isinstance(storage, _Storage) else "?"
    return Tensor(_NAMES.get(kind, kind.lower()), tuple(int(n) for n in shape), _BYTES.get(kind, 1))


def _typed(dtype: Any, shape: Any) -> Tensor:
    name = getattr(dtype, "__name__", "?")
    bits = int(match[1] or 8) if (match := _DTYPE.fullmatch(name)) else 8
    return Tensor(name, tuple(int(n) for n in shape), bits / 8)


def _rebuild_sparse(_layout: Any, data: Any) -> Tensor:
    *indices, values = (part for part in data if isinstance(part, Tensor))
    shape = next(part for part in data if type(part) is tuple)
    return Tensor(f"sparse {values.dtype}", tuple(int(n) for n in shape), values.element_size, (values, *indices))


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): lambda _storage, _offset, shape, _stride, _grad, _hooks, dtype, *_rest: (
        _typed(dtype, shape)
    ),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda dtype, shape, *_rest: _typed(dtype, shape),
    ("torch._utils", "_rebuild_wrapper_subclass"): lambda _cls, dtype, shape, *_rest: _typed(dtype, shape),
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse,
    ("torch._utils", "_rebuild_nested_tensor"): lambda buffer, *_rest: buffer._replace(dtype=f"nested {buffer.dtype}"),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_rest: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_rest: data,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): lambda data, *_rest: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _type, args, _state: rebuild(*args),
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], strangers: set[str]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.strangers = strangers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        qualified = f"{module}.{name}"
        if not (module in ("torch", "torch.storage") and _PLAIN.fullmatch(name)):
            self.strangers.add(qualified)
        return type(name, (Stranger,), {"qualified_name": qualified})

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else None
        return _Storage(getattr(kind, "__name__", "?"))


def read(path: str | Path) -> tuple[Any, set[str]]:
    """(the object in the file, the names of the classes and functions in it that are not plain).

    Raises ValueError with a reason in one line if it is neither a PyTorch nor a safetensors file, OSError if it cannot
    be opened.
    """
    strangers: set[str] = set()
    if reason := no_file(path):
        raise ValueError(reason)
    with open(path, "rb") as file:  # zipfile would take a disk's error here for a damaged archive
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65_557))
        file.read()
        file.seek(0)
        other = format_of(file, Path(path).suffix)
    if other == SAFETENSORS:
        return _safetensors(Path(path)), strangers
    if other:
        raise ValueError(f"{other}, not a PyTorch file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                with archive.open(names[0]) as file:
                    return _Unpickler(file, strangers).load(), strangers
        with open(path, "rb") as file:
            if _Unpickler(file, set()).load() != _MAGIC:
                raise ValueError("not a PyTorch file")
            for _ in range(2):  # protocol version and system information
                _Unpickler(file, set()).load()
            return _Unpickler(file, strangers).load(), strangers
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"truncated, or not a PyTorch file ({type(error).__name__})") from None


def format_of(file: IO[bytes], suffix: str) -> str:
    """What a file is that is not PyTorch's, whole or not: "a NumPy array", `SAFETENSORS`, ...; else ""."""
    start = file.read(9)
    if start.startswith(b"PK"):
        with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged one can raise anything
            names = archive.namelist()
            if not any(name.endswith("/data.pkl") for name in names):
                return "NumPy arrays" if any(name.endswith(".npy") for name in names) else "a zip archive"
    if start[4:8] == bytes(4) and (start[8:] == b"{" or suffix == ".safetensors"):  # a length, then JSON
        return SAFETENSORS
    return next((name for magic, name in _OTHERS.items() if start.startswith(magic)), "")


def _safetensors(path: Path) -> Safetensors:
    """The header of a safetensors file (huggingface.co/docs/safetensors): its length, then JSON. Raises ValueError."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size - 8 - length  # of the tensors
        text = file.read(length) if size >= 0 else b""
    try:
        header = json.loads(text or b"{}")
        content = Safetensors(header.pop("__metadata__", {}))
        ends = [0]
        for name, entry in header.items():
            kind, bits, rest = _SAFE.fullmatch(entry["dtype"]).groups()
            shape = tuple(int(n) for n in entry["shape"])
            content[name] = Tensor(f"{_SAFE_NAMES[kind]}{bits}{rest.lower()}", shape, int(bits or 8) / 8)
            ends.append(int(entry["data_offsets"][1]))
    except Exception as error:  # whatever the JSON holds
        raise ValueError(f"a safetensors file, but its header is damaged ({type(error).__name__})") from None
    if size < max(ends) or not text:
        raise ValueError("a safetensors file, but truncated")
    return content


def tensors_in(value: Any) -> dict[str, Tensor]:
    """All tensors within a read object, by their dotted names (a module's as its state_dict would call them)."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # a file may hold objects that contain themselves, or nest them thousands deep
    waiting = [(value, "")]
    while waiting:
        value, name = waiting.pop()
        if isinstance(value, Tensor):
            found[name or "tensor"] = value
            continue
        inner = value.contents if isinstance(value, Stranger) else value
        inner = dict(enumerate(inner)) if isinstance(inner, list | tuple) else inner
        if isinstance(inner, dict) and id(value) not in seen:
            seen.add(id(value))
            hidden = ("_parameters", "_buffers", "_modules")
            names = (name if key in hidden else ".".join(filter(None, (name, str(key)))) for key in inner)
            waiting.extend(reversed(list(zip(inner.values(), names, strict=True))))
    return found
