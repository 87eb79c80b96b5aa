"""The differences of two configurations by field, and the steps of a run that each change rebuilds.

A step is rebuilt if its fingerprint changes. Fingerprints depend on the configurations and on external files, which
are not read here: images and published weights at another location count as different.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import Section
from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.printing.redaction import redacted_values
from edt_core.store.artifact import Artifact, Source
from edt_core.store.manifest import sha256_json
from jobs.commands.options import validated
from jobs.models.initial import Initial
from jobs.stages.stage import Stage
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.engine.step import StepFuture, input_fingerprints
from pipelines.engine.steps import D, Promotion
from pipelines.pipeline import Published, call_promotion, call_steps
from pipelines.registry.kept import Kept

if TYPE_CHECKING:
    from pipelines.tracking.catalog import Catalog

ABSENT = "(absent)"
_RUN_ID = re.compile("[0-9a-f]{8,32}")  # whole, or its beginning
_SOURCE = "edt.source"  # the tag of a workflow run with the fingerprint of its images
_RECORDED = {"edt.code_version": "code version", _SOURCE: "content of the images"}


@dataclass(frozen=True)
class Side:
    """One configuration of a comparison. `recorded`: the tags of its run, if it is that of a run."""

    name: str
    config: PipelineConfig
    recorded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One field, its JSON values on both sides, and the steps that the change rebuilds."""

    field: str
    a: Any
    b: Any
    steps: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "steps": list(self.steps)}


def read_side(name: str, catalog: "Catalog | None" = None, assignments: tuple[str, ...] = ()) -> Side:
    """A shipped configuration, a YAML file, or the configuration of a workflow's MLflow run, by its id.

    Raises UserError if there is none, or if a run's record has fields that this version does not know.
    """
    if not is_run_id(name):
        return Side(name, load_config(name, assignments))
    assert catalog is not None
    if assignments:
        raise UserError("--set cannot change the recorded configuration of a run; give its YAML file instead")
    from pipelines.tracking.runs import read_record

    record = read_record(catalog, name)
    return Side(name, validated(PipelineConfig, record.config), record.tags)


def is_run_id(name: str) -> bool:
    """Whether a name has the form of an MLflow run id or of its beginning, and is no file."""
    return _RUN_ID.fullmatch(name) is not None and not Path(name).exists()


def differences(a: Side, b: Side) -> list[Difference]:
    """The fields in which two configurations differ, in the order of the schema, then differences of the records."""
    before, after = _leaves(a.config), _leaves(b.config)
    names = [*before, *(name for name in after if name not in before)]
    order = {name: at for at, name in enumerate(PipelineConfig.model_fields)}
    changed = [name for name in names if before.get(name, ABSENT) != after.get(name, ABSENT)]
    changed.sort(key=lambda name: order[name.partition(".")[0]])
    same_images, rows = _same_images(a, b), []
    for name in changed:
        moved = same_images and name.startswith("source.")
        steps = () if moved else tuple(_rebuilt_by_field(a.config, b.config, name, after))
        rows.append(Difference(name, before.get(name, ABSENT), after.get(name, ABSENT), steps))
    return rows + list(_recorded_differences(a, b))


def _recorded_differences(a: Side, b: Side) -> Iterator[Difference]:
    """The differences of two runs' records besides the configurations: code version, images at the same location."""
    for tag, name in _RECORDED.items():
        first, second = a.recorded.get(tag), b.recorded.get(tag)
        if first and second and first != second:
            steps = tuple(outline(b.config)) if tag == _SOURCE else ()
            yield Difference(name, first[:12], second[:12], steps)


def _rebuilt_by_field(a: PipelineConfig, b: PipelineConfig, name: str, after: Mapping[str, Any]) -> list[str]:
    """The steps that are rebuilt if this one field of `a` gets its value in `b`."""
    try:
        changed = _with(a, name, after.get(name, ABSENT))
        before, now = outline(a), outline(changed)
    except UserError:  # invalid without the other changes: use the steps that all changes together rebuild
        before, now = outline(a), outline(b)
    return _new_in(now, before)


