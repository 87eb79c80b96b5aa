"""pareto: which sampling settings of a model are worth their time, by successive halving over a grid.

The grid is measured with few samples first. The better half, by whole Pareto fronts of metric and seconds an image, is
measured with twice as many, and so on up to `num_samples`. Everything is an artifact in the output folder: a killed or
ended search resumes, and a longer `--budget-s` adds to it.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edt_core.config import SampleConfig, recorded_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.files.small_files import read_text
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.folder import Folder
from jobs.commands.clock import TIMED_SAMPLES, Clock
from jobs.commands.evaluate_model import RESULTS, Subject, add_subject, prepared
from jobs.commands.front import Measured, front, halved, named_points
from jobs.commands.options import add_fields, add_json, given_fields, parser_of, validated
from jobs.commands.sweep import Point, effective, grid, parse_axis
from jobs.models.open import load_model, use_mlflow, version_at
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar

if TYPE_CHECKING:
    from edt_core.models import ModelConfig

GIVEN = "as given"
_SHARES = (0.25, 0.5, 1.0)  # of num_samples in each rung
_HIGHER_IS_BETTER = ("accuracy", "inception_score", "precision", "recall")


@dataclass(frozen=True)
class Search:
    """What a search measures: the settings by name, the metric that decides, and the size of each rung."""

    settings: Mapping[str, SampleConfig]
    metric: str
    rungs: tuple[int, ...]

    @property
    def lower(self) -> bool:
        """Whether lower values of the metric are better."""
        return not self.metric.startswith(_HIGHER_IS_BETTER)


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

    Raises UserError for settings that the model does not support.
    """
    points = [Point({}, base), *grid(base, [parse_axis(text) for text in axes])]
    settings: dict[str, SampleConfig] = {}
    known: set[str] = set()
    for point in points:
        effect = effective(point.config, config).model_dump_json()
        if effect not in known:
            known.add(effect)
            settings[" ".join(f"{name}={text}" for name, text in point.settings.items()) or GIVEN] = point.config
    return settings


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
    if options.budget_s is not None and options.budget_s <= 0:
        raise UserError(f"--budget-s is {options.budget_s:g}; use seconds above 0, or leave it out for no limit")
    check_named()
    use_mlflow(options.model, options.tracking_uri, options.store)
    registered = version_at(options.model)
    version = None if registered is None else f"{registered.name}/{registered.version}"
    options.model = version or options.model  # an alias may move during a search
    loaded = load_model(options.model)
    base = validated(SampleConfig, {**loaded.sampling, **given_fields(options, SampleConfig)})
    axes = options.sweep or default_axes(base, loaded.model.config)
    settings = settings_of(base, axes, loaded.model.config)
    subject = prepared(options, base, out, bar, [Point({}, config) for config in settings.values()])
    evaluation = validated(EvaluateConfig, given_fields(options, EvaluateConfig))
    rungs = tuple(sorted({max(2, math.ceil(base.num_samples * share)) for share in _SHARES}))
    for size in rungs:
        subject.check_sizes(base.model_copy(update={"num_samples": size}), evaluation)
    search = Search(settings, options.metric or _default_metric(subject), rungs)
    guide = load_model(options.guide).model if options.guide else None
    clock = Clock(loaded.model, loaded.num_timesteps, out, guide)
    results, complete = _measured(search, subject, evaluation, clock, options.budget_s, bar)
    _write(search, results, complete, options.model, version, clock.place, out)


def _default_metric(subject: Subject) -> str:
    """The Fréchet distance in the first feature space."""
    from edt_core.evaluation.extractors import EXTRACTORS
    from edt_core.evaluation.metrics import metric_name

    return metric_name("fid", next(space for space in EXTRACTORS if space in subject.inputs))


def _measured(
    search: Search,
    subject: Subject,
    evaluation: EvaluateConfig,
    clock: Clock,
    budget_s: float | None,
    bar: Progress,
) -> tuple[list[dict[str, Measured]], bool]:
    """What each rung measured, until the time is over. Raises UserError for a metric that is not measured."""
    began = time.monotonic()

    def measure(name: str, samples: int) -> Measured | None:
        if budget_s is not None and time.monotonic() - began > budget_s:
            return None
        config = search.settings[name]
        _, artifact = subject.measure(config.model_copy(update={"num_samples": samples}), evaluation, bar)
        metrics = artifact.counts["metrics"]
        if search.metric not in metrics:
            raise UserError(f"--metric {search.metric} was not measured; choose from {', '.join(sorted(metrics))}")
        value, spread = metrics[search.metric], metrics.get(f"{search.metric}_std")
        point = Measured(name, value, spread, clock.seconds(config), clock.flops(config))
        say(f"{samples} samples, {name}: {search.metric} {value:.4g}, {point.seconds:.3g} s an image", err=True)
        return point

    return halved(list(search.settings), search.rungs, measure, [GIVEN], search.lower)


