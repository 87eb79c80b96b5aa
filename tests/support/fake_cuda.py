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
    """Operations on CUDA are faked, those of the host are done. `syncs`: those for which the host waits, by kind.

    `uploads`: copies to the GPU by the kind of memory that they come from, "page-locked" or "pageable". The latter are
    copied by the host first, which waits for that.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._locked: dict[int, Tensor] = {}  # kept, so that no other tensor gets the memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = tree_map_only(torch.device, _meant, kwargs or {})
        inputs, _ = tree_flatten((args, kwargs))
        on_gpu = any(isinstance(each, FakeTensor) for each in inputs)
        to_gpu = any(isinstance(each, torch.device) and each.type == "cuda" for each in inputs)
        if not on_gpu and not to_gpu:
            return self._on_host(func, args, kwargs)
        aten = torch.ops.aten
        copied = {aten._to_copy.default: args[:1], aten.copy_.default: args[1:2]}.get(func, ())
        for source in copied:
            if source.device.type == "cpu" and (to_gpu or args[0].device.type == "cuda"):
                locked = source.untyped_storage().data_ptr() in self._locked
                self.uploads["page-locked" if locked else "pageable"] += 1
        if not on_gpu:  # a copy to the GPU, or a new tensor there
            args = tree_map_only(Tensor, self._fakes.from_tensor, args)
        if func is aten._local_scalar_dense.default:
            self.syncs["value read on the host"] += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 0)
        if func is aten.nonzero.default:
            self.syncs["size read on the host"] += 1
            return args[0].new_empty((1, args[0].ndim), dtype=torch.int64)  # one place is found
        if func is aten._linalg_check_errors.default:
            self.syncs["errors read on the host"] += 1
            return None
        if func is aten.copy_.default and args[0].device.type == "cpu":
            self.syncs["copy to the host"] += 1
            with unset_fake_temporarily():
                return args[0].fill_(1)
        return tree_map_only(FakeTensor, self._arrived, func(*args, **kwargs))

    def page_locked(self, tensor: Tensor) -> Tensor:
        """What `Tensor.pin_memory` returns: a copy in memory that a GPU reads by itself."""
        copy = tensor.clone()
        self._locked[copy.untyped_storage().data_ptr()] = copy
        return copy

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        locked = bool(kwargs.get("pin_memory"))
        with unset_fake_temporarily():
            made = func(*args, **{**kwargs, **({"pin_memory": False} if locked else {})})
        if locked:
            self._locked[made.untyped_storage().data_ptr()] = made
        return made

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


class Event:
    """A CUDA event, which has nothing to wait for; `waited` gets an entry for each wait."""

    def __init__(self, waited: list[None]) -> None:
        self.waited = waited

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.waited.append(None)


@contextmanager
def waits(mode: FakeCuda, *expected: str) -> Iterator[None]:
    """Within it the host waits for the GPU exactly as listed."""
    before = Counter(mode.syncs)
    yield
    found = mode.syncs - before
    assert found == Counter(expected), found


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