def made_anew(a: Side, b: Side) -> list[str]:
    """The steps that a run of `b` rebuilds after a complete run of `a`."""
    config = b.config
    if _same_images(a, b):
        config = config.model_copy(update={"source": a.config.source})
    return _new_in(outline(config), outline(a.config))


def _new_in(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """The steps with a new fingerprint. Steps are reused by fingerprint, so the name of the model does not matter."""
    fingerprints = set(before.values())
    return [step for step, fingerprint in now.items() if fingerprint not in fingerprints]


def _same_images(a: Side, b: Side) -> bool:
    """Whether the images of two recorded runs are the same, at any location."""
    return _SOURCE in a.recorded and a.recorded[_SOURCE] == b.recorded.get(_SOURCE)


def outline(config: PipelineConfig) -> dict[str, str]:
    """Step -> a fingerprint that changes with the configuration, for every step and promotion."""
    steps = _Outline()
    for branch in call_steps(steps, config, _images(config), _published(config)):
        call_promotion(steps, config, branch)
    return steps.steps


class _Outline:
    """Takes the same calls as a Workflow, but only records the fingerprints of the steps."""

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        self.steps[name] = stage.fingerprint(config, input_fingerprints(inputs))
        return StepFuture(name, stage.kind, self.steps[name])

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        self.steps[name] = item.fingerprint
        return StepFuture(name, stage.kind, item.fingerprint)

    def promote(self, promotion: Promotion[D]) -> D | None:
        self.steps[promotion.name] = promotion.fingerprint
        return None


def _images(config: PipelineConfig) -> Source:
    return Source("", sha256_json(config.source.model_dump(mode="json")))


def _published(config: PipelineConfig) -> Published:
    """The published inputs, each identified by its configured digest, or else by its location."""
    used = {*config.extractors, *config.token_spaces()}
    weights = {space: config.network(space) for space in PUBLISHED_SPACES if space in used}
    sources = {space: Source("", sha256_json(network.sha256 or network.weights)) for space, network in weights.items()}
    pretrained, statistics = config.autoencoder.pretrained, config.reference_statistics
    classifier = config.classifier.pretrained if "classifier" in config.extractors else None
    return Published(
        None if pretrained is None else Source(pretrained, sha256_json(pretrained)),
        {space: source for space, source in sources.items() if space in config.extractors},
        None if statistics is None else Source(statistics, sha256_json(statistics)),
        {name: Initial(text, sha256_json(text)) for name in config.models if (text := config.train_of(name).init_from)},
        {} if classifier is None else {"classifier": Kept(Source(classifier, sha256_json(classifier)), classifier)},
        {space: sources[space] for space in config.token_spaces()},
        None if (guide := config.sample.guide_model) is None else Source(guide, sha256_json(guide)),
    )


def _with(config: PipelineConfig, name: str, value: Any) -> PipelineConfig:
    """A configuration with one changed field of a section. Sections are not checked against each other.

    Raises UserError if the value is invalid in its section.
    """
    top, _, rest = name.partition(".")
    values: Any = config.model_dump(mode="json")[top]
    if rest:
        _put(values, rest, value)
    else:
        values = value
    section = getattr(config, top)
    if isinstance(section, Section):
        return config.model_copy(update={top: validated(type(section), values)})
    return config.model_copy(update={top: tuple(values) if isinstance(values, list) else values})


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    top, _, rest = name.partition(".")
    if rest:
        _put(values.setdefault(top, {}), rest, value)
    elif value == ABSENT:
        values.pop(top, None)
    else:
        values[top] = value


def _leaves(config: PipelineConfig) -> dict[str, Any]:
    """Dotted name -> JSON value of every field, credentials redacted. A model without own fields counts as a field."""
    return dict(_walk(redacted_values(config.model_dump(mode="json")), ""))


def _walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: Any) -> str:
    """A field's value in a table."""
    return value if isinstance(value, str) else json.dumps(value)
