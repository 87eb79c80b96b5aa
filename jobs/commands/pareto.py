"""pareto: which sampling settings of a model are worth their time, by successive halving over a grid.

The grid is measured with few samples first. The better half, by whole Pareto fronts of metric and seconds an image, is
measured with twice as many, and so on up to `num_samples`. Other models can take part, such as a distilled one; all are
compared with the same images by the same networks. Everything is an artifact in the output folder: a killed or ended
search resumes, and a longer `--budget-s` adds to it.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edt_core.config import ChainConfig, SampleConfig
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.files.small_files import read_text
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.folder import Folder
from jobs.commands.clock import Clock
from jobs.commands.curve import Curve
from jobs.commands.evaluate_model import RESULTS, Subject, add_subject, prepared
from jobs.commands.front import Measured, halved
from jobs.commands.options import add_fields, add_json, given_fields, parser_of, validated
from jobs.commands.sweep import EMA, Axis, Point, effective, grid, parse_axis
from jobs.models.open import Loaded, load_model, use_mlflow, version_at
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages import sample

if TYPE_CHECKING:
    from edt_core.models import ModelConfig

GIVEN = "as given"
_SHARES = (0.25, 0.5, 1.0)  # of num_samples in each rung
_HIGHER_IS_BETTER = ("accuracy", "inception_score", "precision", "recall")


@dataclass(frozen=True)
class Entrant:
    """A model in a search: what measures it, and the settings to try on it by the names of their points.

    `label` is its name, or where it is; `version` the NAME/NUMBER of a registered one.
    """

    label: str
    version: str | None
    subject: Subject
    clock: Clock
    settings: Mapping[str, SampleConfig]


@dataclass(frozen=True)
class Search:
    """What a search measures: its models, of which the first is MODEL, and the size of each rung."""

    entrants: Sequence[Entrant]
    metric: str
    rungs: tuple[int, ...]

    @property
    def lower(self) -> bool:
        """Whether lower values of the metric are better."""
        return not self.metric.startswith(_HIGHER_IS_BETTER)

    @property
    def points(self) -> dict[str, Entrant]:
        """The model of each point."""
        return {name: entrant for entrant in self.entrants for name in entrant.settings}


def default_axes(base: SampleConfig, config: "ModelConfig") -> list[str]:
    """The axes of a search without `--sweep`: samplers of few steps, fewer steps, and caches."""
    from edt_core.diffusion import objective_of_model

    objective = objective_of_model(config)
    samplers = [name for name in objective.samplers if name not in ("ancestral", "sde")]
    steps = sorted({max(2, round(base.num_sampling_steps * share)) for share in (0.08, 0.16, 0.32, 0.5, 1.0)})
    return [
        f"sampler={','.join(samplers)}",
        f"steps={','.join(map(str, steps))}",
        *([] if objective.of_tokens else ["cache=off,newton-2-1,newton-3-1"]),
    ]


def settings_of(base: SampleConfig, axes: Sequence[str], config: "ModelConfig") -> dict[str, SampleConfig]:
    """The settings of the grid by name, those of the same effect once; the base first, as GIVEN.

    Raises UserError for axes that are no settings of a chain, and for settings that the model does not support.
    """
    points = [Point({}, base), *grid(base, [_axis(text) for text in axes])]
    settings: dict[str, SampleConfig] = {}
    known: set[str] = set()
    for point in points:
        effect = effective(point.config, config).model_dump_json()
        if effect not in known:
            known.add(effect)
            settings[" ".join(f"{name}={text}" for name, text in point.settings.items()) or GIVEN] = point.config
    return settings


def _axis(text: str) -> Axis:
    """An axis of a search. Raises UserError for what is the same for all of its points: weights, samples, workers."""
    axis = parse_axis(text)
    if axis.field not in ChainConfig.model_fields:
        remedy = f"set it for all of them with --{axis.field.replace('_', '-')}"
        if axis.field == EMA:
            remedy = f"compare averages with `edt evaluate MODEL OUT --sweep {text}`, and register one with `edt ema`"
        raise UserError(
            f"--sweep {text}: {axis.name} is no setting of a chain, and only in those do the points of a search "
            f"differ; {remedy}"
        )
    return axis


def main(arguments: Sequence[str] | None = None, prog: str = "edt pareto") -> None:
    """Search sampling settings of a model: MODEL OUT. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("pareto") as bar:
        run(options, bar)
        say(read_text(Path(options.out, f"{RESULTS}.{'json' if options.as_json else 'md'}")))
        if not options.as_json:
            say(f"{options.out}/{RESULTS}.json and .png")


