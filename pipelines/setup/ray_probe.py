"""Ray started or joined, looked at, left: `python -m pipelines.setup.ray_probe JSON`, for `edt doctor`.

A process of its own, because Ray may hang where it cannot start, and such a process can be ended.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edt_core.environment import quiet_defaults
from edt_core.errors import UserError
from edt_core.printing.console import say

_SECONDS = 30  # for the answer of every node
_LOOK_SECONDS = 0.5


def probe(address: str | None, min_cpus: int, paths: Sequence[str]) -> dict[str, Any]:
    """The cluster's resources, its nodes, and on how many of them each local path is missing.

    Raises UserError where there is no cluster at the address, or its nodes do not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jobs.runtime.cluster import connect

    connect(address, min_cpus)
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        look = ray.remote(missing)
        pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [
            look.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(list(paths)) for place in pinned
        ]
        try:
            answers = ray.get(asked, timeout=_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"not all of {len(nodes)} nodes ran a task within {_SECONDS} s; see `ray status`"
            ) from error
        absent = {path: sum(path in found for found in answers) for path in paths}
        return {"resources": ray.cluster_resources(), "nodes": len(nodes), "missing": absent}
    finally:
        ray.shutdown()


def missing(paths: list[str]) -> list[str]:
    """Those of local paths that are not on this node."""
    return [path for path in paths if not Path(path).exists()]


def _end_with(parent: int) -> None:
    """Kill this process, and what it started, once the process that asked is gone: nobody else would."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Print what was found, or {"error"}, as the last line."""
    quiet_defaults()
    asked = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(asked["parent"],), daemon=True).start()
    try:
        answer = probe(asked["address"], asked["min_cpus"], asked["paths"])
    except Exception as error:  # whatever Ray raises, it is the finding
        answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    say(json.dumps(answer))


if __name__ == "__main__":
    main()
