"""The machine of an acceptance: card, driver and versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from edt_core.environment import code_version, nvidia_driver, utc


def card_of(device: torch.device) -> str:
    """The name of the card, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, for the head of the report."""
    return {
        "card": card_of(device),
        "memory_gib": _memory_gib(device),
        "cores": os.cpu_count(),
        "driver": nvidia_driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": nccl_version() if device.type == "cuda" else None,
        "code": code_version(),
        "started": utc(),
    }


def _memory_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.get_device_properties(device).total_memory / (1 << 30), 1)


def nccl_version() -> str | None:
    """The version of NCCL, such as 2.27.3; None for a build without it."""
    try:
        from torch.cuda import nccl

        return ".".join(map(str, nccl.version()))
    except (ImportError, AttributeError, RuntimeError):
        return None
