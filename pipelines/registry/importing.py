"""Import: registers a released checkpoint as a version, with an autoencoder and its origin.

The version has no metrics, so it becomes `candidate`, never `champion`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import ChainConfig, recorded_fields
from edt_core.environment import code_version, utc
from edt_core.errors import UserError
from edt_core.evaluation.published import AUTOENCODER, AUTOENCODER_CHANNELS, AUTOENCODER_FACTOR
from edt_core.files.place_names import place_for_others
from edt_core.printing.redaction import redacted
from edt_core.store.folder import sha256_file
from jobs.runtime.cluster_address import first_line
from jobs.stages.autoencoder import check_decoder, read_autoencoder
from pipelines.registry.aliases import CANDIDATE, find_version, move_alias, set_tags
from pipelines.registry.lookup import ORIGIN
from pipelines.registry.packaging import log_pipeline
from pipelines.registry.registration import OBJECTIVE_TAG, add_logged
from pipelines.tracking.catalog import Catalog

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer, ModelConfig
    from edt_core.models.import_released import ReleasedModel, WeightsName

SETTLED_TAG = "edt.imported"  # the time after the alias move; without it, a rerun repeats the move
_NUM_TIMESTEPS = 1000  # of all papers


@dataclass(frozen=True)
class Released:
    """A released checkpoint, read and checked, with the autoencoder for its latents."""

    path: Path
    read: "ReleasedModel"
    weights: "WeightsName"
    autoencoder: Any
    autoencoder_location: str
    is_default_autoencoder: bool = False

    @property
    def model(self) -> "DiffusionTransformer":
        """The model, in evaluation mode on the CPU."""
        return self.read.model

    @property
    def weights_label(self) -> str:
        """Which weights of the file these are, for messages."""
        return f"{self.weights} weights" if self.read.label else "weights"

    @property
    def default_name(self) -> str:
        """The default name in the registry: model and resolution."""
        config = self.model.config
        return f"{config.name.lower().replace('/', '-')}-{config.image_size}"


def read_released(
    path: Path,
    weights: "WeightsName | None",
    autoencoder: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    objective: str | None = None,
) -> Released:
    """Read a checkpoint file and an autoencoder. `model` and `image_size`, if set, must match the file.

    `objective`: what the weights were trained for, if the file does not say it.

    `autoencoder` None means that of the papers, if the model was trained on its latents. `weights` None means the
    averaged weights if the file has them.

    Raises UserError if the file cannot be read safely, contains another model, or does not fit the autoencoder.
    """
    from edt_core.diffusion import objective_words
    from edt_core.models import read_released_model

    read = read_released_model(path, weights, objective_words(), objective)
    config = read.model.config
    if model not in (None, config.name) or image_size not in (None, config.image_size):
        raise UserError(
            f"{path} is {config.name} at {config.image_size} px with {config.num_classes} classes; give --model "
            f"{config.name} --image-size {config.image_size}, or omit both"
        )
    location = autoencoder or AUTOENCODER
    decoder = _default_autoencoder(path, read) if autoencoder is None else read_autoencoder(autoencoder)
    check_decoder(config, decoder)
    # A single set of weights without a name counts as the requested one; the papers' authors release averages.
    weights_name: WeightsName = (weights or "ema") if not read.label else ("ema" if read.is_average else "model")
    return Released(path, read, weights_name, decoder, location, autoencoder is None)


def _default_autoencoder(path: Path, read: "ReleasedModel") -> Any:
    """The papers' autoencoder. Raises UserError if the model needs other latents, or if it cannot be loaded."""
    config, missing = read.model.config, "--autoencoder is missing"
    latents = config.autoencoder_factor, config.in_channels
    if latents != (AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS):
        raise UserError(
            f"{missing}: {path} is {config.name} for latents of factor {latents[0]} with {latents[1]} channels, but "
            f"the default, {AUTOENCODER}, has factor {AUTOENCODER_FACTOR} and {AUTOENCODER_CHANNELS} channels. Give "
            "the autoencoder of the model's training: --autoencoder FOLDER_OR_HUB_ID"
        )
    if read.other_latents:
        raise UserError(
            f"{missing}: {path} was trained on latents with {', '.join(read.other_latents)}, but the default is "
            f"{AUTOENCODER}. Give the autoencoder of the model's training: --autoencoder FOLDER_OR_HUB_ID"
        )
    try:
        return read_autoencoder(AUTOENCODER)
    except UserError as error:
        raise UserError(
            f"{missing}, and the default, {AUTOENCODER}, could not be loaded: "
            f"{first_line(error.__cause__ or error)}. "
            f"On a machine with network access, run hf download {AUTOENCODER} --local-dir sd-vae-ft-ema; then copy the "
            "folder here and give --autoencoder ./sd-vae-ft-ema"
        ) from error


