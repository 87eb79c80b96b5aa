"""In which fields two configurations differ, and which steps of a run each of these changes rebuilds.

A step is rebuilt if its fingerprint changes. Fingerprints follow from the configurations alone, but for what lies
outside them: of images and published weights at another place it is taken that they are others.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edt_core.config import Section
from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.printing.redaction import redacted_values
from edt_core.store.artifact import Source
from edt_core.store.manifest import sha256_json
from jobs.commands.options import validated
from jobs.stages.stage import Stage
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.engine.step import StepFuture, input_fingerprints
from pipelines.engine.steps import D, Promotion
from pipelines.pipeline import Published, call_promotion, call_steps

if TYPE_CHECKING:
    from pipelines.tracking.catalog import Catalog

ABSENT = "(absent)"
_RUN_ID = re.compile("[0-9a-f]{32}")
_SOURCE = "edt.source"  # the tag of a workflow run that holds the identity of its images
_RECORDED = {"edt.code_version": "code version", _SOURCE: "content of the images"}


@dataclass(frozen=True)
class Side:
    """One configuration of a comparison. `recorded`: what a run's record says beside it."""

    name: str
    config: PipelineConfig
    recorded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One field, its JSON value on either side, and the steps that the change rebuilds."""

    field: str
    a: Any
    b: Any
    steps: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "steps": list(self.steps)}


def read_side(name: str, catalog: "Catalog | None" = None, assignments: tuple[str, ...] = ()) -> Side:
    """A shipped configuration, a YAML file, or the configuration of a workflow's MLflow run, by its id.

    Raises UserError where there is none, or where a run's record has fields that this version does not know.
    """
    if not is_run_id(name):
        return Side(name, load_config(name, assignments))
    assert catalog is not None
    if assignments:
        raise UserError("--set changes a configuration, and a run's record stays as it is; give its YAML file instead")
    from pipelines.tracking.runs import read_record

    record = read_record(catalog, name)
    return Side(name, validated(PipelineConfig, record.config), record.tags)


def is_run_id(name: str) -> bool:
    """Whether a name has the form of an MLflow run id."""
    return _RUN_ID.fullmatch(name) is not None


def differences(a: Side, b: Side) -> list[Difference]:
    """Every field in which two configurations differ, in the order of the schema, then what the records say."""
    before, after = _leaves(a.config), _leaves(b.config)
    names = [*before, *(name for name in after if name not in before)]
    order = {name: at for at, name in enumerate(PipelineConfig.model_fields)}
    changed = [name for name in names if before.get(name, ABSENT) != after.get(name, ABSENT)]
    changed.sort(key=lambda name: order[name.partition(".")[0]])
    same_images, found = _same_images(a, b), []
    for name in changed:
        moved = same_images and name.startswith("source.")
        steps = () if moved else tuple(_made_anew(a.config, b.config, name, after))
        found.append(Difference(name, before.get(name, ABSENT), after.get(name, ABSENT), steps))
    return found + list(_recorded_differences(a, b))


def _recorded_differences(a: Side, b: Side) -> Iterator[Difference]:
    """What two runs' records say beside the configurations: another code, other images at the same place."""
    for tag, name in _RECORDED.items():
        first, second = a.recorded.get(tag), b.recorded.get(tag)
        if first and second and first != second:
            steps = tuple(outline(b.config)) if tag == _SOURCE else ()
            yield Difference(name, first[:12], second[:12], steps)


def _made_anew(a: PipelineConfig, b: PipelineConfig, name: str, after: Mapping[str, Any]) -> list[str]:
    """The steps of `b` that have another fingerprint where this one field of `a` is what it is in `b`."""
    try:
        changed = _with(a, name, after.get(name, ABSENT))
        before, now = outline(a), outline(changed)
    except UserError:  # it does not fit without the other changes: then what all of them together make anew
        before, now = outline(a), outline(b)
    return _new_in(now, before)


def made_anew(a: Side, b: Side) -> list[str]:
    """The steps that a run of `b` makes anew where a run of `a` has made all of its own."""
    config = b.config
    if _same_images(a, b):
        config = config.model_copy(update={"source": a.config.source})
    return _new_in(outline(config), outline(a.config))


def _new_in(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Steps are found again by their fingerprints, whatever the name of their model."""
    known = set(before.values())
    return [step for step, fingerprint in now.items() if fingerprint not in known]


def _same_images(a: Side, b: Side) -> bool:
    """Whether two records say that the images were the same ones, wherever they lay."""
    return _SOURCE in a.recorded and a.recorded[_SOURCE] == b.recorded.get(_SOURCE)


def outline(config: PipelineConfig) -> dict[str, str]:
    """Step -> a fingerprint that moves where the configuration makes it move, promotions included."""
    outlined = _Outline()
    for branch in call_steps(outlined, config, _images(config), _published(config)):
        call_promotion(outlined, config, branch)
    return outlined.steps


class _Outline:
    """Stands where a Workflow does: takes the calls of the steps and keeps their fingerprints alone."""

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        self.steps[name] = stage.fingerprint(config, input_fingerprints(inputs))
        return StepFuture(name, stage.kind, self.steps[name])

    def promote(self, promotion: Promotion[D]) -> D | None:
        self.steps[promotion.name] = promotion.fingerprint
        return None


def _images(config: PipelineConfig) -> Source:
    return Source("", sha256_json(config.source.model_dump(mode="json")))


def _published(config: PipelineConfig) -> Published:
    """What lies elsewhere, each by its stated digest, or else by its place."""
    weights = {space: config.network(space) for space in PUBLISHED_SPACES if space in config.extractors}
    pretrained, statistics = config.autoencoder.pretrained, config.reference_statistics
    return Published(
        None if pretrained is None else Source(pretrained, sha256_json(pretrained)),
        {space: Source("", sha256_json(found.sha256 or found.weights)) for space, found in weights.items()},
        None if statistics is None else Source(statistics, sha256_json(statistics)),
    )


def _with(config: PipelineConfig, name: str, value: Any) -> PipelineConfig:
    """A configuration with one field of a section changed. Sections are not checked against each other.

    Raises UserError where the value does not fit its own section.
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
    """Dotted name -> JSON value of every field, credentials out. A model without fields of its own is one as well."""
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
