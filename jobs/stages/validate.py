"""validate: how often the classifier assigns a sample to the class that it was drawn for, class by class.

The classifier was fitted on real images. Its accuracy on held-out real images is stated for comparison.
Legend: N images, K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import ray

from edt_core.config import ClassifierConfig, SampleConfig, ValidateConfig
from edt_core.errors import UserError
from edt_core.evaluation.confusion import Accuracy, Confusion
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.cache import local_copy
from edt_core.store.layout import CLASSES_NAME, REAL_CONFUSION, SAMPLE_CONFUSION, VALIDATION_NAME
from jobs.runtime.cluster import require, use_threads
from jobs.stages import extractors
from jobs.stages.autoencoder import IMAGE_SHARDS
from jobs.stages.sample import load_units
from jobs.stages.stage import Stage

_BATCH = 64  # real images per call of the classifier
_MOST_MISTAKES = 3  # other classes that are listed for a class


def validate(
    config: ValidateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Count, by class, how often the classifier assigns samples to the class that they were drawn for.

    The same is counted for held-out real images, which the classifier was not fitted on. Raises UserError if samples,
    classifier and images do not belong together, and for incomplete samples.
    """
    check(inputs)
    require("validate", CPU=config.num_cpus)
    task = ray.remote(num_cpus=config.num_cpus)(_validate)
    counts: dict[str, Any] = ray.get(task.remote(config, dict(inputs), out, progress))
    if missing := counts["classes"] - counts["real_classes"]:  # not in the task: its last report may arrive too late
        progress.warn(f"{missing} of {counts['classes']} classes have no held-out real image")
    return counts


def check(inputs: Mapping[str, Artifact]) -> None:
    """Raise UserError if the samples lack predictions of this classifier, or it was fitted on other images."""
    features, classifier, images = inputs["features"], inputs["classifier"], inputs["images"]
    digest, expected = features.counts["extractors"].get("classifier"), classifier.manifest.digest
    if digest != expected:
        by = f"classifier {digest[:12]}" if digest else "no classifier"
        raise UserError(
            f"the samples at {features.folder.uri} were classified by {by}, but this classifier is {expected[:12]}; "
            "pass the classifier that they were sampled with"
        )
    fitted_on = classifier.manifest.inputs.get("images")
    if fitted_on != images.fingerprint:
        raise UserError(
            f"the classifier at {classifier.folder.uri} was fitted on images {str(fitted_on)[:12]}, but these are "
            f"{images.fingerprint[:12]}; pass the images that it was fitted on"
        )


