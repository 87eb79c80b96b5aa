"""amm-search: find which blocks of an existing model benefit from attention modulation, by sampling alone.

Each placement is sampled with the same labels and noise as the model without modulation, in `repeats` sets. So its gain
is a mean of paired differences, with a standard error. The search has stages: single blocks, pairs of the best, radii.
The best placement is measured again on new seeds, and is chosen only if its gain there is more than chance. The
modulation is that of arXiv 2410.23788.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal

from pydantic import Field

from edt_core.config import SampleConfig, added, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.small_files import read_text
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import METRICS_NAME
from jobs.commands.evaluate_model import RESULTS, Subject, add_subject, prepared, usual_chain
from jobs.commands.options import add_fields, add_json, given_fields, parser_of, validated
from jobs.models.derived import write_modulated
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages.sample import model_config_of
from jobs.stages.stage import alone_in, existing_artifact

_VERSION = 1
_WORK = ".search"  # features and evaluations of the placements, inside the artifact's folder
# One-sided 5 % of Student's t at 1, 2, ... degrees of freedom; for more, the last one is conservative.
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


class SearchConfig(SampleConfig):
    """Settings of a search for placements of AMM: the sampling of each, and which are tried."""

    LEFT_OUT: ClassVar = (
        "amm_blocks",
        "amm_radius",
        "amm_radius_rows",
        "keep_images",
    )  # what the search sets, and what it does not need

    num_samples: int = Field(500, ge=2, description="samples per repeat; sample i is a function of (seed, i)")
    repeats: int = Field(4, ge=2, le=1000, description="sets of samples, for the standard error")
    keep_images: int | Literal["all"] = 1
    metric: str | None = Field(
        None,
        description="distance that decides, such as fid or fd_classifier; null for kid of the first feature network",
    )
    blocks: tuple[int, ...] | None = Field(None, description="blocks to try; null for all of the model")
    radii: tuple[float, ...] | None = Field(
        None, description="radii to try beside the paper's, in tokens; null for 1/4, 1/2 and 3/4 of the grid's side"
    )
    radius_rows: tuple[int, ...] | None = added(
        None, description="k of radii sqrt((N - 1)^2 + k) to try too, by the side N of each grid; null for none"
    )
    top: int = Field(3, ge=1, description="best single blocks to combine into pairs; 1 for no pairs")

    def sampling(self, placement: "Placement", seed: int) -> SampleConfig:
        """The protocol of one placement."""
        fields = {name: getattr(self, name) for name in SampleConfig.model_fields}
        fields |= {"amm_blocks": placement.blocks, "amm_radius": placement.radius, "amm_radius_rows": placement.rows}
        fields["seed"] = seed
        return SampleConfig.model_validate(fields)


@dataclass(frozen=True)
class Placement:
    """Where attention is modulated: 0-based blocks, () for AMM off, and the radius, None for the paper's.

    The radius is in tokens, or follows from `rows` for each grid.
    """

    blocks: tuple[int, ...] = ()
    radius: float | None = None
    rows: int | None = None

    def __str__(self) -> str:
        radius = "" if self.radius is None else f", radius {self.radius:g}"
        radius += "" if self.rows is None else f", radius rows {self.rows}"
        return f"{'+'.join(map(str, self.blocks))}{radius}" if self.blocks else "off"


@dataclass(frozen=True)
class Gain:
    """How far a placement's distance is below that without AMM: mean of paired differences, and its error."""

    mean: float
    error: float
    repeats: int

    @property
    def least(self) -> float:
        """The mean above which a gain is not chance, at 5 %."""
        return self.error * _STUDENT[min(self.repeats - 1, len(_STUDENT)) - 1]

    @property
    def real(self) -> bool:
        return self.mean > self.least

    def __str__(self) -> str:
        return f"{self.mean:+.4g} ± {self.error:.2g}"


def paired_gain(off: Sequence[float], values: Sequence[float]) -> Gain:
    """The gain of distances over those without AMM; each pair has the same labels and noise."""
    differences = [before - after for before, after in zip(off, values, strict=True)]
    return Gain(fmean(differences), stdev(differences) / math.sqrt(len(differences)), len(differences))


@dataclass(frozen=True)
class Trial:
    """A placement and its measurement, in a stage of the search."""

    stage: str
    placement: Placement
    value: float
    gain: Gain | None = None  # None for AMM off


@dataclass(frozen=True)
class Found:
    """All trials in order. `chosen` is AMM off if no gain was more than chance."""

    trials: tuple[Trial, ...]
    chosen: Placement
    reason: str


Measure = Callable[[Placement, bool], Sequence[float]]
Radii = Callable[[Placement], Sequence[Placement]]


