"""The protocol that runs, plans and compares a graph of steps. So the graph is written once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edt_core.config import Section
from edt_core.store.artifact import Artifact, Source
from jobs.stages.stage import Stage
from pipelines.engine.step import StepFuture
from pipelines.tracking.catalog import Catalog


class Decided(Protocol):
    """The result of a promotion. Its text is "<outcome>: <why>"."""

    @property
    def version(self) -> str:
        """The number of the new or existing version."""


D = TypeVar("D", bound=Decided)


@dataclass(frozen=True)
class Promotion(Generic[D]):
    """The step without an artifact: the driver registers the model of a branch and decides whether it is champion.

    `steps` are the steps of the branch by role; all of them end first. The decision depends on those in `roles`.
    `after` is the step that the promotion is shown beneath, `then` the step that depends on it. `fingerprint` changes
    if the configuration can change the decision.
    `decide(catalog, run_id, artifacts)` registers the artifacts, by role, and decides. It raises MLflow's errors.
    `find(catalog, artifacts)` returns the earlier decision about them and its MLflow run, or None.
    `compare(steps, catalog, artifacts)` calls the steps that the decision needs besides the branch, once that is
    finished. In a plan, `artifacts` is None. The decision is made after these steps, also if one of them failed.
    """

    model: str
    fingerprint: str
    steps: Mapping[str, StepFuture]
    roles: tuple[str, ...]
    after: str
    then: str
    decide: Callable[[Catalog, str, Mapping[str, Artifact]], D]
    find: Callable[[Catalog, Mapping[str, Artifact]], tuple[D, str] | None]
    compare: "Callable[[Steps, Catalog, Mapping[str, Artifact] | None], Sequence[StepFuture]]" = lambda *_: ()

    @property
    def name(self) -> str:
        return f"promote {self.model}"

    @property
    def named(self) -> dict[str, StepFuture]:
        """The steps whose artifacts the decision depends on, by role."""
        return {role: self.steps[role] for role in self.roles}


class Steps(Protocol):
    """Takes the calls of steps: a Workflow runs them, a Planner plans them, an Outline records their fingerprints."""

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Call one step. Returns at once."""

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        """Take a finished artifact of the stage's kind for the result of a step. The step itself does not run.

        `origin` says what the artifact belongs to, as "edt-s version 3". Outlines pass a stand-in with the fingerprint.
        """

    def promote(self, promotion: Promotion[D]) -> D | None:
        """Call the promotion of one model. Returns the decision, or None if there is none yet.

        Without a decision, the steps that depend on it are not called.
        """
