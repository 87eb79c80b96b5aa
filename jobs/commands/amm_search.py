"""amm-search: where to modulate the attention of a model that was made without that, found by sampling alone.

Each placement is sampled from with the labels and noise that the model without modulation gets, in `repeats` sets. So
its gain is a mean of paired differences, with a standard error. The search goes in stages: single blocks, pairs of the
best, radii. What it ends with is measured once more, on seeds by which nothing was chosen, and is taken only if it is
better there by more than chance. The modulation itself is that of arXiv 2410.23788.
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

from edt_core.config import SampleConfig, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.small_files import read_text
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import METRICS_NAME
from jobs.commands.evaluate_model import RESULTS, Subject, add_subject, prepared
from jobs.commands.options import add_fields, add_json, given_fields, parser_of, validated
from jobs.models.open import write_modulated
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages.sample import model_config_of
from jobs.stages.stage import alone_in, existing_artifact

_VERSION = 1
_WORK = ".search"  # features and evaluations of the placements, within the artifact's folder
# One-sided 5 % of Student's t at 1, 2, ... degrees of freedom; beyond, the last one is on the safe side.
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


class SearchConfig(SampleConfig):
    """How placements of AMM are searched for: the sampling of each, and which are tried."""

    LEFT_OUT: ClassVar = ("amm_blocks", "amm_radius", "keep_images")  # what is searched for, and what nobody looks at

    num_samples: int = Field(500, ge=2, description="of a repeat; sample i is a function of (seed, i)")
    repeats: int = Field(4, ge=2, le=1000, description="sets of samples, of which the standard error is made")
    keep_images: int | Literal["all"] = 1
    metric: str | None = Field(
        None, description="distance that decides, as fid or fd_classifier; kid of the first network of features if null"
    )
    blocks: tuple[int, ...] | None = Field(None, description="blocks to try; null for all of the model")
    radii: tuple[float, ...] | None = Field(
        None, description="radii to try beside the paper's, in tokens; null for 1/4, 1/2 and 3/4 of the grid's side"
    )
    top: int = Field(3, ge=1, description="single blocks that pairs are made of; 1 for no pairs")

    def sampling(self, placement: "Placement", seed: int) -> SampleConfig:
        """The protocol of one placement."""
        fields = {name: getattr(self, name) for name in SampleConfig.model_fields}
        fields |= {"amm_blocks": placement.blocks, "amm_radius": placement.radius, "seed": seed}
        return SampleConfig.model_validate(fields)


@dataclass(frozen=True)
class Placement:
    """Where attention is modulated: 0-based blocks, () for AMM off, and the radius in tokens, None for the paper's."""

    blocks: tuple[int, ...] = ()
    radius: float | None = None

    def __str__(self) -> str:
        radius = "" if self.radius is None else f", radius {self.radius:g}"
        return f"{'+'.join(map(str, self.blocks))}{radius}" if self.blocks else "off"


@dataclass(frozen=True)
class Gain:
    """By how much a placement's distance is below that without AMM: mean of paired differences, and its error."""

    mean: float
    error: float
    repeats: int

    @property
    def least(self) -> float:
        """What the mean has to be above not to be chance, at 5 %."""
        return self.error * _STUDENT[min(self.repeats - 1, len(_STUDENT)) - 1]

    @property
    def real(self) -> bool:
        return self.mean > self.least

    def __str__(self) -> str:
        return f"{self.mean:+.4g} ± {self.error:.2g}"


def paired_gain(off: Sequence[float], values: Sequence[float]) -> Gain:
    """The gain of distances over those without AMM, each pair of one set of labels and noise."""
    differences = [before - after for before, after in zip(off, values, strict=True)]
    return Gain(fmean(differences), stdev(differences) / math.sqrt(len(differences)), len(differences))


@dataclass(frozen=True)
class Trial:
    """A placement and what it was measured to be, in a stage of the search."""

    stage: str
    placement: Placement
    value: float
    gain: Gain | None = None  # None for AMM off


@dataclass(frozen=True)
class Found:
    """All trials in order. `chosen` is AMM off where no gain was more than chance."""

    trials: tuple[Trial, ...]
    chosen: Placement
    reason: str


