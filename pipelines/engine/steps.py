"""What a graph of steps is called on, so that it is written once: to be run, to be planned, to be compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edt_core.config import Section
from edt_core.store.artifact import Artifact, Source
from jobs.stages.stage import Stage
from pipelines.engine.step import StepFuture
from pipelines.tracking.catalog import Catalog


class Decided(Protocol):
    """What comes of a promotion. As text it is "<outcome>: <why>"."""

    @property
    def version(self) -> str:
        """The version that was registered, or found again."""


D = TypeVar("D", bound=Decided)


@dataclass(frozen=True)
class Promotion(Generic[D]):
    """The step that makes no artifact: the driver registers what a branch made, and decides on it.

    `steps` are those of the branch by role, and all of them end before; the decision rests on those in `roles`.
    `after` is the step that it is shown beneath, `then` the one that rests on it. `fingerprint` moves where another
    configuration may decide otherwise.
    `decide(catalog, run_id, artifacts)` registers the artifacts, by role, and decides; it raises what MLflow raises.
    `find(catalog, artifacts)` is what was decided of them before, and the MLflow run that did; None where none did.
    """

    model: str
    fingerprint: str
    steps: Mapping[str, StepFuture]
    roles: tuple[str, ...]
    after: str
    then: str
    decide: Callable[[Catalog, str, Mapping[str, Artifact]], D]
    find: Callable[[Catalog, Mapping[str, Artifact]], tuple[D, str] | None]

    @property
    def name(self) -> str:
        return f"promote {self.model}"

    @property
    def named(self) -> dict[str, StepFuture]:
        """The steps whose artifacts the decision rests on, by role."""
        return {role: self.steps[role] for role in self.roles}


class Steps(Protocol):
    """Whatever steps are called on: a Workflow has them run, a Planner and an outline only look."""

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Call one step. Returns at once."""

    def promote(self, promotion: Promotion[D]) -> D | None:
        """Call the promotion of one model. Returns the decision; None where there is none, or none yet.

        What rests on the decision is then not called.
        """
