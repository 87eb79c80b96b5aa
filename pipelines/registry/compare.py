"""compare: a metric of registered versions against the cost of their training, next to published results.

Registration writes a version's costs as its tags. For older versions without these tags, the costs come from the
checkpoint artifact, if that is readable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.published import PUBLISHED, Published
from edt_core.store.artifact import Artifact
from pipelines.registry.aliases import gate_of
from pipelines.registry.gate import metric_of, metrics_of, protocol_of
from pipelines.registry.lookup import Record, differences, same_protocol
from pipelines.registry.registration import COST_TAG, COSTS

AXES = {"training_flops": "training FLOPs", "images_seen": "images seen", "device_hours": "device-hours"}
_PUBLISHED_METRIC = "fid"
_PATCHES = "/2"  # of the published models to show: those with larger patches are far off in the figure


@dataclass(frozen=True)
class Point:
    """One version, or one row of a paper (`source`). Costs that are not recorded are None."""

    label: str
    model: str
    value: float
    spread: float | None = None
    steps: int | None = None
    images_seen: int | None = None
    training_flops: int | None = None
    device_hours: float | None = None
    comparable: bool = True  # with the first version
    source: str | None = None

    @property
    def series(self) -> str:
        """The line of the figure that the point is on: the registered model, or the paper and its model family."""
        return self.label.partition("/")[0] if self.source is None else f"{self.model.partition('-')[0]}, {self.source}"


@dataclass(frozen=True)
class Comparison:
    """Versions in the given order, published points, and notes for the reader."""

    metric: str
    points: tuple[Point, ...]
    published: tuple[Point, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One table row per point, versions first."""
        return [self._row(point) for point in (*self.points, *self.published)]

    def _row(self, point: Point) -> dict[str, Any]:
        value = f"{point.value:.4g}" if point.spread is None else f"{point.value:.4g} ± {point.spread:.2g}"
        mark = "" if point.comparable else " *"
        fields = {**asdict(point), self.metric: f"{value}{mark}", "version": point.source or point.label}
        return {**fields, "training_flops": None if point.training_flops is None else float(point.training_flops)}

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def compare(records: Sequence[Record], metric: str | None = None, with_published: bool = False) -> Comparison:
    """Compare versions by a metric, by default the metric of the first version's gate.

    Published FIDs are added if the metric is `fid` and the image size is the same; `with_published` always adds them.
    Raises UserError if one of the versions lacks the metric.
    """
    first = records[0].version
    metric = metric or gate_of(first).metric
    costs = [costs_of(record.version) for record in records]
    points = tuple(_point(record, metric, cost, first) for record, cost in zip(records, costs, strict=True))
    published, note = _published(metric, [cost.get("image_size") for cost in costs], first, with_published)
    notes = [*_unlike(records), *_unknown(points), note]
    return Comparison(metric, points, published, tuple(note for note in notes if note))


def costs_of(version: Any) -> dict[str, Any]:
    """The recorded size and training costs of a version, by the names in `COSTS`, without those not recorded."""
    texts = {name: version.tags[f"{COST_TAG}{name}"] for name in COSTS if f"{COST_TAG}{name}" in version.tags}
    types = {"model": str, "device_hours": float}
    recorded = {name: types.get(name, int)(text) for name, text in texts.items()}
    if "training_flops" in recorded:
        return recorded
    return {**_costs_in_store(version.tags.get("edt.uri")), **recorded}


def _costs_in_store(uri: str | None) -> dict[str, Any]:
    """The costs of an older training, from its artifact. {} if it is unreadable, or the model was not trained here."""
    from edt_core.models import ModelConfig, training_flops
    from jobs.stages.sample import model_config_of

    try:
        artifact = Artifact.read(uri or "")
        images = artifact.counts["steps"] * artifact.manifest.config["global_batch_size"]
        masked = artifact.manifest.config["masked_loss"]
        config = ModelConfig.from_dict(model_config_of(artifact))
    except (UserError, OSError, ValueError, KeyError):
        return {}
    recorded = {name: artifact.counts[name] for name in COSTS if name in artifact.counts}
    flops = images * training_flops(config, masked=masked)
    return {"image_size": config.image_size, "images_seen": images, "training_flops": flops, **recorded}


def _point(record: Record, metric: str, costs: Mapping[str, Any], first: Any) -> Point:
    value = metric_of(record.version, metric)
    if value is None:
        names = ", ".join(sorted(metrics_of(record.version))) or "none"
        raise UserError(f"{record.label} has no metric {metric!r}; it has {names}. Choose another with --metric")
    return Point(
        record.label,
        str(costs.get("model", "-")),
        value,
        metric_of(record.version, f"{metric}_std"),
        **{name: costs.get(name) for name in ("steps", *AXES)},
        comparable=same_protocol(first, record.version),
    )


def _unlike(records: Sequence[Record]) -> list[str]:
    """A note for each version whose protocol differs from that of the first."""
    first, *others = (record.version for record in records)
    names = [record.label for record in records]
    return [
        f"* {name} is NOT comparable with {names[0]}, measured by another protocol: "
        f"{'; '.join(differences(other, first)) or '(details not recorded)'}"
        for name, other in zip(names[1:], others, strict=True)
        if not same_protocol(first, other)
    ]


def _unknown(points: Sequence[Point]) -> list[str]:
    """A note on the costs that are not recorded."""
    missing = {axis: [point.label for point in points if getattr(point, axis) is None] for axis in AXES}
    return [f"{AXES[axis]} not recorded: {', '.join(labels)}" for axis, labels in missing.items() if labels]


def _published(
    metric: str, image_sizes: Sequence[int | None], version: Any, forced: bool
) -> tuple[tuple[Point, ...], str]:
    """The published points to show, and a note on them."""
    candidates = [row for row in PUBLISHED if row.model.endswith(_PATCHES)]
    sizes = set(image_sizes) & {row.image_size for row in candidates}
    guided = float(protocol_of(version).get("cfg_scale", 1.0)) > 1.0
    if forced:
        rows = [row for row in candidates if not sizes or row.image_size in sizes]
        note = "published: FID-50k of ImageNet, shown for any data set and metric (--published)"
    elif metric != _PUBLISHED_METRIC:
        return (), f"no published values for {metric}: only FID-50k is published; --published shows it anyway"
    elif not sizes:
        return (), "no published values for this image size: only 256 and 512 px are; --published shows them anyway"
    else:
        rows = [row for row in candidates if row.image_size in sizes and row.guided == guided]
        note = f"published: FID-50k of ImageNet, {'with' if guided else 'without'} guidance"
    return tuple(_published_point(row) for row in rows), note


def _published_point(row: Published) -> Point:
    """The point of a paper's row. Its training FLOPs are counted by this code for the model of that name."""
    from edt_core.models import MODEL_NAMES, model_config, training_flops

    flops = None
    if row.model in MODEL_NAMES:
        config = model_config(row.model, row.image_size)
        flops = row.images_seen * training_flops(config, masked=config.is_masked)
    label = f"{row.model}{' guided' if row.guided else ''}, {row.steps // 1000}k steps"
    return Point(label, row.model, row.fid, None, row.steps, row.images_seen, flops, source=row.source)