def search(measure: Measure, blocks: Sequence[int], radii: Radii, top: int) -> Found:
    """Search in stages, greedily. `measure(placement, fresh)` returns distances, one per repeat, in the order of sets.

    `fresh` requests new sets: on the sets that the search used, the best of many placements looks better than it is.
    """
    trials: list[Trial] = []

    def run_stage(stage: str, placements: Sequence[Placement], off: Sequence[float], fresh: bool = False) -> None:
        for placement in placements:
            values = measure(placement, fresh)
            trials.append(Trial(stage, placement, fmean(values), paired_gain(off, values)))

    off = measure(Placement(), False)
    trials.append(Trial("off", Placement(), fmean(off)))
    run_stage("blocks", [Placement((block,)) for block in blocks], off)
    singles = [trial.placement.blocks[0] for trial in sorted(trials[1:], key=_by_gain)[:top]]
    run_stage("pairs", [Placement(tuple(sorted(pair))) for pair in combinations(singles, 2)], off)
    leader = min(trials[1:], key=_by_gain).placement
    run_stage("radii", radii(leader), off)
    best = min(trials[1:], key=_by_gain)
    if best.gain is None or best.gain.mean <= 0:
        return Found(tuple(trials), Placement(), "no placement is better than AMM off")
    off = measure(Placement(), True)
    trials.append(Trial("confirm", Placement(), fmean(off)))
    run_stage("confirm", [best.placement], off, fresh=True)
    gain = trials[-1].gain
    assert gain is not None
    summary = f"{best.placement} gains {gain} on new seeds, where chance alone gives up to {gain.least:.2g}"
    return Found(tuple(trials), best.placement if gain.real else Placement(), summary)


def _by_gain(trial: Trial) -> float:
    assert trial.gain is not None
    return -trial.gain.mean


def settings(blocks: int, radii: int, top: int) -> int:
    """The largest number of settings that a search measures: off, blocks, pairs, radii, and two to confirm."""
    return 1 + blocks + math.comb(min(top, blocks), 2) + radii + 2


