"""export: stored samples as PNG, ADM's .npz or WebDataset shards, or a model as a program, for other tools."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edt_core.config import ChainConfig, SampleConfig
from edt_core.data.export import EXPORT_FORMATS, export_samples
from edt_core.errors import UserError
from edt_core.files.tensor_files import opened_tensors
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import FEATURE_UNIT
from jobs.commands.options import add_fields, given_fields, parser_of, validated
from jobs.models.open import DEFAULT_STORE, check_model, load_model, use_mlflow
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages.sample import FEATURE_UNITS, units_per_repeat

PROGRAM_FORMAT = "torch-export"
_SUFFIX = {"npz": ".npz"}
_NOT_OF_THE_DENOISER = (
    *("sampler", "num_sampling_steps", "temperature"),
    *("guidance_channels", "guidance_interval", "precision"),
)


def export_features(features: Artifact, form: str, target: Path, progress: Progress, repeat: int = 0) -> Path:
    """Write the samples of a repeat of a features artifact to `target`, complete or not at all; return the path.

    Raises UserError if not all pixels are stored, or the target exists.
    """
    if features.manifest.kind != "features":
        raise UserError(
            f"{features.folder.uri} is an artifact of kind {features.manifest.kind}; samples are exported from features"
        )
    config = SampleConfig.model_validate(features.manifest.config)
    if config.keep_images != "all":
        raise UserError(
            f"{features.folder.uri} has the pixels of {config.keep_images} of {config.num_samples} samples; sample "
            "again with keep_images=all"
        )
    if not 0 <= repeat < config.repeats:
        raise UserError(f"--repeat is {repeat}, but the repeats are 0 to {config.repeats - 1}")
    target = target.with_name(target.name + _SUFFIX.get(form, ""))
    features.verify_once(FEATURE_UNITS)

    def report(done: int) -> None:
        progress.update(done, config.num_samples, "images")

    export_samples(form, _batches(features, config, repeat), config.num_samples, target, report)
    return target


def _batches(features: Artifact, config: SampleConfig, repeat: int) -> Iterator[tuple[Any, Any, Any]]:
    first = repeat * units_per_repeat(config)
    for number in range(first, first + units_per_repeat(config)):
        with opened_tensors(features.path(FEATURE_UNIT.format(number)), "numpy") as unit:
            yield tuple(unit.get_tensor(name) for name in ("indices", "labels", "images"))


def export_model(location: str, target: Path, fields: Mapping[str, Any]) -> Path:
    """Write the denoiser of a model as a checked `torch.export` program, complete or not at all; return its path.

    `fields`: of ChainConfig; those of AMM matter. Fields that are left out are as the model was evaluated.
    Raises UserError if there is no model, or the target exists.
    """
    from edt_core.sampling.torch_export import save_program

    target = target.with_suffix(".pt2")
    if target.exists():
        raise UserError(f"{target} already exists; use a new file")
    validated(ChainConfig, fields)  # a mistake is reported before the model is loaded
    check_model(location)
    folder = Folder.at(target.parent)
    folder.check_writable()
    loaded = load_model(location)
    chain: ChainConfig = validated(ChainConfig, {**loaded.sampling, **fields})
    with folder.staged(target.name) as staged:
        save_program(staged, loaded.model, chain, loaded.num_timesteps)
        folder.publish(staged, target.name)
    return target


def main(arguments: Sequence[str] | None = None, prog: str = "edt export") -> None:
    """Write samples or a model: WHAT TARGET. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("export") as bar:
        say(str(_exported(options, bar)))


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = parser_of(
        prog,
        "Write stored samples, or a model, for other tools",
        ["./features ./pngs --format png", f"edt-s-2-256@champion denoiser.pt2 --format {PROGRAM_FORMAT}"],
    )
    parser.add_argument(
        "what", help="features artifact with stored samples (keep_images=all); for torch-export any model"
    )
    parser.add_argument("target", type=Path, help="what to write: a folder for png and webdataset, else a file")
    parser.add_argument("--format", choices=(*EXPORT_FORMATS, PROGRAM_FORMAT), default="png")
    parser.add_argument("--repeat", type=int, default=0, help="repeat of the samples  [default: 0]")
    model = parser.add_argument_group(f"{PROGRAM_FORMAT} (default: as the model was evaluated, if known)")
    model.add_argument("--store", default=DEFAULT_STORE, help="store with the model registry  [default: %(default)s]")
    model.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow to look models up in  [default: MLFLOW_TRACKING_URI]"
    )
    add_fields(model, ChainConfig, leave_out=_NOT_OF_THE_DENOISER)
    return parser


def _exported(options: argparse.Namespace, progress: Progress) -> Path:
    if options.format == PROGRAM_FORMAT:
        use_mlflow(options.what, options.tracking_uri, options.store)
        return export_model(options.what, options.target, given_fields(options, ChainConfig))
    target = options.target
    if options.format == "npz" and target.suffix == ".npz":
        target = target.with_suffix("")
    return export_features(Artifact.open(options.what), options.format, target, progress, options.repeat)
