"""Memory of a process: its own, whatever its parent's size, and since the last reset."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edt_core.child_process import child_environment, python_command
from edt_core.memory import peak_bytes, reset_peak, resident_bytes

LARGE = 256 << 20
CHILD = "from edt_core.memory import peak_bytes; print(peak_bytes())"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_peak_counts_from_its_reset() -> None:
    reset_peak()
    before = resident_bytes()
    block = np.ones(LARGE, np.uint8)
    assert peak_bytes() - before > 0.9 * LARGE
    del block
    assert peak_bytes() - resident_bytes() > 0.5 * LARGE
    reset_peak()
    assert peak_bytes() - resident_bytes() < 0.5 * LARGE


@pytest.mark.extern
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no figure of its own for a child")
def test_a_child_of_a_large_process_reports_its_own_size() -> None:
    block = np.ones(LARGE, np.uint8)
    done = subprocess.run(python_command("-c", CHILD), capture_output=True, check=True, env=child_environment())
    assert int(done.stdout) < LARGE <= len(block)
