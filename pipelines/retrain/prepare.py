"""Retraining: the run that made the champion of a model, repeated with the images of now, from the champion's weights.

The configuration is that of the champion's run. The autoencoder and the classifier are the champion's (`kept.py`), so
only the images that changed cost anything before the training. Published feature networks stay the same by digest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edt_core.data.sources.delta import ImageDelta
from edt_core.errors import UserError
from edt_core.store.artifact import Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.commands.options import parse_assignment, validated
from jobs.models.initial import initial_source
from jobs.models.registry_files import title
from pipelines.config.schema import PipelineConfig, assign
from pipelines.pipeline import prepare_source
from pipelines.plan import PlannedStep, plan
from pipelines.registry.aliases import DECISION_TAG, version_at
from pipelines.registry.gate import Decision
from pipelines.registry.kept import ClassesDifferError, kept_networks
from pipelines.retrain.delta import delta_of
from pipelines.retrain.guard import guarded, over_limit
from pipelines.retrain.kept_values import is_of_a_version, kept_values, pinned_networks
from pipelines.retrain.line import champion_record, has_ended, is_started, line_start
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import Record

SHARE = 4  # a retraining has a quarter of the steps of the training from scratch that its line began with
_SETTINGS = ("retrain", "notify")  # sections that are not of the training
_NOT_OF_THE_TRAINING = tuple(f"{section}." for section in (*_SETTINGS, "promote"))


@dataclass(frozen=True)
class Request:
    """What a person asks for. `images` is a path or URI in place of the recorded one.

    `when_data_changed`: the images of the champion are no reason for another training, whatever else is asked for.
    """

    name: str
    store: str
    images: str | None = None
    assignments: tuple[str, ...] = ()
    steps: int | None = None
    from_scratch: bool = False
    when_data_changed: bool = False

    @property
    def differs(self) -> bool:
        """Whether it asks for another training also with the same images."""
        if self.when_data_changed:
            return False
        changes = [text for text in self.assignments if not text.startswith(_NOT_OF_THE_TRAINING)]
        return bool(changes) or self.steps is not None or self.from_scratch


@dataclass(frozen=True)
class Retraining:
    """A retraining that can be planned or run.

    `nothing_to_do` says why there is none, and `over_limit` why it may not run; else they are empty.
    """

    config: PipelineConfig
    source: Source
    champion: Any | None  # the version that it starts from; None from scratch without a champion
    delta: ImageDelta | None = None
    notes: tuple[str, ...] = ()
    nothing_to_do: str = ""
    over_limit: str = ""


def prepare(catalog: Catalog, request: Request, terminal: Terminal, digest_again: bool = False) -> Retraining:
    """The retraining of a model. Reads the source, and writes nothing. `digest_again`: read all images of the source.

    Raises UserError if there is no champion, if its run or its classifier is gone, or if the source is unusable.
    """
    version, record = champion_record(catalog, request.name, request.from_scratch)
    _check_learns_from_images(request.name, record)
    config = _configured(catalog, request, version, record)
    store = Store(Folder.at(request.store))
    source = prepare_source(config.source, store.root, terminal, digest_again)
    if version is not None and not request.differs and source.fingerprint == version.tags.get("edt.source"):
        if not has_ended(catalog, version):
            return _unfinished(request, record, source, version)
        return Retraining(config, source, version, nothing_to_do=f"the images are those of {title(version)}")
    notes: list[str] = []
    if not request.from_scratch:
        config, notes = _with_classifier(config, catalog, store, source)
        _check_start(config, catalog, request.name)
    delta = delta_of(version, store, source)
    if not request.from_scratch and delta is not None and delta.gained:  # else the line is not looked up again
        _, first = line_start(catalog, request.name, version, record)
        config, said = _with_rate(config, request, delta, first)
        notes += said
    too_long = over_limit(config, version, request.name)
    return Retraining(guarded(config, request.name), source, version, delta, tuple(notes), over_limit=too_long)


def _check_learns_from_images(name: str, record: Record) -> None:
    """Raise UserError for a distilled model: it has learnt the steps of its teacher, and not images."""
    own, train = record.config["models"].get(name) or {}, record.config.get("train") or {}
    distill = own.get("distill", train.get("distill"))
    if distill:
        teacher = own.get("init_from", train.get("init_from"))
        raise UserError(
            f"{name} was distilled from {teacher}, whose steps it has learnt, and not images. Retrain that model, then "
            f"distill it again with `edt distill NAME@champion --steps {distill['steps']}`"
        )


def _unfinished(request: Request, record: Record, source: Source, version: Any) -> Retraining:
    """The run that made a champion, to be finished: it ended after the alias moved, before its decision or its report.

    All its other steps are reused.
    """
    models = {request.name: record.config["models"][request.name]}
    config: PipelineConfig = validated(PipelineConfig, {**record.config, "store": request.store, "models": models})
    note = f"the run that made {title(version)} ended before its decision or its report; it is finished first"
    return Retraining(config, source, version, notes=(note,))


def planned(catalog: Catalog, retraining: Retraining) -> list[PlannedStep]:
    """The steps of a retraining, as `edt plan` has them."""
    return plan(retraining.config, catalog, source=retraining.source)


def done_before(catalog: Catalog, retraining: Retraining, steps: Sequence[PlannedStep]) -> str:
    """Which version this very retraining made before, with its decision; "" if it was not done, or not to its end."""
    (name,) = retraining.config.models
    promotion = next((step for step in steps if step.step == f"promote {name}"), None)
    if promotion is None or promotion.action != "reuse":
        return ""
    number = promotion.why.removeprefix("version ")
    version = version_at(catalog, name, number)
    if version is None or not has_ended(catalog, version):
        return ""
    return f"{name} version {number} is this retraining ({Decision.from_json(version.tags[DECISION_TAG])})"


def _configured(catalog: Catalog, request: Request, version: Any | None, record: Record) -> PipelineConfig:
    """The configuration of a retraining: that of the champion's run, with what a retraining changes, then `--set`."""
    if request.from_scratch:
        values = _fitted_again(record, request.store)
    else:
        values = kept_values(record, version, request.store)
    values.pop("prune", None)  # a pruned champion is trained further as it is
    values["source"] = _source(record.config, request.images)
    first_version, first = line_start(catalog, request.name, version, record)
    recorded = first if request.from_scratch else record
    if _overrides(recorded) != _overrides(record):  # AMM of a pruned model is in other blocks
        values["sample"] = recorded.config["sample"]
    own, train = dict(recorded.config["models"].get(request.name) or {}), dict(recorded.config.get("train") or {})
    if request.from_scratch and request.steps is None and is_started(first, request.name):
        raise UserError(
            f"the training from scratch that the versions of {request.name} began with is no longer on record, so its "
            "number of steps is not known. Set it with --steps"
        )
    changes = _from_scratch(request) if request.from_scratch else _further(request, version, first_version, first)
    for name in changes:
        own.pop(name, None)
    values |= {"models": {request.name: own}, "train": train | changes}
    for (
        section
    ) in _SETTINGS:  # of the configuration that the line began with: what was set for one run is not inherited
        values.pop(section, None)
        if section in first.config:
            values[section] = first.config[section]
    for text in request.assignments:
        assign(values, *parse_assignment(text))
    config: PipelineConfig = validated(PipelineConfig, values)
    return config