def main(arguments: Sequence[str] | None = None, prog: str = "edt amm-search") -> None:
    """Search for a placement of AMM: MODEL OUT. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("amm-search") as bar:
        artifact = run(options, bar)
        if options.as_json:
            say(json.dumps({"folder": artifact.folder.uri, **artifact.read_json(f"{RESULTS}.json")}, indent=1))
            return
        say(read_text(artifact.path(f"{RESULTS}.md")))
        say(artifact.folder.uri)


def run(options: argparse.Namespace, bar: Progress) -> Artifact:
    """The model as a checkpoint artifact in OUT, with the chosen placement in its configuration."""
    out = Folder.at(options.out)
    if out.local is None:
        raise UserError(f"{options.out} is remote; search into a local folder")
    config: SearchConfig = validated(SearchConfig, given_fields(options, SearchConfig))
    check_named()
    subject = prepared(options, config, out.child(_WORK), bar)
    config = config.model_copy(update=usual_chain(subject, given_fields(options, SearchConfig)))
    metric, evaluation = _metric(config, subject)
    subject.check_sizes(config.sampling(Placement(), config.seed), evaluation)
    grids = _grids(subject)
    blocks = _blocks(config, len(grids))
    parents = {role: item.fingerprint for role, item in {**subject.inputs, "reference": subject.real}.items()}
    num_timesteps = subject.model.checkpoint.manifest.config["num_timesteps"]
    recorded = {"num_timesteps": num_timesteps, "amm_search": result_fields(config)}
    identity = fingerprint("checkpoint", _VERSION, recorded, parents)
    with alone_in(out):
        if (existing := existing_artifact(out, identity)) is not None:
            return existing
        writer = ArtifactWriter(out, "checkpoint", identity)
        writer.check_own()
        say(_budget(config, len(blocks)), err=True)
        result = search(_measure(config, subject, metric, evaluation, bar), blocks, _radii(config, grids), config.top)
        return writer.commit(recorded, parents, _write(result, metric, config, subject, writer))


def _measure(config: SearchConfig, subject: Subject, metric: str, evaluation: EvaluateConfig, bar: Progress) -> Measure:
    def measure(placement: Placement, fresh: bool) -> Sequence[float]:
        seed = config.seed + (config.repeats if fresh else 0)
        _, artifact = subject.measure(config.sampling(placement, seed), evaluation, bar)
        return [repeat[metric] for repeat in artifact.read_json(METRICS_NAME)["repeats"]]

    return measure


def _metric(config: SearchConfig, subject: Subject) -> tuple[str, EvaluateConfig]:
    """The name of the distance that decides, and the evaluation that computes it. Raises UserError for another one."""
    from edt_core.evaluation.metrics import metric_name

    spaces = [space for space in EXTRACTORS if space in subject.inputs]
    metrics = {metric_name(metric, space): metric for space in spaces for metric in ("kid", "fid")}
    name = config.metric or next(iter(metrics))
    if name not in metrics:
        raise UserError(f"metric {name!r} cannot decide; with these feature networks use {', '.join(metrics)}")
    return name, validated(EvaluateConfig, {"metrics": (metrics[name],)})


def _grids(subject: Subject) -> list[int]:
    """The side of the token grid of each block, in forward order."""
    from edt_core.models import ModelConfig, shadow

    config = ModelConfig.from_dict(model_config_of(subject.model.checkpoint))
    replace(config, amm_blocks=(0,))  # raises for a family without AMM
    model = shadow(config)
    return [attention.grid for attention in model.attentions()]


def _blocks(config: SearchConfig, count: int) -> tuple[int, ...]:
    blocks = tuple(range(count)) if config.blocks is None else tuple(dict.fromkeys(config.blocks))
    if not blocks or not all(0 <= block < count for block in blocks):
        raise UserError(f"blocks {list(blocks)}: the model has {count} blocks; use blocks of 0..{count - 1}")
    return blocks


def _radii(config: SearchConfig, grids: Sequence[int]) -> Radii:
    def radii(placement: Placement) -> Sequence[Placement]:
        side = max(grids[block] for block in placement.blocks)
        in_tokens = tuple(side * part / 4 for part in (1, 2, 3)) if config.radii is None else config.radii
        by_tokens = [Placement(placement.blocks, radius) for radius in in_tokens]
        return [*by_tokens, *(Placement(placement.blocks, rows=rows) for rows in config.radius_rows or ())]

    return radii


def _budget(config: SearchConfig, blocks: int) -> str:
    radii = len(config.radius_rows or ()) + (3 if config.radii is None else len(config.radii))
    most = settings(blocks, radii, config.top)
    each = f"{config.repeats} x {config.num_samples} samples"
    total = most * config.repeats * config.num_samples
    return f"amm-search: up to {most} settings of {each}, {total:,} samples in all"


def _write(result: Found, metric: str, config: SearchConfig, subject: Subject, out: ArtifactWriter) -> dict[str, Any]:
    amm: dict[str, Any] = {"amm_blocks": list(result.chosen.blocks), "amm_radius": result.chosen.radius}
    if result.chosen.rows is not None:
        amm["amm_radius_rows"] = result.chosen.rows
    if config.amm_kernel is not None:
        amm["amm_kernel"] = config.amm_kernel
    decoder = subject.inputs["autoencoder"]  # for a released file only the options name it
    model = replace(subject.model, autoencoder=decoder) if isinstance(decoder, Artifact) else subject.model
    counts = write_modulated(model, amm, out)
    trials = [{**asdict(trial), "placement": str(trial.placement)} for trial in result.trials]
    out.write_json(f"{RESULTS}.json", {**amm, "metric": metric, "reason": result.reason, "trials": trials})
    out.write_bytes(f"{RESULTS}.md", f"{_table(result, metric, config)}\n".encode())
    return {**counts, "amm_search": {**amm, "metric": metric, "cfg_scale": config.cfg_scale, "reason": result.reason}}


def _table(result: Found, metric: str, config: SearchConfig) -> str:
    """A Markdown table with one row per trial, and the result."""
    lines = [f"| stage | blocks | {metric} | gain |", "|---|---|---|---|"]
    for trial in result.trials:
        lines.append(f"| {trial.stage} | {trial.placement} | {trial.value:.4g} | {trial.gain or ''} |")
    protocol = f"{config.repeats} x {config.num_samples} samples each, cfg_scale {config.cfg_scale:g}"
    verdict = f"AMM: {result.chosen} ({result.reason}; {protocol})"
    return "\n".join([*lines, "", verdict])


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = parser_of(
        prog,
        "Find the blocks and the radius of attention modulation for any model, without training. The model that it "
        "writes samples with the placement: edt evaluate OUT ... --amm-blocks model",
        [
            "dit-s-2-256@champion ./dit-with-amm --images ./images --cfg-scale 1.5 "
            "--inception-weights pt_inception-2015-12-05-6726825d.pth"
        ],
    )
    add_subject(parser, "new folder for the model with its placement: a checkpoint artifact")
    add_json(parser)
    searched = [name for name in SearchConfig.model_fields if name not in SampleConfig.model_fields]
    add_fields(parser.add_argument_group("search"), SearchConfig, leave_out=tuple(SampleConfig.model_fields))
    add_fields(parser.add_argument_group("sampling"), SearchConfig, leave_out=(*SearchConfig.LEFT_OUT, *searched))
    return parser
