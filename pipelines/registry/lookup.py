"""Look-ups in the registry: which versions there are, what one is, and in what two differ. From MLflow alone."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.evaluation.protocol import protocol_differences
from jobs.commands.options import parse_assignment
from pipelines.registry.aliases import (
    BEFORE_TAG,
    CHAMPION,
    DECISION_TAG,
    PROMOTED_TAG,
    ROLLED_BACK_TAG,
    search,
    version_at,
)
from pipelines.registry.gate import PROTOCOL_TAG, Decision, metrics_of, protocol_of
from pipelines.tracking.catalog import Catalog, paged
from pipelines.tracking.runs import runs_of

_VERSION = re.compile(r"(?:models:/)?([\w.-]+)(?:@([\w.-]+)|/(\d+))?")
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
    """A version with what is recorded of it: its aliases, and the parameters of the workflow run that made it."""

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
        """One line of a table."""
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
        """Everything, as JSON has it."""
        tags = self.version.tags
        return {
            "name": self.version.name,
            "version": str(self.version.version),
            "aliases": list(self.aliases),
            "created": utc(self.version.creation_timestamp / 1000),
            "run": self.version.run_id,
            "code_version": tags.get("edt.code_version"),
            "metrics": metrics_of(self.version),
            "protocol": dict(protocol_of(self.version)),
            "protocol_digest": tags.get(PROTOCOL_TAG),
            "data": {name.removeprefix("edt."): tags[name] for name in _IDS if name in tags},
            "parents": {role: tags[f"edt.{role}"] for role in ("checkpoint", "evaluation") if f"edt.{role}" in tags}
            | json.loads(tags.get("edt.inputs", "{}")),
            "uri": tags.get("edt.uri"),
            "origin": origin_of(self.version),
            "decision": None if self.decision is None else json.loads(self.decision.to_json()),
            "decision_text": None if self.decision is None else str(self.decision),
            "champion_before": tags.get(BEFORE_TAG) or None,
            "promoted": tags.get(PROMOTED_TAG),
            "rolled_back": tags.get(ROLLED_BACK_TAG),
            "config": dict(self.config),
        }


def origin_of(version: Any) -> dict[str, str]:
    """Where an imported version came from; empty for one that was trained here."""
    return {tag.removeprefix(ORIGIN): text for tag, text in version.tags.items() if tag.startswith(ORIGIN)}


def find(catalog: Catalog, text: str) -> Any:
    """The version at NAME@ALIAS or NAME/NUMBER; of NAME alone the champion, or else the newest.

    Raises UserError saying what there is.
    """
    if (match := _VERSION.fullmatch(text)) is None:
        raise UserError(f"{text!r} names no version; give NAME@ALIAS, NAME/NUMBER or NAME")
    name, alias, number = match.groups()
    known = all_aliases(catalog)
    if name not in known:
        raise UserError(f"there is no registered model {name!r}; {_there_is(name, known, 'models')}")
    if alias is None and number is None and CHAMPION in known[name]:
        alias = CHAMPION
    if alias is not None and alias not in known[name]:
        raise UserError(f"{name} has no alias {alias!r}; {_there_is(alias, known[name], 'aliases')}")
    wanted = known[name][alias] if alias is not None else number
    if wanted is not None and (found := version_at(catalog, name, wanted)) is not None:
        return found
    versions = {str(version.version): version for version in search(catalog, f"name = '{name}'")}
    if not versions:
        raise UserError(f"{name} has no versions; they were deleted")
    if wanted is not None:
        numbers = ", ".join(sorted(versions, key=int)[-10:])
        raise UserError(f"{name} has no version {wanted}; there are {len(versions)}, the newest: {numbers}")
    return versions[max(versions, key=int)]


def select(
    catalog: Catalog,
    name: str | None = None,
    data: str | None = None,
    config: Sequence[str] = (),
    metrics: Sequence[str] = (),
    commit: str | None = None,
    with_config: bool = False,
) -> list[Record]:
    """The versions of which all of this holds, by name and newest first.

    `data` and `commit` are beginnings of a digest or fingerprint, `config` FIELD=VALUE, `metrics` as "fid<5". Raises
    UserError for a model, field or metric that no version has.
    """
    known = all_aliases(catalog)
    if name is not None and name not in known:
        raise UserError(f"there is no registered model {name!r}; {_there_is(name, known, 'models')}")
    found = search(catalog, f"name = '{name}'" if name else "")
    if commit is not None:
        found = [v for v in found if v.tags.get("edt.code_version", "").startswith(commit)]
    if data is not None:
        found = [v for v in found if any(v.tags.get(tag, "").startswith(data) for tag in _IDS)]
    found = _by_metrics(found, metrics)
    chosen = _by_config(records(catalog, found, known, with_config or bool(config)), config)
    return sorted(chosen, key=lambda record: (record.version.name, -int(record.version.version)))


def records(
    catalog: Catalog, versions: Sequence[Any], aliases: Mapping[str, Mapping[str, str]], with_config: bool = True
) -> list[Record]:
    """Versions with their aliases and, where wanted, the configuration of their runs, asked for in batches."""
    runs = runs_of(catalog, {v.run_id for v in versions if v.run_id}) if with_config else {}

    def record(version: Any) -> Record:
        ours = aliases.get(version.name, {}).items()
        named = tuple(sorted(alias for alias, number in ours if number == str(version.version)))
        run = runs.get(version.run_id)
        return Record(version, named, {} if run is None else config_of(run.data.params, version.name))

    return [record(version) for version in versions]


def record_of(catalog: Catalog, text: str) -> Record:
    """The version that a text names, with all that is recorded of it. Raises UserError as `find`."""
    (record,) = records(catalog, [find(catalog, text)], all_aliases(catalog))
    return record


def compare(first: Record, second: Record) -> dict[str, Any]:
    """In what two versions differ: every metric side by side, protocol, data, code, and fields of configuration."""
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
    """Whether the metrics of two versions may be compared."""
    return bool(first.tags.get(PROTOCOL_TAG) == second.tags.get(PROTOCOL_TAG))


def differences(first: Any, second: Any) -> list[str]:
    """In what the protocols of two versions differ; also empty where that is not recorded in words."""
    return [] if same_protocol(first, second) else protocol_differences(protocol_of(first), protocol_of(second))


def config_of(params: Mapping[str, str], model: str) -> dict[str, str]:
    """The configuration of one model of a run: its own fields in the place of the shared ones of `train`."""
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
            raise UserError(f"--metric takes a comparison, as 'fid<5'; got {condition!r}")
        known = {name for version in versions for name in metrics_of(version)}
        if versions and match[1] not in known:
            raise UserError(f"no version has a metric {match[1]!r}; {_there_is(match[1], known, 'metrics')}")
        holds = _COMPARE[match[2]]
        versions = [v for v in versions if match[1] in (m := metrics_of(v)) and holds(m[match[1]], limit)]
    return versions


def _by_config(found: list[Record], assignments: Sequence[str]) -> list[Record]:
    for text in assignments:
        key, value = parse_assignment(text)
        known = {name for record in found for name in record.config}
        if found and key not in known:
            raise UserError(f"no run has a field {key!r} of configuration; {_there_is(key, known, 'fields')}")
        found = [record for record in found if key in record.config and _same(record.config[key], value)]
    return found


def _same(recorded: str, value: Any) -> bool:
    """Whether a parameter, which MLflow keeps as text, is this value: 0.004 is 4e-3."""
    if recorded == str(value):
        return True
    try:
        return not isinstance(value, bool) and float(recorded) == float(value)
    except (TypeError, ValueError):
        return False


def _there_is(name: str, known: Iterable[str], what: str) -> str:
    """What somebody who mistyped a name may have meant, or else what there is."""
    names = sorted(known)
    if close := get_close_matches(name, names, 3):
        return f"did you mean {' or '.join(close)}?"
    more = ", ..." if len(names) > 20 else ""
    return f"there are no {what}" if not names else f"{what} are {', '.join(names[:20])}{more}"
