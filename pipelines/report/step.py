"""summary: collects the report's data from the artifacts, and writes the page and the sample grid."""

from collections.abc import Mapping, Sequence
from typing import Any

from edt_core.config import Section, added
from edt_core.data.left_out import left_out
from edt_core.data.sources.files import some
from edt_core.evaluation.metrics import metric_space
from edt_core.evaluation.protocol import protocol_differences
from edt_core.evaluation.trainings import seed_role
from edt_core.progress import Progress
from edt_core.sampling.grid import sample_grid
from edt_core.sampling.labels import trained_classes
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import CLASSES_NAME, REPORT_NAME, SAMPLES_NAME
from jobs.stages.stage import Stage
from jobs.stages.train import history
from pipelines.report.along import AlongView, along_view, read_along
from pipelines.report.costs import step_cost
from pipelines.report.history import VersionRecord
from pipelines.report.inputs import (
    PER_CLASS,
    Neighbourhood,
    Samples,
    find_neighbours,
    no_neighbours,
    read_samples,
    real_images,
    timestep_losses,
)
from pipelines.report.lineage import LineageRow
from pipelines.report.page import ReportData, render_report
from pipelines.report.predecessor import PredecessorFacts, read_predecessor
from pipelines.report.teacher import TeacherFacts
from pipelines.report.validation import read_validation
from pipelines.report.worth import measured, remarks_on

REGISTERED = ("checkpoint", "evaluation")  # roles of the artifacts that a registered version records


class SummaryConfig(Section):
    """The report's facts that are in no artifact. `lineage`: role of an input -> (step, steps it was made from)."""

    title: str
    pipeline: str
    model: dict[str, Any]
    decision: str
    registry: VersionRecord
    lineage: dict[str, tuple[str, tuple[str, ...]]]
    config_yaml: str
    champion: PredecessorFacts | None = added(None)
    teacher: TeacherFacts | None = added(None)
    pruned: dict[str, str] = added({})  # facts of a version whose blocks were cut
    seeds: tuple[int, ...] = added(())  # of all trainings of the model, if there are several; its own is the first


def summarize(
    config: SummaryConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Write the report of one registered model from all artifacts of its branch."""
    data = gather(config, inputs)
    out.write_bytes(REPORT_NAME, render_report(data).encode())
    grid = sample_grid(data.samples, data.sample_labels, data.classes, per_class=PER_CLASS)
    out.write_bytes(SAMPLES_NAME, grid)
    return {"metrics": dict(data.metrics_after)}


def gather(config: SummaryConfig, inputs: Mapping[str, Artifact]) -> ReportData:
    """The report's data from the artifacts of a branch, by role."""
    images, evaluation, checkpoint = (inputs[role] for role in ("images", "evaluation", "checkpoint"))
    space = metric_space(config.registry.metric)
    classes = tuple(images.read_json(CLASSES_NAME))
    counts = checkpoint.counts.get("class_counts")
    drawn = trained_classes(len(classes), counts)
    trained = read_samples(inputs["features"], drawn, space)
    untrained = read_samples(inputs["untrained_features"], drawn) if "untrained_features" in inputs else None
    before = inputs.get("untrained_evaluation")  # a model that starts from another one has none
    real, real_labels = real_images(images, counts)
    facts = {
        "architecture": checkpoint.counts["model"],
        **{f"model.{name}": value for name, value in checkpoint.counts.get("model_overrides", {}).items()},
        "parameters": checkpoint.counts["parameters"],
        "macs": checkpoint.counts["macs"],
        "steps": checkpoint.counts["steps"],
        "image_size": images.counts["image_size"],
        "images": images.counts["images"],
    }
    if holdout := checkpoint.counts.get("holdout"):
        facts["images_held_out"] = holdout["images"]
    if empty := [name for name, count in zip(classes, counts or (), strict=bool(counts)) if not count]:
        facts["classes_without_images"] = f"{len(empty)} of {len(classes)}: {some(empty)}"
    if images.counts.get("turned"):
        of = images.counts["turned_of"]
        facts["exif_orientation_ignored"] = f"{images.counts['turned']} of {of} inspected images"
    if "classifier" in inputs:
        facts["classifier_holdout_accuracy"] = inputs["classifier"].counts["holdout_accuracy"]
    return ReportData(
        title=config.title,
        config_name=config.pipeline,
        model={**config.model, **facts},
        decision=config.decision,
        classes=classes,
        samples=trained.images,
        sample_labels=trained.labels,
        untrained=None if untrained is None else untrained.images,
        untrained_labels=None if untrained is None else untrained.labels,
        real=real,
        real_labels=real_labels,
        history=history(checkpoint),
        metrics_before=None if before is None else before.counts["metrics"],
        metrics_after=evaluation.counts["metrics"],
        protocol=evaluation.counts["protocol"],
        lineage=[_row(role, config, inputs[role]) for role in config.lineage],
        config_yaml=config.config_yaml,
        environment=checkpoint.manifest.environment,
        protocol_differences=()
        if before is None
        else protocol_differences(before.counts["protocol"], evaluation.counts["protocol"]),
        registry=config.registry,
        crowned="champion" in config.model["aliases"],
        neighbours=_neighbours(space, trained, inputs),
        final_losses=timestep_losses(checkpoint),
        num_timesteps=checkpoint.manifest.config["num_timesteps"],
        predecessor=None if config.champion is None else read_predecessor(config.champion, inputs),
        teacher=config.teacher,
        pruned=config.pruned,
        validation=read_validation(inputs["validation"]) if "validation" in inputs else None,
        along=_along(config.registry, inputs),
        trainings=_trainings(config.seeds, inputs),
        measured=measured(evaluation),
        remarks=remarks_on(inputs, config.registry.metric, config.registry.lower_is_better),
        left_out=left_out(images.counts, classes),
        costs=[step_cost(step, inputs[role], facts["macs"]) for role, (step, _) in config.lineage.items()],
    )


def _trainings(seeds: Sequence[int], inputs: Mapping[str, Artifact]) -> dict[int, Mapping[str, float]]:
    """The metrics of each training by seed, of a model that was trained with several."""
    roles = {seed: seed_role(seed, "evaluation") if place else "evaluation" for place, seed in enumerate(seeds)}
    return {seed: inputs[role].counts["metrics"] for seed, role in roles.items()}


def _along(registry: VersionRecord, inputs: Mapping[str, Artifact]) -> AlongView | None:
    """The curve of the metric that decides, if there were evaluations along the training."""
    if "along" not in inputs:
        return None
    return along_view(read_along(inputs["along"]), registry.metric, registry.lower_is_better, inputs["checkpoint"])


def _neighbours(space: str, samples: Samples, inputs: Mapping[str, Artifact]) -> Neighbourhood | str:
    """The nearest real images of some samples, or the reason why there are none."""
    if why := no_neighbours(space, samples, inputs["features"], inputs["reference"], inputs["images"]):
        return why
    return find_neighbours(space, samples, inputs["reference"], inputs["images"])


def _row(role: str, config: SummaryConfig, artifact: Artifact) -> LineageRow:
    step, needs = config.lineage[role]
    manifest = artifact.manifest
    return LineageRow(
        step=step,
        kind=manifest.kind,
        fingerprint=manifest.fingerprint,
        digest=manifest.digest,
        inputs=needs,
        uri=artifact.folder.uri,
        run_id=manifest.mlflow_run_id,
        code_version=manifest.code_version,
        registered=role in REGISTERED,
    )


STAGE = Stage("report", "report", 2, SummaryConfig, summarize, roles=())
