"""The validation section of a report: how often the classifier recognizes the samples and real images of each class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edt_core.evaluation.confusion import Confusion
from edt_core.files.tensor_files import load_tensors
from edt_core.store.artifact import Artifact
from edt_core.store.layout import SAMPLE_CONFUSION, VALIDATION_NAME
from pipelines.report.figures import BLUE, INK, ORANGE, Picture, drawn

MOST_ROWS = 20  # classes in the table: those with the lowest accuracy
MOST_CELLS = 100  # classes in the confusion figure: with more, a cell is smaller than a pixel


@dataclass(frozen=True, eq=False)
class Validation:
    """The contents of a validation artifact: its `validation.json`, and the confusion of the samples."""

    facts: Mapping[str, Any]
    confusion: Confusion


@dataclass(frozen=True)
class ClassRow:
    """One class. Shares are 0..1, None without images. `mistaken_for`: (name of another class, number of samples)."""

    number: int
    name: str
    images: int
    accuracy: float | None
    low: float
    high: float
    real_images: int
    real_accuracy: float | None
    mistaken_for: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ValidationView:
    """The validation as the page shows it. `rows`: lowest accuracy first. `matrix`: None if there are many classes.

    `sampled` of the `classes` have samples.
    """

    samples: Mapping[str, Any]
    real: Mapping[str, Any]
    confidence: float
    rows: Sequence[ClassRow]
    sampled: int
    classes: int
    curve: Picture
    matrix: Picture | None


def read_validation(artifact: Artifact) -> Validation:
    """The files of a validation artifact, verified."""
    artifact.verify_once(SAMPLE_CONFUSION)
    arrays = load_tensors(artifact.path(SAMPLE_CONFUSION), "numpy")
    return Validation(
        artifact.read_json(VALIDATION_NAME), Confusion.from_arrays(arrays, int(artifact.counts["classes"]))
    )


def validation_view(validation: Validation) -> ValidationView:
    """The classes with samples, in order of accuracy, lowest first."""
    classes, facts = validation.facts["classes"], validation.facts
    rows = [_row(number, row) for number, row in enumerate(classes) if row["samples"]["images"]]
    rows.sort(key=lambda row: (row.accuracy, -row.images, row.number))
    matrix = _matrix(validation.confusion) if len(classes) <= MOST_CELLS else None
    shown = rows[:MOST_ROWS]
    return ValidationView(
        facts["samples"], facts["real"], facts["confidence"], shown, len(rows), len(classes), _curve(rows), matrix
    )


def _row(number: int, row: Mapping[str, Any]) -> ClassRow:
    samples, real = row["samples"], row["real"]
    return ClassRow(
        number,
        row["name"],
        samples["images"],
        samples["accuracy"],
        samples["low"],
        samples["high"],
        real["images"],
        real["accuracy"],
        tuple((name, count) for name, count in row["mistaken_for"]),
    )


def _curve(rows: Sequence[ClassRow]) -> Picture:
    """The accuracy by class, in order, with its interval, and the accuracy for real images of the class."""
    places = np.arange(1, len(rows) + 1)
    value, low, high = (100 * np.array([getattr(row, key) for row in rows]) for key in ("accuracy", "low", "high"))
    real = 100 * np.array([np.nan if row.real_accuracy is None else row.real_accuracy for row in rows])

    def paint(axes: list[Any]) -> None:
        axis, size = axes[0], 4.0 if len(rows) <= MOST_CELLS else 2.0
        axis.vlines(places, low, high, color=BLUE, linewidth=1.0, alpha=0.5)
        axis.plot(places, value, "o", color=BLUE, markersize=size, label="samples")
        axis.plot(places, real, "_", color=ORANGE, markersize=size + 4, label="real images")
        axis.set_ylim(-3, 103)
        axis.set_title("recognized as their own class, %")
        axis.set_xlabel("classes, lowest accuracy first")
        axis.xaxis.get_major_locator().set_params(integer=True)

    extremes = f"from {value[0]:.3g} % of class {rows[0].number} to {value[-1]:.3g} % of class {rows[-1].number}"
    return drawn(
        f"share of samples that are recognized as their own class: {extremes}, median over classes "
        f"{np.median(value):.3g} %",
        paint,
    )


def _matrix(confusion: Confusion) -> Picture:
    """The confusion matrix: the share of each class's samples that is recognized as each class."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    counts = confusion.matrix()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    blue = to_rgb(BLUE)
    shades = LinearSegmentedColormap.from_list("shares", [(*blue, 0.0), (*blue, 1.0)])  # on a light and a dark page

    def paint(axes: list[Any]) -> None:
        axis = axes[0]
        axis.imshow(shares, cmap=shades, vmin=0, vmax=1, interpolation="none")
        axis.grid(False)
        for side in ("top", "right", "left", "bottom"):
            axis.spines[side].set(visible=True, color=INK)
        axis.set_title("samples of a class (row) by recognized class")
        axis.set_xlabel("recognized as class")
        axis.set_ylabel("sampled for class")

    right = int(np.trace(counts))
    return drawn(f"confusion of {len(counts)} classes: {right} of {int(counts.sum())} samples on the diagonal", paint)
