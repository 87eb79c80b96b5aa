"""What a report shows of a validation: how often the samples of a class are taken for it, and real images of it.

Legend: K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edt_core.evaluation.confusion import Confusion
from edt_core.files.tensor_files import load_tensors
from edt_core.store.artifact import Artifact
from edt_core.store.layout import SAMPLE_CONFUSION, VALIDATION_NAME
from pipelines.report.figures import BLUE, INK, ORANGE, Picture, drawn

MOST_ROWS = 20  # classes of the table, those that are recognized least
MOST_CELLS = 100  # classes whose confusion is drawn whole: of more a cell is no pixel


@dataclass(frozen=True, eq=False)
class Validation:
    """A validation artifact as it was read: its `validation.json`, and the confusion of the samples."""

    facts: Mapping[str, Any]
    confusion: Confusion


@dataclass(frozen=True)
class ClassRow:
    """One class. Shares are 0..1; None of no images. `mistaken_for`: name of another class -> number of samples."""

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
    """What the page shows. `rows`: the classes that are recognized least come first; `matrix`: None of many classes.

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


def validation_view(found: Validation) -> ValidationView:
    """The classes in order of their accuracy, least first, those without samples left out."""
    classes, facts = found.facts["classes"], found.facts
    rows = [_row(number, row) for number, row in enumerate(classes) if row["samples"]["images"]]
    rows.sort(key=lambda row: (row.accuracy, -row.images, row.number))
    matrix = _matrix(found.confusion) if len(classes) <= MOST_CELLS else None
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
    """Accuracy by class, in order, with its interval; real images of the same class beside it."""
    places = np.arange(1, len(rows) + 1)
    value, low, high = (100 * np.array([getattr(row, key) for row in rows]) for key in ("accuracy", "low", "high"))
    real = 100 * np.array([np.nan if row.real_accuracy is None else row.real_accuracy for row in rows])

    def paint(axes: list[Any]) -> None:
        axis, size = axes[0], 4.0 if len(rows) <= MOST_CELLS else 2.0
        axis.vlines(places, low, high, color=BLUE, linewidth=1.0, alpha=0.5)
        axis.plot(places, value, "o", color=BLUE, markersize=size, label="samples")
        axis.plot(places, real, "_", color=ORANGE, markersize=size + 4, label="real images")
        axis.set_ylim(-3, 103)
        axis.set_title("taken to be of their own class, %")
        axis.set_xlabel("classes, those recognized least first")
        axis.xaxis.get_major_locator().set_params(integer=True)

    told = f"from {value[0]:.3g} % of class {rows[0].number} to {value[-1]:.3g} % of class {rows[-1].number}"
    return drawn(
        f"share of samples that are taken to be of their own class: {told}, half of the classes from "
        f"{np.median(value):.3g} % on",
        paint,
    )


def _matrix(confusion: Confusion) -> Picture:
    """The share of each class's samples that is taken to be of each class."""
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
        axis.set_title("samples of a class (row) by the class they are taken for")
        axis.set_xlabel("taken for class")
        axis.set_ylabel("drawn for class")

    right = int(np.trace(counts))
    return drawn(f"confusion of {len(counts)} classes: {right} of {int(counts.sum())} samples on the diagonal", paint)
