"""The checks of `edt doctor` for services: MLflow, published weights, Ray."""

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

Result = tuple[Status, str, str]

_RAY_SECONDS = 100
_END_SECONDS = 5
_PROBE = "edt-doctor-"


def mlflow(setup: Setup) -> Result:
    """MLflow: the server or SQLite file answers, and can create and remove a registered model."""
    from jobs.runtime.tracking import SQLITE, own_uri

    folder = Folder.at(setup.config.store)
    uri = setup.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own_uri(folder)
    if not uri:
        remedy = "set MLFLOW_TRACKING_URI to your MLflow server: an object store cannot contain a SQLite file"
        return "fail", f"the store {folder.uri} is remote, but no MLflow server is set", remedy
    if uri == own_uri(folder) and folder.local is not None and not (folder.local / SQLITE).exists():
        return "ok", "a SQLite file in the store, which the first run creates", ""
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
        remedy = "check MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and the server"
        return "fail", f"{redacted(uri)}: {str(error).splitlines()[0][:300]}", remedy
    version = _server_version(uri)
    return "ok", f"{redacted(uri)} answers and is writable{f', MLflow {version}' if version else ''}", ""


def _server_version(uri: str) -> str:
    """The version of an MLflow server; "" if it is unknown, or there is no server."""
    if not uri.startswith("http"):
        return ""
    with suppress(OSError, ValueError), urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=5) as answer:
        return str(answer.read(100).decode(errors="replace")).strip()
    return ""


def autoencoder(setup: Setup) -> Result:
    """The autoencoder: a published one exists and has the configured shape. Its weights are not loaded."""
    config = setup.config.autoencoder
    if config.pretrained is None:
        return "ok", f"fitted on the images, {config.steps:,} steps", ""
    if config.pretrained.startswith(MLFLOW_SCHEMES):
        from jobs.stages.autoencoder import published_source

        published_source(config, setup.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        return "ok", f"{config.pretrained} is registered", ""
    facts = published_facts(config.pretrained)
    configured = {"downsample_factor": config.downsample_factor, "latent_channels": config.latent_channels}
    wrong = [
        f"{name} is {facts[name]}, but {value} in the configuration"
        for name, value in configured.items()
        if facts[name] != value
    ]
    if wrong:
        changes = " ".join(f"--set autoencoder.{name}={facts[name]}" for name in configured)
        return "fail", f"{config.pretrained}: {'; '.join(wrong)}", f"use its values: {changes}"
    place = "a local folder" if typed_path(config.pretrained).is_dir() else _in_cache(config.pretrained)
    return "ok", f"{config.pretrained} ({place}), factor {facts['downsample_factor']}", ""


def _in_cache(hub_id: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    weights = try_to_load_from_cache(hub_id, "diffusion_pytorch_model.safetensors")
    return "in this machine's cache" if isinstance(weights, str) else "on the hub, downloaded once"


def features(setup: Setup) -> Result:
    """The feature networks: their weights exist, match their digest and load."""
    config = setup.config
    used = dict.fromkeys([*config.extractors, *config.token_spaces()])
    sources = [_weights(space, config.network(space)) for space in used if space in PUBLISHED_SPACES]
    sources += ["a classifier fitted on the images"] if "classifier" in config.extractors else []
    if config.reference_statistics is not None:
        from jobs.stages.reference import statistics_source

        statistics_source(config.reference_statistics)
        sources.append(f"statistics {config.reference_statistics}")
    return "ok", "; ".join(sources), ""


def _weights(space: str, config: ExtractorConfig) -> str:
    """A short description of published weights. Raises UserError if they are unusable."""
    from edt_core.evaluation.extractors import load_extractor
    from edt_core.evaluation.extractors.weights import published_weights

    location = config.weights or ""
    if location.startswith(MLFLOW_SCHEMES):
        return f"{space} from MLflow ({location}), which the run downloads"
    if location.startswith(("http://", "https://")) and config.sha256:
        with urllib.request.urlopen(urllib.request.Request(location, method="HEAD"), timeout=answer_seconds()):
            return f"{space} at its URL, downloaded once and verified"
    path, digest = published_weights(space, config.weights, config.sha256)
    if Path(path).exists():
        load_extractor(space, path)
        return f"{space} {path} loads, sha256 {digest[:12]}"
    return f"{space} {path} on the hub"


def ray(setup: Setup) -> Result:
    """Ray, locally or at the address: it starts, runs a task on each node, and has the resources of the steps."""
    config, address = setup.config, named_address(setup.address)
    if setup.quick and not address:
        return "ok", "not started (--quick)", ""
    if address:
        try:
            check_answers(address)
        except UserError as error:
            problem, _, remedy = str(error).partition(". ")
            return "fail", problem, remedy
    store = Folder.at(config.store).local
    places = [config.source.path, *([config.store] if address and store and store.exists() else [])]
    local = [
        str(path) for place in places if place and (path := Folder.at(place).local) and not set("*?[{") & set(place)
    ]
    answer = _run_probe(setup.address, config.workers, local)
    if "error" in answer:
        return "fail", redacted(answer["error"]), _RAY_REMEDY[bool(address)]
    resources, nodes = answer["resources"], answer["nodes"]
    summary = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs on {nodes} node{'s' * (nodes > 1)}"
    summary = f"{'joined ' + address if address else 'starts here'}: {summary}"
    if missing := {path: number for path, number in answer["missing"].items() if number}:
        paths = ", ".join(f"{path} (on {number} of {nodes} nodes)" for path, number in missing.items())
        return "fail", f"{summary}; missing: {paths}", "use a folder that every node can read, such as NFS, or a URI"
    if shortage := _shortage(config, resources):
        status: Status = "warn" if address else "fail"
        return (
            status,
            f"{summary}; {shortage}",
            "lower the resources of this stage in the configuration, or run on a cluster that has them",
        )
    return "ok", summary, ""


_RAY_REMEDY = {
    True: "check the address (--address or RAY_ADDRESS), and that the cluster runs this Ray and Python (`ray status`)",
    False: "check /dev/shm, free ports and /tmp of this machine; Ray's logs are in /tmp/ray/session_latest/logs",
}


def _shortage(config: Any, resources: dict[str, float]) -> str:
    """The first stage that would wait forever, and what it requires; "" if there is none."""
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
        if cpus > resources.get("CPU", 0) or gpus > resources.get("GPU", 0):
            return f"{name} requires {cpus:g} CPUs and {gpus:g} GPUs at once"
    return ""


def _run_probe(address: str | None, min_cpus: int, paths: list[str]) -> dict[str, Any]:
    """The answer of `pipelines.setup.ray_probe`, which runs in a separate process that ends with this call."""
    request = json.dumps({"address": address, "min_cpus": min_cpus, "paths": paths, "parent": os.getpid()})
    process = subprocess.Popen(
        python_command("-m", "pipelines.setup.ray_probe", request),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        # Ray's default of 20 retries takes longer than the time limit.
        env=child_environment({"RAY_NUM_REDIS_GET_RETRIES": "1", **os.environ}),
    )
    try:
        lines = process.communicate(timeout=_RAY_SECONDS)[0].strip().splitlines()
        return dict(json.loads(lines[-1]))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {_RAY_SECONDS} s"}
    except (IndexError, ValueError):
        return {"error": f"Ray exited with code {process.returncode} and no output"}
    finally:
        if process.poll() is None:  # let it end its session; it is killed below if it hangs
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
