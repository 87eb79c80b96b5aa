"""draw: a few labelled images of any model as one picture, drawn in this process without Ray."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.folder import Folder
from jobs.commands.options import add_fields, given_fields, parser_of, validated
from jobs.models.open import DEFAULT_STORE, Loaded, check_model, load_model, use_mlflow
from jobs.runtime.devices import check_gpu
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages.autoencoder import check_decoder, read_autoencoder

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer
    from edt_core.sampling.sampler import LatentSampler

_AT_ONCE = {"cpu": 1, "cuda": 8}  # batch size on a device, the same for every batch
_CLASSES = 8  # drawn if none are named


def draw(
    sampler: "LatentSampler", decoder: Any, labels: Sequence[int], num: int, seed: int, progress: Progress
) -> NDArray[np.uint8]:
    """Images uint8 [labels, num, S, S, 3]: image i of a class is a function of (seed, i, label), to the last bit.

    The last bit of a matrix product depends on the size of its batch, and on the position in it. So every batch has
    the same size and one class, is filled up with extra images, and has a fixed position for image i.
    """
    from edt_core.autoencoders.autoencoder import decode_to_pixels

    size = _AT_ONCE[decoder.device.type]
    rows = []
    for row, label in enumerate(labels):
        images: list[NDArray[np.uint8]] = []
        for first in range(0, num, size):
            latents = sampler([label] * size, seed, range(first, first + size))
            images += list(decode_to_pixels(decoder, latents, sampler.model.config))
            progress.update(row * num + min(len(images), num), len(labels) * num, "images")
        rows.append(np.stack(images[:num]))
    return np.stack(rows)


def main(arguments: Sequence[str] | None = None, prog: str = "edt sample") -> None:
    """Draw a picture: MODEL --out PICTURE. Exits with 0, 1, 2 or 130."""
    options = make_parser(prog).parse_args(arguments)
    with exit_code(), Bar("sample") as bar:
        say(run(options, bar))


def run(options: argparse.Namespace, progress: Progress) -> str:
    """Draw as the options say; return a summary. Raises UserError."""
    from edt_core.precision import use_precision
    from edt_core.sampling.class_names import class_labels, class_names
    from edt_core.sampling.grid import MAX_CLASSES, sample_grid
    from edt_core.sampling.labels import trained_classes
    from edt_core.sampling.sampler import LatentSampler

    fields = given_fields(options, ChainConfig)
    validated(ChainConfig, fields)  # a mistake is reported before the model is loaded
    use_mlflow(options.model, options.tracking_uri, options.store)
    check_model(options.model)
    folder, name = _target(options.out)
    device = _device(options.device)
    use_precision("fp32")
    loaded = load_model(options.model)
    num_classes = loaded.model.config.num_classes
    names = class_names(loaded.classes, num_classes)
    trained = trained_classes(num_classes, loaded.class_counts).tolist()
    classes = _spread(trained) if options.classes is None else options.classes.split(",")
    labels = class_labels(classes, names)
    if untrained := sorted(set(labels) - set(trained)):
        progress.warn(f"the model was trained without images of {', '.join(names[label][0] for label in untrained)}")
    if len(labels) > MAX_CLASSES:
        raise UserError(f"{len(labels)} classes do not fit the {MAX_CLASSES} rows of a picture; draw several pictures")
    chain: ChainConfig = validated(ChainConfig, {**loaded.sampling, **fields})
    decoder = _decoder(loaded, options.autoencoder, options.model)
    model, guide = loaded.model.to(device), _guide(options, loaded, chain, device)
    decoder = decoder.to(device)
    sampler = LatentSampler(model, chain, loaded.num_timesteps, guide, classify=loaded.classify_by(decoder))
    images = draw(sampler, decoder, labels, options.num, options.seed, progress)
    shown = [names[label][0] for label in labels]
    rows = np.repeat(np.arange(len(labels)), options.num)
    folder.write_bytes(name, sample_grid(images.reshape(-1, *images.shape[2:]), rows, shown, options.num))
    return (
        f"{options.out}  {len(labels)} x {options.num} images of {model.config.name} ({', '.join(shown)})\n"
        f"seed {options.seed}, {chain.sampler}, {chain.num_sampling_steps} steps, cfg_scale {chain.cfg_scale:g}, "
        f"AMM {list(model.config.amm_blocks) or 'off'}, {chain.precision}, {device}"
    )


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = parser_of(
        prog,
        "Sample from a model into one picture, one row per class. The same seed gives the same picture on one "
        "device: image i of a class depends only on the seed, i and the class",
        [
            "edt-s-2-256@champion --classes 'golden retriever,360' --num 4 --cfg-scale 4",
            "./model --classes 3,1,4 --seed 7 --out digits.png",
        ],
    )
    parser.add_argument(
        "model",
        help="NAME (its champion), NAME@ALIAS or NAME/VERSION of the registry, MLflow run, checkpoint, diffusers "
        "folder, or .pt",
    )
    parser.add_argument(
        "--classes",
        metavar="CLASS,...",
        help="indices or names, ImageNet's for its 1,000 classes; the beginning of a name is enough  "
        f"[default: {_CLASSES} evenly spaced classes]",
    )
    parser.add_argument("--num", type=_positive, default=8, help="images of each class  [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[default: %(default)s]")
    parser.add_argument("--out", default="samples.png", metavar="FILE", help="PNG to write  [default: %(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[default: %(default)s]")
    parser.add_argument("--autoencoder", metavar="INPUT", help="decodes the images  [default: the model's own]")
    parser.add_argument(
        "--guide", metavar="MODEL", help="weaker model to guide away from (autoguidance)  [default: the folder's own]"
    )
    parser.add_argument("--store", default=DEFAULT_STORE, help="store with the model registry  [default: %(default)s]")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow to look models up in  [default: MLFLOW_TRACKING_URI]"
    )
    add_fields(parser.add_argument_group("sampling (default: as the model was evaluated, if known)"), ChainConfig)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _target(out: str) -> tuple[Folder, str]:
    """The folder and the name of the picture. Raises UserError if it cannot be written."""
    place, _, name = out.rpartition("/")
    if not name.lower().endswith(".png"):
        raise UserError(f"--out {out} does not name a PNG file; use a name that ends in .png")
    folder = Folder.at(place or ("/" if out.startswith("/") else "."))
    if (root := folder.local) is not None and (root / name).is_dir():
        raise UserError(f"--out {out} is a folder; use the name of a file")
    folder.check_writable()
    return folder, name


def _device(option: str) -> str:
    import torch

    if option == "cuda":
        check_gpu("--device is cuda", "leave --device out, or use cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if option == "auto" else option


def _decoder(loaded: Loaded, location: str | None, model: str) -> Any:
    """The autoencoder at a location, or the model's own. Raises UserError if there is none, or it does not fit."""
    decoder = loaded.autoencoder if location is None else read_autoencoder(location)
    if decoder is None:
        raise UserError(
            f"{model} does not state its autoencoder; pass --autoencoder, for example stabilityai/sd-vae-ft-ema for "
            "the authors' models"
        )
    check_decoder(loaded.model.config, decoder)
    return decoder


def _guide(
    options: argparse.Namespace, loaded: Loaded, chain: ChainConfig, device: str
) -> "DiffusionTransformer | None":
    """The model that samples are guided away from: the named one, or that of the folder; None for no class."""
    if options.guide is None:
        guide = loaded.guide_of(chain)
    else:
        use_mlflow(options.guide, options.tracking_uri, options.store)
        check_model(options.guide)
        guide = load_model(options.guide).model
    return None if guide is None else guide.to(device)


def _spread(classes: Sequence[int]) -> list[str]:
    """Indices of a few evenly spaced classes."""
    count = min(_CLASSES, len(classes))
    return [str(classes[place * len(classes) // count]) for place in range(count)]
