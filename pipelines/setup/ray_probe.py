"""Start or join Ray, inspect it and leave it: `python -m pipelines.setup.ray_probe JSON`, for `edt doctor`.

It is a separate process, because Ray may hang if it cannot start, and a process can be killed.
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

_SECONDS = 30  # for the answers of all nodes
_LOOK_SECONDS = 0.5


def probe(address: str | None, min_cpus: int, paths: Sequence[str]) -> dict[str, Any]:
    """The cluster's resources, its number of nodes, and the number of nodes on which each local path is missing.

    Raises UserError if there is no cluster at the address, or its nodes do not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jobs.runtime.cluster import connect

    connect(address, min_cpus)
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        task = ray.remote(missing)
        pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        references = [
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(list(paths)) for place in pinned
        ]
        try:
            answers = ray.get(references, timeout=_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"not all of {len(nodes)} nodes ran a task within {_SECONDS} s; see `ray status`"
            ) from error
        absent = {path: sum(path in paths_missing for paths_missing in answers) for path in paths}
        return {"resources": ray.cluster_resources(), "nodes": len(nodes), "missing": absent}
    finally:
        ray.shutdown()


def missing(paths: list[str]) -> list[str]:
    """The local paths that do not exist on this node."""
    return [path for path in paths if not Path(path).exists()]


def _end_with(parent: int) -> None:
    """Kill this process and its children once the parent process is gone."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Print the result, or {"error": message}, as the last line."""
    quiet_defaults()
    request = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    try:
        answer = probe(request["address"], request["min_cpus"], request["paths"])
    except Exception as error:  # any error of Ray is the result
        answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    say(json.dumps(answer))


if __name__ == "__main__":
    main()
