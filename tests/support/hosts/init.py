"""The first process of a host: `unshare ... python init.py NAME FOLDER...`; it lives until its standard input ends.

It gives the host disks of its own. All that is on the machine's disk is there too, but cannot be written to, and the
folders that programs write to (`OWN`) are empty. Code and Python (`FOLDER...`) stay readable where they are.
Everything in the host ends with this process, which is the first of its PID namespace.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

OWN = ("/tmp", "/var/tmp", "/root", "/home", "/dev/shm", "/run")
_LIBC = ctypes.CDLL(None, use_errno=True)
_RDONLY, _REMOUNT, _BIND = 1, 32, 4096  # of sys/mount.h


def mount(source: str, target: str, kind: str = "", flags: int = 0) -> None:
    """mount(2). The program of this name would follow /proc/self/fd to a path that is hidden by now."""
    if _LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def own_disks(name: str, kept: list[str]) -> None:
    """Hide what hosts would share, and show the folders `kept` again, read-only."""
    handles = {folder: os.open(folder, os.O_PATH) for folder in kept}
    for folder in filter(os.path.isdir, OWN):
        mount("tmpfs", folder, "tmpfs")
    mount("/", "/", flags=_BIND | _REMOUNT | _RDONLY)
    for folder, handle in handles.items():
        if not os.path.exists(folder):
            os.makedirs(folder)
            mount(f"/proc/self/fd/{handle}", folder, flags=_BIND)
            mount(folder, folder, flags=_BIND | _REMOUNT | _RDONLY)
        os.close(handle)
    # As Debian's installer writes it: the host's own name is an address that no other host reaches.
    Path("/run/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    mount("/run/hosts", "/etc/hosts", flags=_BIND)


def main(name: str, *kept: str) -> None:
    socket.sethostname(name)
    own_disks(name, list(kept))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are its children, and nobody waits for them
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
