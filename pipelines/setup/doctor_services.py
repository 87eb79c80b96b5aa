"""The checks of what answers from elsewhere: MLflow, the hub's weights, Ray."""

import json
import os
import signal
import subprocess
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from edt_core.child_process import child_environment, python_command
from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.files.place_names import typed_path
from edt_core.network.answers import answer_seconds
from edt_core.printing.redaction import redacted
from edt_core.store.folder import Folder
from jobs.runtime.cluster_address import check_answers, named_address
from jobs.stages.autoencoder import MLFLOW_SCHEMES
from pipelines.config.networks import ExtractorConfig
from pipelines.setup.autoencoder_facts import published_facts
from pipelines.setup.doctor import Setup, Status

Found = tuple[Status, str, str]

_RAY_SECONDS = 100
_END_SECONDS = 5
_PROBE = "edt-doctor-"


def mlflow(setup: Setup) -> Found:
    """The tracking server or SQLite file: it answers, and takes and gives back an entry of its registry."""
    from jobs.runtime.tracking import SQLITE, own_uri

    folder = Folder.at(setup.config.store)
    uri = setup.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own_uri(folder)
    if not uri:
        remedy = "set MLFLOW_TRACKING_URI to your MLflow server: a SQLite file cannot live in an object store"
        return "fail", f"the store {folder.uri} is remote, and no MLflow server is named", remedy
    if uri == own_uri(folder) and folder.local is not None and not (folder.local / SQLITE).exists():
        return "ok", "a SQLite file in the store, which the first run makes", ""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow.exceptions import MlflowException

    from pipelines.tracking.catalog import Catalog, check_tracking

    check_tracking(uri)
    try:
        client = Catalog(uri, "").client
        client.search_experiments(max_results=1)
        name = f"{_PROBE}{uuid.uuid4().hex}"  # a registered model, because it can be removed without a trace
        client.create_registered_model(name)
        client.delete_registered_model(name)
    except MlflowException as error:
        remedy = "see to MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and to the server"
        return "fail", f"{redacted(uri)}: {str(error).splitlines()[0][:300]}", remedy
    version = _server_version(uri)
    return "ok", f"{redacted(uri)} answers and takes entries{f', MLflow {version}' if version else ''}", ""


def _server_version(uri: str) -> str:
    """What a server says of itself; "" where it does not, or is none."""
    if not uri.startswith("http"):
        return ""
    with suppress(OSError, ValueError), urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=5) as answer:
        return str(answer.read(100).decode(errors="replace")).strip()
    return ""


