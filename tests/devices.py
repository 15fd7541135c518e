"""A pretended Apple GPU in plain Python: tensors that say they are on "mps" and lie on the CPU.

Inside `pretended_device()` the device "mps" exists, and refuses what the real one refuses: numbers
of 64 bits with a fraction, and operations on tensors of several devices. It also refuses
copies that do not wait (`non_blocking`), which on the real one read memory that may be gone.

What it computes is what the CPU computes, so that results can be compared bit for bit. It cannot
show which operations the real device lacks: `python -m benchmarks.device_check` does, on one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("mps:0")
REFUSED = (torch.float64, torch.complex128)
# Operations that take a tensor of the device and one of the CPU on the real device too.
MIXING = {"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor of the pretended device, whose numbers lie in `raw`, a tensor on the CPU.

    To PyTorch's own code it is a tensor without memory (device "meta"), since autograd would ask
    the library of a device that is not there.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device="meta",
        )
        self.raw = raw
        return self

    def __init__(self, raw: Tensor) -> None: ...

    device = property(lambda self: DEVICE)
    is_meta = property(lambda self: False)
    is_mps = property(lambda self: True)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, OnDevice) or other.shape != self.shape:
            raise NotImplementedError("pretended device: .data = … of another shape or device")
        self.raw = other.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin = OnDevice(self.raw.clone()).requires_grad_(self.requires_grad)
            twin.__dict__.update(
                {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "raw"}
            )
            memo[id(self)] = twin
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r} on {DEVICE}"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU, its results on the device that they would be on."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    name = function.overloadpacket.__name__
    _refuse_mixing(name, args, tensors, ours)
    on_device = bool(ours)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        if (on_device or ours) and kwargs.get("non_blocking"):
            raise RuntimeError("pretended device: a copy that does not wait (non_blocking)")
        if on_device or ours:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    out = function(*pytree.tree_map(_raw, args), **pytree.tree_map(_raw, kwargs))
    if name == "copy_":
        on_device = isinstance(args[0], OnDevice)

    def wrap(result: Any) -> Any:
        if not isinstance(result, Tensor) or not on_device:
            return result
        if result.dtype in REFUSED:
            raise TypeError(
                f"Cannot convert a MPS Tensor to {result.dtype} as the MPS framework doesn't "
                f"support it (in {function})."
            )
        written = [tensor for tensor in ours if tensor.raw is result]  # in place
        return written[0] if written else OnDevice(result)

    return pytree.tree_map(wrap, out)


def _refuse_mixing(name: str, args: tuple, tensors: list[Tensor], ours: list[OnDevice]) -> None:
    others = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() and not t.is_meta]
    fine = name in MIXING and (name.endswith("copy_") or isinstance(args[0], OnDevice))
    if ours and others and not fine:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and {others[0].device} (in {name})."
        )


def _has_ours(values: Any) -> bool:
    return any(isinstance(leaf, OnDevice) for leaf in pytree.tree_leaves(values))


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


class _Named(TorchFunctionMode):
    """Calls the device by its number: PyTorch would ask its library which "mps" is the current.

    `inside` says that the call under way has a tensor of the device: what PyTorch's own code then
    makes on "meta", where it believes that tensor to be, belongs on the device.
    """

    inside = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = pytree.tree_map(_numbered, kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            made = function(*args, **{**kwargs, "device": torch.device("cpu")})  # past all modes
            return made.to(DEVICE)
        outer, self.inside = self.inside, _has_ours((args, kwargs))
        try:
            return function(*map(_numbered, args), **kwargs)
        finally:
            self.inside = outer


def _numbered(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value) == DEVICE.type
    return DEVICE if named else value


class _Dispatch(TorchDispatchMode):
    """Sees operations that have no tensor of the device yet: `torch.zeros(device="mps")`, `to`."""

    def __init__(self, named: _Named) -> None:
        super().__init__()
        self.named = named

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.named.inside and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": DEVICE}
        return _run(function, args, kwargs)


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Inside, "mps" is a device that modules and tensors can be moved to; yields it."""
    generator = torch.Generator("cpu")
    patched: dict[str, Callable[..., Any]] = {
        "_get_default_mps_generator": lambda: generator,
        "manual_seed": generator.manual_seed,
        "synchronize": lambda: None,
    }
    named = _Named()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    try:
        with mock.patch.multiple(torch.mps, **patched), named, _Dispatch(named):
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