def import_released(
    catalog: Catalog, released: Released, name: str | None, source: str | None = None, license: str | None = None
) -> tuple[Any, bool]:
    """Register a released checkpoint as a version of `name` and move `candidate` to it. Returns (version, is new).

    The same weights with the same autoencoder reuse their version, and no alias moves. Safe to repeat after a crash at
    any point.
    """
    name = name or released.default_name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"invalid model name {name!r}; use letters, digits, '.', '_' and '-'")
    identity = {
        f"{ORIGIN}sha256": sha256_file(released.path),
        f"{ORIGIN}weights": released.weights,
        f"{ORIGIN}autoencoder_digest": _digest(released.autoencoder),
    }
    origin = {
        "file": released.path.name,
        **{key.removeprefix(ORIGIN): value for key, value in identity.items()},
        "autoencoder": released.autoencoder_location,
        **({"autoencoder_choice": "default"} if released.is_default_autoencoder else {}),
        **({"source": source} if source else {}),
    }
    version = find_version(catalog, name, identity)
    is_new = version is None
    if version is None:
        version = _register(catalog, released, name, identity, origin, license)
    if SETTLED_TAG not in version.tags:
        move_alias(catalog, version, CANDIDATE)
        set_tags(catalog, version, {SETTLED_TAG: utc()})
    return version, is_new


def _register(
    catalog: Catalog,
    released: Released,
    name: str,
    identity: Mapping[str, str],
    origin: Mapping[str, str],
    license: str | None,
) -> Any:
    tags = {f"{ORIGIN}{key}": value for key, value in origin.items()}
    if (objective := released.model.config.objective_record().get("objective")) is not None:
        tags[OBJECTIVE_TAG] = objective
    run_id = catalog.start_run(f"import {name}", tags)
    logged = log_pipeline(
        catalog,
        run_id,
        name,
        lambda folder: _write(folder, released, name, origin, license),
        params={"architecture": released.model.config.name},
    )
    return add_logged(catalog, name, run_id, logged, {**tags, "edt.code_version": code_version()}, identity)


def _protocol(config: "ModelConfig") -> ChainConfig:
    """The sampling settings of a released model that its authors' sampler fixes. cfg_scale and steps are the user's.

    If no AMM placement is published for the model, that of its own configuration is used.
    """
    from edt_core.diffusion import objective_of_model
    from edt_core.models import FAMILIES, has_paper_amm_blocks

    objective = objective_of_model(config)
    protocol = ChainConfig(**FAMILIES[config.architecture].released_sampling, **objective.released_chain)
    if protocol.amm_blocks == "paper" and not has_paper_amm_blocks(config.name, config.image_size):
        return protocol.model_copy(update={"amm_blocks": "model"})
    return protocol


def _write(folder: Path, released: Released, name: str, origin: Mapping[str, str], license: str | None) -> None:
    """The diffusers folder of a released model, with its card."""
    from edt_core.models import count_macs, count_parameters
    from edt_core.pipeline import save_pipeline
    from pipelines.registry.model_card import README, ModelCard

    model = released.model
    protocol = recorded_fields(_protocol(model.config))
    save_pipeline(folder, model, released.autoencoder, num_timesteps=_NUM_TIMESTEPS, classes=(), protocol=protocol)
    card = ModelCard(
        name=name,
        config=model.config,
        parameters=count_parameters(model),
        macs=count_macs(model),
        sampling=protocol,
        license=license,
        origin={key: place_for_others(value) for key, value in origin.items()},
    )
    (folder / README).write_text(redacted(card.text()), encoding="utf-8")


def _digest(autoencoder: Any) -> str:
    """sha256 of an autoencoder's weights and scale, independent of its location."""
    from edt_core.autoencoders.kinds import scale_of

    digest = sha256(repr(autoencoder.config.scaling_factor).encode())
    if centred := scale_of(autoencoder).beyond_factor():
        digest.update(json.dumps(centred, sort_keys=True).encode())
    for key, value in sorted(autoencoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