Measure = Callable[[Placement, bool], Sequence[float]]
Radii = Callable[[Placement], Sequence[float]]


def search(measure: Measure, blocks: Sequence[int], radii: Radii, top: int) -> Found:
    """Search in stages, greedily. `measure(placement, fresh)` gives distances, one a repeat, in the same order of sets.

    `fresh` asks for sets that are not those of the search: the best of many placements looks better than it is on the
    sets that it was chosen by.
    """
    trials: list[Trial] = []

    def tried(stage: str, placements: Sequence[Placement], off: Sequence[float], fresh: bool = False) -> None:
        for placement in placements:
            values = measure(placement, fresh)
            trials.append(Trial(stage, placement, fmean(values), paired_gain(off, values)))

    off = measure(Placement(), False)
    trials.append(Trial("off", Placement(), fmean(off)))
    tried("blocks", [Placement((block,)) for block in blocks], off)
    singles = [trial.placement.blocks[0] for trial in sorted(trials[1:], key=_by_gain)[:top]]
    tried("pairs", [Placement(tuple(sorted(pair))) for pair in combinations(singles, 2)], off)
    leader = min(trials[1:], key=_by_gain).placement
    tried("radii", [Placement(leader.blocks, radius) for radius in radii(leader)], off)
    best = min(trials[1:], key=_by_gain)
    if best.gain is None or best.gain.mean <= 0:
        return Found(tuple(trials), Placement(), "no placement is better than AMM off")
    off = measure(Placement(), True)
    trials.append(Trial("confirm", Placement(), fmean(off)))
    tried("confirm", [best.placement], off, fresh=True)
    gain = trials[-1].gain
    assert gain is not None
    summary = f"{best.placement} gains {gain} on seeds that chose nothing, where chance gives up to {gain.least:.2g}"
    return Found(tuple(trials), best.placement if gain.real else Placement(), summary)


def _by_gain(trial: Trial) -> float:
    assert trial.gain is not None
    return -trial.gain.mean


def settings(blocks: int, radii: int, top: int) -> int:
    """The most settings that a search measures: off, single blocks, pairs, radii, and two to confirm."""
    return 1 + blocks + math.comb(min(top, blocks), 2) + radii + 2


