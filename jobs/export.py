"""export: kept samples in the formats of other people's tools: a folder of PNG, ADM's .npz, WebDataset shards."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edt_core.artifact import Artifact
from edt_core.config import SampleConfig
from edt_core.data.export import EXPORT_FORMATS, export_samples
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import FEATURE_UNIT
from jobs.progress import Bar
from jobs.sample import FEATURE_UNITS, units_per_repeat
from jobs.verb import exit_code

_SUFFIX = {"npz": ".npz"}


def export_features(features: Artifact, form: str, target: Path, progress: Progress, repeat: int = 0) -> Path:
    """Write the samples of a repeat of a features artifact to `target`, whole or not at all; returns where they are.

    Raises UserError where their pixels were not kept, or something is at the target already.
    """
    if features.manifest.kind != "features":
        raise UserError(f"{features.folder.uri} holds {features.manifest.kind}; samples are exported from features")
    config = SampleConfig.model_validate(features.manifest.config)
    if config.keep_images != "all":
        raise UserError(
            f"{features.folder.uri} keeps the pixels of {config.keep_images} of {config.num_samples} samples; sample "
            "with keep_images=all"
        )
    if not 0 <= repeat < config.repeats:
        raise UserError(f"--repeat is {repeat}; there are repeats 0 to {config.repeats - 1}")
    target = target.with_name(target.name + _SUFFIX.get(form, ""))
    features.verify_once(FEATURE_UNITS)

    def told(done: int) -> None:
        progress.update(done, config.num_samples, "images")

    export_samples(form, _batches(features, config, repeat), config.num_samples, target, told)
    return target


def _batches(features: Artifact, config: SampleConfig, repeat: int) -> Iterator[tuple[Any, Any, Any]]:
    from safetensors import safe_open

    first = repeat * units_per_repeat(config)
    for number in range(first, first + units_per_repeat(config)):
        with safe_open(features.path(FEATURE_UNIT.format(number)), "numpy") as unit:
            yield tuple(unit.get_tensor(name) for name in ("indices", "labels", "images"))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.export") -> None:
    """The verb on its own. Exits with 0, 2 or 130."""
    parser = argparse.ArgumentParser(prog=prog, description="Write kept samples for other tools")
    parser.add_argument("features", help="features artifact whose samples were kept (keep_images=all)")
    parser.add_argument("target", type=Path, help="what to write: a folder for png and webdataset, a file for npz")
    parser.add_argument("--format", choices=EXPORT_FORMATS, default="png")
    parser.add_argument("--repeat", type=int, default=0, help="which repeat  [default: 0]")
    options = parser.parse_args(arguments)
    target = options.target
    if options.format == "npz" and target.suffix == ".npz":
        target = target.with_suffix("")
    with exit_code(), Bar("export") as bar:
        print(export_features(Artifact.open(options.features), options.format, target, bar, options.repeat))


if __name__ == "__main__":
    main()
