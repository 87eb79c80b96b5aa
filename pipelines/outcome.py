"""The outcome of a pipeline run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edt_core.evaluation.worth import Remark
from edt_core.printing.redaction import redacted
from edt_core.store.artifact import Artifact
from edt_core.store.layout import REPORT_NAME
from jobs.runtime.failure import explained
from pipelines.registry.gate import Decision


@dataclass
class Outcome:
    """The outcome of a run: models, metrics, reports and failures."""

    run_id: str
    tracking_uri: str
    link: str = ""  # to the run in MLflow, or the command that shows it
    seconds: float = 0.0
    decisions: dict[str, Decision] = field(default_factory=dict)
    reports: dict[str, Artifact] = field(default_factory=dict)
    # of the untrained model, None for a training that starts from another model, and of the trained one
    metrics: dict[str, tuple[Mapping[str, float] | None, Mapping[str, float]]] = field(default_factory=dict)
    # of each training by seed, of models that are trained with several
    trainings: dict[str, Mapping[int, Mapping[str, float]]] = field(default_factory=dict)
    remarks: dict[str, tuple[Remark, ...]] = field(default_factory=dict)  # on the metrics of a model
    left_out: tuple[str, ...] = ()  # what of the source was not used, a line each kind
    failures: dict[str, BaseException] = field(default_factory=dict)
    stopped: str = ""  # the message about where the run stopped; "" if it was not stopped
    executed: int = 0
    reused: int = 0
    skipped: int = 0  # steps that were not run because one that they need failed
    images: Mapping[str, Any] = field(default_factory=dict)  # counts of the image artifact; empty without one

    @property
    def status(self) -> str:
        """finished, failed or stopped."""
        return "stopped" if self.stopped else "failed" if self.failures else "finished"

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON values, for programs."""
        return {
            "run_id": self.run_id,
            "tracking_uri": redacted(self.tracking_uri),
            "link": self.link,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "reused": self.reused,
            "executed": self.executed,
            "skipped": self.skipped,
            "images": self.images.get("images"),
            "unreadable_images": self.images.get("quarantined"),
            "stopped": self.stopped,
            "left_out": list(self.left_out),
            "failures": {name: asdict(explained(error)) for name, error in self.failures.items()},
            "models": {
                name: {
                    "version": decision.version,
                    "champion": decision.became_champion,
                    "decision": str(decision),
                    "untrained": None if (before := self.metrics[name][0]) is None else dict(before),
                    "metrics": dict(self.metrics[name][1]),
                    "trainings": {seed: dict(metrics) for seed, metrics in self.trainings.get(name, {}).items()},
                    "remarks": [remark.text for remark in self.remarks.get(name, ())],
                    "report": str(self.reports[name].path(REPORT_NAME)) if name in self.reports else None,
                }
                for name, decision in self.decisions.items()
            },
        }
