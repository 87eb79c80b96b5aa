"""What a pruned version records of the model it was cut from: what the cut saved, and the metrics before it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PRUNED_TAG = "edt.pruned"  # the record as JSON


@dataclass(frozen=True)
class PrunedRecord:
    """A pruned version beside the model it was cut from, at `location`. Pairs are values before and after the cut.

    `kept_blocks` are numbers over all `blocks` of the uncut model. `seconds` are of an image by the version's chain,
    from passes of both models that were timed in turn on `device`. `loss` is the mean squared error of the prediction
    right after the cut, before any fine-tuning. `metrics` are those of the uncut model by its own protocol, on the
    reference of the version; `problem` says why there are none.
    """

    location: str
    keep: tuple[int, int]
    blocks: int
    kept_blocks: tuple[int, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float]
    device: str
    loss: tuple[float, float] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: str = ""
    uri: str = ""
    problem: str = ""

    @classmethod
    def of_cut(cls, location: str, cut: Mapping[str, Any], passes: float, **measured: Any) -> "PrunedRecord":
        """That of a step's record of its cut, for a chain of so many forward passes."""
        before, after = cut["seconds_of_a_pass"]
        values: dict[str, Any] = {name: tuple(cut[name]) for name in ("keep", "kept_blocks", "parameters", "macs")}
        return cls(
            location,
            blocks=cut["blocks"],
            seconds=(before * passes, after * passes),
            device=cut["device"],
            loss=tuple(cut["loss"]) if "loss" in cut else None,
            **values,
            **measured,
        )

    @classmethod
    def of(cls, version: Any) -> "PrunedRecord | None":
        """That of a registered version; None if it was not pruned."""
        text = version.tags.get(PRUNED_TAG)
        if text is None:
            return None
        values: dict[str, Any] = json.loads(text)
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)

    def to_json(self) -> str:
        """The record as a tag has it."""
        return json.dumps(asdict(self), sort_keys=True)

    def facts(self) -> dict[str, str]:
        """What was cut, and the metrics before, for `edt models show`."""
        kept, size = self.keep
        before = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        loss = {} if self.loss is None else {"loss_after_cut": "{:.4g}, before {:.4g}".format(*self.loss[::-1])}
        return {
            "model": self.location,
            "blocks": f"{len(self.kept_blocks)} of {self.blocks}, {kept} of each {size}: "
            + ", ".join(map(str, self.kept_blocks)),
            "parameters": "{:,}, before {:,}".format(*self.parameters[::-1]),
            "macs": "{:,}, before {:,}".format(*self.macs[::-1]),
            "seconds_an_image": "{:.3g}, before {:.3g}, ".format(*self.seconds[::-1]) + self.device,
            **loss,
            "metrics_before": before or f"not measured: {self.problem}",
        }
