"""classifier: fit a small classifier on image shards; its features replace Inception's if those are not available."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from edt_core.config import ClassifierConfig
from edt_core.errors import UserError
from edt_core.progress import Progress, fit_report
from edt_core.store.artifact import Artifact, ArtifactWriter
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import device_name, kind_of_devices
from jobs.stages.autoencoder import IMAGE_SHARDS
from jobs.stages.stage import DEVICE, Stage

FOLDER = "classifier"


def classifier(
    config: ClassifierConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Fit a classifier on image shards, and measure its accuracy on held-out images.

    The images are `inputs["images"]`. The artifact contains the weights and sizes of the classifier. Raises UserError
    for the classifier of a registered version, which a pipeline takes from its store without this stage.
    """
    if config.pretrained is not None:
        raise UserError(
            f"classifier.pretrained is {config.pretrained}, and only a pipeline (edt run) can keep the classifier of a "
            "version. Fit one: classifier.pretrained=null"
        )
    require("the fit", CPU=config.num_cpus, GPU=config.num_gpus)
    task = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(_fit)
    return ray.get(task.remote(config, dict(inputs), out, progress))


def _fit(
    config: ClassifierConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    from edt_core.data.shards import load_images
    from edt_core.evaluation.extractors.classifier import fit_classifier
    from edt_core.precision import use_precision

    use_threads(config.num_cpus)
    use_precision("fp32")
    images = inputs["images"]
    pixels, labels = load_images(images.paths(IMAGE_SHARDS), images.counts["images"], config.max_images)

    report = fit_report(progress, config.steps, "loss", 3)
    device = device_name(config.num_gpus)
    model, facts = fit_classifier(config, pixels, labels, images.counts["classes"], device, report)
    with tempfile.TemporaryDirectory() as folder:
        model.cpu().save(Path(folder))
        out.add_tree(Path(folder), FOLDER)
    counts = {**facts, "classes": images.counts["classes"], "feature_dim": config.feature_dim}
    return {**counts, DEVICE: kind_of_devices([device])}


STAGE = Stage("classifier", "classifier", 1, ClassifierConfig, classifier, roles=("images",))
