"""The checks of `edt doctor`. Each checks one thing and returns (status, summary, remedy)."""

import importlib.util
import os
import platform
import shlex
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edt_core.config import TrainConfig
from edt_core.environment import environment
from edt_core.evaluation.extractors import PUBLISHED_SPACES, extractor_spec
from edt_core.store.folder import Folder
from jobs.runtime.devices import driver_remedy
from pipelines.config.schema import PipelineConfig
from pipelines.setup.disk import disk_needs, largest_first, size_text
from pipelines.setup.doctor import Check, Setup, Status, Undetermined
from pipelines.setup.doctor_services import autoencoder, features, mlflow, ray
from pipelines.setup.hardware import Hardware

if TYPE_CHECKING:
    from edt_core.models import ModelConfig

Result = tuple[Status, str, str]

_OLDEST_PYTHON = (3, 11)
_SHARED_MEMORY = 512 << 20  # for Ray's object store in a local session, and for NCCL
_ROOM = 0.8  # share of a GPU's memory that an estimate may take: libraries, kernels and fragments take the rest
_FREE = 0.9  # share of a GPU's memory below which another process uses it
_SLACK = 1.1  # a margin on the estimated disk space
_EXTRAS = {
    "s3://": (("s3fs", "boto3"), "s3"),
    "gs://": (("gcsfs",), "gcs"),
    "postgresql": (("psycopg2",), "postgres"),
}


def python(setup: Setup) -> Result:
    """The versions of Python and of the packages that results depend on."""
    installed = environment()
    versions = ", ".join(
        f"{name} {installed[name]}" for name in ("torch", "ray", "mlflow", "diffusers") if name in installed
    )
    version = f"Python {platform.python_version()} ({versions})"
    if sys.version_info < _OLDEST_PYTHON:
        return "fail", version, "install Python 3.11 or newer and recreate the virtual environment"
    return "ok", version, ""


