"""The checks of `edt doctor`. Each looks at one thing and says (status, what was found, what to do)."""

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

from edt_core.environment import environment
from edt_core.evaluation.extractors import PUBLISHED_SPACES, extractor_spec
from edt_core.store.folder import Folder
from pipelines.config.schema import PipelineConfig
from pipelines.setup.disk import disk_needs, largest_first, size_text
from pipelines.setup.doctor import Check, NotKnown, Setup, Status
from pipelines.setup.doctor_services import autoencoder, features, mlflow, ray

Found = tuple[Status, str, str]

_OLDEST_PYTHON = (3, 11)
_SHARED_MEMORY = 512 << 20  # Ray's object store of a session of our own; NCCL wants its part beside it
_SLACK = 1.1  # an estimate of disk that is just met is none
_EXTRAS = {
    "s3://": (("s3fs", "boto3"), "s3"),
    "gs://": (("gcsfs",), "gcs"),
    "postgresql": (("psycopg2",), "postgres"),
}


def python(setup: Setup) -> Found:
    """The version, and those of what results depend on."""
    found = environment()
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "ray", "mlflow", "diffusers") if name in found)
    version = f"Python {platform.python_version()} ({versions})"
    if sys.version_info < _OLDEST_PYTHON:
        return "fail", version, "install Python 3.11 or newer and recreate the virtual environment"
    return "ok", version, ""


