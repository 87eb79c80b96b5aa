"""The promotion of the models that a pipeline made, and their reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edt_core.config import result_fields
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.manifest import sha256_json
from edt_core.store.store import Store
from pipelines.champion import ChampionMeasurement
from pipelines.config.schema import PipelineConfig, recorded_yaml
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Promotion, Steps
from pipelines.pipeline.branches import Branch
from pipelines.registry.aliases import version_at
from pipelines.registry.distilled.pruned_record import PrunedRecord
from pipelines.registry.distilled.teacher_record import TeacherRecord
from pipelines.registry.gate import Decision
from pipelines.registry.registration import ENTRY_ROLES, entry_of, promote, registered
from pipelines.report import step as summary
from pipelines.report.history import VersionRecord, version_record
from pipelines.report.predecessor import predecessor_facts, predecessor_inputs
from pipelines.report.teacher import TeacherFacts
from pipelines.teacher import TeacherMeasurement, UncutMeasurement
from pipelines.tracking.catalog import Catalog


@dataclass(frozen=True)
class Promoted:
    """The decision about a model, and the registry's record of its version for the report."""

    decision: Decision
    record: VersionRecord
    champion: Mapping[str, StepFuture] = field(default_factory=dict)  # artifacts of the champion before, by role
    teacher: TeacherRecord | None = None  # of a distilled model
    pruned: PrunedRecord | None = None  # of a model whose blocks were cut

    @property
    def version(self) -> str:
        return self.decision.version

    def __str__(self) -> str:
        return str(self.decision)


def call_promotion(steps: Steps, config: PipelineConfig, branch: Branch) -> tuple[Promoted, StepFuture] | None:
    """Call the promotion of one model, then its report. None if there is no decision yet, or the branch failed.

    Rungs of a ladder are compared and not registered, so None as well.
    """
    if config.ladder.budgets:
        return None
    report = f"report {branch.name}"
    promoted = steps.promote(_promotion(config, branch, report))
    if promoted is None:
        return None
    inputs = {**branch.steps, **branch.beside, **promoted.champion}
    return promoted, steps.step(report, summary.STAGE, _report_config(config, branch, promoted), **inputs)


def _promotion(config: PipelineConfig, branch: Branch, report: str) -> Promotion[Promoted]:
    """The promotion of one model, from the artifacts of its branch, by the gate in the configuration."""

    champion = ChampionMeasurement(config, branch.name, branch.steps, branch.feature_networks)
    compared = config, branch.name, branch.train, branch.start, branch.steps, branch.feature_networks
    teacher, uncut = TeacherMeasurement(*compared), UncutMeasurement(*compared)

    def with_record(catalog: Catalog, decision: Decision) -> Promoted:
        before = predecessor_inputs(catalog, decision, Store(Folder.at(config.store)))
        version = version_at(catalog, decision.name, decision.version)
        origins = TeacherRecord.of(version), PrunedRecord.of(version)
        return Promoted(decision, version_record(catalog, decision, config.store), before, *origins)

    def compare(steps: Steps, catalog: Catalog, artifacts: Mapping[str, Artifact] | None) -> tuple[StepFuture, ...]:
        rivals = champion, teacher, uncut
        return tuple(step for rival in rivals for step in rival.call(steps, catalog, artifacts))

    def decide(catalog: Catalog, run_id: str, artifacts: Mapping[str, Artifact]) -> Promoted:
        untrained = branch.steps.get("untrained_evaluation")  # finished, as all steps of the branch are
        trainings = {seed: evaluation.result() for seed, evaluation in branch.evaluations().items()}
        entry = entry_of(artifacts, None if untrained is None else untrained.result(), trainings)
        rivals = champion.result(), teacher.result(), uncut.result()
        return with_record(catalog, promote(catalog, run_id, branch.name, config.promote, entry, *rivals))

    def find(catalog: Catalog, artifacts: Mapping[str, Artifact]) -> tuple[Promoted, str] | None:
        previous = registered(catalog, branch.name, config.promote, entry_of(artifacts))
        return None if previous is None else (with_record(catalog, previous[0]), previous[1])

    roles = ("checkpoint", "evaluation", "untrained_evaluation")
    artifacts = {role: branch.steps[role].fingerprint for role in roles if role in branch.steps}
    artifacts |= {f"seed {seed}": step.fingerprint for seed, step in branch.evaluations().items()}
    gate = {"model": branch.name, **result_fields(config.promote)}
    identity = sha256_json({**artifacts, "gate": gate})
    after = branch.steps["evaluation"].name
    named = (*ENTRY_ROLES, *_roles_of_guidance(config, branch))
    return Promotion(branch.name, identity, branch.steps, named, after, report, decide, find, compare)


def _roles_of_guidance(config: PipelineConfig, branch: Branch) -> list[str]:
    """The roles of what a registered version carries of its guidance."""
    guide = ["guide"] if "guide" in branch.steps else []
    return guide + (["classifier"] if config.sample.guidance_reference == "confused" else [])


def _report_config(config: PipelineConfig, branch: Branch, promoted: Promoted) -> summary.SummaryConfig:
    """The configuration of a model's report: the facts that are in no artifact."""
    decision = promoted.decision
    aliases = ["candidate", *(["champion"] if decision.became_champion else [])]

    def short(step: str) -> str:
        return step.removesuffix(f" {branch.name}")

    return summary.SummaryConfig(
        champion=predecessor_facts(decision),
        title=f"{branch.name} version {decision.version}",
        pipeline=config.name,
        model={"name": branch.name, "version": decision.version, "aliases": aliases},
        decision=str(decision),
        registry=promoted.record,
        lineage={
            role: (short(f.name), tuple(map(short, f.needs))) for role, f in {**branch.steps, **branch.beside}.items()
        },
        seeds=tuple(branch.evaluations()),
        teacher=None if promoted.teacher is None else TeacherFacts.of(promoted.teacher),
        pruned={} if promoted.pruned is None else promoted.pruned.facts(),
        config_yaml=recorded_yaml(config.model_copy(update={"store": "."})),
    )
