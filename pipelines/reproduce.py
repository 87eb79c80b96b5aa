"""A run done again from its MLflow record: configuration, code version, seeds and inputs, into a store of its own.

The record says what every artifact's content was (`edt.digest`); what comes out now is compared with
that, step by step.
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
from jobs.runtime.tracking import own_uri
from jobs.stages.autoencoder import resolve
from pipelines.config.schema import PipelineConfig
from pipelines.outcome import Outcome
from pipelines.pipeline import Published, call_steps, prepare_source, run
from pipelines.plan import Planner
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog, flatten
from pipelines.tracking.runs import Record, artifact_runs, read_record, step_tag, steps_of

REPORT = "report."  # reports name runs, places and times; they are written again, and not compared


@dataclass(frozen=True)
class Comparison:
    """One step, then and now. `how`: how far its content is from what the record says; "" for not at all."""

    step: str
    fingerprint: str
    recorded: str | None  # digest; None where the step did not end in the recorded run
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
    """Run again what a record describes, into the empty local folder `store`, and compare.

    Raises UserError, before anything is computed, where the record is not whole, the code is another one (unless
    `other_code`), the images are not those of the record, or the folder is not empty. Warns of other weights.
    """
    record = read_record(catalog, run_id)
    folder = _empty(store, run_id)
    check_code(record, terminal, other_code)
    config, published = restored(record, catalog, store)
    steps = _checked_steps(record, config, published, folder, terminal)
    outcome = run(config, terminal, address, published, own_uri(folder))
    return outcome, list(compare(record, catalog, Store(folder), steps))


def _empty(store: str, run_id: str) -> Folder:
    """The folder of the new store: empty, or of an earlier try at the same."""
    folder = Folder.at(store)
    if folder.local is None:
        raise UserError(f"a run is reproduced into a local folder, and {store} is none; give one with --into")
    check_store_name(folder.local)
    mark = f".reproduces-{run_id}"
    if folder.names() and not folder.exists(mark):
        raise UserError(f"{folder.uri} is not empty; give an empty folder with --into")
    folder.write_bytes(mark, b"")
    return folder


def check_code(record: Record, terminal: Terminal, other_code: bool) -> None:
    """Refuse another code version, or warn of it, and of other versions of libraries."""
    then, now = record.tags.get("edt.code_version", "unknown"), code_version()
    if then != now:
        text = f"the run was made by code version {then}, and this is {now}"
        if not other_code:
            raise UserError(f"{text}; check that version out, or give --other-code to see what comes out of this one")
        terminal.warn(text)
    elif then.endswith("+dirty"):
        terminal.warn(f"the run was made by {then}: with uncommitted changes that no record holds")
    ours = environment()
    for name in sorted({*ours, *record.environment}):
        if (before := record.environment.get(name)) != ours.get(name):
            terminal.warn(f"{name} was {before} and is {ours.get(name)}: results may differ")


def restored(record: Record, catalog: Catalog, store: str) -> tuple[PipelineConfig, Published]:
    """The recorded configuration with another store, and what it named from elsewhere as it was then."""
    config: PipelineConfig = validated(PipelineConfig, {**record.config, "store": store})
    published = Published.of(pinned(config, record), catalog.tracking_uri)
    if (vae := published.autoencoder) is not None:  # the new store's MLflow does not know the registered model
        published = replace(published, autoencoder=Source(resolve(vae.location), vae.fingerprint))
    return config, published


def pinned(config: PipelineConfig, record: Record) -> PipelineConfig:
    """The configuration with a registered autoencoder by its version: the alias may have moved since."""
    version = record.tags.get("edt.autoencoder", "")
    if not version.startswith("models:/"):
        return config
    fixed: AutoencoderConfig = config.autoencoder.model_copy(update={"pretrained": version})
    return config.model_copy(update={"autoencoder": fixed})


def _checked_steps(
    record: Record, config: PipelineConfig, published: Published, folder: Folder, terminal: Terminal
) -> dict[str, str]:
    """The fingerprints of the steps as they would be now; warns of those that are not what they were.

    Raises UserError where the images are others.
    """
    source = prepare_source(config.source, folder, terminal)
    if (then := record.tags.get("edt.source")) != source.fingerprint:
        raise UserError(
            f"the images at {config.source.path or config.source.kind} are not those of the run: their identity was "
            f"{str(then)[:12]} and is {source.fingerprint[:12]}; put the images of then in their place"
        )
    planner = Planner(Store(folder))
    call_steps(planner, config, source, published)
    now = steps_of({step_tag(name): step.fingerprint for name, step in planner.steps.items()})
    differing = [name for name, identity in now.items() if record.steps.get(name, identity) != identity]
    if differing:
        terminal.warn(
            f"{len(differing)} steps are not those of the record, by this code or other weights: {', '.join(differing)}"
        )
    return now


def compare(record: Record, catalog: Catalog, store: Store, steps: Mapping[str, str]) -> Iterator[Comparison]:
    """What the record says of every step beside what `steps` (step -> fingerprint) have made in a store."""
    there = {artifact.fingerprint: artifact for artifact in store.artifacts()}
    then = {name: identity for name, identity in record.steps.items() if not name.startswith(REPORT)}
    runs = artifact_runs(catalog, set(then.values()))
    for name, identity in then.items():
        made = there.get(steps.get(name, ""))
        run = runs.get(identity)
        recorded = run.data.tags["edt.digest"] if run is not None else None
        digest = made.manifest.digest if made is not None else None
        how = "" if recorded == digest else _distance(run, made)
        yield Comparison(name, identity, recorded, digest, how)


def _distance(run: Any, made: Artifact | None) -> str:
    """How far an artifact is from the recorded one: files that differ, weights, numbers."""
    if made is None:
        return "not made"
    if run is None:
        return "the record has no such artifact"
    differences = []
    if (before := _still_there(run.data.tags["edt.uri"])) is not None:
        differences.append(_files(before, made))
    differences += _numbers(run.data.metrics, made)
    return ", ".join(differences) or "other content, the same counts"


def _still_there(uri: str) -> Artifact | None:
    try:
        return Artifact.open(uri)
    except (UserError, OSError):
        return None


def _files(before: Artifact, made: Artifact) -> str:
    """How many files differ, and by how much at most where they are tensors."""
    then = {entry.path: entry.sha256 for entry in before.manifest.files}
    now = {entry.path: entry.sha256 for entry in made.manifest.files}
    differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    tensors = [n for n in differing if n in then and n in now and n.endswith(".safetensors")]
    largest = max((_tensor_distance(before.path(name), made.path(name)) for name in tensors), default=None)
    by = f" by up to {largest:.3g}" if largest is not None else ""
    return f"{len(differing)} of {len({*then, *now})} files differ{by}"


def _tensor_distance(before: Path, made: Path) -> float:
    """Largest absolute difference of two safetensors files; inf where they hold other tensors."""
    then, now = load_tensors(before), load_tensors(made)
    if {name: value.shape for name, value in then.items()} != {name: value.shape for name, value in now.items()}:
        return float("inf")
    distances = [float((then[name].double() - now[name].double()).abs().max()) for name in then if then[name].numel()]
    return max(distances, default=0.0)


def _numbers(recorded: Mapping[str, float], made: Artifact) -> list[str]:
    """The counts and metrics that differ, as `fd_classifier 4.93 -> 4.95`."""
    now = {k: v for k, v in flatten(made.counts).items() if isinstance(v, int | float)}
    return [
        f"{name} {recorded[name]:.6g} -> {value:.6g}"
        for name, value in now.items()
        if name in recorded and not np.isclose(recorded[name], value, rtol=0, atol=0, equal_nan=True)
    ]
