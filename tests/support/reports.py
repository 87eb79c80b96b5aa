"""A made-up report with every part that one can have."""

from dataclasses import replace
from typing import Any

import numpy as np

from edt_core.data.sources.delta import ImageDelta
from edt_core.evaluation.confusion import Accuracy, Confusion
from edt_core.evaluation.worth import Remark
from pipelines.report.costs import StepCost
from pipelines.report.history import Champion, VersionRecord
from pipelines.report.inputs import Neighbourhood
from pipelines.report.lineage import LineageRow
from pipelines.report.page import ReportData
from pipelines.report.predecessor import Predecessor, PredecessorFacts
from pipelines.report.validation import Validation

CLASSES = ("ant", "bee", "cat")


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def row(step: str, kind: str, *inputs: str) -> LineageRow:
    fingerprint, digest = (step.encode().hex() * 64)[:64], (kind.encode().hex() * 64)[:64]
    return LineageRow(
        step, kind, fingerprint, digest, inputs, f"s3://store/{kind}", None, "c0de", registered=kind == "evaluation"
    )


LINEAGE = (
    row("preprocess", "images", "source"),
    row("autoencoder", "autoencoder", "preprocess"),
    row("encode", "latents", "preprocess", "autoencoder"),
    row("train", "checkpoint", "encode"),
    row("evaluate", "evaluation", "train", "preprocess"),
)
HISTORY = [
    {"step": k, "loss": 3 / k, "loss_full": 1 / k, "loss_masked": 2 / k, "lr": 1e-3, "grad_norm": 1.0}
    | {f"loss_t{quarter}": (4 - quarter) / k for quarter in range(4)}
    for k in range(1, 6)
]
COSTS = (
    StepCost("preprocess", 4.0, 1797, "images", None, None, 6_600_000),
    StepCost("train", 60.0, 57_600, "images", 3_310_000_000_000, 118.0, 45_000_000),
    StepCost("evaluate", 0.5, None, "", None, None, 1400),
)
REGISTRY = VersionRecord(
    metric="fd_classifier",
    lower_is_better=True,
    registered="2026-03-20T03:04:05Z",
    run_id="c0ffee" * 5 + "00",
    code_version="ab" * 20,
    champions=(
        Champion(version="1", registered="2026-03-06T03:00:00Z", value=4.5, spread=0.25),
        Champion(
            version="2",
            registered="2026-03-13T03:00:00Z",
            value=3.5,
            comparable=False,
            differences=("cfg_scale 1.5 / 1.75",),
        ),
    ),
    found_with="--store /data/edt-store",
)


def neighbourhood(size: int = 8) -> Neighbourhood:
    """Two generated images with three real ones each; the last is of another class."""
    rng = np.random.default_rng(0)
    return Neighbourhood(
        space="classifier",
        samples=images(2, size),
        labels=np.array([0, 1]),
        real=np.stack([images(3, size), images(3, size)[::-1]]),
        real_labels=np.array([[0, 0, 0], [1, 1, 2]]),
        distances=np.array([[0.5, 0.625, 0.75], [1.25, 1.5, 1.75]]),
        generated_nearest=rng.uniform(2, 4, 50),
        real_nearest=rng.uniform(1, 4, 100),
        searched=100,
        total=1000,
    )


def validation(num_classes: int, wrong: dict[int, float], images: int = 10) -> Validation:
    """A validation in which a share of the samples of some classes is taken for the class before."""
    labels = np.repeat(np.arange(num_classes), images)
    predictions = labels.copy()
    for label, share in wrong.items():
        places = np.flatnonzero(labels == label)[: round(share * images)]
        predictions[places] = (label - 1) % num_classes
    found = Confusion.of(labels, predictions, num_classes)
    rows = [
        {
            "name": f"class <{label}> $x",
            "samples": numbers(accuracy),
            "real": numbers(Accuracy(20, 19) if label % 2 else Accuracy(0, 0)),
            "mistaken_for": [[f"class <{other}> $x", count] for other, count in found.mistakes(label, 3)],
        }
        for label, accuracy in enumerate(found.by_class())
    ]
    samples = {**numbers(found.overall()), "mean_over_classes": found.mean_over_classes(), "classes": num_classes}
    real = {**numbers(Accuracy(100, 95)), "mean_over_classes": 0.95, "classes": num_classes // 2}
    return Validation({"confidence": 0.95, "samples": samples, "real": real, "classes": rows}, found)


def numbers(accuracy: Accuracy) -> dict[str, Any]:
    """An accuracy as `validation.json` has it."""
    low, high = accuracy.interval(0.95)
    return {"images": accuracy.images, "right": accuracy.right, "accuracy": accuracy.value, "low": low, "high": high}


def report_data(**changes: Any) -> ReportData:
    """The least that a report is made of, with these changes."""
    labels = np.arange(9) % 3
    data = ReportData(
        title="edt-tiny version 3",
        config_name="quickstart",
        model={"version": 3, "parameters": 1234567, "aliases": ["candidate", "champion"]},
        decision="became champion: fd_classifier 1.5, before 4",
        classes=CLASSES,
        samples=images(9),
        sample_labels=labels,
        untrained=images(3),
        untrained_labels=labels[:3],
        real=images(9),
        real_labels=labels,
        history=(),
        metrics_before={"fd_classifier": 6.0, "precision": 0.25},
        metrics_after={"fd_classifier": 1.5, "precision": 0.5},
        protocol={"sampler": "ddpm", "num_sampling_steps": 50},
        lineage=LINEAGE,
        config_yaml="name: quickstart\n",
        environment={"python": "3.11"},
    )
    return replace(data, **changes)


def whole_report_data(**changes: Any) -> ReportData:
    """A report with every part."""
    parts: dict[str, Any] = {
        "history": HISTORY,
        "registry": REGISTRY,
        "crowned": True,
        "neighbours": neighbourhood(),
        "final_losses": 1 / np.arange(1.0, 101.0),
        "num_timesteps": 100,
        "costs": COSTS,
    }
    return report_data(**parts | changes)


def fullest_report_data(**changes: Any) -> ReportData:
    """A report with every part, those of a retraining and of the optional steps among them."""
    facts = PredecessorFacts(version="2", metric="fd_classifier", value=2.25, measured="measured again by hand")
    delta = ImageDelta(
        *(1000, 1100, 980), {"ant": 110}, {"ant": 17}, {("ant", "bee"): 3}, {"nul": "cat"}, ("dog",), ("old",)
    )
    parts: dict[str, Any] = {
        "predecessor": Predecessor(facts, delta, images(9), np.arange(9) % 3, True, {"classifier": 0.5}),
        "validation": validation(3, {1: 0.5}),
        "remarks": (Remark("accuracy_classifier is 0.12: as by chance", doubt=True), Remark("a fact")),
        "left_out": ("13 files that are not images: 13 .txt", "2 classes without images: dog, old"),
    }
    return whole_report_data(**parts | changes)
