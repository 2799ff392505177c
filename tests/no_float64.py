"""A pretended ``mps`` device: tensors that live on the CPU, say they do not, and refuse float64.

There is no such device to test on. These tensors do what its own do with a dtype that it lacks:
they raise where one would be made, whatever the operator. What is moved to the CPU is an ordinary
tensor from then on, as is what is made there.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

LACKING = (torch.float64, torch.complex128)
DEVICE = torch.device("mps")


class Pretended(torch.Tensor):
    """To autograd a tensor of the CPU, which has no engine for a device that is not there."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in LACKING:
            raise TypeError(f"the pretended device has no {inner.dtype}")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Pretended({self.inner})"

    def cpu(self):
        return _ToCpu.apply(self)

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        changed = self if dtype is None else super().to(dtype)  # before it moves, as there
        return changed.cpu() if device is not None and device.type == "cpu" else changed

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.clone()

    @staticmethod
    def backward(ctx, grad):
        return Pretended(grad)


def _run(function, args, kwargs):
    """On the CPU; what comes out is of the pretended device."""
    given = {}

    def inner(t):
        given[id(t.inner)] = t
        return t.inner

    args, kwargs = tree_map_only(Pretended, inner, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")

    def outer(t):
        # In-place operators give back what they were given.
        return (
            given.get(id(t))
            if id(t) in given
            else Pretended(t)
            if isinstance(t, torch.Tensor)
            else t
        )

    return tree_map(outer, function(*args, **kwargs))


class _FromCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Pretended(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner


class _Moves(TorchFunctionMode):
    """Moves of ordinary tensors, with gradients that come back to the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and type(args[0]) is torch.Tensor:
            x, *rest = args
            if rest and isinstance(rest[0], torch.Tensor):
                rest = [rest[0].device, rest[0].dtype]
            device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
            if device == DEVICE:
                if x.requires_grad and x.dtype in LACKING and dtype is not None:
                    raise TypeError(
                        f"the gradient would be {x.dtype} there: the pretended device "
                        f"has no {x.dtype}"
                    )
                return _FromCpu.apply(x if dtype is None else x.to(dtype))
        return function(*args, **kwargs)


@contextmanager
def pretended_device():
    """A block in which ``device="mps"`` makes pretended tensors."""
    with _Moves(), _Factories():
        yield


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == DEVICE:
            return _run(function, args, dict(kwargs))
        return function(*args, **kwargs)


def moved(module):
    """``module.to("mps")``."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module._apply(lambda t: Pretended(t.detach()))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
