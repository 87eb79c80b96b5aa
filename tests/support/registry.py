"""A registry of small versions: real artifacts in a store, real runs and versions in MLflow, no training."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, SimpleNamespace
from typing import Any

from edt_core.config import ChainConfig
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASSES_NAME
from jobs.models.open import Opened
from jobs.models.registry_files import DIGEST_TAG, DIGESTS, digests_text, folder_digests, stored_problems
from pipelines.config.schema import PipelineConfig, PromoteConfig, load_config
from pipelines.registry.aliases import add_version, settle
from pipelines.registry.gate import Decision
from pipelines.registry.registration import Entry, identity_of, promote, version_tags
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import artifact_tags
from tests.support.models import made_model, opened

NAME, REAL = "edt-small", "edt-real"
PROTOCOL = {"num_samples": 500, "cfg_scale": 1.75, "repeats": 1}
SOURCE = sha256(b"source").hexdigest()


def write_empty_mlflow(root: Path) -> None:
    """Put an MLflow of no runs into the folder of a store, where `Catalog.open` finds it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "mlflow.db").write_bytes(_empty_mlflow())


@cache
def _empty_mlflow() -> bytes:
    """A SQLite file with MLflow's tables and nothing in them: to make them takes seconds."""
    with TemporaryDirectory() as folder:
        Catalog.open(Folder.at(folder), "none")
        return (Path(folder) / "mlflow.db").read_bytes()


