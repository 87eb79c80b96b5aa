"""evaluate: all metrics from stored features, with the protocol of the evaluation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from edt_core.config import SampleConfig, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.references import load_reference
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import METRICS_NAME
from jobs.runtime.cluster import use_threads
from jobs.stages.reference import evenly_spaced
from jobs.stages.sample import load_units
from jobs.stages.sizes import wanted_metrics
from jobs.stages.stage import Stage

# How work is split, and what is stored of it: results that differ only in these fields are comparable.
_NOT_OF_THE_PROTOCOL = ("keep_images", "unit_size")


def evaluate(
    config: EvaluateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Compute the metrics of samples against a reference, in each feature space.

    Compares `inputs["features"]` with `inputs["reference"]`. With several repeats the metrics are means, with
    `<metric>_std` beside them. Raises UserError if the two come from different extractors, for metrics that cannot be
    computed, and for incomplete samples.
    """
    counts = ray.get(ray.remote(num_cpus=config.num_cpus)(_compare).remote(config, dict(inputs), out, progress))
    for warning in counts["warnings"]:  # not in the task: its last report may arrive too late
        progress.warn(warning)
    return counts


def _compare(
    config: EvaluateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    use_threads(config.num_cpus)
    features, reference = inputs["features"], inputs["reference"]
    spaces = check_spaces(features.counts, reference, features.folder.uri)
    sampling = SampleConfig.model_validate(features.manifest.config)
    real = {space: load_reference(reference, space) for space in spaces}
    repeats = []
    for number in range(sampling.repeats):
        samples = load_units(features, number)
        repeats.append(repeat_metrics(config, samples, real))
        progress.update(number + 1, sampling.repeats, "repeats")
    metrics = repeats[0] if len(repeats) == 1 else over_repeats(repeats)
    protocol = protocol_of(sampling, config, features.counts, reference)
    warnings = _warnings(metrics, sampling.num_samples, real)
    out.write_json(METRICS_NAME, {"metrics": metrics, "protocol": protocol, "repeats": repeats, "warnings": warnings})
    # Not part of the protocol: models of different objectives are compared by their samples.
    objective = {name: value for name, value in features.counts.items() if name == "objective"}
    return {"metrics": metrics, "protocol": protocol, "warnings": warnings, **objective}


def check_spaces(counts: Mapping[str, Any], reference: Artifact, place: str) -> list[str]:
    """The feature spaces of samples with these counts. Raises UserError if the reference has other networks or sizes.

    `place`: where the samples are, for the message.
    """
    generated, real = counts["extractors"], reference.counts["extractors"]
    if not generated:
        raise UserError(f"{place} contains samples without features; sample again with a feature network")
    if differing := {
        space: (digest, real.get(space)) for space, digest in generated.items() if real.get(space) != digest
    }:
        digests = "; ".join(f"{space}: {a[:12]} and {(b or 'none')[:12]}" for space, (a, b) in differing.items())
        raise UserError(
            f"features and reference come from different extractors ({digests}); make both with the same extractors"
        )
    size, real_size = counts["image_size"], reference.counts["image_size"]
    if real_size not in (size, None):
        raise UserError(
            f"the samples are images of {size} px, those of the reference have {real_size} px, and features depend on "
            f"the size; preprocess the real images with --image-size {size}"
        )
    return list(generated)


def repeat_metrics(config: EvaluateConfig, samples: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one repeat in all spaces."""
    from edt_core.evaluation.metrics import FeatureSet, FeatureStatistics, compute_metrics

    metrics: dict[str, float] = {}
    for space, reference in real.items():
        features = samples[f"{space}.features"]
        generated = FeatureSet(
            features=features[evenly_spaced(0, len(features), len(features), config.pairwise_limit)],
            statistics=FeatureStatistics.from_features(features, "generated").gaussian,
            spatial=samples.get(f"{space}.spatial"),
            probabilities=samples.get(f"{space}.probabilities"),
        )
        names = wanted_metrics(config, space, len(features))
        metrics |= compute_metrics(
            generated, reference, names, space=space, allow_rank_deficient=config.allow_rank_deficient
        )
        if space == "classifier":
            is_correct = samples["classifier.probabilities"].argmax(1) == samples["labels"]
            metrics["accuracy_classifier"] = float(is_correct.mean())
    return metrics


def over_repeats(repeats: list[dict[str, float]]) -> dict[str, float]:
    """Mean and sample standard deviation of each metric over the repeats; the latter replaces the one over splits."""
    metrics: dict[str, float] = {}
    for name in (name for name in repeats[0] if not name.endswith("_std")):
        values = np.array([repeat[name] for repeat in repeats])
        metrics |= {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}
    return metrics


def protocol_of(
    sampling: SampleConfig, config: EvaluateConfig, counts: Mapping[str, Any], reference: Artifact
) -> dict[str, Any]:
    """Everything that must be equal for two results to be comparable. `counts`: those of the samples' networks."""
    from edt_core.evaluation.protocol import UINT8_RULE

    fields = {name: value for name, value in result_fields(sampling).items() if name not in _NOT_OF_THE_PROTOCOL}
    return {
        **fields,
        "guide": counts["guide_digest"],
        "extractors": counts["extractors"],
        "reference": reference.counts["content"],
        "reference_source": reference.counts["source"],
        "reference_images": reference.counts["images"],
        "reference_features": reference.manifest.config["keep_features"],
        "pairwise_limit": config.pairwise_limit,
        "autoencoder": counts["autoencoder_digest"],
        "uint8_rule": UINT8_RULE,
    }


def _warnings(metrics: Mapping[str, float], num_samples: int, real: Mapping[str, Any]) -> list[str]:
    """Warnings about the metrics: few samples bias distances, and fewer samples than dimensions distort them."""
    from edt_core.evaluation.metrics import bias_warning, in_order, rank_warning

    warnings = [bias_warning(in_order(metrics), num_samples)]
    if any(warnings):
        warnings += [rank_warning(num_samples, side.gaussian(space).dimensions) for space, side in real.items()]
    return [warning for warning in warnings if warning]


STAGE = Stage("evaluate", "evaluation", 2, EvaluateConfig, evaluate, roles=("features", "reference"))
