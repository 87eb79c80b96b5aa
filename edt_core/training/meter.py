"""Measured speed of a training, and the peak rate of its device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from edt_core.models.kernels import project_tokens

_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


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


class Meter:
    """Step times since the last row: image rate, share of time spent waiting for data, percentiles, memory, MFU.

    The model FLOPs utilisation is computed from `flops_per_image` and `peak_flops`, the sum of all workers' devices.
    """

    def __init__(self, images_per_step: int, device: torch.device, flops_per_image: float, peak_flops: float) -> None:
        self.images_per_step, self.device = images_per_step, device
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
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
            "mfu": rate * self.flops_per_image / self.peak_flops,
            "device_memory_mib": device_memory(self.device) / (1 << 20),
        }
        self._steps, self._waited = [], 0.0
        return figures


def device_memory(device: torch.device) -> int:
    """Peak bytes that this process has allocated on a device; on the CPU, its peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