def packages(setup: Setup) -> Result:
    """Optional packages that this configuration needs."""
    extras_of = dict(_optional_packages(setup.config, setup.tracking_uri))
    missing = {name: extra for name, extra in extras_of.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        return "fail", f"not installed: {', '.join(missing)}", f"pip install 'edt-pipeline[{extras}]'"
    return "ok", f"{', '.join(extras_of)} installed" if extras_of else "no optional packages are needed", ""


def _optional_packages(config: PipelineConfig, tracking_uri: str | None) -> Iterator[tuple[str, str]]:
    """(package, extra) of each optional package that a configuration uses."""
    weights = [config.network(space).weights for space in PUBLISHED_SPACES]
    places = [config.store, config.source.path, *weights, config.reference_statistics]
    for place in [*places, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")]:
        for scheme, (names, extra) in _EXTRAS.items():
            if place and place.startswith(scheme):
                yield from ((name, extra) for name in names)
    if config.preprocess.decoder == "simplejpeg":
        yield "simplejpeg", "simplejpeg"
    for spec in map(extractor_spec, dict.fromkeys([*config.extractors, *config.token_spaces()])):
        if spec.package and spec.extra:
            yield spec.package, spec.extra


def required_gpus(config: PipelineConfig) -> int:
    """The number of GPUs without which some step would wait forever."""
    stages = [
        config.encode.num_gpus_per_worker,
        config.sample.num_gpus_per_worker,
        config.reference.num_gpus_per_worker,
    ]
    stages += [config.classifier.num_gpus] if "classifier" in config.extractors else []
    stages += [config.autoencoder.num_gpus] if config.autoencoder.pretrained is None else []
    trainings = [config.train_of(name) for name in config.models]
    return max(
        *(train.worker_range[0] if train.use_gpu else 0 for train in trainings), *(int(-(-x // 1)) for x in stages)
    )


def device(setup: Setup) -> Result:
    """The devices of torch here, compared with what the configuration requires."""
    machine, required = setup.machine.result(), required_gpus(setup.config)
    parts = [f"torch {machine.torch}", str(machine)]
    if machine.gpus or machine.driver:
        parts += [f"CUDA {machine.cuda}" if machine.cuda else "", f"driver {machine.driver or 'unknown'}"]
    if machine.gpus:
        parts += [f"NCCL {machine.nccl}" if machine.nccl else "no NCCL", "bf16" if machine.bf16 else "no bf16"]
        free = ", ".join(f"{number / (1 << 30):.0f}" for number in machine.gpu_free)
        parts += [f"free memory {free} GiB" if free else "free memory unknown"]
    summary = ", ".join(part for part in parts if part)
    elsewhere = bool(setup.address or os.environ.get("RAY_ADDRESS"))
    low_precision = {setup.config.train_of(name).precision for name in setup.config.models} & {"bf16"}
    if required > len(machine.gpus) and elsewhere:
        return "ok", f"{summary}; the GPUs are on the cluster", ""
    if required > len(machine.gpus):
        return "fail", f"{summary}; the configuration requires {required} GPUs", _too_few_gpus(machine)
    if required and machine.unsupported:
        problem = f"this torch has no kernels for {', '.join(dict.fromkeys(machine.unsupported))}"
        return "fail", f"{summary}; {problem}", "install torch for an older CUDA from pytorch.org, or use newer GPUs"
    if required and (used := [n for n, free in enumerate(machine.gpu_free) if free < _FREE * machine.gpu_memory]):
        numbers = ", ".join(map(str, used))
        return "warn", summary, f"other processes use the memory of GPU {numbers}: find them with nvidia-smi"
    if low_precision and machine.gpus and not machine.bf16:
        return "warn", summary, "these GPUs do not support bf16 in hardware: set train.precision=fp32"
    if low_precision and not required:
        return (
            "warn",
            f"{summary}; train.precision is bf16",
            "bf16 is slower than fp32 on CPUs: set train.precision=fp32",
        )
    return "ok", summary, ""


def _too_few_gpus(machine: Hardware) -> str:
    if machine.driver and not machine.gpus:
        return driver_remedy(machine.cuda, machine.driver)
    return "use a cluster with GPUs (--address, edt submit), or set train.use_gpu=false and num_gpus_per_worker=0"


def cpus(setup: Setup) -> Result:
    """The CPUs that the workers of a step take at once, compared with this machine's."""
    if setup.address or os.environ.get("RAY_ADDRESS"):
        return "ok", "the steps use the CPUs of the cluster", ""
    available = setup.machine.result().cpus
    needs = sorted(_cpus_at_once(setup.config, available), reverse=True)
    number, _, _, text = needs[0]
    if number <= available:
        return "ok", f"{available} CPUs; no step uses more than {number:g} at once", ""
    fields = dict.fromkeys(f"{field}={value}" for need, value, field, _ in needs if need > available)
    remedy = f"set {' '.join(fields)}, or use a machine or a cluster with more CPUs"
    return "warn", f"{text}, but there are {available} CPUs here: they slow each other down", remedy


def _cpus_at_once(config: PipelineConfig, available: int) -> Iterator[tuple[float, int, str, str]]:
    """(CPUs, a value for which `available` ones are enough, field, what the field is) of each step."""
    trains = [config.train_of(name) for name in config.models]
    pools = [("train", train.worker_range[0], train.num_cpus_per_worker) for train in trains]
    for name in ("encode", "sample", "reference"):
        pool = getattr(config, name)
        pools.append((name, pool.num_workers, pool.num_cpus_per_worker))
    for section, workers, each in pools:
        fewer = max(1, int(available // each)) if each else workers
        text = f"{section}.num_workers is {workers} with {each:g} CPUs each"
        yield workers * each, fewer, f"{section}.num_workers", text
    fits = {"autoencoder": config.autoencoder.pretrained is None, "classifier": "classifier" in config.extractors}
    for section in (name for name, is_fitted in fits.items() if is_fitted):
        number = getattr(config, section).num_cpus
        yield number, available, f"{section}.num_cpus", f"{section}.num_cpus is {number}"


def memory(setup: Setup) -> Result:
    """Estimated memory of training, compared with what is free on a GPU, and with this machine's."""
    from edt_core.training.estimate import estimate, host_memory

    images, classes = counts(setup)
    machine, config = setup.machine.result(), setup.config
    worst, host, needs = 0.0, 0, []
    for name in config.models:
        train = config.train_of(name)
        workers = 1 if train.use_gpu else train.worker_range[1]
        estimated = estimate(train, config.model_of(name, classes), images)
        need = workers * estimated.memory
        if train.use_gpu and machine.gpus:
            host = max(host, host_memory(estimated, min(len(machine.gpus), train.worker_range[1])))
        size = machine.gpu_room if train.use_gpu else machine.memory
        of = size_text(size) if size else "GPUs on other machines"
        needs.append(f"{name} about {size_text(need)} of {of}{_fitting(train, config.model_of(name, classes), size)}")
        worst = max(worst, need / size if size else 0.0)
    remedy = "lower train.micro_batch_size, or set train.activation_checkpointing=true"
    trains = [config.train_of(name) for name in config.models]
    if any(train.use_gpu and train.worker_range[0] > 1 and train.shard == "none" for train in trains):
        remedy += " or train.shard=optimizer"
    if host:
        needs.append(f"host memory about {size_text(host)} of {size_text(machine.memory)}")
    if worst > 1:
        return "fail", "; ".join(needs), remedy
    if host > machine.memory > 0:
        return "warn", "; ".join(needs), "give this machine, or its container, more memory: worker 0 copies checkpoints"
    return (
        ("warn", "; ".join(needs), f"little room is left: {remedy}") if worst > _ROOM else ("ok", "; ".join(needs), "")
    )


def _fitting(train: TrainConfig, model: "ModelConfig", gpu_memory: int) -> str:
    """The largest micro-batch that leaves a GPU some room, as text; "" without a GPU."""
    from edt_core.training.estimate import largest_micro_batch

    if not (train.use_gpu and gpu_memory):
        return ""
    largest = largest_micro_batch(train, model, int(_ROOM * gpu_memory))
    if not largest:
        return " (no micro-batch fits)"
    whole = ", the whole batch," if largest == train.global_batch_size else ""
    return f" (micro-batch {train.micro_batch()}; up to {largest:,}{whole} fits)"


def counts(setup: Setup) -> tuple[int, int]:
    """Numbers of images and classes. Raises Undetermined if they are unknown; the check `images` reports why."""
    try:
        source = setup.images.result()
    except Exception as error:
        raise Undetermined("unknown without the images") from error
    return source.images, source.classes


def images(setup: Setup) -> Result:
    """The images of the source, which is listed but not read."""
    listing = setup.images.result()
    number, classes = listing.images, listing.classes
    source = setup.config.source
    summary = f"{number:,} images of {classes} classes ({source.kind}{f', {source.path}' if source.path else ''})"
    summary = ". ".join([summary, *listing.remarks])
    if number < 1000:
        return "warn", summary, "with so few images any model memorises them; use them for a trial only"
    if listing.remarks:
        return "warn", summary, "check that this is intended"
    return "ok", summary, ""


def decoding(setup: Setup) -> Result:
    """Whether the images can be decoded and are upright: all of a small set, otherwise as many as 20 seconds allow."""
    from edt_core.data.inspection import inspect
    from pipelines.setup.photos import remarks_on

    counts(setup)
    listing = setup.images.result().listing
    if listing is None:
        return "ok", "the digits come with the package", ""
    inspection = inspect(listing)
    if not (remarks := remarks_on(inspection, setup.config.preprocess)):
        return "ok", f"{inspection.extent} can be decoded", ""
    status: Status = "fail" if any(remark.stops for remark in remarks) else "warn"
    problems = ". ".join(remark.problem for remark in remarks)
    return status, f"{inspection.extent} inspected: {problems}", ". ".join(remark.remedy for remark in remarks)


def sizes(setup: Setup) -> Result:
    """Numbers of samples and images, compared with what the metrics need. A run would fail only after training."""
    from pipelines.config.size_check import size_problems

    number, _ = counts(setup)
    problems = size_problems(setup.config, number)
    if problems:
        summary, _, remedy = problems[0].partition(". ")
        more = f" (and {len(problems) - 1} more: edt plan lists all)" if len(problems) > 1 else ""
        return "fail", f"{summary}{more}", remedy
    return "ok", f"{setup.config.sample.num_samples:,} samples and {number:,} images are enough for the metrics", ""


def store(setup: Setup) -> Result:
    """Write, read and remove a file in the store, and the folders that this creates."""
    folder = Folder.at(setup.config.store)
    new_folders = _missing_folders(folder)
    name, data = f".doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        folder.write_bytes(name, data)
        same = folder.read_bytes(name) == data
        folder.remove(name)
    finally:
        for path in new_folders:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    if not same:
        return "fail", f"{folder.uri} returns other bytes than were written", "use another store"
    if (root := folder.local) is not None and root.is_dir() and root.stat().st_mode & stat.S_IWOTH:
        summary = f"every user of this machine can write to {folder.uri} and replace its artifacts and records"
        return "warn", summary, f"run `chmod o-w {shlex.quote(str(root))}`"
    return "ok", f"{folder.uri} is readable and writable{' (it is new)' if new_folders else ''}", ""


def _missing_folders(folder: Folder) -> list[Path]:
    """The missing folders of a local store, innermost first."""
    root = folder.local
    return [] if root is None else [path for path in (root, *root.parents) if not path.exists()]


def disk(setup: Setup) -> Result:
    """Space for everything that the configuration makes; for a remote store, space for this node's copies."""
    needs, folder = disk_needs(setup.config, *counts(setup)), Folder.at(setup.config.store)
    summary = f"{size_text(sum(needs.values()))} at most ({largest_first(needs)})"
    if folder.local is None:
        from edt_core.store.cache import DIRECTORY_VARIABLE, cache_folder

        place, need, name = cache_folder(), needs["latents"], f"the cache (set {DIRECTORY_VARIABLE})"
        summary += f", including {size_text(need)} of latents on each node"
    else:
        place, need, name = folder.local, sum(needs.values()), "the store"
    place = next(path for path in (place, *place.parents) if path.exists())
    usage = shutil.disk_usage(place)
    if not usage.total:
        return "fail", f"{place} is not on a disk, so nothing can be stored in it", "set another --store"
    free = usage.free
    summary = f"{summary}, {size_text(free)} free in {name}"
    if need * _SLACK > free:
        remedy = (
            "free some space (edt gc, then edt gc --empty-trash), set another --store, or lower source.limit, "
            "sample.num_samples, train.num_to_keep"
        )
        return "fail" if need > free else "warn", summary, remedy
    return "ok", summary, ""


def shared_memory(setup: Setup) -> Result:
    """The size of /dev/shm, the shared memory of Ray and NCCL."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return "ok", "this system has no /dev/shm", ""
    size = shutil.disk_usage(place).total
    summary = f"/dev/shm has {size_text(size)}"
    if size < _SHARED_MEMORY:
        return (
            "warn",
            summary,
            "Ray falls back to the disk, and NCCL may fail: use docker run --shm-size=2g, or an emptyDir",
        )
    return "ok", summary, ""


# Time limits are long, because several checks import torch, MLflow or diffusers at once.
CHECKS: dict[str, tuple[Check, float]] = {
    "python": (python, 20),
    "packages": (packages, 20),
    "device": (device, 90),
    "cpus": (cpus, 90),
    "memory": (memory, 120),
    "images": (images, 120),
    "decoding": (decoding, 180),
    "sizes": (sizes, 120),
    "store": (store, 60),
    "disk": (disk, 120),
    "/dev/shm": (shared_memory, 20),
    "mlflow": (mlflow, 90),
    "autoencoder": (autoencoder, 90),
    "features": (features, 120),
    "ray": (ray, 120),
}
