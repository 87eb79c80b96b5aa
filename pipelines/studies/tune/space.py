"""The space of a search: fields of `train` with the values to try, and the points that are tried.

The points are a function of the space and a seed. More points of the same space begin with those of fewer, so a search
can be made longer, and its finished trials are reused.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import yaml

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.files.yaml_text import parse_yaml
from edt_core.printing.suggestions import suggestions

Kind = Literal["log", "linear", "choice"]
Point = dict[str, Any]  # field of `train` -> value
SECTION = "train."
_DIGITS = 4  # of a value from a range
_DRAWS = 1000  # for each point that is new
_FORM = "such as train.lr=log:1e-4..1e-2, train.warmup_steps=linear:0..100 or train.weight_decay=choice:0,0.01"
_BUDGET = "the budget of a trial is --steps or --budget"
_WIDTH = "all trials have the width --width"
_SEED = "all trials have the same seed"
_LOSS = "trials with different values of it have losses that cannot be compared"
_MODEL = "a search is over the recipe of one model; search once for each model"
# Fields that are the same in all trials, and why.
_SAME = {
    **dict.fromkeys(("max_steps", "max_epochs", "max_hours", "patience"), _BUDGET),
    **dict.fromkeys(("width", "mup_base_width"), _WIDTH),
    **dict.fromkeys(("seed", "seeds"), _SEED),
    **dict.fromkeys(("holdout", "objective", "num_timesteps", "latent_norm", "precision"), _LOSS),
    **dict.fromkeys(("model", "model_overrides", "amm_blocks"), _MODEL),
}


@dataclass(frozen=True)
class Parameter:
    """A field of `train` and its values: the two ends of a range, or those to choose from.

    `log` is even in the logarithm. `whole`: the field has whole numbers, so those of a range are rounded.
    """

    field: str
    kind: Kind
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def name(self) -> str:
        """The field as it is set, such as train.lr."""
        return SECTION + self.field

    def __str__(self) -> str:
        return f"{self.name}={self.kind}:{','.join(map(shown, self.values)) if self.is_choice else self._range}"

    @property
    def is_choice(self) -> bool:
        return self.kind == "choice"

    @property
    def _range(self) -> str:
        return "..".join(map(shown, self.values))

    def at(self, share: float) -> Any:
        """The value at a share of the range, from 0 to below 1, rounded to 4 digits."""
        if self.is_choice:
            return self.values[int(share * len(self.values))]
        low, high = self.values
        value = low * (high / low) ** share if self.kind == "log" else low + (high - low) * share
        return round(value) if self.whole else float(f"{value:.{_DIGITS}g}")

    def wider(self, upwards: bool) -> "Parameter":
        """The range with one end moved by a factor of 10, or by its length; at least 0 if it does not go below that."""
        low, high = self.values
        if self.kind == "log":
            ends = (low, high * 10) if upwards else (low / 10, high)
        else:
            ends = (low, 2 * high - low) if upwards else (2 * low - high, high)
        if low >= 0 > ends[0]:
            ends = (type(low)(0), high)
        return Parameter(self.field, self.kind, ends, self.whole)


def shown(value: Any) -> str:
    """A value for people: numbers in short."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def parse_space(texts: Sequence[str]) -> tuple[Parameter, ...]:
    """The parameters of `FIELD=KIND:VALUES` texts, by field. Raises UserError."""
    parameters = sorted((_parse(text) for text in texts), key=lambda parameter: parameter.field)
    if not parameters:
        raise UserError(f"--param is missing: give the fields to search over, {_FORM}")
    for first, second in pairwise(parameters):
        if first.field == second.field:
            raise UserError(f"--param {first.name} is given twice; give all of its values in one")
    return tuple(parameters)


