"""Rendezvous through a file for the workers of a Ray Train job, if all of them are on one machine.

Ray Train's own rendezvous starts PyTorch's TCP store, which listens on every interface and requires no token.
"""

import shutil
import tempfile
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class OneMachineConfig(TorchConfig):
    """Ray Train's PyTorch settings, with a file instead of the TCP store."""

    @property
    def backend_cls(self) -> type["OneMachineBackend"]:
        return OneMachineBackend


class OneMachineBackend(_TorchBackend):
    """Joins the workers to a process group, in the process of Ray Train's controller."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers of a started group: at the start of a training, or after lost workers were replaced."""
        self._remove()
        self._folder = tempfile.mkdtemp(prefix="edt-process-group-")
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        worker_group.execute(_set_torch_distributed_env_vars)
        pending = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend or ("nccl" if gpus > 0 else "gloo"),
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{self._folder}/store",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(pending)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Shut down the process group, and remove the file."""
        super().on_shutdown(worker_group, backend_config)
        self._remove()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
