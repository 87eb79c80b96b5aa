"""The machine of an acceptance: card, driver, versions, and the peak rates of the card's data sheet."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from edt_core.environment import code_version, utc

# Dense rates in TFLOP/s without sparsity, by a part of the card's name; the first match counts.
_DATA_SHEETS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H100": {"bf16": 989, "tf32": 495, "fp32": 67},
    "GH200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A30": {"bf16": 165, "tf32": 82, "fp32": 10.3},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 4090": {"bf16": 165, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
}


def data_sheet_peak(card: str, precision: str) -> float | None:
    """FLOP/s of the data sheet for a precision; None for a card that is not in the table."""
    words = f" {card} "
    for name, rates in _DATA_SHEETS.items():
        if re.search(rf"\b{name}\b", words):
            return rates[precision] * 1e12
    return None


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
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl() if device.type == "cuda" else None,
        "code": code_version(),
        "started": utc(),
    }


def _memory_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.get_device_properties(device).total_memory / (1 << 30), 1)


def _nccl() -> str | None:
    """The version of NCCL, such as 2.27.3; None for a build without it."""
    try:
        from torch.cuda import nccl

        return ".".join(map(str, nccl.version()))
    except (ImportError, AttributeError, RuntimeError):
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if no tool tells it."""
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        return text.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else None