def _parse(text: str) -> Parameter:
    name, equals, rest = text.partition("=")
    kind, colon, values = rest.partition(":")
    name, kind = name.strip(), kind.strip()
    if not equals or not colon or kind not in ("log", "linear", "choice"):
        raise UserError(f"--param takes FIELD=KIND:VALUES, {_FORM}; got {text!r}")
    field = _checked_field(name)
    if kind == "choice":
        return Parameter(field, "choice", _choices(name, values))
    whole = TrainConfig.model_fields[field].annotation in (int, int | None)
    return Parameter(field, "log" if kind == "log" else "linear", _ends(name, kind, values, whole), whole)


def _checked_field(name: str) -> str:
    """The field of `train` that a search can be over. Raises UserError."""
    field = name.removeprefix(SECTION)
    info = TrainConfig.model_fields.get(field)
    if info is not None and not name.startswith(SECTION):
        raise UserError(f"--param {name}: a search is over fields of train; write {SECTION}{name}")
    if info is None:
        known = [other for other in TrainConfig.model_fields if other not in _SAME and not _is_runtime(other)]
        fields = [SECTION + other for other in known]
        raise UserError(f"--param {name}: a search is over fields of train; {suggestions(name, fields, 'fields')}")
    if field in _SAME:
        raise UserError(f"--param {name}: {_SAME[field]}; leave it out")
    if _is_runtime(field):
        raise UserError(f"--param {name}: the field does not change what is trained; leave it out, or use --set")
    return field


def _is_runtime(field: str) -> bool:
    """Whether a field of `train` does not change what is trained."""
    extra = TrainConfig.model_fields[field].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("runtime"))


def _choices(name: str, text: str) -> tuple[Any, ...]:
    try:
        values = parse_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        raise UserError(f"--param {name}: {text!r} is no list of values, such as choice:0,0.01") from error
    values = [_as_number(value) for value in values]
    if len(values) < 2 or any(value in values[:place] for place, value in enumerate(values)):
        raise UserError(f"--param {name}: choice needs at least 2 different values, and got {text!r}")
    return tuple(values)


def _as_number(value: Any) -> Any:
    """YAML reads 1e-4, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _ends(name: str, kind: str, text: str, whole: bool) -> tuple[float, float]:
    low_text, dots, high_text = text.partition("..")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        dots = ""
    if not dots:
        raise UserError(f"--param {name}: {kind} takes two numbers, such as {kind}:1e-4..1e-2; got {text!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--param {name}: the range {text} has no values; give the lower number first")
    if kind == "log" and low <= 0:
        raise UserError(
            f"--param {name}: a logarithmic range begins above 0, and got {low_text}; use linear, or raise it"
        )
    if whole and (low != int(low) or high != int(high)):
        raise UserError(f"--param {name}: the field has whole numbers, and got {text}")
    return (int(low), int(high)) if whole else (low, high)


def points(space: Sequence[Parameter], count: int, seed: int) -> tuple[Point, ...]:
    """The first `count` different points of a space, spread evenly. Raises UserError if it has fewer.

    Coordinate j of draw i is frac(o_j + i a_j): an additive recurrence with a_j = phi^-(j+1), where phi is the root of
    x^(d+1) = x + 1 above 1 in d dimensions, and an offset o_j from the seed. In one dimension it is the golden ratio's,
    whose first n points leave gaps of at most three lengths for every n.
    """
    phi = _root(len(space))
    offsets = [_offset(seed, parameter.field) for parameter in space]
    found: list[Point] = []
    for draw in range(_DRAWS * count):
        point = {
            parameter.field: parameter.at((offset + draw * phi ** -(place + 1)) % 1.0)
            for place, (parameter, offset) in enumerate(zip(space, offsets, strict=True))
        }
        if point not in found:
            found.append(point)
        if len(found) == count:
            return tuple(found)
    raise UserError(
        f"--trials is {count}, but the space has {len(found)} different points; use at most {len(found)}, or give more "
        "values"
    )


def _root(dimensions: int) -> float:
    """The root above 1 of x^(d+1) = x + 1."""
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (dimensions + 1))
    return root


def _offset(seed: int, field: str) -> float:
    """A number from 0 to below 1, a function of the seed and the field."""
    digest = hashlib.sha256(f"{seed} {field}".encode()).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)
