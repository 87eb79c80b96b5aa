"""Processes below one, found in /proc; and waiting for something to come true."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def stat(pid: int) -> tuple[int, str, str] | None:
    """Parent, state and start time of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return int(fields[1]), fields[0], fields[19]


def descendants(root: int) -> dict[int, str]:
    """Processes below one, with their start times."""
    every = {pid: stat(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
    found, line = {}, [root]
    for parent in line:
        below = {pid: seen[2] for pid, seen in every.items() if seen is not None and seen[0] == parent}
        found |= below
        line += below
    return found


def listeners(root: int) -> set[tuple[str, str, int]]:
    """What a process and those below it listen on, TCP and UDP: (title, address, port)."""
    import psutil

    found = set()
    for pid in [root, *descendants(root)]:
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(pid).net_connections("inet"):
                if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and not one.raddr):
                    found.add((title(pid), one.laddr.ip, one.laddr.port))
    return found


def beyond_loopback(found: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Those of `listeners` that other machines can reach."""
    import ipaddress

    def inner(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    return sorted(one for one in found if not inner(one[1]))


def title(pid: int) -> str:
    """What a process calls itself; Ray's say what they do."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def bytes_written(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0])
    except OSError:
        return 0


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(ready: Callable[[], Any], seconds: float = 600, pause: float = 0.02) -> Any:
    """What `ready` answers once it is true. The limit is for what never comes: slow machines are given time."""
    until = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < until, "the moment never came"
        time.sleep(pause)
    return found


def joining() -> dict[str, str]:
    """Variables for a process that joins this process's Ray session, which is on loopback.

    Without the second one Ray takes the machine's own address for 127.0.0.1, where nothing of the session listens.
    """
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
