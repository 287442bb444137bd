"""Apple's GPU as far as its rules go, on any machine: no float64, no numpy, and no arithmetic with another device."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)
ACROSS = ("aten.copy_", "aten._to_copy", "aten.index", "aten._index_put", "aten._unsafe_index")
"""Operations that take tensors of two devices: copies, and indices on the CPU."""


class OnMps(torch.Tensor):
    """A tensor that says that it is on the device, and keeps its numbers in one on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnMps({self.inner})"

    @property
    def device(self):
        return DEVICE

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def refuse_float64():
    raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


def is_here(device):
    return torch.device(device).type == "mps"


def run(function, args, kwargs):
    """Computes on the CPU what the device would, if it would."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnMps)]
    device, name = kwargs.get("device"), str(function)
    made_here = bool(here) if device is None else is_here(device)
    if here:
        others = [tensor for tensor in tensors if not isinstance(tensor, OnMps)]
        if kwargs.get("dtype") is torch.float64 or any(t.dtype is torch.float64 and t.ndim == 0 for t in others):
            refuse_float64()
        if any(tensor.ndim for tensor in others) and not name.startswith(ACROSS):
            raise RuntimeError(f"{function}: expected all tensors to be on the same device")
        if name.startswith("aten.copy_"):
            made_here = isinstance(args[0], OnMps)
    if device is not None and made_here:
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(tensor.inner): tensor for tensor in here}  # an operation in place returns what it was given
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnMps) else leaf, (args, kwargs))

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or not made_here or id(value) in known:
            return known.get(id(value), value)
        return refuse_float64() if value.dtype is torch.float64 else OnMps(value)

    return tree_map(wrapped, function(*args, **kwargs))


class Creating(TorchDispatchMode):
    """Creates tensors on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Moving(TorchFunctionMode):
    """Moves tensors to the device and back, for which torch would ask Apple's backend."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cpu:
            return moved(args[0], "cpu")
        if function in (torch.tensor, torch.as_tensor) and is_here(kwargs.get("device") or "cpu"):
            del kwargs["device"]
            return moved(function(*args, **kwargs), DEVICE)
        if function is torch.Tensor.to:
            other = next((a for a in args[1:] if isinstance(a, torch.Tensor)), None)
            device, dtype = (other.device, other.dtype) if other is not None else target(*args[1:], **kwargs)
            tensor = args[0] if dtype is None or dtype == args[0].dtype else args[0].type(dtype)
            return tensor if device is None else moved(tensor, device)
        return function(*args, **kwargs)


def target(*args, device=None, dtype=None, **_):
    for argument in args:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, str | torch.device):
            device = argument
    return device, dtype


def moved(tensor, device):
    if is_here(device) == isinstance(tensor, OnMps):
        return tensor
    if not is_here(device):
        return tensor.inner.clone()
    return refuse_float64() if tensor.dtype is torch.float64 else OnMps(tensor.detach().clone())


@contextmanager
def fake_mps(monkeypatch):
    """Yields the device, on which tensors can be created and to which they can be moved in the `with` block."""
    monkeypatch.setattr("prune_callbacks.anatomy.changeable.plain", lambda tensor: True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper is no other data of a parameter
    try:
        with Creating(), Moving(), torch.no_grad():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
