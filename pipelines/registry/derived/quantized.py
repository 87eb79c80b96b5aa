"""Register a quantised model as a version of the model that it is made from: a candidate, decided on as any other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edt_core.config import SampleConfig
from edt_core.environment import code_version
from edt_core.models import DiffusionTransformer
from edt_core.models.quantized.record import SCHEMES
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import ema_model
from jobs.commands.clock import Clock
from jobs.models.open import Loaded
from jobs.models.quantize import QUANTIZATION, Settings, check_settings, device_of_work, make_quantized
from jobs.models.registry_files import DIGEST_TAG, stored_problems, title
from pipelines.registry.aliases import (
    DECISION_TAG,
    QUANTIZED_OF_TAG,
    QUANTIZED_TAG,
    find_version,
    gate_of,
    settle,
    version_at,
)
from pipelines.registry.derived.evaluation import evaluation_of, trained_checkpoint
from pipelines.registry.derived.folder import TAKEN_OVER, write_derived
from pipelines.registry.gate import Decision, metric_of
from pipelines.registry.packaging import QUANTIZE_EXTRA, log_pipeline
from pipelines.registry.registration import COST_TAG, add_logged, evaluation_tags
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import artifact_tags

MIB = 1 << 20


@dataclass(frozen=True)
class Quantized:
    """A quantised model of the version `parent`: its artifact, the model in memory, and what was measured.

    `seconds` and `seconds_before` are of an image, quantised and in float, measured in one run at `place`.
    `features` and `evaluation` are None where no metric was measured.
    """

    parent: Any
    artifact: Artifact
    loaded: Loaded
    seconds: float
    seconds_before: float
    place: str
    features: Artifact | None = None
    evaluation: Artifact | None = None

    @property
    def facts(self) -> dict[str, str]:
        """How it was made, with sizes and times, by name: the tags of the version."""
        made = self.artifact.counts[QUANTIZATION]
        rows = made["layers"]
        quantized = [row for row in rows if row["stored"] == "quantised"]
        group = {} if made["group_size"] is None else {"group_size": str(made["group_size"])}
        return {
            "of": f"{self.parent.name}/{self.parent.version}",
            "scheme": made["scheme"],
            **group,
            "layers": f"{len(quantized)} of {len(rows)}",
            "worst_error": f"{max(row['worst'] for row in quantized):.4g}",
            "keep_error": f"{made['keep_error']:.4g}",
            "mib": f"{made['bytes'] / MIB:.4g}",
            "mib_before": f"{made['bytes_before'] / MIB:.4g}",
            "seconds": f"{self.seconds:.4g}",
            "seconds_before": f"{self.seconds_before:.4g}",
            "timed_on": self.place,
            "torchao": made["torchao"],
        }

    @property
    def shift(self) -> dict[str, str]:
        """The metric that decides, of the version and of its parent; empty where it was not measured."""
        if self.evaluation is None:
            return {}
        metric = gate_of(self.parent).metric
        value, before = float(self.evaluation.counts["metrics"][metric]), metric_of(self.parent, metric)
        if before is None:
            return {metric: f"{value:.4g}"}
        spread = metric_of(self.parent, f"{metric}_std")
        noise = "" if spread is None else f", whose standard deviation is {spread:.2g}"
        return {metric: f"{value:.4g}; {before:.4g} of version {self.parent.version}{noise}"}

    def origin(self) -> dict[str, str]:
        """The facts for the model card."""
        made, facts = self.artifact.counts[QUANTIZATION], self.facts
        floats = [row["layer"] for row in made["layers"] if row["stored"] == "float"]
        settings = self.artifact.manifest.config["quantize"]
        return {
            "made from": f"{title(self.parent)}, without training",
            "quantised": f"{SCHEMES[made['scheme']]} of {facts['layers']} linear layers, by torchao {made['torchao']}",
            "in float": ", ".join(["embeddings, final layer", *floats]),
            "largest error of a layer's output": f"{facts['worst_error']}, layers above {facts['keep_error']} stay in "
            "float",
            "calibration": f"{settings['samples']} samples of seed {settings['seed']}, {made['calls']} of "
            f"{made['calls_of_chain']} calls of their chain",
            "size of the weights": f"{facts['mib']} MiB, before {facts['mib_before']} MiB",
            "seconds an image": f"{facts['seconds']}, before {facts['seconds_before']}, on {self.place}",
            **self.shift,
        }


def quantized(
    catalog: Catalog, parent: Any, loaded: Loaded, settings: Settings, store: Folder, with_metric: bool, bar: Progress
) -> Quantized:
    """The quantised model of a version, which is `loaded`, measured and timed; its artifact is in the store.

    With metrics that is the store with the evaluation of the version, which is repeated on Ray. Raises UserError for a
    version that cannot be quantised so, and for an evaluation that cannot be repeated.
    """
    check_settings(loaded, settings)
    evaluation = evaluation_of(catalog, parent) if with_metric else None
    root = store if evaluation is None else evaluation.store.root
    opened = trained_checkpoint(parent, root)
    if evaluation is not None:
        opened = replace(opened, autoencoder=evaluation.autoencoder)
    weights = str(parent.tags.get(DIGEST_TAG, ""))
    artifact = make_quantized(opened, loaded, weights, settings, lambda name: root.child(f"checkpoint/{name}"), bar)
    model = ema_model(artifact.directory(artifact.counts["final"]))
    features, measured = (None, None) if evaluation is None else evaluation.repeated(artifact, bar)
    (seconds, before), place = _times(loaded, (model, loaded.model))
    own = replace(loaded, model=model)
    return Quantized(parent, artifact, own, seconds, before, place, features, measured)


def _times(loaded: Loaded, models: Sequence[DiffusionTransformer]) -> tuple[list[float], str]:
    """Seconds an image of each model by the protocol, without decoding, and where they were measured."""
    chain = SampleConfig.model_validate(dict(loaded.sampling))
    device = device_of_work()
    loaded.model.to(device)  # the classifier of a chain goes where the model is
    classify = loaded.classify_by(None if loaded.autoencoder is None else loaded.autoencoder.to(device))
    with TemporaryDirectory() as folder:
        facts = loaded.num_timesteps, Folder.at(folder), loaded.guide_of(chain), classify
        clocks = [Clock(model, *facts) for model in models]
        return [clock.seconds(chain) for clock in clocks], clocks[0].place


def register_quantized(catalog: Catalog, made: Quantized) -> tuple[Any, Decision | None, bool]:
    """The version of a quantised model, the decision about it, and whether it is new.

    Without metrics there is no decision, and no alias moves.
    """
    parent, artifact, evaluation = made.parent, made.artifact, made.evaluation
    name = str(parent.name)
    identity = {"edt.checkpoint": artifact.fingerprint, QUANTIZED_OF_TAG: made.facts["of"]}
    if evaluation is not None:
        identity["edt.evaluation"] = evaluation.fingerprint
    version = find_version(catalog, name, identity)
    is_new = version is None
    if version is None:
        version = _register(catalog, made, identity)
    if evaluation is None:
        return version, None, is_new
    if DECISION_TAG in version.tags:
        return version, Decision.from_json(version.tags[DECISION_TAG]), is_new
    by, files = f"edt quantize {made.facts['of']}", lambda: stored_problems(catalog.client, version)
    decision = settle(catalog, version, gate_of(parent), by, files)
    return version_at(catalog, name, str(version.version)), decision, is_new


def _register(catalog: Catalog, made: Quantized, identity: Mapping[str, str]) -> Any:
    parent, artifact = made.parent, made.artifact
    name = str(parent.name)
    own = {f"{QUANTIZED_TAG}{key}": text for key, text in made.facts.items()}
    tags = {key: text for key, text in parent.tags.items() if key in TAKEN_OVER or key.startswith(COST_TAG)}
    tags |= {**artifact_tags(artifact), **own, "edt.code_version": code_version()}
    if made.evaluation is not None:
        tags |= evaluation_tags(gate_of(parent), made.evaluation)
    run_id = catalog.start_run(f"quantize {name}", {**own, **identity})
    logged = log_pipeline(
        catalog,
        run_id,
        name,
        lambda folder: _write(folder, made),
        needs=QUANTIZE_EXTRA,
        params={"architecture": str(artifact.counts["model"]), "scheme": made.facts["scheme"]},
        step=int(artifact.counts["steps"]),
    )
    for step in filter(None, (artifact, made.features, made.evaluation)):
        _record(catalog, step, run_id)
    return add_logged(catalog, name, run_id, logged, tags, identity)


def _record(catalog: Catalog, artifact: Artifact, parent: str) -> None:
    """A finished run for an artifact below the run that registers the version, so that MLflow has its lineage."""
    kind = artifact.manifest.kind
    run_id = catalog.step_run(kind, kind, artifact.fingerprint, parent)
    catalog.log_params(run_id, dict(artifact.manifest.config))
    catalog.set_tags(run_id, artifact_tags(artifact))
    catalog.end_run(run_id, "FINISHED")


def _write(folder: Path, made: Quantized) -> None:
    """The diffusers folder of the parent with the quantised weights, and its card."""
    loaded = replace(made.loaded, model=made.loaded.model.cpu())
    measured = None if made.evaluation is None else made.evaluation.counts
    write_derived(folder, made.parent, loaded, loaded.protocol, made.origin(), measured)