def run(options: argparse.Namespace, bar: Progress) -> None:
    """Search as the options say, and write `results.json`, `.md` and `.png` into the folder."""
    out = Folder.at(options.out)
    if out.local is None:
        raise UserError(f"{options.out} is remote; search into a local folder")
    if options.budget_s is not None and not options.budget_s > 0:  # nan is not above 0 either
        raise UserError(f"--budget-s is {options.budget_s:g}; use seconds above 0, or leave it out for no limit")
    check_named()
    evaluation = validated(EvaluateConfig, given_fields(options, EvaluateConfig))
    entrants = _entrants(options, out, bar)
    sizes = entrants[0].settings[GIVEN]
    rungs = {share: max(2, math.ceil(sizes.num_samples * share)) for share in _SHARES}
    for share, size in rungs.items():
        entrants[0].subject.check_sizes(sizes.model_copy(update={"num_samples": size}), evaluation, share)
    for entrant in entrants:
        _check_points(entrant)
    metric = options.metric or _default_metric(entrants[0].subject)
    search = Search(entrants, metric, tuple(sorted(set(rungs.values()))))
    results, complete = _measured(search, evaluation, options.budget_s, bar)
    Curve(search, results, complete, GIVEN).write(out)


def _entrants(options: argparse.Namespace, out: Folder, bar: Progress) -> list[Entrant]:
    """MODEL, then the models of `--also`. Raises UserError for one that cannot be compared with MODEL."""
    loaded = _loaded(options, options.model)
    version = _version(options.model)
    options.model = version or options.model  # an alias may move during a search
    settings = _settings(options, loaded)
    if not options.guide:
        _check_unguided(options.model, loaded, settings[GIVEN], "pass the guide with --guide")
    subject = prepared(options, settings[GIVEN], out, bar, [Point({}, config) for config in settings.values()])
    guide = load_model(options.guide).model if options.guide else None
    clock = Clock(loaded.model, loaded.num_timesteps, out, guide, loaded.classify_by(loaded.autoencoder))
    entrants = [Entrant(options.model, version, subject, clock, settings)]
    for location in options.also:
        other, version = _loaded(options, location), _version(location)
        label = version or location
        if label in [entrant.label for entrant in entrants]:
            raise UserError(f"--also {location} is {label}, which is in the search already; name each model once")
        _check_comparable(label, other, options.model, loaded)
        tried = _settings(options, other)
        _check_unguided(label, other, tried[GIVEN], "search it by itself, with --guide")
        settings = {label if name == GIVEN else f"{label} {name}": config for name, config in tried.items()}
        clock = Clock(other.model, other.num_timesteps, out, classify=other.classify_by(other.autoencoder))
        entrants.append(Entrant(label, version, subject.beside(options, label, bar), clock, settings))
    return entrants


def _loaded(options: argparse.Namespace, location: str) -> Loaded:
    use_mlflow(location, options.tracking_uri, options.store)
    return load_model(location)


def _version(location: str) -> str | None:
    """The name and number of a registered version, whatever it was called by; None for another place."""
    registered = version_at(location)
    return None if registered is None else f"{registered.name}/{registered.version}"


def _settings(options: argparse.Namespace, loaded: Loaded) -> dict[str, SampleConfig]:
    """The settings to try on a model: its own with the options, and the grid around them."""
    base = validated(SampleConfig, {**loaded.sampling, **given_fields(options, SampleConfig)})
    config = loaded.model.config
    return settings_of(base, options.sweep or default_axes(base, config), config)


