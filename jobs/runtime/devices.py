"""The device of a worker: a GPU that was asked for is used, or the work is refused."""

import os
from collections.abc import Iterable
from typing import Any

from edt_core.environment import nvidia_driver
from edt_core.errors import UserError

# Of each major version of CUDA, by docs.nvidia.com/deploy/cuda-compatibility (minor version compatibility).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_WITHOUT = "use CPUs (train.use_gpu=false, num_gpus_per_worker=0, num_gpus=0)"


def device_name(num_gpus: float) -> str:
    """The torch device of a worker with this share of GPUs, "cuda" or "cpu". Raises UserError as `check_gpu`."""
    if num_gpus <= 0:
        return "cpu"
    check_gpu(f"num_gpus is {num_gpus:g} for this worker")
    return "cuda"


def check_gpu(asked: str, without: str = _WITHOUT) -> None:
    """Raise UserError if PyTorch cannot use a GPU in this process.

    For the message, `asked` states the setting that asks for a GPU, and `without` how to ask for none.
    """
    import torch

    if torch.cuda.is_available():
        return
    built = torch.version.cuda or torch.version.hip
    build = f"torch {torch.__version__} is built for {f'CUDA {built}' if built else 'CPUs'}"
    version = nvidia_driver()
    found = f"NVIDIA driver {version}" if version else "no NVIDIA driver"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
    raise UserError(
        f"{asked}, but PyTorch finds no usable GPU on {os.uname().nodename}: {build}, {found}{shown}; "
        f"{driver_remedy(built, version)}; or {without}"
    )


def driver_remedy(built: str | None, version: str | None) -> str:
    """What makes a GPU usable for a torch that is built for CUDA `built`, with NVIDIA's driver `version`."""
    if built is None:
        return "install the CUDA build of torch from pytorch.org"
    if version is None:
        return "install the NVIDIA driver (in a container: NVIDIA's container runtime, or its device plugin)"
    oldest = _OLDEST_DRIVER.get(built.partition(".")[0])
    if oldest is not None and int(version.partition(".")[0]) >= oldest:
        return "the driver is new enough: check that `nvidia-smi` lists a GPU, and CUDA_VISIBLE_DEVICES"
    since = "" if oldest is None else f" ({oldest} or newer)"
    return f"update the driver to one that supports CUDA {built}{since}, or install torch for an older CUDA"


def check_gpu_of_cluster(asked: str) -> None:
    """Raise UserError, as `check_gpu`, if a process that Ray gives a GPU cannot use it.

    Ray counts GPUs without PyTorch, and NCCL's own error, in workers that start together, does not state the remedy.
    """
    import ray

    task: Any = ray.remote(num_cpus=0, num_gpus=1)(check_gpu)
    ray.get(task.remote(asked))


def kind_of_devices(names: Iterable[str]) -> str:
    """ "gpu" if any of the torch devices that workers computed on is a GPU, otherwise "cpu"."""
    return "gpu" if any(name.startswith("cuda") for name in names) else "cpu"
