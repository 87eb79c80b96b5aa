"""Tensors that say they are on a GPU, where there is none: they have shapes, dtypes and a device, and no values.

FakeTensorMode refuses an operation on tensors of two devices as CUDA does. Tensors of the host stay real, so that code
which computes on the host and copies to a GPU, and back, runs as it is. What makes the host wait is counted.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
_CUDA, _META, _DEVICES = 1, 14, 21  # of c10::DeviceType
Module = TypeVar("Module", bound=nn.Module)


class FakeCuda(TorchDispatchMode):
    """Operations on CUDA are faked, those of the host are done. `syncs`: those for which the host waits, by kind."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = tree_map_only(torch.device, _meant, kwargs or {})
        inputs, _ = tree_flatten((args, kwargs))
        on_gpu = any(isinstance(each, FakeTensor) for each in inputs)
        to_gpu = any(isinstance(each, torch.device) and each.type == "cuda" for each in inputs)
        if not on_gpu and not to_gpu:
            with unset_fake_temporarily():
                return func(*args, **{**kwargs, **({"pin_memory": False} if "pin_memory" in kwargs else {})})
        if not on_gpu:  # a copy to the GPU, or a new tensor there
            args = tree_map_only(Tensor, self._fakes.from_tensor, args)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs["value read on the host"] += 1
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            self.syncs["size read on the host"] += 1
        if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu":
            self.syncs["copy to the host"] += 1
            return args[0]
        return tree_map_only(FakeTensor, self._arrived, func(*args, **kwargs))

    def _arrived(self, tensor: FakeTensor) -> Tensor:
        """A result on the host as a real tensor of ones."""
        if tensor.device.type != "cpu":
            return tensor
        self.syncs["copy to the host"] += 1
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype)


def _meant(device: torch.device) -> torch.device:
    """The device of an argument: PyTorch asks the guard which device "cuda" without a number is, and gets "meta"."""
    return CUDA if device.type == "meta" else device


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within it, device "cuda" exists. Autocast for CUDA and the backward pass are not supported by a CPU build."""
    _set_device_guard()
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, FakeCuda(fakes) as mode:
        yield mode


def _set_device_guard() -> None:
    """Give CUDA a device guard that does nothing, that of device "meta", where the build has none.

    PyTorch sets one itself, but only in a build for CUDA. It stays, since tensors that live longer ask for it too.
    """
    (library,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")
    guards = (ctypes.c_void_p * _DEVICES).in_dll(ctypes.CDLL(str(library)), _GUARDS)
    guards[_CUDA] = guards[_CUDA] or guards[_META]


def on_cuda(module: Module) -> Module:
    """The module, whose parameters and buffers are now fake ones on CUDA. Call within `fake_cuda`."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(CUDA)
                child._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(CUDA)
    return module
