"""The hardware of a machine: CPUs, memory, and the GPUs that torch can use."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edt_core.environment import nvidia_driver

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Hardware:
    """One machine. `memory` and `gpu_memory` (of the smallest GPU) are in bytes, 0 if unknown.

    `gpu_free`: bytes of each GPU that no process uses; empty if unknown. `unsupported`: the GPUs for which this torch
    has no kernels, with their compute capability.
    """

    cpus: int
    memory: int = 0
    gpus: tuple[str, ...] = ()  # names
    gpu_memory: int = 0
    bf16: bool = False  # in hardware, on every GPU
    cuda: str | None = None  # the version for which torch is built; None for a CPU build
    nccl: str | None = None
    torch: str = ""
    gpu_free: tuple[int, ...] = ()
    driver: str | None = None  # NVIDIA's
    unsupported: tuple[str, ...] = ()

    @property
    def gpu_room(self) -> int:
        """Free bytes of the GPU that has the least; its memory if what is free is unknown."""
        return min(self.gpu_free, default=self.gpu_memory)

    def as_row(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.gpus:
            return f"{self.cpus} CPUs, no GPU"
        memory = f", {self.gpu_memory / (1 << 30):.0f} GiB each" if self.gpu_memory else ""
        return f"{self.cpus} CPUs, {len(self.gpus)} x {self.gpus[0]}{memory}"


def this_machine() -> Hardware:
    """The hardware of this machine. The import of torch takes a second or two."""
    import torch

    from edt_core.acceptance.machine import nccl_version

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return Hardware(
        cpus=_cpus(),
        memory=_memory(),
        gpus=tuple(gpu.name for gpu in properties),
        gpu_memory=min((int(gpu.total_memory) for gpu in properties), default=0),
        bf16=bool(properties) and all(gpu.major >= 8 for gpu in properties),
        cuda=torch.version.cuda or torch.version.hip,
        nccl=nccl_version() if properties and torch.version.cuda else None,
        torch=torch.__version__,
        gpu_free=_free_memory(len(properties)),
        driver=nvidia_driver(),
        unsupported=_unsupported(properties),
    )


def _unsupported(gpus: Sequence[Any]) -> tuple[str, ...]:
    """The GPUs for which this torch has no kernels; none if torch does not tell for which it is built."""
    import torch

    built = torch.cuda.get_arch_list() if gpus and torch.version.cuda else []
    return tuple(
        f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"
        for gpu in gpus
        if built and not has_kernels((gpu.major, gpu.minor), built)
    )


def has_kernels(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Whether a torch that is built for these architectures, such as sm_90 and compute_120, runs on a GPU.

    Kernels (sm) run on GPUs of the same major version and at least the minor one, PTX (compute) on all newer ones.
    """
    for arch in built:
        if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)) is None:
            continue
        own = (int(found[2]), int(found[3]))
        if own <= capability and (found[1] == "compute" or own[0] == capability[0]):
            return True
    return False


def _free_memory(gpus: int) -> tuple[int, ...]:
    """Free bytes of each GPU; empty if one of them does not answer, which the check of the device reports."""
    import torch

    try:
        return tuple(torch.cuda.mem_get_info(device)[0] for device in range(gpus))
    except RuntimeError:  # another process uses the GPU alone, or it is broken
        return ()


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes that this process may use: those of the machine, or the limit of its container."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not supported on every system
        return 0
    return min([total, *_memory_limits()])


def _memory_limits() -> list[int]:
    """The memory limits of a container, from cgroup files of version 1 or 2. "max" means no limit and is skipped."""
    limits = []
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return [limit for limit in limits if limit > 0]
