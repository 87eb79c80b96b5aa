"""evaluate: every metric from kept features, with the protocol that gave them."""

from collections.abc import Mapping
from typing import Any

import ray

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import EvaluateConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import METRICS_NAME
from jobs.cluster import use_threads
from jobs.reference import FEATURES_NAME
from jobs.sample import load_units
from jobs.verb import Verb

EXTRACTOR = "classifier"


def evaluate(
    config: EvaluateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Compare `inputs["features"]` with `inputs["reference"]`.

    Raises UserError where the two come from different extractors.
    """
    return ray.get(ray.remote(num_cpus=config.num_cpus)(_compare).remote(config, dict(inputs), out))


def _compare(config: EvaluateConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter) -> dict[str, Any]:
    from safetensors.numpy import load_file

    from edt_core.metrics import compute_metrics

    use_threads(config.num_cpus)
    features, reference = inputs["features"], inputs["reference"]
    extractors = {name: item.manifest.inputs[EXTRACTOR] for name, item in inputs.items()}
    if len(set(extractors.values())) != 1:
        raise UserError(f"features and reference come from different extractors ({extractors}); make both with one")
    generated = load_units(features)
    real = load_file(reference.path(FEATURES_NAME))
    made, truth = generated["features"], real["features"]
    few = [evenly(features, config.pairwise_limit) for features in (made, truth)]
    pairwise = [name for name in config.metrics if name != "fid"]
    metrics = compute_metrics(few[0], few[1], pairwise, space=EXTRACTOR)
    if "fid" in config.metrics:
        metrics |= compute_metrics(made, truth, ["fid"], space=EXTRACTOR)
    metrics["accuracy_classifier"] = float((generated["probabilities"].argmax(1) == generated["labels"]).mean())
    protocol = {
        "space": EXTRACTOR,
        "extractor": extractors["features"],
        "reference": reference.fingerprint,
        "reference_images": reference.counts["images"],
        "label_policy": "classes in turn",
        "pairwise_limit": config.pairwise_limit,
        **features.manifest.config,
    }
    out.write_json(METRICS_NAME, {"metrics": metrics, "protocol": protocol})
    return {"metrics": metrics, "protocol": protocol}


def evenly(features: Any, limit: int) -> Any:
    """At most `limit` rows at even distances, in order: class-sorted features keep their share of each class."""
    step = max(len(features), limit)
    return features[[row for row in range(len(features)) if (row + 1) * limit // step > row * limit // step]]


VERB = Verb("evaluate", "evaluation", 1, EvaluateConfig, evaluate, roles=("features", "reference"))

if __name__ == "__main__":
    VERB.main()