@dataclass
class Registry:
    """One store with its MLflow."""

    root: Path
    catalog: Catalog = field(init=False)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if "MLFLOW_TRACKING_URI" not in os.environ:
            write_empty_mlflow(self.root)
        self.catalog = Catalog.open(Folder.at(self.root), "test")

    @property
    def arguments(self) -> list[str]:
        return ["--store", str(self.root)]

    def artifact(
        self,
        kind: str,
        files: Mapping[str, bytes],
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact | str],
        counts: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Artifact:
        """An artifact of the store, made once, and the run of its step where a workflow run is given."""
        needed = {role: item if isinstance(item, str) else item.fingerprint for role, item in inputs.items()}
        identity = fingerprint(kind, 1, config, needed)
        folder = Folder.at(self.root / kind / identity)
        if folder.exists("manifest.json"):
            return Artifact.open(folder)
        run = self.catalog.step_run(kind, kind, identity, parent) if parent else None
        out = ArtifactWriter(folder, kind, identity, "attempt")
        for name, data in files.items():
            out.write_bytes(name, data)
        made = out.commit(config, needed, counts or {}, mlflow_run_id=run)
        if run:
            self.catalog.log_params(run, dict(config))
            self.catalog.set_tags(run, artifact_tags(made))
            self.catalog.end_run(run, "FINISHED")
        return made

    def run(self, name: str = NAME, *assignments: str) -> tuple[str, PipelineConfig]:
        """A workflow run with its parameters, and the configuration of it."""
        config = load_config("quickstart", [f"models={{{name}: {{}}}}", *assignments])
        run_id = self.catalog.start_run("test", {"edt.workflow": "test", "edt.source": SOURCE})
        self.catalog.log_params(run_id, config.model_dump(mode="json", exclude={"store", "name"}))
        return run_id, config

    def entry(
        self,
        key: str,
        metrics: Mapping[str, float],
        protocol: Mapping[str, Any],
        run: str,
        costs: Mapping[str, Any] = MappingProxyType({}),
        untrained: Mapping[str, Any] | None = None,
        **train: Any,
    ) -> Entry:
        """The artifacts of a model; images and autoencoder are those of all. `costs` are counts of its training.

        `untrained`: the metrics and the protocol of the untrained model's evaluation.
        """
        config = {"max_steps": 8, "lr": 0.004, "seed": len(key), "key": key, **train}
        images = self.artifact("images", {CLASSES_NAME: b'["0", "1"]'}, {"image_size": 32}, {"source": SOURCE}, {}, run)
        vae = self.artifact("autoencoder", {"a": b"a"}, {"steps": 3}, {"images": images}, {}, run)
        latents = self.artifact("latents", {"l": b"l"}, {}, {"images": images, "autoencoder": vae}, {}, run)
        counts = {"model": "EDT-Tiny/2", "steps": 8, **costs}
        checkpoint = self.artifact("checkpoint", {"ema": key.encode()}, config, {"latents": latents}, counts, run)
        needed = {"checkpoint": checkpoint, "autoencoder": vae}
        features = self.artifact("features", {"f": b"f"}, ChainConfig().model_dump(mode="json"), needed, {}, run)
        reference = self.artifact("reference", {"r": b"r"}, {}, {"images": images}, {}, run)
        result = {"metrics": dict(metrics), "protocol": dict(protocol)}
        text = json.dumps(result).encode()
        judged = {"features": features, "reference": reference}
        evaluation = self.artifact("evaluation", {"metrics.json": text}, {}, judged, result, run)
        before = None
        if untrained is not None:
            before = self.artifact("evaluation", {"metrics.json": b"{}"}, {"untrained": key}, judged, untrained, run)
        return Entry(images, vae, checkpoint, features, evaluation, before)

    def add(
        self,
        key: str,
        value: float,
        gate: PromoteConfig | None = None,
        protocol: Mapping[str, Any] = PROTOCOL,
        name: str = NAME,
        assignments: tuple[str, ...] = (),
        train: Mapping[str, Any] | None = None,
        costs: Mapping[str, Any] = MappingProxyType({}),
        untrained: Mapping[str, Any] | None = None,
        **metrics: float,
    ) -> Decision:
        """Register a version whose fd_classifier is `value`, with made-up weights, and decide on it."""
        run, config = self.run(name, *assignments)
        gate = gate or config.promote
        measured = {"fd_classifier": value, **metrics}
        entry = self.entry(key, measured, protocol, run, costs, untrained, **(train or {}))
        model = self.root / "models" / key
        files = {"model_index.json": b"{}", "transformer/weights.safetensors": key.encode() * 99}
        for inner, data in files.items():
            path = model / "artifacts" / "pipeline" / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        text = digests_text(folder_digests(model / "artifacts" / "pipeline"))
        (model / "artifacts" / DIGESTS).write_bytes(text)
        tags = version_tags({"edt.source": SOURCE}, gate, entry) | {DIGEST_TAG: sha256(text).hexdigest()}
        version = add_version(self.catalog, name, model.as_uri(), run, tags, identity_of(entry, gate))
        return settle(self.catalog, version, gate, f"run {run}", lambda: stored_problems(self.catalog.client, version))

    def champion(self, name: str = NAME) -> str:
        return str(self.catalog.client.get_model_version_by_alias(name, "champion").version)

    def version(self, number: str, name: str = NAME) -> Any:
        return self.catalog.client.get_model_version(name, number)


def registered(
    registry: Registry, folder: Path, model: Opened | None = None, torch_export: bool = True
) -> SimpleNamespace:
    """A whole model, registered as the workflow does under the name REAL, with the artifacts behind it."""
    model = model or opened(folder, made_model())
    exported = f"promote.torch_export={str(torch_export).lower()}"
    run, config = registry.run(REAL, exported, "promote.license=apache-2.0")
    chain = ChainConfig(num_sampling_steps=3).model_dump(mode="json")
    assert model.autoencoder is not None
    images = registry.artifact("images", {CLASSES_NAME: b'["a", "b", "c", "d"]'}, {"real": 1}, {}, {})
    features = registry.artifact("features", {"f": b"f"}, chain, {"checkpoint": model.checkpoint}, {})
    result = {"metrics": {"fd_classifier": 3.0}, "protocol": PROTOCOL}
    evaluation = registry.artifact("evaluation", {"m": b"m"}, {}, {"features": features}, result)
    entry = Entry(images, model.autoencoder, model.checkpoint, features, evaluation)
    decision = promote(registry.catalog, run, REAL, config.promote, entry)
    return SimpleNamespace(entry=entry, decision=decision, run=run, config=config)