def _overrides(record: Record) -> Any:
    """The shape of a run's model, where it is not that of its name."""
    return (record.config.get("train") or {}).get("model_overrides", {})


def _from_scratch(request: Request) -> dict[str, Any]:
    """The fields of `train` that a training from random weights changes."""
    return {"init_from": None, **({} if request.steps is None else {"max_steps": request.steps})}


def _further(request: Request, version: Any, first_version: Any, first: Record) -> dict[str, Any]:
    """The fields of `train` that a training from a champion's weights changes.

    `first`: the record of the training from scratch that the line of the champion began with, whose steps count.
    """
    config: PipelineConfig = validated(PipelineConfig, dict(first.config))
    train = config.train_of(request.name)
    recorded = None if first_version is None else first_version.tags.get("edt.cost.steps")
    share = 1 if is_started(first, request.name) else SHARE  # a retraining has a quarter of both already
    steps = request.steps or max(1, math.ceil(int(recorded or train.max_steps) / share))
    return {
        "max_steps": steps,
        "max_epochs": None,
        "lr": train.lr / share,  # the highest rate would move a trained model away from its minimum
        "lr_final": min(train.lr_final, train.lr / share),
        "max_hours": train.max_hours,  # not what the limit of an earlier retraining left of it
        "warmup_steps": min(train.warmup_steps, steps // SHARE),
        "init_from": f"models:/{version.name}/{version.version}",
        "init_weights": "ema",
        "init_optimizer": "fresh",
    }


def _with_rate(
    config: PipelineConfig, request: Request, delta: ImageDelta, first: Record
) -> tuple[PipelineConfig, list[str]]:
    """The configuration with the whole learning rate if classes are new, and a note, unless `--set` has a rate.

    `first`: the record of the training from scratch, whose rate it is. A line without one keeps its rate.
    """
    is_set = any(text.startswith(("train.lr=", f"models.{request.name}.lr=")) for text in request.assignments)
    if not delta.gained or is_set or is_started(first, request.name):
        return config, []
    whole: PipelineConfig = validated(PipelineConfig, dict(first.config))
    train = config.train.model_copy(update={"lr": whole.train_of(request.name).lr})
    note = f"new classes ({len(delta.gained)}): the learning rate is {train.lr:g}, that of the training from scratch"
    return config.model_copy(update={"train": train}), [note]


def _source(config: Mapping[str, Any], images: str | None) -> dict[str, Any]:
    """The recorded source, or the same selection of images elsewhere."""
    source = dict(config["source"])
    if images is None:
        return source
    return source | {"path": images, "kind": "auto" if source.get("kind") == "digits" else source.get("kind", "auto")}


def _fitted_again(record: Record, store: str) -> dict[str, Any]:
    """The recorded values, with an autoencoder and a classifier that are fitted, unless they are published."""
    autoencoder = dict(record.config.get("autoencoder") or {})
    if is_of_a_version(autoencoder):
        autoencoder["pretrained"] = None
    classifier = {**(record.config.get("classifier") or {}), "pretrained": None}
    fitted = {"autoencoder": autoencoder, "classifier": classifier}
    return {**record.config, "store": store, **fitted, **pinned_networks(record)}


def _check_start(config: PipelineConfig, catalog: Catalog, name: str) -> None:
    """Raise UserError, with the way on, if the champion's weights are neither in the store nor in the registry."""
    try:
        initial_source(config.train_of(name), catalog.tracking_uri)
    except (UserError, OSError) as error:
        raise UserError(f"{name} cannot be trained further: {error}. Retrain it with --from-scratch") from error


def _with_classifier(
    config: PipelineConfig, catalog: Catalog, store: Store, source: Source
) -> tuple[PipelineConfig, list[str]]:
    """The configuration with the champion's classifier; with other classes one is fitted again, and a note says so."""
    try:
        kept_networks(config, catalog.tracking_uri, store, source.classes)
    except ClassesDifferError as error:
        classifier = config.classifier.model_copy(update={"pretrained": None})
        return config.model_copy(update={"classifier": classifier}), [f"the classifier is fitted again: {error.change}"]
    return config, []