def main(arguments: Sequence[str] | None = None, prog: str = "edt amm-search") -> None:
    """Search for a placement of AMM: MODEL OUT. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("amm-search") as bar:
        made = run(options, bar)
        if options.as_json:
            say(json.dumps({"folder": made.folder.uri, **made.read_json(f"{RESULTS}.json")}, indent=1))
            return
        say(read_text(made.path(f"{RESULTS}.md")))
        say(made.folder.uri)


def run(options: argparse.Namespace, bar: Progress) -> Artifact:
    """The model of the options as a checkpoint artifact in OUT, with the placement found in its configuration."""
    out = Folder.at(options.out)
    if out.local is None:
        raise UserError(f"{options.out} is remote; search into a local folder")
    config: SearchConfig = validated(SearchConfig, given_fields(options, SearchConfig))
    check_named()
    subject = prepared(options, config, out.child(_WORK), bar)
    metric, judged = _metric(config, subject)
    subject.check_sizes(config.sampling(Placement(), config.seed), judged)
    grids = _grids(subject)
    blocks = _blocks(config, len(grids))
    parents = {role: item.fingerprint for role, item in {**subject.inputs, "reference": subject.real}.items()}
    num_timesteps = subject.model.checkpoint.manifest.config["num_timesteps"]
    made_by = {"num_timesteps": num_timesteps, "amm_search": result_fields(config)}
    identity = fingerprint("checkpoint", _VERSION, made_by, parents)
    with alone_in(out):
        if (made := existing_artifact(out, identity)) is not None:
            return made
        writer = ArtifactWriter(out, "checkpoint", identity)
        writer.check_own()
        say(_budget(config, len(blocks)), err=True)
        found = search(_measure(config, subject, metric, judged, bar), blocks, _radii(config, grids), config.top)
        return writer.commit(made_by, parents, _write(found, metric, config, subject, writer))


def _measure(config: SearchConfig, subject: Subject, metric: str, judged: EvaluateConfig, bar: Progress) -> Measure:
    def measure(placement: Placement, fresh: bool) -> Sequence[float]:
        seed = config.seed + (config.repeats if fresh else 0)
        _, made = subject.measure(config.sampling(placement, seed), judged, bar)
        return [repeat[metric] for repeat in made.read_json(METRICS_NAME)["repeats"]]

    return measure


def _metric(config: SearchConfig, subject: Subject) -> tuple[str, EvaluateConfig]:
    """The name of the distance that decides, and the evaluation that computes it. Raises UserError for another one."""
    from edt_core.evaluation.metrics import metric_name

    spaces = [space for space in EXTRACTORS if space in subject.inputs]
    known = {metric_name(metric, space): metric for space in spaces for metric in ("kid", "fid")}
    name = config.metric or next(iter(known))
    if name not in known:
        raise UserError(f"metric {name!r} cannot decide; with these networks of features take {', '.join(known)}")
    return name, validated(EvaluateConfig, {"metrics": (known[name],)})


def _grids(subject: Subject) -> list[int]:
    """The side of the grid of tokens of each block, in forward order."""
    from edt_core.models import ModelConfig, shadow

    model = shadow(ModelConfig.from_dict(model_config_of(subject.model.checkpoint)))
    return [attention.grid for attention in model.attentions()]


def _blocks(config: SearchConfig, count: int) -> tuple[int, ...]:
    blocks = tuple(range(count)) if config.blocks is None else tuple(dict.fromkeys(config.blocks))
    if not blocks or not all(0 <= block < count for block in blocks):
        raise UserError(f"blocks {list(blocks)}: the model has {count} blocks; take some of 0..{count - 1}")
    return blocks


def _radii(config: SearchConfig, grids: Sequence[int]) -> Radii:
    def radii(placement: Placement) -> Sequence[float]:
        if config.radii is not None:
            return config.radii
        side = max(grids[block] for block in placement.blocks)
        return tuple(side * part / 4 for part in (1, 2, 3))

    return radii


def _budget(config: SearchConfig, blocks: int) -> str:
    most = settings(blocks, 3 if config.radii is None else len(config.radii), config.top)
    each = f"{config.repeats} x {config.num_samples} samples"
    total = most * config.repeats * config.num_samples
    return f"amm-search: up to {most} settings of {each}, {total:,} samples in all"


def _write(found: Found, metric: str, config: SearchConfig, subject: Subject, out: ArtifactWriter) -> dict[str, Any]:
    amm: dict[str, Any] = {"amm_blocks": list(found.chosen.blocks), "amm_radius": found.chosen.radius}
    if config.amm_kernel is not None:
        amm["amm_kernel"] = config.amm_kernel
    decoder = subject.inputs["autoencoder"]  # of a released file it is known by the options alone
    model = replace(subject.model, autoencoder=decoder) if isinstance(decoder, Artifact) else subject.model
    counts = write_modulated(model, amm, out)
    trials = [{**asdict(trial), "placement": str(trial.placement)} for trial in found.trials]
    out.write_json(f"{RESULTS}.json", {**amm, "metric": metric, "reason": found.reason, "trials": trials})
    out.write_bytes(f"{RESULTS}.md", f"{_table(found, metric, config)}\n".encode())
    return {**counts, "amm_search": {**amm, "metric": metric, "cfg_scale": config.cfg_scale, "reason": found.reason}}


def _table(found: Found, metric: str, config: SearchConfig) -> str:
    """A Markdown table, a trial a row, and what came of it."""
    lines = [f"| stage | blocks | {metric} | gain |", "|---|---|---|---|"]
    for trial in found.trials:
        lines.append(f"| {trial.stage} | {trial.placement} | {trial.value:.4g} | {trial.gain or ''} |")
    protocol = f"{config.repeats} x {config.num_samples} samples each, cfg_scale {config.cfg_scale:g}"
    verdict = f"AMM: {found.chosen} ({found.reason}; {protocol})"
    return "\n".join([*lines, "", verdict])


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Reads what `main` is given."""
    parser = parser_of(
        prog,
        "Search for the blocks and the radius of attention modulation of any model, without training. What it writes "
        "samples with its placement: edt evaluate OUT ... --amm-blocks model",
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