def _validate(
    config: ValidateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    use_threads(config.num_cpus)
    names = inputs["images"].read_json(CLASSES_NAME)
    samples = _of_samples(inputs["features"], len(names))
    if out.recover(SAMPLE_CONFUSION) is None:
        _write(out, SAMPLE_CONFUSION, samples)
    real = _recover_confusion(out, REAL_CONFUSION, len(names))
    if real is None:
        real = _of_real(inputs, len(names), progress)
        _write(out, REAL_CONFUSION, real)
    sides = {"samples": samples, "real": real}
    rows = _rows(names, sides, config.confidence)
    about = {side: _summary(confusion, config.confidence) for side, confusion in sides.items()}
    out.write_json(VALIDATION_NAME, {"confidence": config.confidence, **about, "classes": rows})
    return {
        "samples": about["samples"]["images"],
        "real_images": about["real"]["images"],
        "classes": len(names),
        "sampled_classes": about["samples"]["classes"],
        "real_classes": about["real"]["classes"],
        "metrics": _metrics(about),
        "classifier_digest": inputs["classifier"].manifest.digest,
    }


def _of_samples(features: Artifact, num_classes: int) -> Confusion:
    """The confusion of the samples of all repeats, from the predictions stored with their features."""
    repeats = [
        load_units(features, number) for number in range(SampleConfig.model_validate(features.manifest.config).repeats)
    ]
    labels = np.concatenate([units["labels"] for units in repeats])
    predictions = np.concatenate([units["classifier.probabilities"].argmax(1) for units in repeats])
    if len(labels) and labels.max() >= num_classes:
        raise UserError(
            f"the samples have labels up to {labels.max()}, but the classifier has {num_classes} classes; pass "
            "samples of a model with these classes, or the classifier of the model's own images"
        )
    return Confusion.of(labels, predictions, num_classes)


def _of_real(inputs: Mapping[str, Artifact], num_classes: int, progress: Progress) -> Confusion:
    """The confusion of the held-out real images, which are classified here."""
    from edt_core.data.prefetch import in_batches
    from edt_core.precision import use_precision

    use_precision("fp32")
    images, classifier = inputs["images"], inputs["classifier"]
    extract, total = extractors.load("classifier", classifier, "cpu"), int(classifier.counts["holdout"])
    labels: list[int] = []
    predictions: list[int] = []
    for batch in in_batches(_held_out(images, classifier), _BATCH):
        predictions += extract(np.stack([sample.pixels() for sample in batch]))["probabilities"].argmax(1).tolist()
        labels += [sample.label for sample in batch]
        progress.update(len(labels), total, "real images")
    if len(labels) != total:
        raise UserError(
            f"there are {len(labels)} held-out real images, but the classifier states {total}; run classifier again"
        )
    return Confusion.of(np.array(labels, np.int64), np.array(predictions, np.int64), num_classes)


def _held_out(images: Artifact, classifier: Artifact) -> Iterator[Any]:
    """The samples of the image shards that the classifier was not fitted on, in order."""
    from edt_core.data.shards import read_image_shard
    from edt_core.data.subsets import at_even_distances
    from edt_core.evaluation.extractors.classifier import split_holdout

    fit = ClassifierConfig.model_validate(classifier.manifest.config)
    total = images.counts["images"]
    _, held = split_holdout(min(total, fit.max_images), fit.holdout_fraction, fit.seed)
    held_out, index = set(held.tolist()), 0
    shards = (read_image_shard(path) for path in images.paths(IMAGE_SHARDS))
    for number, sample in enumerate(chain.from_iterable(shards)):
        if at_even_distances(number, total, fit.max_images):
            if index in held_out:
                yield sample
            index += 1


def _write(out: ArtifactWriter, name: str, confusion: Confusion) -> None:
    from safetensors.numpy import save

    out.write_bytes(name, save(confusion.arrays()), confusion.overall().images)


def _recover_confusion(out: ArtifactWriter, name: str, num_classes: int) -> Confusion | None:
    """The confusion that an earlier attempt stored; None if there is none."""
    if out.recover(name) is None:
        return None
    return Confusion.from_arrays(load_tensors(local_copy(out.data, name), "numpy"), num_classes)


def _rows(names: Sequence[str], sides: Mapping[str, Confusion], confidence: float) -> list[dict[str, Any]]:
    """The results of each class, in order of class index."""
    accuracies = {side: confusion.by_class() for side, confusion in sides.items()}
    rows = []
    for label, name in enumerate(names):
        numbers = {side: _numbers(classes[label], confidence) for side, classes in accuracies.items()}
        mistakes = sides["samples"].mistakes(label, _MOST_MISTAKES)
        rows.append({"name": name, **numbers, "mistaken_for": [[names[other], count] for other, count in mistakes]})
    return rows


def _numbers(accuracy: Accuracy, confidence: float) -> dict[str, Any]:
    low, high = accuracy.interval(confidence)
    return {"images": accuracy.images, "right": accuracy.right, "accuracy": accuracy.value, "low": low, "high": high}


def _summary(confusion: Confusion, confidence: float) -> dict[str, Any]:
    """The results over all images of one side. `classes`: how many classes have images."""
    num_classes = sum(accuracy.images > 0 for accuracy in confusion.by_class())
    mean = confusion.mean_over_classes()
    return {**_numbers(confusion.overall(), confidence), "mean_over_classes": mean, "classes": num_classes}


def _metrics(about: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of the step for MLflow."""
    return {
        f"{prefix}{name}": about[side][key]
        for side, prefix in (("samples", ""), ("real", "real_"))
        for name, key in (
            ("conditional_accuracy", "accuracy"),
            ("conditional_accuracy_low", "low"),
            ("conditional_accuracy_high", "high"),
            ("mean_class_accuracy", "mean_over_classes"),
        )
    }


STAGE = Stage("validate", "validation", 1, ValidateConfig, validate, roles=("features", "classifier", "images"))