def _check_unguided(label: str, loaded: Loaded, given: SampleConfig, remedy: str) -> None:
    """Raise UserError for a model that its own settings guide away from a guide, which a search does not take over."""
    if loaded.guide_of(given) is not None:
        raise UserError(
            f"{label} carries a guide, from which cfg_scale {given.cfg_scale:g} guides away; without it the search "
            f"would measure another chain. Search with --cfg-scale 1, or {remedy}"
        )


def _check_comparable(label: str, other: Loaded, model: str, first: Loaded) -> None:
    """Raise UserError for a model of other images: one metric would compare different things."""
    for name in ("num_classes", "image_size"):
        theirs, ours = getattr(other.model.config, name), getattr(first.model.config, name)
        if theirs != ours:
            raise UserError(f"--also {label} has {name} {theirs} and {model} has {ours}: they cannot be compared")


def _check_points(entrant: Entrant) -> None:
    """Raise UserError for a setting that the model cannot be sampled by, before any sample is drawn."""
    for name, config in entrant.settings.items():
        try:
            sample.check(config, entrant.subject.inputs)
        except UserError as error:
            raise UserError(f"{entrant.label} cannot be measured with the setting {name!r}: {error}") from error


def _default_metric(subject: Subject) -> str:
    """The Fréchet distance in the first feature space."""
    from edt_core.evaluation.extractors import EXTRACTORS
    from edt_core.evaluation.metrics import metric_name

    return metric_name("fid", next(space for space in EXTRACTORS if space in subject.inputs))


def _measured(
    search: Search, evaluation: EvaluateConfig, budget_s: float | None, bar: Progress
) -> tuple[list[dict[str, Measured]], bool]:
    """What each rung measured, until the time is over. Raises UserError for a metric that is not measured."""
    began, points = time.monotonic(), search.points

    def measure(name: str, samples: int) -> Measured | None:
        if budget_s is not None and time.monotonic() - began > budget_s:
            return None
        entrant = points[name]
        config = entrant.settings[name]
        _, artifact = entrant.subject.measure(config.model_copy(update={"num_samples": samples}), evaluation, bar)
        metrics = artifact.counts["metrics"]
        if search.metric not in metrics:
            raise UserError(f"--metric {search.metric} was not measured; choose from {', '.join(sorted(metrics))}")
        value, spread = metrics[search.metric], metrics.get(f"{search.metric}_std")
        point = Measured(name, value, spread, entrant.clock.seconds(config), entrant.clock.flops(config))
        say(f"{samples} samples, {name}: {search.metric} {value:.4g}, {point.seconds:.3g} s an image", err=True)
        return point

    as_given = [next(iter(entrant.settings)) for entrant in search.entrants]
    return halved(list(points), search.rungs, measure, as_given, search.lower)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = parser_of(
        prog,
        "Find the sampling settings of a model that are worth their time: metric against seconds an image. Without "
        "--sweep it tries samplers of few steps, fewer steps and caches",
        [
            "edt-s-2-256@champion ./pareto --inception-weights pt_inception-2015-12-05-6726825d.pth",
            "./model ./pareto --images ./images --classifier ./classifier --repeats 3 "
            "--sweep sampler=ddim,unipc steps=5,10,25 cache=off,taylor-3 cfg=1,1.5",
            "edt-s-2-256/3 ./pareto --also edt-s-2-256/4 edt-s-2-256/5 --classifier ./classifier --repeats 3",
        ],
    )
    add_subject(parser, "folder for artifacts and results; existing artifacts in it are reused")
    add_json(parser)
    actions = parser.add_argument_group("what to try")
    actions.add_argument("--sweep", nargs="+", default=[], metavar="NAME=V,V", help="the grid, as of `edt evaluate`")
    actions.add_argument(
        "--also", nargs="+", default=[], metavar="MODEL", help="more models, such as a distilled or a pruned version"
    )
    actions.add_argument(
        "--metric", help="the metric that decides  [default: the Fréchet distance of the first network]"
    )
    actions.add_argument("--budget-s", type=float, metavar="S", help="begin no measurement after so many seconds")
    add_fields(parser.add_argument_group("sampling, where the grid does not set it"), SampleConfig)
    add_fields(parser.add_argument_group("metrics"), EvaluateConfig, leave_out=("num_cpus",))
    return parser
