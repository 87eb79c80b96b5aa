"""Measured speed of a training, and the peak rate of its device."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from edt_core.memory import peak_bytes
from edt_core.models.kernels import project_tokens

_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
# Dense TFLOP/s of NVIDIA's data sheets: bf16 and TF32 on tensor cores (half of the figures with sparsity where only
# those are given), and fp32. The names are words of the card's name; the first row whose words all occur is used.
# https://www.nvidia.com/en-us/data-center/: a100, h100, h200, l40s, l4, and a30, a40, a10 under products.
_DATASHEETS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bf16": 2250, "tf32": 1125, "fp32": 75}),
    ("GH200", {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H200 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("H100 PCIe", {"bf16": 756.5, "tf32": 378, "fp32": 51}),
    ("H100 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H100", {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    ("A100", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    ("L4", {"bf16": 121, "tf32": 60, "fp32": 30.3}),
    ("A40", {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A30", {"bf16": 165, "tf32": 82, "fp32": 10.3}),
    ("A10", {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
)


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large square matrix product on a device, the best of several."""
    side = _MATMUL_SIDE.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(1, side, side, device=device, dtype=dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        project_tokens(a, b[0])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def datasheet_rate(device: torch.device, precision: str) -> float | None:
    """Peak floating-point operations per second of a GPU by its data sheet; None for a CPU and an unknown card."""
    return datasheet_rate_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def datasheet_rate_of(card: str, precision: str) -> float | None:
    """As `datasheet_rate`, by the card's name. A slice of a card (MIG) has no data sheet."""
    words = set(re.split(r"[\s-]+", card))
    if "MIG" in words:
        return None
    rates = next((rates for name, rates in _DATASHEETS if words >= set(name.split())), {})
    return rates[precision] * 1e12 if precision in rates else None


class Meter:
    """Step times since the last row: image rate, share of time spent waiting for data, percentiles, memory, MFU.

    The model FLOPs utilisation is computed from `flops_per_image` against two peaks, each the sum of all workers'
    devices: `peak_flops`, that of a measured product, and `datasheet_flops`, None where it is not known.
    """

    def __init__(
        self,
        images_per_step: int,
        device: torch.device,
        flops_per_image: float,
        peak_flops: float,
        datasheet_flops: float | None = None,
    ) -> None:
        self.images_per_step, self.device, self.flops_per_image = images_per_step, device, flops_per_image
        self._peaks = {"mfu_measured": peak_flops}
        if datasheet_flops is not None:
            self._peaks["mfu_datasheet"] = datasheet_flops
        self._steps: list[float] = []
        self._waited = self._waiting = 0.0  # seconds, for the completed steps and for the next one
        self._last = time.perf_counter()

    def begin(self) -> None:
        """Start the clock of the next step; earlier time is not counted."""
        self._last, self._waiting = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context that counts its time as waiting for the next batch."""
        started = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - started

    def step_done(self) -> float:
        """Count the time since the last step, and return it in seconds."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._steps.append(seconds)
        self._waited, self._waiting = self._waited + self._waiting, 0.0
        return seconds

    def row(self) -> dict[str, float]:
        """The figures since the last row; empty if no step was completed."""
        if not self._steps:
            return {}
        total = sum(self._steps)
        rate = len(self._steps) * self.images_per_step / total
        p50, p95 = np.percentile(self._steps, (50, 95))
        figures = {
            "images_per_s": rate,
            "data_wait_share": self._waited / total,
            "step_time_p50_s": float(p50),
            "step_time_p95_s": float(p95),
            **{name: rate * self.flops_per_image / peak for name, peak in self._peaks.items()},
            "device_memory_mib": device_memory(self.device) / (1 << 20),
        }
        self._steps, self._waited = [], 0.0
        return figures


def device_memory(device: torch.device) -> int:
    """Peak bytes that this process has allocated on a device; on the CPU, its peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()
