"""Reproduction of a run from its MLflow record: configuration, code version, seeds and inputs, into a new store.

The record has the digest of every artifact (`edt.digest`). The new artifacts are compared with it, step by step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.config import AutoencoderConfig
from edt_core.environment import code_version, environment
from edt_core.errors import UserError
from edt_core.files.place_names import check_store_name
from edt_core.files.tensor_files import load_tensors
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.commands.options import validated
from jobs.models.initial import INIT_FROM_TAG
from jobs.runtime.tracking import own_uri
from jobs.stages.autoencoder import resolve
from pipelines.config.schema import PipelineConfig
from pipelines.outcome import Outcome
from pipelines.pipeline import Published, call_steps, prepare_source, run
from pipelines.plan import Planner
from pipelines.registry.aliases import GUIDE_FROM_TAG
from pipelines.registry.kept import kept_roles, recorded_networks
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog, flatten
from pipelines.tracking.runs import Record, artifact_runs, read_record, step_tag, steps_of

_OF_RIVALS = tuple(f"{step}.{who}." for step in ("sample", "evaluate") for who in ("champion", "teacher", "few-step"))
REPORT = "report."  # reports contain runs, locations and times; they are rewritten, but not compared


@dataclass(frozen=True)
class Comparison:
    """One step, then and now. `how`: how its content differs from the record; "" if it does not."""

    step: str
    fingerprint: str
    recorded: str | None  # digest; None if the step did not finish in the recorded run
    now: str | None
    how: str = ""

    @property
    def equal(self) -> bool:
        return self.recorded is not None and self.recorded == self.now

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "equal": self.equal}


def reproduce(
    run_id: str, catalog: Catalog, store: str, terminal: Terminal, address: str | None = None, other_code: bool = False
) -> tuple[Outcome, list[Comparison]]:
    """Repeat the recorded run in the empty local folder `store`, and compare the artifacts.

    Raises UserError, before anything is computed, if the record is incomplete, the code version differs (unless
    `other_code`), the images differ, or the folder is not empty. Warns if published weights differ.
    """
    record = read_record(catalog, run_id)
    folder = _empty(store, run_id)
    check_code(record, terminal, other_code)
    config, published = restored(record, catalog, store)
    steps = _checked_steps(record, config, published, folder, terminal)
    outcome = run(config, terminal, address, published, own_uri(folder))
    return outcome, list(compare(record, catalog, Store(folder), steps))


def _empty(store: str, run_id: str) -> Folder:
    """The folder of the new store: empty, or from an earlier attempt to reproduce the same run."""
    folder = Folder.at(store)
    if folder.local is None:
        raise UserError(f"--into {store} is not a local folder; give a new or empty one")
    check_store_name(folder.local)
    mark = f".reproduces-{run_id}"
    if folder.names() and not folder.exists(mark):
        raise UserError(f"{folder.uri} is not empty; give an empty folder with --into")
    folder.write_bytes(mark, b"")
    return folder


def check_code(record: Record, terminal: Terminal, other_code: bool) -> None:
    """Warn if versions of libraries differ. Raise UserError, or with `other_code` warn, if the code version differs."""
    then, now = record.tags.get("edt.code_version", "unknown"), code_version()
    if then != now:
        text = f"the run was made by code version {then}, but this is {now}"
        if not other_code:
            raise UserError(f"{text}; check out that version, or give --other-code to run this one")
        terminal.warn(text)
    elif then.endswith("+dirty"):
        terminal.warn(f"the run was made by {then}: its uncommitted changes were not saved, so this code may differ")
    present = environment()
    for name in sorted({*present, *record.environment}):
        if (before := record.environment.get(name)) != present.get(name):
            terminal.warn(f"{name} was {before} and is {present.get(name)}: results may differ")


def restored(record: Record, catalog: Catalog, store: str) -> tuple[PipelineConfig, Published]:
    """The recorded configuration with another store, and its published inputs as they were then."""
    config: PipelineConfig = validated(PipelineConfig, {**record.config, "store": store})
    published = replace(Published.of(pinned(config, record), catalog.tracking_uri), kept=recorded_networks(record.tags))
    vae = None if "autoencoder" in published.kept else published.autoencoder
    if vae is not None:  # the new store's MLflow does not know the registered model
        published = replace(published, autoencoder=Source(resolve(vae.location), vae.fingerprint))
    return config, published


def pinned(config: PipelineConfig, record: Record) -> PipelineConfig:
    """The configuration with registered models by their versions, because an alias may have moved."""
    version = record.tags.get("edt.autoencoder", "")
    if version.startswith("models:/"):
        by_version: AutoencoderConfig = config.autoencoder.model_copy(update={"pretrained": version})
        config = config.model_copy(update={"autoencoder": by_version})
    places = {name: record.tags.get(f"{INIT_FROM_TAG}.{name}") for name in config.models}
    models = {n: {**fields, "init_from": places[n]} if places[n] else fields for n, fields in config.models.items()}
    if (place := record.tags.get(GUIDE_FROM_TAG)) is not None:
        config = config.model_copy(update={"sample": config.sample.model_copy(update={"guide": place})})
    return config.model_copy(update={"models": models})


def _checked_steps(
    record: Record, config: PipelineConfig, published: Published, folder: Folder, terminal: Terminal
) -> dict[str, str]:
    """The present fingerprints of the steps. Warns if they differ from the record.

    Raises UserError if the images differ.
    """
    source = prepare_source(config.source, folder, terminal)
    if (then := record.tags.get("edt.source")) != source.fingerprint:
        raise UserError(
            f"the images at {config.source.path or config.source.kind} are not those of the run: their fingerprint was "
            f"{str(then)[:12]} and is {source.fingerprint[:12]}; restore the images of the run"
        )
    planner = Planner(Store(folder))
    call_steps(planner, config, source, published)
    now = steps_of({step_tag(name): step.fingerprint for name, step in planner.steps.items()})
    differing = [name for name, identity in now.items() if record.steps.get(name, identity) != identity]
    if differing:
        terminal.warn(
            f"{len(differing)} steps differ from the record, because of other code or weights: {', '.join(differing)}"
        )
    return now


def compare(record: Record, catalog: Catalog, store: Store, steps: Mapping[str, str]) -> Iterator[Comparison]:
    """Compare every recorded step with the artifact of its fingerprint in `steps` (step -> fingerprint) in a store."""
    artifacts = {artifact.fingerprint: artifact for artifact in store.artifacts()}
    kept = kept_roles(record.tags)  # of another run, and taken as they were
    then = {n: identity for n, identity in record.steps.items() if not n.startswith(REPORT) and n not in kept}
    # A champion or a teacher is measured after the branch, and the registry of the new store is empty.
    then = {n: identity for n, identity in then.items() if n in steps or not n.startswith(_OF_RIVALS)}
    runs = artifact_runs(catalog, set(then.values()))
    for name, identity in then.items():
        artifact = artifacts.get(steps.get(name, ""))
        run = runs.get(identity)
        recorded = run.data.tags["edt.digest"] if run is not None else None
        digest = artifact.manifest.digest if artifact is not None else None
        how = "" if recorded == digest else _distance(run, artifact)
        yield Comparison(name, identity, recorded, digest, how)


def _distance(run: Any, artifact: Artifact | None) -> str:
    """How an artifact differs from the recorded one: files, weights, numbers."""
    if artifact is None:
        return "not made"
    if run is None:
        return "the record has no such artifact"
    differences = []
    if (before := _existing(run.data.tags["edt.uri"])) is not None:
        differences.append(_files(before, artifact))
    differences += _numbers(run.data.metrics, artifact)
    return ", ".join(differences) or "different content, equal counts"


def _existing(uri: str) -> Artifact | None:
    try:
        return Artifact.open(uri)
    except (UserError, OSError):
        return None


def _files(before: Artifact, after: Artifact) -> str:
    """How many files differ, and the largest difference between tensors."""
    then = {entry.path: entry.sha256 for entry in before.manifest.files}
    now = {entry.path: entry.sha256 for entry in after.manifest.files}
    differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    tensors = [n for n in differing if n in then and n in now and n.endswith(".safetensors")]
    largest = max((_tensor_distance(before.path(name), after.path(name)) for name in tensors), default=None)
    by = f" by up to {largest:.3g}" if largest is not None else ""
    return f"{len(differing)} of {len({*then, *now})} files differ{by}"


def _tensor_distance(before: Path, after: Path) -> float:
    """Largest absolute difference of two safetensors files; inf if their names or shapes differ."""
    then, now = load_tensors(before), load_tensors(after)
    if {name: value.shape for name, value in then.items()} != {name: value.shape for name, value in now.items()}:
        return float("inf")
    distances = [float((then[name].double() - now[name].double()).abs().max()) for name in then if then[name].numel()]
    return max(distances, default=0.0)


def _numbers(recorded: Mapping[str, float], artifact: Artifact) -> list[str]:
    """The counts and metrics that differ, as `fd_classifier 4.93 -> 4.95`."""
    now = {k: v for k, v in flatten(artifact.counts).items() if isinstance(v, int | float)}
    return [
        f"{name} {recorded[name]:.6g} -> {value:.6g}"
        for name, value in now.items()
        if name in recorded and not np.isclose(recorded[name], value, rtol=0, atol=0, equal_nan=True)
    ]
