"""A model measured from end to end: samples, reference, metrics; once, or over a grid of sampling settings.

Everything is an artifact of the folder that is given, by kind and fingerprint: what is there already is reused, and
what was killed resumes where it was.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import ReferenceConfig, SampleConfig, Section
from edt_core.data.export import EXPORT_FORMATS
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import EXTRACTORS, FITTED_SPACES, PUBLISHED_SPACES, extractor_spec
from edt_core.evaluation.extractors.weights import feature_dimensions
from edt_core.files.small_files import read_text
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from jobs.commands.export import export_features
from jobs.commands.inputs import add_role, open_input
from jobs.commands.options import add_fields, add_json, given_fields, parser_of, validated
from jobs.commands.sweep import Point, Result, check_settings, grid, parse_axis, plot, repeated_settings, results_table
from jobs.models.open import DEFAULT_STORE, Opened, open_model, use_mlflow
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages import evaluate, reference, sample
from jobs.stages.sizes import check_sizes
from jobs.stages.stage import Stage

if TYPE_CHECKING:
    from edt_core.models import ModelConfig

RESULTS = "results"
Inputs = Mapping[str, Artifact | Source]


@dataclass(frozen=True)
class Subject:
    """A model with all that it takes to measure it, in the store `out`: networks, autoencoder, reference."""

    model: Opened
    inputs: Inputs
    real: Artifact
    out: Folder

    def check_sizes(self, sampling: SampleConfig, config: EvaluateConfig) -> None:
        """Raise UserError for a metric that there are too few samples or images for: before any is drawn."""
        spaces = {space: _dimensions(space, self.inputs[space]) for space in EXTRACTORS if space in self.inputs}
        # Published statistics do not state how many images they are of, and some come with images for kid alone.
        images = self.real.counts["images"] if self.real.counts["source"] == "images" else None
        kept = self.real.manifest.config["keep_features"]
        check_sizes(config, spaces, sampling.num_samples, images, kept)

    def measure(self, sampling: SampleConfig, config: EvaluateConfig, progress: Progress) -> tuple[Artifact, Artifact]:
        """The features and the evaluation artifact of one protocol, made now or found in the store."""
        features = make(sample.STAGE, sampling, self.inputs, self.out, progress)
        judged = {"features": features, "reference": self.real}
        return features, make(evaluate.STAGE, config, judged, self.out, progress)


def prepared(
    options: argparse.Namespace, sampling: SampleConfig, out: Folder, bar: Progress, points: Sequence[Point] = ()
) -> Subject:
    """What the options of `add_subject` name. Raises UserError for what is missing, or is not what it should be.

    `points`: settings to check against the model before the reference is computed, which can take hours.
    """
    use_mlflow(options.model, options.tracking_uri, options.store)
    judges = _extractors(options, out, bar)
    opened = open_model(options.model, out)
    if points:
        check_settings(points, _config_of(opened))
    inputs: dict[str, Artifact | Source] = {
        "checkpoint": opened.checkpoint,
        "autoencoder": _autoencoder(options, opened, out, bar),
        **judges,
    }
    if options.guide:
        inputs["guide"] = open_model(options.guide, out).checkpoint
    return Subject(opened, inputs, _reference(options, opened, judges, sampling, out, bar), out)


def _dimensions(space: str, network: Artifact | Source) -> int | None:
    """Of the features of a network, None where only loading it tells."""
    if isinstance(network, Artifact):
        size: int | None = network.manifest.config.get("feature_dim")
        return size
    return feature_dimensions(space, network.location)


def _config_of(opened: Opened) -> "ModelConfig":
    from edt_core.models import ModelConfig

    return ModelConfig.from_dict(sample.model_config_of(opened.checkpoint))


def make(stage: Stage, config: Section, inputs: Inputs, out: Folder, progress: Progress) -> Artifact:
    """An artifact in its place of a store, `<kind>/<fingerprint>`."""
    identity = stage.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return stage.make(config, inputs, out.child(f"{stage.kind}/{identity}"), progress)


def main(arguments: Sequence[str] | None = None, prog: str = "edt evaluate") -> None:
    """Evaluate a model: MODEL OUT. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("evaluate") as bar:
        run(options, bar)
        if options.as_json:
            say(read_text(Path(options.out, f"{RESULTS}.json")), nl=False)
            return
        say(read_text(Path(options.out, f"{RESULTS}.md")))
        say(f"{options.out}/{RESULTS}.json")


def run(options: argparse.Namespace, bar: Progress) -> list[Result]:
    """Evaluate what the options ask for, and write `results.json`, `.md` and, of a sweep, `.png` into the folder."""
    out = Folder.at(options.out)
    if out.local is None:
        raise UserError(f"{options.out} is remote; evaluate into a local folder")
    base = validated(SampleConfig, given_fields(options, SampleConfig))
    if options.export and base.keep_images != "all":
        base = base.model_copy(update={"keep_images": "all"})
    points = list(grid(base, [parse_axis(text) for text in options.sweep]))
    if options.export and len(points) > 1:
        raise UserError(f"--export is of one set of samples, and --sweep asks for {len(points)}; leave one of them out")
    check_named()
    subject = prepared(options, base, out, bar, points)
    notes = repeated_settings(points, _config_of(subject.model))
    config = validated(EvaluateConfig, given_fields(options, EvaluateConfig))
    for point in points:
        subject.check_sizes(point.config, config)
    results = []
    for point in points:
        features, made = subject.measure(point.config, config, bar)
        results.append(Result(point.settings, made.counts["metrics"], made.counts["protocol"]))
        for form in options.export:
            export_features(features, form, out.local / f"samples-{features.fingerprint[:12]}-{form}", bar)
    _write(results, options.model, out, notes)
    return results


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Reads what `main` is given."""
    weights = "--inception-weights pt_inception-2015-12-05-6726825d.pth"
    parser = parser_of(
        prog,
        "Sample from a model, compare with real images, and print the metrics with their protocol",
        [
            f"edt-s-2-256@champion ./evaluation {weights} --num-samples 50000 --cfg-scale 1",
            f"./model ./evaluation --images ./images {weights} --sweep cfg=1,1.5,2 amm=off,paper",
        ],
    )
    add_subject(parser, "folder for artifacts and results; what it holds already is reused")
    add_json(parser)
    asked = parser.add_argument_group("what to do")
    asked.add_argument(
        "--sweep", nargs="+", default=[], metavar="NAME=V,V", help="a grid, as cfg=1,1.5,2 amm=off,paper"
    )
    asked.add_argument(
        "--export", nargs="+", default=[], choices=EXPORT_FORMATS, help="write the samples for other tools as well"
    )
    add_fields(parser.add_argument_group("sampling"), SampleConfig)
    add_fields(parser.add_argument_group("metrics"), EvaluateConfig, leave_out=("num_cpus",))
    return parser


def add_subject(parser: argparse.ArgumentParser, out_help: str) -> None:
    """The arguments MODEL and OUT, and the options that say what a model is measured with."""
    parser.add_argument(
        "model", help="NAME@ALIAS or NAME/VERSION of the registry, MLflow run, checkpoint, diffusers folder, or .pt"
    )
    parser.add_argument("out", help=out_help)
    against = parser.add_argument_group("compared with (left out: the images of the model's training, where known)")
    for role in ("images", "statistics"):
        add_role(against, role)
    against.add_argument("--reference", metavar="INPUT", help="reference artifact that was made before")
    networks = parser.add_argument_group("networks of features (at least one)")
    for role in EXTRACTORS:
        add_role(networks, role)
    models = parser.add_argument_group("models")
    add_role(models, "guide")
    models.add_argument("--autoencoder", metavar="INPUT", help="decodes the samples; left out: the model's own")
    models.add_argument("--store", default=DEFAULT_STORE, help="store whose registry is asked  [default: %(default)s]")
    models.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow to look models up in  [default: MLFLOW_TRACKING_URI]"
    )
    add_fields(parser.add_argument_group("reference"), ReferenceConfig, leave_out=_SHARED)


_SHARED = ("num_workers", "num_cpus_per_worker", "num_gpus_per_worker")  # fields of sampling and reference alike


def _extractors(options: argparse.Namespace, out: Folder, bar: Progress) -> dict[str, Artifact | Source]:
    """The networks of features that are given. Raises UserError where there is none, or one is not to be had."""
    given = [space for space in EXTRACTORS if getattr(options, space)]
    judges = {space: open_input(space, getattr(options, space), out, options, bar) for space in given}
    if not judges:
        *first, last = [extractor_spec(space).suggestion for space in (*PUBLISHED_SPACES, *FITTED_SPACES)]
        raise UserError(f"there is no network of features to compare in: give {', '.join(first)}, or {last}")
    return judges


def _autoencoder(options: argparse.Namespace, opened: Opened, out: Folder, bar: Progress) -> Artifact | Source:
    if options.autoencoder:
        place = out.child(f".published/{hashlib.sha256(options.autoencoder.encode()).hexdigest()[:16]}")
        return open_input("autoencoder", options.autoencoder, place, options, bar)
    if opened.autoencoder is None:
        raise UserError(
            f"{options.model} does not say which autoencoder decodes it; give --autoencoder, as "
            "stabilityai/sd-vae-ft-ema for the authors' models"
        )
    return opened.autoencoder


def _reference(
    options: argparse.Namespace, opened: Opened, judges: Inputs, base: SampleConfig, out: Folder, bar: Progress
) -> Artifact:
    """The reference that is given, or that of the images or statistics that are, or of the model's own images."""
    given = [name for name in ("reference", "images", "statistics") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name for name in given)} are two references; give one")
    if options.reference:
        artifact = open_input("reference", options.reference, out, options, bar)
        assert isinstance(artifact, Artifact)
        return artifact
    images: Artifact | Source
    if given:
        images = open_input(given[0], getattr(options, given[0]), out, options, bar)
    elif opened.images is not None:
        images = opened.images
    else:
        raise UserError(
            f"there is nothing to compare {options.model} with: give --images (an artifact of `edt preprocess`), "
            "--statistics (ADM's .npz) or --reference"
        )
    shared = {name: getattr(base, name) for name in _SHARED}
    config = validated(ReferenceConfig, {**given_fields(options, ReferenceConfig), **shared})
    return make(reference.STAGE, config, {"images": images, **judges}, out, bar)


def _told(result: Result) -> str:
    """One result: its metrics, then what they were measured by."""
    from edt_core.evaluation.metrics import in_order
    from edt_core.evaluation.protocol import comparison_table

    metrics = {name: result.metrics[name] for name in in_order(result.metrics)}
    table = comparison_table({"value": {"metrics": metrics, "protocol": result.protocol}})
    return f"{table}\n\nprotocol\n" + "\n".join(f"  {name}: {value}" for name, value in result.protocol.items())


def _write(results: Sequence[Result], model: str, out: Folder, notes: Sequence[str]) -> None:
    told: list[dict[str, Any]] = [{"model": model, **asdict(result)} for result in results]
    out.write_bytes(f"{RESULTS}.json", f"{json.dumps(told, indent=1, default=dict)}\n".encode())
    swept = bool(results[0].settings)
    out.write_bytes(f"{RESULTS}.md", f"{results_table(results, notes) if swept else _told(results[0])}\n".encode())
    if swept:
        out.write_bytes(f"{RESULTS}.png", plot(results))
