"""A quantised model of a registered version: calibration on its own samples, the table of errors, and the artifact."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINTS
from jobs.models.derived import derived_counts, write_model
from jobs.models.open import Loaded, Opened
from jobs.stages.stage import alone_in, existing_artifact

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer
    from edt_core.models.quantized.record import Quantization
    from edt_core.sampling.calibration import LayerError

QUANTIZATION = "quantization"  # among the counts of the artifact: how, what became of each layer, and the sizes
OUTLIER = 3.0  # by default a layer stays in float whose error is above so many times the median of all layers
_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """How to quantise. `keep_error` None is `OUTLIER` times the median error, `group_size` None the usual one.

    The error of a layer is measured with the samples 0..samples-1 of a seed at `calls` calls of their chain.
    """

    scheme: str
    group_size: int | None = None
    keep_error: float | None = None
    samples: int = 16
    calls: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Calibrated:
    """The errors of the layers, which of them are quantised, and what that was decided by."""

    errors: "list[LayerError]"
    quantization: "Quantization"
    keep_error: float
    calls: int
    calls_of_chain: int

    def rows(self) -> list[Mapping[str, object]]:
        """The table of errors, the largest first."""
        from edt_core.sampling.calibration import error_rows

        return error_rows(self.errors, self.quantization.layers)


def check_settings(loaded: Loaded, settings: Settings) -> None:
    """Raise UserError for a model that is quantised already, and for settings that this model or machine cannot have.

    Nothing is computed.
    """
    from edt_core.models.quantized.linear import check_scheme
    from edt_core.models.quantized.model import quantizable
    from edt_core.models.quantized.record import check_group_size

    if (done := loaded.model.config.quantization) is not None:
        raise UserError(f"the model is quantised already ({done.scheme}); quantise the version that it was made from")
    check_scheme(settings.scheme)
    if settings.keep_error is not None and not math.isfinite(settings.keep_error):
        raise UserError(f"--keep-error is {settings.keep_error}; give a number, such as 1000 to quantise every layer")
    if settings.group_size is not None:
        if settings.scheme != "int4-weights":
            raise UserError(f"--group-size is of int4-weights, but --to is {settings.scheme}; leave it out")
        check_group_size(
            settings.group_size, {name: layer.in_features for name, layer in quantizable(loaded.model).items()}
        )


def calibrated(loaded: Loaded, settings: Settings) -> Calibrated:
    """The errors of the layers on samples of the model itself by its protocol, and the layers to quantise.

    Raises UserError as `check_settings`, and if every layer's error is above the limit.
    """
    import numpy as np

    from edt_core.config import ChainConfig
    from edt_core.models.quantized.record import GROUP_SIZE, Quantization
    from edt_core.sampling.calibration import calls_of_chain, chosen_layers, layer_errors

    check_settings(loaded, settings)
    chain = ChainConfig.model_validate(dict(loaded.sampling))
    device = device_of_work()
    model, guide = loaded.model.to(device), loaded.guide_of(chain)
    vae = None if loaded.autoencoder is None else loaded.autoencoder.to(device)
    calls, total = calls_of_chain(
        model,
        chain,
        loaded.num_timesteps,
        samples=settings.samples,
        count=settings.calls,
        seed=settings.seed,
        guide=None if guide is None else guide.to(device),
        classify=loaded.classify_by(vae),
    )
    group = (settings.group_size or GROUP_SIZE) if settings.scheme == "int4-weights" else None
    errors = layer_errors(model, calls, settings.scheme, group)
    limit = settings.keep_error
    if limit is None:
        limit = OUTLIER * float(np.median([layer.worst for layer in errors if layer.errors]))
    layers = chosen_layers(errors, limit)
    if not layers:
        least = min(layer.worst for layer in errors if layer.errors)
        raise UserError(
            f"--keep-error is {limit:g}, but the smallest error of a layer is {least:.2g}, so that none would be "
            f"quantised; raise it (without it, it is {OUTLIER:g} times the median error)"
        )
    return Calibrated(errors, Quantization(settings.scheme, layers, group), limit, len(calls), total)


def device_of_work() -> str:
    """Where models are calibrated: a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_quantized(
    opened: Opened, loaded: Loaded, weights: str, settings: Settings, place: Callable[[str], Folder], progress: Progress
) -> Artifact:
    """The checkpoint artifact of the quantised model, made or reused, in the folder `place(fingerprint)`.

    `opened` is the checkpoint whose training made the model, `weights` the digest of those in `loaded`. Raises
    UserError as `calibrated`.
    """
    check_settings(loaded, settings)
    config = {"num_timesteps": loaded.num_timesteps, "quantize": asdict(settings), "weights": weights}
    inputs = {"checkpoint": opened.checkpoint.fingerprint}
    identity = fingerprint("checkpoint", _VERSION, config, inputs)
    folder = place(identity)
    with alone_in(folder):
        if (existing := existing_artifact(folder, identity)) is not None:
            return existing
        out = ArtifactWriter(folder, "checkpoint", identity)
        out.check_own()
        progress.update(0, 1, "calibration")
        counts = _write(out, opened, loaded, calibrated(loaded, settings))
        return out.commit(config, inputs, counts)


def _write(out: ArtifactWriter, opened: Opened, loaded: Loaded, made: Calibrated) -> dict[str, Any]:
    """Write the two files of the model; return the counts of the artifact."""
    from safetensors.torch import save_file

    from edt_core.models.quantized.model import quantized_model
    from edt_core.training.checkpoint import checkpoint_name

    counts = derived_counts(opened)
    if opened.autoencoder is not None:
        counts["autoencoder_digest"] = opened.autoencoder.manifest.digest
    final = f"{CHECKPOINTS}/{checkpoint_name(int(counts['steps']))}"
    model = quantized_model(loaded.model, made.quantization)
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    write_model(out, final, model.built_config.to_dict(), lambda path: save_file(state, path))
    facts = {
        "scheme": made.quantization.scheme,
        "group_size": made.quantization.group_size,
        "keep_error": made.keep_error,
        "calls": made.calls,
        "calls_of_chain": made.calls_of_chain,
        "torchao": package_version("torchao"),
        "bytes": weight_bytes(model),
        "bytes_before": weight_bytes(loaded.model),
        "layers": made.rows(),
    }
    return {**counts, "final": final, QUANTIZATION: facts}


def weight_bytes(model: "DiffusionTransformer") -> int:
    """Bytes of all tensors of a model's state."""
    return sum(value.nbytes for value in model.state_dict().values())
