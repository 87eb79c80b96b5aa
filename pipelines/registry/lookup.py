"""Look-ups in the registry: list versions, describe one, and compare two. Only MLflow is needed."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.evaluation.protocol import protocol_differences
from edt_core.evaluation.trainings import spread_text
from edt_core.printing.suggestions import suggestions
from jobs.commands.options import parse_assignment
from jobs.models.names import REGISTERED, STD_TAG
from pipelines.registry.aliases import (
    BEFORE_TAG,
    CHAIN_OF_TAG,
    CHAIN_TAG,
    CHAMPION,
    DECISION_TAG,
    PARENT_TAG,
    PROMOTED_TAG,
    QUANTIZED_TAG,
    ROLLED_BACK_TAG,
    TRAININGS_TAG,
    search,
    version_at,
)
from pipelines.registry.distilled.pruned_record import PrunedRecord
from pipelines.registry.distilled.teacher_record import TeacherRecord
from pipelines.registry.gate import PROTOCOL_TAG, Decision, metrics_of, protocol_of
from pipelines.tracking.catalog import Catalog, paged
from pipelines.tracking.runs import runs_of

_CONDITION = re.compile(r"\s*([\w.-]+?)\s*(<=|>=|==|=|<|>)\s*(\S+)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
}
ORIGIN = "edt.import."  # tags of a version that was imported: file, sha256, weights, autoencoder, source
_IDS = ("edt.images", "edt.images.digest", "edt.source")


@dataclass(frozen=True)
class Record:
    """A version with its aliases and the parameters of the workflow run that made it."""

    version: Any
    aliases: tuple[str, ...]
    config: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.version.name}/{self.version.version}"

    @property
    def decision(self) -> Decision | None:
        text = self.version.tags.get(DECISION_TAG)
        return Decision.from_json(text) if text else None

    def row(self) -> dict[str, Any]:
        """One table row."""
        tags, decision = self.version.tags, self.decision
        metric = f"{decision.metric} {decision.value:.4g}" if decision else None
        return {
            "model": self.version.name,
            "version": str(self.version.version),
            "aliases": ", ".join(self.aliases) or None,
            "metric": metric,
            "data": tags.get("edt.images.digest", "")[:12] or None,
            "code": tags.get("edt.code_version", "")[:12] or None,
            "created": utc(self.version.creation_timestamp / 1000),
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        tags = self.version.tags
        return {
            "name": self.version.name,
            "version": str(self.version.version),
            "aliases": list(self.aliases),
            "created": utc(self.version.creation_timestamp / 1000),
            "run": self.version.run_id,
            "code_version": tags.get("edt.code_version"),
            "metrics": metrics_of(self.version),
            "teacher": {} if (teacher := TeacherRecord.of(self.version)) is None else teacher.facts(),
            "pruned": {} if (pruned := PrunedRecord.of(self.version)) is None else pruned.facts(),
            "trainings": trainings_of(self.version),
            "protocol": dict(protocol_of(self.version)),
            "protocol_digest": tags.get(PROTOCOL_TAG),
            "data": {name.removeprefix("edt."): tags[name] for name in _IDS if name in tags},
            "parents": {role: tags[f"edt.{role}"] for role in ("checkpoint", "evaluation") if f"edt.{role}" in tags}
            | json.loads(tags.get("edt.inputs", "{}")),
            "uri": tags.get("edt.uri"),
            "origin": origin_of(self.version),
            "average": {tag.removeprefix("edt."): tags[tag] for tag in (STD_TAG, PARENT_TAG) if tag in tags},
            "quantization": quantization_of(self.version),
            "chain": chain_of(self.version),
            "decision": None if self.decision is None else json.loads(self.decision.to_json()),
            "decision_text": None if self.decision is None else str(self.decision),
            "champion_before": tags.get(BEFORE_TAG) or None,
            "promoted": tags.get(PROMOTED_TAG),
            "rolled_back": tags.get(ROLLED_BACK_TAG),
            "config": dict(self.config),
        }


def trainings_of(version: Any) -> dict[str, str]:
    """Mean and standard deviation of the metrics over the trainings of a model; empty if it was trained once."""
    trainings = json.loads(version.tags.get(TRAININGS_TAG, "{}"))
    return {"seeds": ", ".join(trainings), **spread_text(trainings)} if trainings else {}


def origin_of(version: Any) -> dict[str, str]:
    """Where an imported version came from; empty for one that was trained here."""
    return {tag.removeprefix(ORIGIN): text for tag, text in version.tags.items() if tag.startswith(ORIGIN)}


def quantization_of(version: Any) -> dict[str, str]:
    """How a quantised version was made, its sizes and its times; empty for another one."""
    return {
        tag.removeprefix(QUANTIZED_TAG): text for tag, text in version.tags.items() if tag.startswith(QUANTIZED_TAG)
    }


def chain_of(version: Any) -> dict[str, Any]:
    """The default settings of a version of `edt models set-chain`, and the version that it has the weights of."""
    tags = version.tags
    return {"of": tags[CHAIN_OF_TAG], **json.loads(tags.get(CHAIN_TAG, "{}"))} if CHAIN_OF_TAG in tags else {}


def find(catalog: Catalog, text: str) -> Any:
    """The version at NAME@ALIAS or NAME/NUMBER; for NAME alone the champion, or else the newest version.

    Raises UserError that lists what exists.
    """
    name, alias, number = parts_of(text)
    aliases = all_aliases(catalog)
    check_registered(name, aliases)
    if alias is None and number is None and CHAMPION in aliases[name]:
        alias = CHAMPION
    if alias is not None and alias not in aliases[name]:
        raise UserError(f"{name} has no alias {alias!r}; {suggestions(alias, aliases[name], 'aliases')}")
    number = aliases[name][alias] if alias is not None else number
    if number is not None and (version := version_at(catalog, name, number)) is not None:
        return version
    versions = {str(version.version): version for version in search(catalog, f"name = '{name}'")}
    if not versions:
        raise UserError(f"{name} has no versions; they were deleted")
    if number is not None:
        numbers = ", ".join(sorted(versions, key=int)[-10:])
        raise UserError(f"{name} has no version {number}; there are {len(versions)}, the newest: {numbers}")
    return versions[max(versions, key=int)]


def parts_of(text: str) -> tuple[str, str | None, str | None]:
    """(name, alias, number) as they are written; NAME alone has neither. Raises UserError for other text."""
    if (match := REGISTERED.fullmatch(text)) is None:
        raise UserError(f"{text!r} is not the name of a version; give NAME@ALIAS, NAME/NUMBER or NAME")
    name, alias, number = match.groups()
    return name, alias, number


def name_alone(text: str, command: str) -> str:
    """The name of a registered model, for a command that is about all of its versions.

    Raises UserError for an alias or a number, with the command as it must be written.
    """
    name, alias, number = parts_of(text)
    if alias is not None or number is not None:
        raise UserError(f"{text} names one version, but `{command}` takes a model; write `{command} {name}`")
    return name


def name_of_champion(catalog: Catalog, text: str, command: str) -> str:
    """The name of a model, for a command that uses its champion: NAME, or a version that is its champion.

    Raises UserError for any other version, with the ways to use that one.
    """
    name, alias, number = parts_of(text)
    if alias in (None, CHAMPION) and number is None:
        return name
    version = find(catalog, text)
    champion = all_aliases(catalog)[name].get(CHAMPION)
    if str(version.version) == champion:
        return name
    label = f"{name}/{version.version}"
    now = "there is none" if champion is None else f"that is version {champion}"
    raise UserError(
        f"{text} is not the champion of {name} ({now}), and `{command}` uses the champion. Make it champion with "
        f"`edt models promote {label} --force`, or fine-tune it with `edt run CONFIG --set train.init_from={label}`"
    )


def check_registered(name: str, models: Iterable[str]) -> None:
    """Raise UserError, with the nearest name, if a model is not among the registered ones."""
    if name not in (names := list(models)):
        raise UserError(f"there is no registered model {name!r}; {suggestions(name, names, 'models')}")


def select(
    catalog: Catalog,
    name: str | None = None,
    data: str | None = None,
    config: Sequence[str] = (),
    metrics: Sequence[str] = (),
    commit: str | None = None,
    with_config: bool = False,
) -> list[Record]:
    """The versions that match all conditions, by name, newest first.

    `data` and `commit` are prefixes of a digest, fingerprint or commit, `config` FIELD=VALUE, `metrics` as "fid<5".
    Raises UserError for a model, field or metric that no version has.
    """
    aliases = all_aliases(catalog)
    if name is not None:
        check_registered(name, aliases)
    versions = search(catalog, f"name = '{name}'" if name else "")
    if commit is not None:
        versions = [v for v in versions if v.tags.get("edt.code_version", "").startswith(commit)]
    if data is not None:
        versions = [v for v in versions if any(v.tags.get(tag, "").startswith(data) for tag in _IDS)]
    versions = _by_metrics(versions, metrics)
    selection = _by_config(records(catalog, versions, aliases, with_config or bool(config)), config)
    return sorted(selection, key=lambda record: (record.version.name, -int(record.version.version)))


def records(
    catalog: Catalog, versions: Sequence[Any], aliases: Mapping[str, Mapping[str, str]], with_config: bool = True
) -> list[Record]:
    """Versions with their aliases and, by default, the configuration of their runs, which are requested in batches."""
    runs = runs_of(catalog, {v.run_id for v in versions if v.run_id}) if with_config else {}

    def record(version: Any) -> Record:
        numbers = aliases.get(version.name, {}).items()
        names = tuple(sorted(alias for alias, number in numbers if number == str(version.version)))
        run = runs.get(version.run_id)
        return Record(version, names, {} if run is None else config_of(run.data.params, version.name))

    return [record(version) for version in versions]


def record_of(catalog: Catalog, text: str) -> Record:
    """The record of the version that `text` names. Raises UserError as `find`."""
    (record,) = records(catalog, [find(catalog, text)], all_aliases(catalog))
    return record


def compare(first: Record, second: Record) -> dict[str, Any]:
    """The differences of two versions: protocol, data, code, configuration fields; all metrics side by side."""
    one, two = metrics_of(first.version), metrics_of(second.version)
    rows = [
        {
            "metric": name,
            "first": one.get(name),
            "second": two.get(name),
            "difference": two[name] - one[name] if name in one and name in two else None,
        }
        for name in dict.fromkeys([*one, *two])
    ]
    tags = first.version.tags, second.version.tags
    fields = [name for name in dict.fromkeys([*first.config, *second.config]) if not name.startswith("promote.")]
    differing = {n: [first.config.get(n), second.config.get(n)] for n in fields}
    other = ("edt.images.digest", "edt.source", "edt.autoencoder", "edt.checkpoint", "edt.code_version")
    facts = {name: [tag.get(name) for tag in tags] for name in other}
    return {
        "versions": [first.label, second.label],
        "metrics": rows,
        "same_protocol": same_protocol(first.version, second.version),
        "protocol": differences(first.version, second.version),
        "config": {name: values for name, values in differing.items() if values[0] != values[1]},
        "recorded": {
            f.removeprefix("edt."): [t.get(f) for t in tags] for f in facts if tags[0].get(f) != tags[1].get(f)
        },
    }


def same_protocol(first: Any, second: Any) -> bool:
    """Whether the metrics of two versions are comparable."""
    return bool(first.tags.get(PROTOCOL_TAG) == second.tags.get(PROTOCOL_TAG))


def differences(first: Any, second: Any) -> list[str]:
    """The differences between the protocols of two versions; also empty if only their digests are recorded."""
    return [] if same_protocol(first, second) else protocol_differences(protocol_of(first), protocol_of(second))


def config_of(params: Mapping[str, str], model: str) -> dict[str, str]:
    """The configuration of one model of a run: its own fields replace the shared fields of `train`."""
    own = f"models.{model}."
    shared = {name: value for name, value in params.items() if not name.startswith("models.")}
    return shared | {f"train.{n.removeprefix(own)}": value for n, value in params.items() if n.startswith(own)}


def all_aliases(catalog: Catalog) -> dict[str, dict[str, str]]:
    """Every registered model, with alias -> version."""
    models = paged(lambda token: catalog.client.search_registered_models(max_results=1000, page_token=token))
    return {model.name: {alias: str(number) for alias, number in model.aliases.items()} for model in models}


def _by_metrics(versions: list[Any], conditions: Sequence[str]) -> list[Any]:
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        try:
            limit = float(match[3]) if match else None
        except ValueError:
            limit = None
        if match is None or limit is None:
            raise UserError(f"--metric {condition!r} is not a comparison; give one such as 'fid<5'")
        names = {name for version in versions for name in metrics_of(version)}
        if versions and match[1] not in names:
            raise UserError(f"no version has a metric {match[1]!r}; {suggestions(match[1], names, 'metrics')}")
        holds = _COMPARE[match[2]]
        versions = [v for v in versions if match[1] in (m := metrics_of(v)) and holds(m[match[1]], limit)]
    return versions


def _by_config(versions: list[Record], assignments: Sequence[str]) -> list[Record]:
    for text in assignments:
        key, value = parse_assignment(text)
        names = {name for record in versions for name in record.config}
        if versions and key not in names:
            raise UserError(f"no run has a configuration field {key!r}; {suggestions(key, names, 'fields')}")
        versions = [record for record in versions if key in record.config and _same(record.config[key], value)]
    return versions


def _same(recorded: str, value: Any) -> bool:
    """Whether a parameter, which MLflow stores as text, equals this value: 0.004 equals 4e-3."""
    if recorded == str(value):
        return True
    try:
        return not isinstance(value, bool) and float(recorded) == float(value)
    except (TypeError, ValueError):
        return False
