"""The files of a registered version: a diffusers folder with its model card, logged as an MLflow model."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import ChainConfig
from edt_core.evaluation.trainings import seeds_text, spread_text
from edt_core.files.small_files import read_bounded
from edt_core.printing.redaction import redacted
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CLASSES_NAME
from jobs.models.registry_files import DIGESTS, PIPELINE, digests_text, folder_digests
from pipelines.config.schema import PromoteConfig
from pipelines.registry.model_card import README, ModelCard
from pipelines.tracking.catalog import Catalog

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer

QUANTIZE_EXTRA = "[quantize]"  # of this package: what a quantised version needs
_CODE = Path(__file__).with_name("pyfunc_model.py")
# Fields of a training's configuration that the card shows; the run's record has all fields.
_TRAINING = (
    "objective",
    "global_batch_size",
    "optimizer",
    "lr",
    "ema_decay",
    "masked_loss",
    "align",
    "class_dropout_prob",
    "timestep_sampler",
    "time_shift",
    "num_timesteps",
    "seed",
    "distill",
)


@dataclass(frozen=True)
class Entry:
    """The artifacts behind one version. `untrained`: the evaluation of the untrained model that it started as.

    `trainings`: the evaluation of each training by seed, its own first, if there are several. `guide`: the model that
    its samples were guided away from, and `classifier` the one that chose from which class.
    """

    images: Artifact
    autoencoder: Artifact
    checkpoint: Artifact
    features: Artifact
    evaluation: Artifact
    untrained: Artifact | None = None
    trainings: Mapping[int, Artifact] = field(default_factory=dict)
    guide: Artifact | None = None
    classifier: Artifact | None = None

    def metrics_of_trainings(self) -> dict[int, Mapping[str, float]]:
        """The metrics of each training by seed; empty if there is one."""
        return {seed: evaluation.counts["metrics"] for seed, evaluation in self.trainings.items()}


@dataclass(frozen=True)
class Logged:
    """A diffusers folder that was logged as an MLflow model: its URI, and the sha256 of its list of digests."""

    uri: str
    model_id: str
    digest: str


def log_pipeline(
    catalog: Catalog, run_id: str, name: str, write: Callable[[Path], None], *, needs: str = "", **extra: Any
) -> Logged:
    """Log the diffusers folder that `write(folder)` writes as an MLflow model of a run, with its files' digests.

    `needs`: the extra of this package that loading the model needs, as "[quantize]". `extra` are further arguments of
    MLflow's `log_model`.
    """
    import mlflow

    mlflow.set_tracking_uri(catalog.tracking_uri)
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the missing input example: a signature is passed
        pipeline, digests = Path(folder) / PIPELINE, Path(folder) / DIGESTS
        write(pipeline)
        digests.write_bytes(digests_text(folder_digests(pipeline)))
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(_CODE),
            artifacts={"pipeline": str(pipeline), "digests": str(digests)},
            pip_requirements=[f"edt-pipeline{needs}=={version('edt-pipeline')}"],
            signature=_signature(),
            **extra,
        )
        return Logged(info.model_uri, info.model_id, sha256(read_bounded(digests)).hexdigest())


def _signature() -> Any:
    """The signature of the model: labels to images, and the parameters of `predict`."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.int64), (-1,))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                ParamSpec("num_inference_steps", "long", 0),
                ParamSpec("cfg_scale", "double", 0.0),
            ]
        ),
    )


def write_pipeline(folder: Path, name: str, config: PromoteConfig, entry: Entry, source: str) -> None:
    """Write a trained model's diffusers folder: EMA weights, autoencoder, scheduler, class names, protocol, model card.

    `source` describes the training images. With `promote.torch_export`, also writes the denoiser as a torch program.
    """
    from edt_core.autoencoders.autoencoder import load_autoencoder
    from edt_core.evaluation.extractors.classifier import Classifier
    from edt_core.pipeline import chain_config, save_pipeline
    from edt_core.sampling.torch_export import PROGRAM, save_program
    from edt_core.training.checkpoint import ema_model
    from jobs.stages.autoencoder import FOLDER, check_checkpoint_scale
    from jobs.stages.classifier import FOLDER as CLASSIFIER

    check_checkpoint_scale(entry.checkpoint, entry.autoencoder)
    protocol = _protocol(entry)
    model = ema_model(entry.checkpoint.directory(entry.checkpoint.counts["final"]))
    num_timesteps = entry.checkpoint.manifest.config["num_timesteps"]
    save_pipeline(
        folder,
        model,
        load_autoencoder(entry.autoencoder.directory(FOLDER)),
        num_timesteps=num_timesteps,
        classes=entry.images.read_json(CLASSES_NAME),
        protocol=protocol,
        class_counts=entry.checkpoint.counts.get("class_counts"),
        guide=None if entry.guide is None else ema_model(entry.guide.directory(entry.guide.counts["final"])),
        classifier=None if entry.classifier is None else Classifier.load(entry.classifier.directory(CLASSIFIER)),
    )
    (folder / README).write_text(redacted(card_of(name, model, config, entry, source).text()), encoding="utf-8")
    if config.torch_export:
        save_program(folder / PROGRAM, model, chain_config(protocol), num_timesteps)


def card_of(name: str, model: "DiffusionTransformer", config: PromoteConfig, entry: Entry, source: str) -> ModelCard:
    """The model card of a trained model, from its artifacts."""
    from edt_core.models import count_macs, count_parameters

    images, checkpoint, evaluation = entry.images, entry.checkpoint, entry.evaluation
    trained = checkpoint.manifest.config
    data = {
        "source": source,
        "source fingerprint": images.manifest.inputs.get("source"),
        **{field: images.counts.get(field) for field in ("images", "quarantined", "duplicates", "image_size")},
        "image shards digest": images.manifest.digest,
    }
    training = {
        "steps": checkpoint.counts["steps"],
        **{field: trained.get(field) for field in _TRAINING},
        **_over_trainings(entry),
        "seconds": round(checkpoint.manifest.duration_s),
        "code version": checkpoint.manifest.code_version,
        "fingerprint": checkpoint.fingerprint,
    }
    return ModelCard(
        name=name,
        config=model.config,
        parameters=count_parameters(model),
        macs=count_macs(model),
        sampling=_protocol(entry),
        license=config.license,
        dataset=source,
        metrics=evaluation.counts["metrics"],
        protocol=evaluation.counts["protocol"],
        data=_non_empty(data),
        training=_non_empty(training),
    )


def _over_trainings(entry: Entry) -> dict[str, str]:
    if not entry.trainings:
        return {}
    metrics = entry.metrics_of_trainings()
    return {f"{name} of {seeds_text(metrics)}": text for name, text in spread_text(metrics).items()}


def _non_empty(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _protocol(entry: Entry) -> dict[str, Any]:
    """The sampling settings of the model's evaluation: fields of ChainConfig."""
    sampling = entry.features.manifest.config
    return {field: sampling[field] for field in ChainConfig.model_fields if field in sampling}
