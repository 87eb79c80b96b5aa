"""scaling: the points of a ladder's trainings, the laws that fit them, and figures."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.config import Rung, ScalingConfig
from edt_core.evaluation.scaling import Fit, Point, bootstrap, fit
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import SCALING_NAME, SCALING_POINTS
from jobs.stages.stage import Stage

ACCURACY = "accuracy_classifier"
Row = dict[str, Any]


def roles_of(number: int) -> tuple[str, str]:
    """The roles of a rung's checkpoint and evaluation."""
    return f"checkpoint_{number}", f"evaluation_{number}"


def scaling(
    config: ScalingConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Gather the points of all rungs, fit the laws of each model, and draw.

    What the points of a model do not determine is left out, with the reason as its `problem`. Raises UserError for a
    training without a held-out loss.
    """
    from jobs.stages.scaling.figures import draw

    rows = [
        _row(config, rung, *(inputs[role] for role in roles_of(number))) for number, rung in enumerate(config.rungs)
    ]
    fits: dict[str, Fit] = {}
    models: dict[str, dict[str, Any]] = {}
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        progress.update(number, len({row["model"] for row in rows}), "models")
        models[model] = _laws(config, [row for row in rows if row["model"] == model], fits, progress)
    out.write_bytes(SCALING_POINTS, _parquet(rows), len(rows))
    for name, picture in draw(config, rows, fits).items():
        out.write_bytes(name, picture)
    out.write_json(SCALING_NAME, {"models": models, "points": rows, "confidence": config.confidence})
    return {"points": len(rows), "models": {name: _summary(laws) for name, laws in models.items()}}


def _row(config: ScalingConfig, rung: Rung, checkpoint: Artifact, evaluation: Artifact) -> Row:
    """One row of the table of points. FLOPs are 2 per multiply-accumulate."""
    counts, metrics = checkpoint.counts, evaluation.counts["metrics"]
    loss = counts.get("holdout", {}).get("loss")
    if loss is None:
        raise UserError(
            f"the training {rung.name} has no held-out loss at its end, and losses of the training are no measure of a "
            "model; set train.holdout to a share of the images, such as 0.05"
        )
    return {
        **rung.model_dump(),
        "parameters": counts["parameters"],
        "steps": counts["steps"],
        "images_seen": counts["images_seen"],
        "training_flops": counts["training_flops"],
        "inference_flops": 2 * counts["macs"] * config.passes,
        "loss": loss,
        config.metric: metrics.get(config.metric),
        ACCURACY: metrics.get(ACCURACY),
    }


def _laws(config: ScalingConfig, rows: Sequence[Row], fits: dict[str, Fit], progress: Progress) -> dict[str, Any]:
    """The laws of one model's points and their intervals, or why there are none."""
    points = [Point(row["budget"], row["parameters"], row["loss"], row["seed"]) for row in rows]
    try:
        laws = fits[rows[0]["model"]] = fit(points)
    except UserError as error:
        progress.warn(f"{rows[0]['model']}: {error}")
        return {"problem": str(error)}
    intervals = bootstrap(points, config.resamples, config.confidence)
    return {
        "minima": [{"budget": m.budget, "parameters": m.parameters, "loss": m.loss} for m in laws.minima],
        "numbers": laws.numbers(),
        "intervals": intervals.ends,
        "resamples": intervals.resamples,
        "failed": intervals.failed,
    }


def _summary(laws: Mapping[str, Any]) -> dict[str, Any]:
    """What the counts of the artifact say of a model's laws."""
    return {key: laws[key] for key in ("problem", "numbers", "intervals") if key in laws}


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


STAGE = Stage("scaling", "scaling", 1, ScalingConfig, scaling, roles=())
