"""A device that is not there: tensors that say they are on `mps` or `cuda`, and are as choosy as if they were.

    with FakeDevice("mps") as device:
        call(LATENT, "train.py", "--device", "mps", ...)
    device.transfers

Inside the block `.to("mps")`, `device="mps"` and the availability tests of torch mean this device. Its tensors are
wrappers around tensors on the CPU, so results are the CPU's. What the wrappers and the mode around them add:

- float64 is refused where the device has none (MPS), as soon as a tensor of that type would be on it;
- operations that mix the device's tensors with the CPU's are refused; numbers and CPU tensors of no dimension may take
  part, as on real devices, and so may index tensors, which are then copied;
- every copy between host and device is counted, with the line of this repository that caused it, and so is every
  operation whose result the host has to wait for (`item`, `bool`, `tolist`, boolean masks, `nonzero`);
- pinned memory is known, so that a copy that need not block can be told from one that must.

What it cannot show: speed, rounding, kernels that a device lacks or that do not repeat exactly, autocast (its rules go
by the tensor's true backend), streams, memory. Parameters are replaced, not changed in place, by `module.to(device)`.
"""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REPO = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
SIZED_BY_VALUES = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
FUSED = (aten._fused_adam_, aten._fused_adamw_)


class Transfer(NamedTuple):
    """kind: "to host", or "to device" (from memory that is not pinned: the host waits), or "to device, pinned"."""

    kind: str
    operation: str
    size: int  # numbers
    line: str  # of this repository


class DeviceTensor(torch.Tensor):
    """`inner`, a tensor on the CPU, as if it were on the device of `fake`."""

    inner: torch.Tensor
    fake: FakeDevice

    @staticmethod
    def __new__(cls, inner: torch.Tensor, fake: FakeDevice) -> DeviceTensor:
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        # C++ takes the wrapper for the CPU's, because nothing there could serve another device; Python sees `device`
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device="cpu", **how)
        tensor.inner, tensor.fake = inner, fake
        return tensor

    @property
    def device(self) -> torch.device:
        return self.fake.device

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        same = (device or self.device).type == self.device.type and (dtype or self.dtype) == self.dtype
        if same and not memory_format and not copy:
            return self
        how = {"dtype": dtype, "device": device, "non_blocking": non_blocking, "memory_format": memory_format}
        return aten._to_copy(self, **{name: value for name, value in how.items() if value is not None})

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        some = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor))
        return some.fake.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner} on {self.fake.device}"

    def __deepcopy__(self, memo: dict) -> DeviceTensor:
        copy = DeviceTensor(self.inner.clone(), self.fake).requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ("inner", "fake")})
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: int) -> Any:  # a file holds it as one from the CPU
        self.fake.count("to host", "save", self.inner)
        return self.inner.__reduce_ex__(protocol)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()


class _Indexed(TorchFunctionMode):
    """Calls that name the device without its index, which torch would ask a driver for, name it with one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        named = (self.device.type, torch.device(self.device.type))
        args = tuple(self.device if isinstance(a, str | torch.device) and a in named else a for a in args)
        kwargs = {k: self.device if k == "device" and v in named else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Watching(TorchDispatchMode):
    """Brings every operation to `fake`."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.fake.run(func, args, kwargs or {})


