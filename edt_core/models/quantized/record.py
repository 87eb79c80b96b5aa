"""What a quantised model's configuration says of its layers. Needs no torchao."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.errors import UserError

SCHEMES: Mapping[str, str] = {
    "int8": "int8 weights and activations",
    "int8-weights": "int8 weights",
    "int4-weights": "int4 weights in groups",
    "fp8": "float8 weights and activations",
}
GROUP_SIZE = 64  # most weights of a row that share a scale in int4
_SMALLEST_GROUP = 8  # a smaller one takes more memory for its scales than for its weights


@dataclass(frozen=True)
class Quantization:
    """The linear layers of a model that are quantised, by their names, and how. All other layers are in float.

    `group_size`: of int4 the most weights of a row that share a scale; None for another scheme.
    Raises ValueError for a scheme that does not exist, and for a group size below 1.
    """

    scheme: str
    layers: tuple[str, ...]
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown quantisation {self.scheme!r}; known: {', '.join(SCHEMES)}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"the group size of a quantisation is {self.group_size}; it must be at least 1")

    @classmethod
    def of(cls, values: Any) -> Quantization | None:
        """From the value of a configuration, which may have been read from JSON. Raises ValueError for another one."""
        if values is None or isinstance(values, Quantization):
            return values
        try:
            return cls(**{**values, "layers": tuple(map(str, values["layers"]))})
        except (TypeError, KeyError) as error:
            raise ValueError(f"quantization is {values!r}; expected scheme, layers and group_size") from error

    def group(self, width: int) -> int:
        """Weights of a row of this width that share a scale: the largest divisor up to `group_size`."""
        most = min(self.group_size or GROUP_SIZE, width)
        return next(size for size in range(most, 0, -1) if width % size == 0)


def check_group_size(group_size: int, widths: Mapping[str, int]) -> None:
    """Raise UserError unless a group size that was asked for divides the width of every layer, given by name."""
    if group_size < _SMALLEST_GROUP:
        raise UserError(
            f"--group-size is {group_size}; with fewer than {_SMALLEST_GROUP} weights in a group the scales take more "
            "memory than the weights"
        )
    if misfits := {width for width in widths.values() if width % group_size}:
        layer = next(name for name, width in widths.items() if width in misfits)
        raise UserError(
            f"--group-size is {group_size}, which does not divide the widths {', '.join(map(str, sorted(misfits)))} "
            f"(for example of {layer}); leave it out, and each layer gets the largest group up to {GROUP_SIZE} that "
            "divides its width"
        )