def autoencoder(setup: Setup) -> Found:
    """A published autoencoder: there, and of the shape that the configuration says; its weights are not loaded."""
    config = setup.config.autoencoder
    if config.pretrained is None:
        return "ok", f"fitted on the images, {config.steps:,} steps", ""
    if config.pretrained.startswith(MLFLOW_SCHEMES):
        from jobs.stages.autoencoder import published_source

        published_source(config, setup.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        return "ok", f"{config.pretrained} is registered", ""
    found = published_facts(config.pretrained)
    wanted = {"downsample_factor": config.downsample_factor, "latent_channels": config.latent_channels}
    wrong = [
        f"{name} is {found[name]}, the configuration says {value}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if wrong:
        changes = " ".join(f"--set autoencoder.{name}={found[name]}" for name in wanted)
        return "fail", f"{config.pretrained}: {'; '.join(wrong)}", f"say what it has: {changes}"
    place = "a local folder" if typed_path(config.pretrained).is_dir() else _in_cache(config.pretrained)
    return "ok", f"{config.pretrained} ({place}), factor {found['downsample_factor']}", ""


def _in_cache(hub_id: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    weights = try_to_load_from_cache(hub_id, "diffusion_pytorch_model.safetensors")
    return "in this machine's cache" if isinstance(weights, str) else "on the hub, downloaded once"


def features(setup: Setup) -> Found:
    """The networks that samples are compared in: weights that are there, have the stated digest and load."""
    config = setup.config
    sources = [_weights(space, config.network(space)) for space in config.extractors if space in PUBLISHED_SPACES]
    sources += ["a classifier fitted on the images"] if "classifier" in config.extractors else []
    if config.reference_statistics is not None:
        from jobs.stages.reference import statistics_source

        statistics_source(config.reference_statistics)
        sources.append(f"statistics {config.reference_statistics}")
    return "ok", "; ".join(sources), ""


def _weights(space: str, config: ExtractorConfig) -> str:
    """Published weights in a few words. Raises UserError where they cannot be used."""
    from edt_core.evaluation.extractors import load_extractor
    from edt_core.evaluation.extractors.weights import published_weights

    location = config.weights or ""
    if location.startswith(MLFLOW_SCHEMES):
        return f"{space} from MLflow ({location}), which the run fetches"
    if location.startswith(("http://", "https://")) and config.sha256:
        with urllib.request.urlopen(urllib.request.Request(location, method="HEAD"), timeout=answer_seconds()):
            return f"{space} at its URL, downloaded once and checked"
    path, digest = published_weights(space, config.weights, config.sha256)
    if Path(path).exists():
        load_extractor(space, path)
        return f"{space} {path} loads, sha256 {digest[:12]}"
    return f"{space} {path} of the hub"


def ray(setup: Setup) -> Found:
    """A Ray session here, or the cluster at the address: it starts, runs a task, and has what the steps ask for."""
    config, address = setup.config, named_address(setup.address)
    if setup.quick and not address:
        return "ok", "not started (--quick)", ""
    if address:
        try:
            check_answers(address)
        except UserError as error:
            found, _, remedy = str(error).partition(". ")
            return "fail", found, remedy
    store = Folder.at(config.store).local
    places = [config.source.path, *([config.store] if address and store and store.exists() else [])]
    local = [
        str(path) for place in places if place and (path := Folder.at(place).local) and not set("*?[{") & set(place)
    ]
    probed = _probed(setup.address, config.workers, local)
    if "error" in probed:
        return "fail", redacted(probed["error"]), _RAY_REMEDY[bool(address)]
    there, nodes = probed["resources"], probed["nodes"]
    what = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs on {nodes} node{'s' * (nodes > 1)}"
    what = f"{'joined ' + address if address else 'starts here'}: {what}"
    if lost := {path: number for path, number in probed["missing"].items() if number}:
        paths = ", ".join(f"{path} (on {number} of {nodes} nodes)" for path, number in lost.items())
        return "fail", f"{what}; not there: {paths}", "give a folder that every node reaches, as NFS, or a URI"
    if short := _short_of(config, there):
        status: Status = "warn" if address else "fail"
        return (
            status,
            f"{what}; {short}",
            "lower what the configuration asks for, or add nodes: a cluster may grow, this machine not",
        )
    return "ok", what, ""


_RAY_REMEDY = {
    True: "see to the address and that the cluster runs this Ray and Python (`ray status`); RAY_ADDRESS names one too",
    False: "see to /dev/shm, free ports and /tmp of this machine; its logs are in /tmp/ray/session_latest/logs",
}


def _short_of(config: Any, there: dict[str, float]) -> str:
    """The first stage that would wait for ever."""
    stages: dict[str, tuple[float, float]] = {}
    for name in config.models:
        train = config.train_of(name)
        fewest = train.worker_range[0]
        stages[f"train {name}"] = (fewest * train.num_cpus_per_worker, fewest * train.use_gpu)
    for name in ("encode", "sample", "reference"):
        section = getattr(config, name)
        stages[name] = (section.num_cpus_per_worker, section.num_gpus_per_worker)
    if config.autoencoder.pretrained is None:
        stages["autoencoder"] = (config.autoencoder.num_cpus, config.autoencoder.num_gpus)
    if "classifier" in config.extractors:
        stages["classifier"] = (config.classifier.num_cpus, config.classifier.num_gpus)
    for name, (cpus, gpus) in stages.items():
        if cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0):
            return f"{name} wants {cpus:g} CPUs and {gpus:g} GPUs at once"
    return ""


def _probed(address: str | None, min_cpus: int, paths: list[str]) -> dict[str, Any]:
    """What `pipelines.setup.ray_probe` says, from a process of its own that is gone afterwards."""
    asked = json.dumps({"address": address, "min_cpus": min_cpus, "paths": paths, "parent": os.getpid()})
    process = subprocess.Popen(
        python_command("-m", "pipelines.setup.ray_probe", asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        # Ray's own 20 retries take longer than anybody waits here.
        env=child_environment({"RAY_NUM_REDIS_GET_RETRIES": "1", **os.environ}),
    )
    try:
        lines = process.communicate(timeout=_RAY_SECONDS)[0].strip().splitlines()
        return dict(json.loads(lines[-1]))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {_RAY_SECONDS} s"}
    except (IndexError, ValueError):
        return {"error": f"Ray ended with code {process.returncode} and said nothing"}
    finally:
        if process.poll() is None:  # let it end the session that it began; what hangs is killed below
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