class FakeDevice:
    """See above. kind: "mps" or "cuda". `transfers` lists what was copied, in order."""

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind, 0)
        self.transfers: list[Transfer] = []
        self._pinned: list[torch.Tensor] = []
        self._entered, self._watching = ExitStack(), _Watching(self)

    def __enter__(self) -> FakeDevice:
        if torch.cuda.is_available() or torch.backends.mps.is_available():
            raise RuntimeError("there is a real device here")
        if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
            pytest.skip("this torch is older than what the stand-in knows of its insides")
        yes = functools.cache(lambda: True)  # torch wants to unwrap it
        replaced = {"torch.backends.mps.is_available": yes}
        if self.device.type == "cuda":
            torch._C._ensureCUDADeviceGuardSet()
            replaced = {"torch.cuda.is_available": yes, "torch.cuda.device_count": lambda: 1}
            replaced |= {"torch.cuda._lazy_init": lambda: None, "torch.cuda.manual_seed_all": lambda _seed: None}
        group = torch._C._group_tensors_by_device_and_dtype

        def grouped(lists: list, *how: Any) -> dict:  # C++ finds them all on the CPU
            return {(value[0][0][0].device, kind): value for (_, kind), value in group(lists, *how).items()}

        replaced["torch._C._group_tensors_by_device_and_dtype"] = grouped
        for name, value in replaced.items():
            self._entered.enter_context(mock.patch(name, value))
        for switch in (
            torch._C._set_only_lift_cpu_tensors,  # torch.tensor(..., device=...) makes it on the CPU, then moves it
            torch.__future__.set_overwrite_module_params_on_conversion,  # wrappers cannot be put into the old ones
        ):
            switch(True)
            self._entered.callback(switch, False)
        self._entered.enter_context(_Indexed(self.device))
        self._entered.enter_context(self._watching)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def counted(self, kind: str = "") -> list[str]:
        """The transfers whose kind begins with `kind`, as text."""
        return [f"{t.kind}: {t.operation} of {t.size} at {t.line}" for t in self.transfers if t.kind.startswith(kind)]

    def count(self, kind: str, operation: object, tensor: torch.Tensor) -> None:
        frame: Any = sys._getframe(1)
        while frame and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(str(REPO))):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "?"
        self.transfers.append(Transfer(kind, str(operation), tensor.numel(), line))

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """One operation: checked, counted, and computed on the CPU."""
        if torch.is_inference_mode_enabled() and func._can_decompose():  # autograd, which does that, is left out then
            with self._watching:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        host = [leaf for leaf in leaves if not isinstance(leaf, DeviceTensor)]
        packet, wanted = func.overloadpacket, kwargs.get("device")
        ours = torch.device(wanted).type == self.device.type if wanted is not None else bool(here)
        if packet is aten._pin_memory:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if packet is aten.is_pinned:
            return any(args[0] is pinned for pinned in self._pinned)
        if not here and not ours:
            return func(*args, **kwargs)
        moving = packet in (aten._to_copy, aten.copy_)
        if moving:
            self._count_move(func, args, ours=isinstance(args[0], DeviceTensor) if packet is aten.copy_ else ours)
            if packet is aten._to_copy:
                self._check_dtype(args[0], func, ours)
        elif packet in INDEXING:
            self._check_index(func, args)
        else:
            strangers = [tensor for tensor in host if tensor.dim() or packet in FUSED or tensor is args[0]]
            if here and strangers:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, "
                    f"{self.device} and cpu! ({func} of shapes {[tuple(tensor.shape) for tensor in leaves]})"
                )
            if ours and kwargs.get("generator") is not None:
                raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")
            if here and packet in SIZED_BY_VALUES:
                self.count("to host", func, here[0])
        if wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        results = func(*inner_args, **inner_kwargs)
        if here and any(isinstance(leaf, bool | int | float) for leaf in tree_leaves(results)):
            self.count("to host", func, here[0])
        if packet is aten.copy_:
            return args[0]
        known = {id(tensor.inner): tensor for tensor in here}  # what an operation in place gives back
        return tree_map(lambda leaf: self._wrapped(leaf, known, func, ours), results)

    def _wrapped(self, leaf: Any, known: dict[int, DeviceTensor], func: Any, ours: bool) -> Any:
        if not isinstance(leaf, torch.Tensor) or not ours:
            return leaf
        self._check_dtype(leaf, func, ours)
        if id(leaf) in known:
            return known[id(leaf)]
        with torch.inference_mode(leaf.is_inference()):  # a view of an ordinary tensor is ordinary, also in that mode
            return DeviceTensor(leaf, self)

    def _check_dtype(self, tensor: torch.Tensor, func: Any, ours: bool) -> None:
        if ours and self.device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                f"Please use float32 instead. ({func})"
            )

    def _count_move(self, func: Any, args: tuple, ours: bool) -> None:
        source = args[1] if func.overloadpacket is aten.copy_ else args[0]
        if isinstance(source, DeviceTensor):
            if not ours:
                self.count("to host", func, source)
        elif ours:
            pinned = any(source is tensor for tensor in self._pinned)
            self._pinned = [tensor for tensor in self._pinned if tensor is not source]
            self.count("to device, pinned" if pinned else "to device", func, source)

    def _check_index(self, func: Any, args: tuple) -> None:
        if not isinstance(args[0], DeviceTensor) or not all(
            isinstance(v, DeviceTensor) or v.dim() == 0 for v in args[2:3]
        ):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({func})")
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, DeviceTensor):
                self.count("to device", func, index)
            elif index.dtype in (torch.bool, torch.uint8):
                self.count("to host", func, index)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf
