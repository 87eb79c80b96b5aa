"""Evaluate a model from samples to metrics, once or over a grid of sampling settings.

Everything is an artifact in the output folder, by kind and fingerprint: existing artifacts are reused, and a killed
evaluation resumes.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from jobs.models.open import DEFAULT_STORE, Opened, check_model, open_model, use_mlflow
from jobs.models.posthoc import Training, make_average, training_of
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
    """A model with the inputs of its evaluation in the store `out`: feature networks, autoencoder, reference."""

    model: Opened
    inputs: Inputs
    real: Artifact
    out: Folder

    def averaged(self, training: Training | None, width: float | None, progress: Progress) -> "Subject":
        """The same with averaged weights of another width, made or reused; None for those of the model."""
        if training is None or width is None:
            return self
        checkpoint = make_average(training, width, lambda name: self.out.child(f"checkpoint/{name}"), progress)
        return replace(self, inputs={**self.inputs, "checkpoint": checkpoint})

    def beside(self, options: argparse.Namespace, location: str, progress: Progress) -> "Subject":
        """Another model, without a guide, compared with the same images by the same networks."""
        opened = open_model(location, self.out)
        networks = {role: item for role, item in self.inputs.items() if role in EXTRACTORS}
        autoencoder = _autoencoder(options, opened, self.out, progress, location)
        inputs = {**networks, "checkpoint": opened.checkpoint, "autoencoder": autoencoder}
        return replace(self, model=opened, inputs=inputs)

    def check_sizes(self, sampling: SampleConfig, config: EvaluateConfig, share: float = 1.0) -> None:
        """Raise UserError for a metric with too few samples or images. Called before any sample is drawn.

        `share`: of --num-samples that `sampling` has.
        """
        spaces = {space: _dimensions(space, self.inputs[space]) for space in EXTRACTORS if space in self.inputs}
        # Published statistics do not state their number of images, and some contain images only for kid.
        images = self.real.counts["images"] if self.real.counts["source"] == "images" else None
        keep_features = self.real.manifest.config["keep_features"]
        check_sizes(config, spaces, sampling.num_samples, images, keep_features, share)

    def measure(self, sampling: SampleConfig, config: EvaluateConfig, progress: Progress) -> tuple[Artifact, Artifact]:
        """The features and the evaluation artifact of one protocol, reused or made now."""
        features = make(sample.STAGE, sampling, self.inputs, self.out, progress)
        inputs = {"features": features, "reference": self.real}
        return features, make(evaluate.STAGE, config, inputs, self.out, progress)


def prepared(
    options: argparse.Namespace, sampling: SampleConfig, out: Folder, bar: Progress, points: Sequence[Point] = ()
) -> Subject:
    """The subject that the options of `add_subject` name. Raises UserError for missing or invalid inputs.

    `points`: settings to check against the model before the reference is computed, which can take hours.
    """
    for location in (options.model, *([options.guide] if options.guide else [])):
        use_mlflow(location, options.tracking_uri, options.store)
        check_model(location)  # a mistake is reported before networks are read
    networks = _extractors(options, out, bar)
    opened = open_model(options.model, out)
    if points:
        check_settings(points, _config_of(opened))
    inputs: dict[str, Artifact | Source] = {
        "checkpoint": opened.checkpoint,
        "autoencoder": _autoencoder(options, opened, out, bar, options.model),
        **networks,
    }
    if options.guide:
        inputs["guide"] = open_model(options.guide, out).checkpoint
    return Subject(opened, inputs, _reference(options, opened, networks, sampling, out, bar), out)


def _dimensions(space: str, network: Artifact | Source) -> int | None:
    """The feature dimensions of a network; None if only loading the network shows them."""
    if isinstance(network, Artifact):
        size: int | None = network.manifest.config.get("feature_dim")
        return size
    return feature_dimensions(space, network.location)


def _config_of(opened: Opened) -> "ModelConfig":
    from edt_core.models import ModelConfig

    return ModelConfig.from_dict(sample.model_config_of(opened.checkpoint))


def usual_chain(subject: Subject, given: Iterable[str]) -> dict[str, Any]:
    """The fields of a chain that the model's objective sets, without those that are given."""
    from edt_core.diffusion import objective_of_model

    usual = objective_of_model(_config_of(subject.model)).usual_chain
    return {name: value for name, value in usual.items() if name not in set(given)}


def make(stage: Stage, config: Section, inputs: Inputs, out: Folder, progress: Progress) -> Artifact:
    """The artifact of a stage in a store, at `<kind>/<fingerprint>`."""
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
    """Evaluate as the options say, and write `results.json`, `.md` and, for a sweep, `.png` into the folder."""
    out = Folder.at(options.out)
    if out.local is None:
        raise UserError(f"{options.out} is remote; evaluate into a local folder")
    base = validated(SampleConfig, given_fields(options, SampleConfig))
    if options.export and base.keep_images != "all":
        base = base.model_copy(update={"keep_images": "all"})
    axes = [parse_axis(text) for text in options.sweep]
    points = list(grid(base, axes))
    if options.export and len(points) > 1:
        raise UserError(f"--export writes one set of samples, but --sweep makes {len(points)}; use only one of the two")
    check_named()
    model, training = options.model, _training(options, points)
    if training is not None:  # so that all points have the autoencoder of the training
        options.model = training.opened.checkpoint.folder.uri
    subject = prepared(options, base, out, bar, points)
    fields = [*given_fields(options, SampleConfig), *(axis.field for axis in axes)]
    usual = usual_chain(subject, fields)
    points = [replace(point, config=point.config.model_copy(update=usual)) for point in points]
    notes = repeated_settings(points, _config_of(subject.model))
    config = validated(EvaluateConfig, given_fields(options, EvaluateConfig))
    for point in points:
        subject.check_sizes(point.config, config)
    results = []
    for point in points:
        features, evaluation = subject.averaged(training, point.ema, bar).measure(point.config, config, bar)
        results.append(Result(point.settings, evaluation.counts["metrics"], evaluation.counts["protocol"]))
        for form in options.export:
            export_features(features, form, out.local / f"samples-{features.fingerprint[:12]}-{form}", bar)
    _write(results, model, out, notes)
    return results


def _training(options: argparse.Namespace, points: Sequence[Point]) -> Training | None:
    """The training of the model if the points have widths. Raises UserError for one that its snapshots do not give."""
    widths = [point.ema for point in points if point.ema is not None]
    if not widths:
        return None
    use_mlflow(options.model, options.tracking_uri, options.store)
    training = training_of(options.model, options.store)
    for width in widths:
        training.checked_mixture(width)
    return training


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    weights = "--inception-weights pt_inception-2015-12-05-6726825d.pth"
    parser = parser_of(
        prog,
        "Sample from a model, compare with real images, and print the metrics with their protocol",
        [
            f"edt-s-2-256@champion ./evaluation {weights} --num-samples 50000 --cfg-scale 1",
            f"./model ./evaluation --images ./images {weights} --sweep cfg=1,1.5,2 amm=off,paper",
        ],
    )
    add_subject(parser, "folder for artifacts and results; existing artifacts in it are reused")
    add_json(parser)
    actions = parser.add_argument_group("what to do")
    actions.add_argument(
        "--sweep", nargs="+", default=[], metavar="NAME=V,V", help="a grid, such as cfg=1,1.5,2 ema=off,0.05,0.1"
    )
    actions.add_argument(
        "--export", nargs="+", default=[], choices=EXPORT_FORMATS, help="also write the samples for other tools"
    )
    add_fields(parser.add_argument_group("sampling"), SampleConfig)
    add_fields(parser.add_argument_group("metrics"), EvaluateConfig, leave_out=("num_cpus",))
    return parser


def add_subject(parser: argparse.ArgumentParser, out_help: str) -> None:
    """Add the arguments MODEL and OUT, and the options for the inputs of an evaluation."""
    parser.add_argument(
        "model", help="NAME@ALIAS or NAME/VERSION of the registry, MLflow run, checkpoint, diffusers folder, or .pt"
    )
    parser.add_argument("out", help=out_help)
    against = parser.add_argument_group("compared with (default: the images of the model's training, if known)")
    for role in ("images", "statistics"):
        add_role(against, role)
    against.add_argument("--reference", metavar="INPUT", help="an existing reference artifact")
    networks = parser.add_argument_group("feature networks (at least one)")
    for role in EXTRACTORS:
        add_role(networks, role)
    models = parser.add_argument_group("models")
    add_role(models, "guide")
    models.add_argument("--autoencoder", metavar="INPUT", help="decodes the samples  [default: the model's own]")
    models.add_argument("--store", default=DEFAULT_STORE, help="store with the model registry  [default: %(default)s]")
    models.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow to look models up in  [default: MLFLOW_TRACKING_URI]"
    )
    add_fields(parser.add_argument_group("reference"), ReferenceConfig, leave_out=_SHARED)


_SHARED = ("num_workers", "num_cpus_per_worker", "num_gpus_per_worker")  # fields that sampling and reference share


def _extractors(options: argparse.Namespace, out: Folder, bar: Progress) -> dict[str, Artifact | Source]:
    """The feature networks of the options. Raises UserError if there is none, or one cannot be opened."""
    spaces = [space for space in EXTRACTORS if getattr(options, space)]
    networks = {space: open_input(space, getattr(options, space), out, options, bar) for space in spaces}
    if not networks:
        *first, last = [extractor_spec(space).suggestion for space in (*PUBLISHED_SPACES, *FITTED_SPACES)]
        raise UserError(f"there is no feature network to compare in: pass {', '.join(first)}, or {last}")
    return networks


def _autoencoder(
    options: argparse.Namespace, opened: Opened, out: Folder, bar: Progress, model: str
) -> Artifact | Source:
    if options.autoencoder:
        place = out.child(f".published/{hashlib.sha256(options.autoencoder.encode()).hexdigest()[:16]}")
        return open_input("autoencoder", options.autoencoder, place, options, bar)
    if opened.autoencoder is None:
        raise UserError(
            f"{model} does not state its autoencoder; pass --autoencoder, for example "
            "stabilityai/sd-vae-ft-ema for the authors' models"
        )
    return opened.autoencoder


def _reference(
    options: argparse.Namespace, opened: Opened, networks: Inputs, base: SampleConfig, out: Folder, bar: Progress
) -> Artifact:
    """The reference of the options, or one of their images or statistics, or of the model's own images."""
    names = [name for name in ("reference", "images", "statistics") if getattr(options, name)]
    if len(names) > 1:
        raise UserError(f"{' and '.join('--' + name for name in names)} are {len(names)} references; pass one")
    if options.reference:
        artifact = open_input("reference", options.reference, out, options, bar)
        assert isinstance(artifact, Artifact)
        return artifact
    images: Artifact | Source
    if names:
        images = open_input(names[0], getattr(options, names[0]), out, options, bar)
    elif opened.images is not None:
        images = opened.images
    else:
        raise UserError(
            f"there is nothing to compare {options.model} with: pass --images (an artifact of `edt preprocess`), "
            "--statistics (ADM's .npz) or --reference"
        )
    shared = {name: getattr(base, name) for name in _SHARED}
    config = validated(ReferenceConfig, {**given_fields(options, ReferenceConfig), **shared})
    return make(reference.STAGE, config, {"images": images, **networks}, out, bar)


def _summary(result: Result) -> str:
    """One result as text: its metrics, then their protocol."""
    from edt_core.evaluation.metrics import in_order
    from edt_core.evaluation.protocol import comparison_table

    metrics = {name: result.metrics[name] for name in in_order(result.metrics)}
    table = comparison_table({"value": {"metrics": metrics, "protocol": result.protocol}})
    return f"{table}\n\nprotocol\n" + "\n".join(f"  {name}: {value}" for name, value in result.protocol.items())


def _write(results: Sequence[Result], model: str, out: Folder, notes: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = [{"model": model, **asdict(result)} for result in results]
    out.write_bytes(f"{RESULTS}.json", f"{json.dumps(rows, indent=1, default=dict)}\n".encode())
    is_sweep = bool(results[0].settings)
    out.write_bytes(
        f"{RESULTS}.md", f"{results_table(results, notes) if is_sweep else _summary(results[0])}\n".encode()
    )
    if is_sweep:
        out.write_bytes(f"{RESULTS}.png", plot(results))
