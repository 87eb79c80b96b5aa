"""What every machine of a cluster must reach: paths of the driver's disk, and servers."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

from edt_core.errors import UserError
from edt_core.printing.redaction import redacted

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_PAGE = "docs/cluster.md#prepare-the-store-and-mlflow"


def check_here(path: Path | None, content: str) -> None:
    """Raise UserError if `path`, which the driver has, does not exist on the machine of this process.

    `content` is what it holds, as "the store"; None, for what is not on a disk, passes.
    """
    if path is not None and not path.exists():
        raise UserError(
            f"{content} {path} does not exist on {socket.gethostname()}, which does a part of the work. All machines "
            "of a Ray cluster must reach it under the same address: use a disk that all of them mount at this path, "
            f"or a server ({_PAGE})"
        )


def check_server(url: str, name: str) -> None:
    """Raise UserError if `url` is of this machine alone and the Ray cluster of this session has other machines.

    `name` is the variable or option that sets it.
    """
    import ray

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and urlsplit(url).hostname in _LOOPBACK:
        raise UserError(
            f"{name} is {redacted(url)}, which on each of the {len(machines)} machines of the Ray cluster is the "
            f"machine itself; give the address by which all of them reach the server ({_PAGE})"
        )
