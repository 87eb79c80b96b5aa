"""A run of the small pipeline on hosts, while it is at work."""

import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, MANIFEST_NAME, STEP_PREFIX
from tests.support.hosts.cluster import RayHosts
from tests.support.hosts.lan import Host
from tests.support.processes import descendants, title, wait_for
from tests.support.runs import AMPLE_S, folders
from tests.support.small import MODEL, options

_IDLE = {"ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
_TRAINS = "ray::RayTrainWorker"  # what the processes of a training call themselves


class Run:
    """`edt run quickstart` of the small size, with its driver on a host."""

    def __init__(self, cluster: RayHosts, on: Host, *assignments: str, **variables: str) -> None:
        self.cluster, self.folders = cluster, folders(*assignments)
        words = ["run", "quickstart", "--store", cluster.store, "--address", cluster.address, *options(*assignments)]
        self.process = on.start(
            sys.executable,
            "-m",
            "pipelines.cli",
            *words,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def finish(self, code: int = 0) -> str:
        """Wait for its end with this exit code; returns what it printed."""
        ended = self.process.wait(timeout=AMPLE_S)
        self._reader.join()
        assert ended == code, f"exit code {ended}\n{self.text}"
        return self.text

    def wait(self, ready: Callable[[], Any]) -> Any:
        """What `ready` answers once it is true, while the run is at work."""
        found = wait_for(lambda: self.process.poll() is not None or ready(), pause=0.1)
        assert self.process.poll() is None, self.text
        return found

    def finished(self, step: str) -> bool:
        """Whether the artifact of a step is committed."""
        return self._folder(step).exists(MANIFEST_NAME)

    def at_work(self, step: str) -> Host:
        """Wait until a step has begun; a worker host that works, and if the step is done already, any one."""
        folder = self._folder(step)
        self.wait(lambda: folder.names() and (busy(self.cluster.workers) or folder.exists(MANIFEST_NAME)))
        return (busy(self.cluster.workers) or self.cluster.workers)[0]

    def training(self) -> Host:
        """Wait for the worker of a training; its host."""
        found: list[Host] = self.wait(lambda: [host for host in self.cluster.workers if trainers(host)])
        return found[0]

    def newest(self) -> int:
        """The step of the training's newest checkpoint; 0 while there is none."""
        return max((max(steps) for steps in self.checkpoints().values()), default=0)

    def checkpoints(self) -> dict[str, list[int]]:
        """The steps of the training's checkpoints, by attempt."""
        found: dict[str, list[int]] = defaultdict(list)
        for name in self._folder(f"train {MODEL}").walk():
            attempt, *folders, file = name.split("/")
            if file == CHECKPOINT_MANIFEST:
                found[attempt].append(int(folders[-1].removeprefix(STEP_PREFIX)))
        return found

    def taken_over(self) -> dict[str, list[int]] | None:
        """The checkpoints, once more than one attempt has some."""
        found = self.checkpoints()
        return found if len(found) > 1 else None

    def _folder(self, step: str) -> Folder:
        return Folder(self.cluster.store).child(self.folders[step])


def works(host: Host) -> list[str]:
    """What Ray's processes on a host are doing, as they call it."""
    titles = (title(pid) for pid in descendants(host.process.pid))
    return sorted(name for name in titles if name.startswith("ray::") and name not in _IDLE)


def busy(hosts: list[Host]) -> list[Host]:
    """The hosts that do work of a run, that with the most processes first."""
    return sorted((host for host in hosts if works(host)), key=lambda host: len(works(host)), reverse=True)


def trainers(host: Host) -> list[int]:
    """The processes of a training on a host."""
    return [pid for pid in descendants(host.process.pid) if title(pid).startswith(_TRAINS)]