def packages(setup: Setup) -> Found:
    """Packages that this configuration needs and a plain installation leaves out."""
    needed = dict(_needed(setup.config, setup.tracking_uri))
    missing = {name: extra for name, extra in needed.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        return "fail", f"not installed: {', '.join(missing)}", f"pip install 'edt-pipeline[{extras}]'"
    return "ok", f"{', '.join(needed)} installed" if needed else "nothing beyond the plain installation is needed", ""


def _needed(config: PipelineConfig, tracking_uri: str | None) -> Iterator[tuple[str, str]]:
    """(package, extra) of everything optional that a configuration uses."""
    weights = [config.network(space).weights for space in PUBLISHED_SPACES]
    places = [config.store, config.source.path, *weights, config.reference_statistics]
    for place in [*places, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")]:
        for scheme, (names, extra) in _EXTRAS.items():
            if place and place.startswith(scheme):
                yield from ((name, extra) for name in names)
    if config.preprocess.decoder == "simplejpeg":
        yield "simplejpeg", "simplejpeg"
    for spec in map(extractor_spec, config.extractors):
        if spec.package and spec.extra:
            yield spec.package, spec.extra


def wanted_gpus(config: PipelineConfig) -> int:
    """GPUs without which some step would wait for ever."""
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


def device(setup: Setup) -> Found:
    """What torch computes on here, against what the configuration wants."""
    from pipelines.setup.hardware import driver

    machine, wanted = setup.machine.result(), wanted_gpus(setup.config)
    parts = [f"torch {machine.torch}", str(machine)]
    if machine.gpus:
        number = driver()
        parts += [
            f"CUDA {machine.cuda}",
            f"driver {number}" if number else "",
            f"NCCL {machine.nccl}" if machine.nccl else "",
        ]
        parts += ["bf16" if machine.bf16 else "no bf16"]
    summary = ", ".join(part for part in parts if part)
    elsewhere = bool(setup.address or os.environ.get("RAY_ADDRESS"))
    low = {setup.config.train_of(name).precision for name in setup.config.models} & {"bf16"}
    if wanted > len(machine.gpus) and elsewhere:
        return "ok", f"{summary}; the GPUs are the cluster's", ""
    if wanted > len(machine.gpus):
        return "fail", f"{summary}; the configuration wants {wanted} GPUs", _no_gpu(machine.cuda)
    if low and machine.gpus and not machine.bf16:
        return "warn", summary, "these GPUs have no bf16 in hardware: set train.precision=fp32"
    if low and not wanted:
        return (
            "warn",
            f"{summary}; train.precision is bf16",
            "on CPUs that is slower than fp32: set train.precision=fp32",
        )
    return "ok", summary, ""


def _no_gpu(cuda: str | None) -> str:
    if shutil.which("nvidia-smi") and cuda is None:
        return "this torch is built for CPUs: install the CUDA build of pytorch.org, and see `nvidia-smi`"
    return "run it where they are (--address, edt submit), or set train.use_gpu=false and num_gpus_per_worker=0"


def memory(setup: Setup) -> Found:
    """Memory of a training worker, as the dry run estimates it, against what a GPU or this machine has."""
    from edt_core.training.estimate import estimate

    images, classes = counts(setup)
    machine, config = setup.machine.result(), setup.config
    worst, needs = 0.0, []
    for name in config.models:
        train = config.train_of(name)
        workers = 1 if train.use_gpu else train.worker_range[1]
        need = workers * estimate(train, config.model_of(name, classes), images).memory
        there = machine.gpu_memory if train.use_gpu else machine.memory
        needs.append(f"{name} about {size_text(need)} of {size_text(there) if there else 'GPUs that are not here'}")
        worst = max(worst, need / there if there else 0.0)
    remedy = "lower train.micro_batch_size, or set train.activation_checkpointing=true"
    if worst > 1:
        return "fail", "; ".join(needs), remedy
    return ("warn", "; ".join(needs), f"it is tight: {remedy}") if worst > 0.8 else ("ok", "; ".join(needs), "")


def counts(setup: Setup) -> tuple[int, int]:
    """Images and classes. Raises NotKnown: the check of the images says why."""
    try:
        found = setup.images.result()
    except Exception as error:
        raise NotKnown("not known without the images") from error
    return found.images, found.classes


def images(setup: Setup) -> Found:
    """The source: listed, not read."""
    found = setup.images.result()
    number, classes = found.images, found.classes
    source = setup.config.source
    summary = f"{number:,} images of {classes} classes ({source.kind}{f', {source.path}' if source.path else ''})"
    summary = ". ".join([summary, *found.remarks])
    if number < 1000:
        return "warn", summary, "a model of any size memorises so few images; good for a trial"
    if found.remarks:
        return "warn", summary, "see whether that is what is meant"
    return "ok", summary, ""


def sizes(setup: Setup) -> Found:
    """Samples and images against what the metrics need: a run would learn it after the training."""
    from pipelines.config.size_check import size_problems

    number, _ = counts(setup)
    problems = size_problems(setup.config, number)
    if problems:
        summary, _, remedy = problems[0].partition(". ")
        more = f" (and {len(problems) - 1} more: edt plan lists all)" if len(problems) > 1 else ""
        return "fail", f"{summary}{more}", remedy
    return "ok", f"{setup.config.sample.num_samples:,} samples and {number:,} images are enough for the metrics", ""


def store(setup: Setup) -> Found:
    """A file written to the store, read back and removed; folders that this made go again."""
    folder = Folder.at(setup.config.store)
    made = _missing_folders(folder)
    name, data = f".doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        folder.write_bytes(name, data)
        same = folder.read_bytes(name) == data
        folder.remove(name)
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    if not same:
        return "fail", f"{folder.uri} gives back other bytes than were written", "use another store"
    if (root := folder.local) is not None and root.is_dir() and root.stat().st_mode & stat.S_IWOTH:
        summary = f"every user of this machine can write to {folder.uri}, and so replace its artifacts and records"
        return "warn", summary, f"run `chmod o-w {shlex.quote(str(root))}`"
    return "ok", f"{folder.uri} is written and read{' (it is new)' if made else ''}", ""


def _missing_folders(folder: Folder) -> list[Path]:
    """The folders of a local store that are not there yet, innermost first."""
    root = folder.local
    return [] if root is None else [path for path in (root, *root.parents) if not path.exists()]


def disk(setup: Setup) -> Found:
    """Room for everything that the configuration makes; for a remote store, room for this node's copies."""
    needs, folder = disk_needs(setup.config, *counts(setup)), Folder.at(setup.config.store)
    summary = f"{size_text(sum(needs.values()))} at most ({largest_first(needs)})"
    if folder.local is None:
        from edt_core.store.cache import DIRECTORY_VARIABLE, cache_folder

        there, need, what = cache_folder(), needs["latents"], f"the cache (set {DIRECTORY_VARIABLE})"
        summary += f"; of it {size_text(need)} of latents on each node"
    else:
        there, need, what = folder.local, sum(needs.values()), "the store"
    there = next(path for path in (there, *there.parents) if path.exists())
    free = shutil.disk_usage(there).free
    summary = f"{summary}, {size_text(free)} free at {what}"
    if need * _SLACK > free:
        remedy = (
            "free some (edt gc, then edt gc --empty-trash), give another --store, or lower source.limit, "
            "sample.num_samples, train.num_to_keep"
        )
        return "fail" if need > free else "warn", summary, remedy
    return "ok", summary, ""


def shared_memory(setup: Setup) -> Found:
    """/dev/shm, where Ray and NCCL keep what processes share."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return "ok", "this system has no /dev/shm", ""
    size = shutil.disk_usage(place).total
    summary = f"/dev/shm has {size_text(size)}"
    if size < _SHARED_MEMORY:
        return (
            "warn",
            summary,
            "Ray falls back to the disk, and NCCL may fail: docker run --shm-size=2g, or an emptyDir",
        )
    return "ok", summary, ""


# Seconds are generous: several checks import torch, MLflow or diffusers at once.
CHECKS: dict[str, tuple[Check, float]] = {
    "python": (python, 20),
    "packages": (packages, 20),
    "device": (device, 90),
    "memory": (memory, 120),
    "images": (images, 120),
    "sizes": (sizes, 120),
    "store": (store, 60),
    "disk": (disk, 120),
    "/dev/shm": (shared_memory, 20),
    "mlflow": (mlflow, 90),
    "autoencoder": (autoencoder, 90),
    "features": (features, 120),
    "ray": (ray, 120),
}
