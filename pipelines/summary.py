"""summary: gathers from the artifacts what the report shows, and writes the page and the sample grid."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import Section
from edt_core.progress import Progress
from edt_core.protocol import protocol_differences
from edt_core.sample_grid import sample_grid
from edt_core.schema import CLASSES_NAME, REPORT_NAME, SAMPLES_NAME
from jobs.autoencoder import IMAGE_SHARDS
from jobs.sample import load_units
from jobs.train import history
from jobs.verb import Verb
from pipelines.report import LineageRow, ReportData, render_report

REGISTERED = ("checkpoint", "evaluation")  # roles whose artifacts a registered version names
_PER_CLASS = 8
_REAL_CLASSES = 20


class SummaryConfig(Section):
    """What the report says that no artifact does. `lineage`: each input's role -> (step, steps it was made from)."""

    title: str
    pipeline: str
    model: dict[str, Any]
    decision: str
    lineage: dict[str, tuple[str, tuple[str, ...]]]
    config_yaml: str


def summarize(
    config: SummaryConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Write the report of one registered model from all artifacts of its branch."""
    data = gather(config, inputs)
    out.write_bytes(REPORT_NAME, render_report(data).encode())
    grid = sample_grid(data.samples, data.sample_labels, data.classes, per_class=_PER_CLASS)
    out.write_bytes(SAMPLES_NAME, grid)
    return {"metrics": dict(data.metrics_after)}


def gather(config: SummaryConfig, inputs: Mapping[str, Artifact]) -> ReportData:
    """The report's data out of the artifacts of a branch, by role."""
    trained, untrained = (load_units(inputs[role]) for role in ("features", "untrained_features"))
    real, real_labels = real_images(inputs["images"])
    evaluation, checkpoint = inputs["evaluation"], inputs["checkpoint"]
    facts = {
        "architecture": checkpoint.counts["model"],
        "parameters": checkpoint.counts["parameters"],
        "macs": checkpoint.counts["macs"],
        "steps": checkpoint.counts["steps"],
        "image_size": inputs["images"].counts["image_size"],
        "images": inputs["images"].counts["images"],
    }
    if "classifier" in inputs:
        facts["classifier_holdout_accuracy"] = inputs["classifier"].counts["holdout_accuracy"]
    return ReportData(
        title=config.title,
        config_name=config.pipeline,
        model={**config.model, **facts},
        decision=config.decision,
        classes=tuple(inputs["images"].read_json(CLASSES_NAME)),
        samples=trained["images"],
        sample_labels=trained["labels"][: len(trained["images"])],
        untrained=untrained["images"],
        untrained_labels=untrained["labels"][: len(untrained["images"])],
        real=real,
        real_labels=real_labels,
        history=history(checkpoint),
        metrics_before=inputs["untrained_evaluation"].counts["metrics"],
        metrics_after=evaluation.counts["metrics"],
        protocol=evaluation.counts["protocol"],
        lineage=[_row(role, config, inputs[role]) for role in config.lineage],
        config_yaml=config.config_yaml,
        environment=checkpoint.manifest.environment,
        protocol_differences=protocol_differences(
            inputs["untrained_evaluation"].counts["protocol"], evaluation.counts["protocol"]
        ),
    )


def real_images(images: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """Up to _PER_CLASS images of each of the first classes, in order: uint8 [M, S, S, 3] and labels [M]."""
    from edt_core.data.shards import read_image_shard

    taken: dict[int, list[np.ndarray]] = {}
    for path in images.paths(IMAGE_SHARDS):
        for sample in read_image_shard(path):
            shown = taken.setdefault(sample.label, []) if sample.label < _REAL_CLASSES else None
            if shown is not None and len(shown) < _PER_CLASS:
                shown.append(sample.pixels())
        if len(taken) >= _REAL_CLASSES and all(len(shown) == _PER_CLASS for shown in taken.values()):
            break
    labels = [label for label, shown in sorted(taken.items()) for _ in shown]
    return np.stack([pixels for _, shown in sorted(taken.items()) for pixels in shown]), np.asarray(labels)


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
        seconds=manifest.duration_s,
        code_version=manifest.code_version,
        registered=role in REGISTERED,
    )


VERB = Verb("report", "report", 1, SummaryConfig, summarize, roles=())