def _write(
    search: Search,
    results: Sequence[dict[str, Measured]],
    complete: bool,
    model: str,
    version: str | None,
    place: str,
    out: Folder,
) -> None:
    """Write the points of the last rung, its front and its named points."""
    points = list(results[-1].values())
    if not points:
        raise UserError("the time was over before anything was measured; use a longer --budget-s")
    best = front(points, search.lower)
    named = named_points(points, search.lower)
    notes = [f"Times are of {place}, for batches of up to {TIMED_SAMPLES} images, without decoding."]
    samples = search.rungs[len(results) - 1]
    notes.append(f"{len(points)} of {len(search.settings)} settings were measured with {samples:,} samples.")
    if not complete:
        notes.append(f"The time was over before the largest number, {search.rungs[-1]:,}; rerun the command to resume.")
    rows = {
        "model": model,
        "version": version,  # NAME/NUMBER of a registered version
        "metric": search.metric,
        "samples": samples,
        "complete": complete,
        "points": [{**asdict(point), "settings": recorded_fields(search.settings[point.name])} for point in points],
        "front": [point.name for point in best],
        "named": {name: point.name for name, point in named.items()},
        "notes": notes,
    }
    out.write_bytes(f"{RESULTS}.json", f"{json.dumps(rows, indent=1)}\n".encode())
    out.write_bytes(f"{RESULTS}.md", _table(search, points, best, named, notes).encode())
    out.write_bytes(f"{RESULTS}.png", _picture(search, results, best))


def _table(
    search: Search,
    points: Sequence[Measured],
    best: Sequence[Measured],
    named: Mapping[str, Measured],
    notes: Sequence[str],
) -> str:
    """The front, fastest first, and the given setting, as Markdown."""
    given = next((point for point in points if point.name == GIVEN), None)
    rows = [*best, *([given] if given is not None and given not in best else [])]
    lines = [f"| setting | {search.metric} | s/image | GFLOPs/image | faster | known as |", "|---|---|---|---|---|---|"]
    for point in rows:
        spread = "" if point.spread is None else f" ± {point.spread:.2g}"
        faster = "" if given is None else f"{given.seconds / point.seconds:.3g}x"
        names = ", ".join(name for name, other in named.items() if other == point)
        cells = (point.name, f"{point.value:.4g}{spread}", f"{point.seconds:.3g}", f"{point.flops / 1e9:.3g}")
        lines.append(f"| {' | '.join((*cells, faster, names))} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def _picture(search: Search, results: Sequence[dict[str, Measured]], best: Sequence[Measured]) -> bytes:
    """Metric against seconds and against operations an image: all points of the last rung, and the front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, cost, label in zip(panels, ("seconds", "flops"), ("seconds an image", "FLOPs an image"), strict=True):
        for point in results[-1].values():
            colour = "#b35000" if point.name == GIVEN else "#0b62c4"
            panel.errorbar(getattr(point, cost), point.value, yerr=point.spread, fmt="o", color=colour, markersize=4)
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].plot([p.seconds for p in best], [p.value for p in best], "-", color="#57606a", linewidth=0.9)
    panels[0].set_ylabel(search.metric)
    figure.suptitle(f"{len(results[-1])} settings; orange: {GIVEN}; line: Pareto front", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


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
        ],
    )
    add_subject(parser, "folder for artifacts and results; existing artifacts in it are reused")
    add_json(parser)
    actions = parser.add_argument_group("what to try")
    actions.add_argument("--sweep", nargs="+", default=[], metavar="NAME=V,V", help="the grid, as of `edt evaluate`")
    actions.add_argument(
        "--metric", help="the metric that decides  [default: the Fréchet distance of the first network]"
    )
    actions.add_argument("--budget-s", type=float, metavar="S", help="begin no measurement after so many seconds")
    add_fields(parser.add_argument_group("sampling, where the grid does not set it"), SampleConfig)
    add_fields(parser.add_argument_group("metrics"), EvaluateConfig, leave_out=("num_cpus",))
    return parser
