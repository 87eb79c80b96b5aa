"""A table of the paper as a YAML file: its rows as fields of a pipeline, and the numbers that are published.

The files are in `pipelines/configs/paper`. `mini.yaml` and `full.yaml` there are the pipelines that the rows change:
the first is small enough for two cores, the second is the paper's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from edt_core.config import Section
from edt_core.errors import UserError
from edt_core.printing.suggestions import suggestions
from jobs.commands.options import read_yaml, validated

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
PAPER = "arXiv 2410.23788"
Scale = Literal["mini", "full"]
Kind = Literal["metrics", "placement", "curve", "losses", "pictures", "sizes", "block", "cost"]
COUNTED: tuple[Kind, ...] = ("sizes", "block", "cost")  # nothing is trained for these
_SAME = {"figure-9": "9"}  # the figure draws the rows of the table
SCALES: tuple[Scale, ...] = ("mini", "full")
_TINY = re.compile(r"-(S|B|L|XL)/2$")


class Mini(Section):
    """Fields of a row that differ at scale mini, whose models have fewer blocks."""

    train: dict[str, Any] = Field({}, description="fields of `train`")
    sample: dict[str, Any] = Field({}, description="fields of `sample`")


class Row(Section):
    """One row: the fields of a pipeline in which it differs, and the numbers that the paper has for it."""

    label: str = Field(description="the row as the table shows it")
    model: str = Field("EDT-S/2", description="the model at full scale; mini takes the Tiny of its family")
    train: dict[str, Any] = Field({}, description="fields of `train`")
    sample: dict[str, Any] = Field({}, description="fields of `sample`")
    published: dict[str, float] = Field({}, description="metric -> value in the paper")
    scales: tuple[Scale, ...] = Field(SCALES, description="where the row is trained")
    mini: Mini = Field(Mini(), description="other fields at scale mini")

    def model_at(self, scale: Scale) -> str:
        """The name of the model at a scale."""
        return self.model if scale == "full" else _TINY.sub("-Tiny/2", self.model)

    def train_at(self, scale: Scale) -> dict[str, Any]:
        """Its fields of `train` at a scale."""
        return {**self.train, **(self.mini.train if scale == "mini" else {})}

    def sample_at(self, scale: Scale) -> dict[str, Any]:
        """Its fields of `sample` at a scale."""
        return {**self.sample, **(self.mini.sample if scale == "mini" else {})}


class Table(Section):
    """A table or figure of the paper with numbers."""

    title: str
    kind: Kind = Field("metrics", description="what is shown: metrics of the rows, curves, losses or pictures")
    note: str = Field("", description="what a reader has to know")
    published: str = Field(description="the protocol of the published numbers")
    base: str = Field(description="the row that the others are compared with")
    image_size: int = 256
    train: dict[str, Any] = Field({}, description="fields of `train` in all rows")
    sample: dict[str, Any] = Field({}, description="fields of `sample` in all rows")
    pipeline: dict[Scale, dict[str, Any]] = Field({}, description="other sections of the pipeline, by scale")
    rows: dict[str, Row] = Field(min_length=1, description="end of the registered name -> row")

    @model_validator(mode="after")
    def _base_is_a_row(self) -> "Table":
        if self.base not in self.rows:
            raise ValueError(f"base is {self.base!r}, which is none of the rows {', '.join(self.rows)}")
        return self

    def rows_at(self, scale: Scale) -> dict[str, Row]:
        """The rows that are trained at a scale."""
        return {name: row for name, row in self.rows.items() if scale in row.scales}


def names() -> list[str]:
    """The tables and figures that there are: "1" to "14", then "figure-6" and so on."""
    found = [*_SAME, *(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in SCALES)]
    return sorted(
        (name.removeprefix("table-") for name in found), key=lambda name: (not name.isdigit(), len(name), name)
    )


def load(name: str) -> Table:
    """A table by its number, or a figure by its name. Raises UserError if there is none."""
    if name not in names():
        raise UserError(f"{PAPER} has no table {name!r} with results: {suggestions(name, names(), 'tables')}")
    table: Table = validated(Table, read_yaml(FOLDER / f"{stem_of(_SAME.get(name, name))}.yaml"))
    return table


def stem_of(name: str) -> str:
    """The name of the files of a table: table-4, figure-10."""
    return f"table-{name}" if name.isdigit() else name


def base_values(scale: Scale) -> Mapping[str, Any]:
    """The pipeline that the rows change, as raw values."""
    return read_yaml(FOLDER / f"{scale}.yaml")
