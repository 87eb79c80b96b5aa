"""Memory of this process, as the system counts it.

Not `getrusage`: on Linux its `ru_maxrss` starts at that of the parent when a process is started, so a child of a large
process reports the parent's size whatever it does itself.
"""

import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"  # proc(5), clear_refs: sets the peak to the memory that is resident now


def resident_bytes() -> int:
    """Bytes of this process that are in memory now, mapped files included; the peak where the system has no /proc."""
    return _field("VmRSS") if _STATUS.exists() else peak_bytes()


def peak_bytes() -> int:
    """The most bytes of this process that were in memory at once, since its start or the last `reset_peak`."""
    if _STATUS.exists():
        return _field("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def reset_peak() -> None:
    """Let `peak_bytes` count from now. Does nothing where the system does not allow it."""
    with suppress(OSError):
        _CLEAR.write_text(_PEAK, encoding="ascii")


def _field(name: str) -> int:
    """A field of proc(5), status, in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10
