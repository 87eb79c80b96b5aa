"""Paths of one machine's disk that work on other machines needs."""

import socket
from pathlib import Path

from edt_core.errors import UserError


def check_here(path: Path | None, content: str) -> None:
    """Raise UserError if `path`, which the driver has, does not exist on the machine of this process.

    `content` is what it holds, as "the store"; None, for what is not on a disk, passes.
    """
    if path is not None and not path.exists():
        raise UserError(
            f"{content} {path} does not exist on {socket.gethostname()}, which does a part of the work. All machines "
            "of a Ray cluster must reach it under the same address: use a disk that all of them mount at this path, "
            "or a server (docs/cluster.md#prepare-the-store-and-mlflow)"
        )
