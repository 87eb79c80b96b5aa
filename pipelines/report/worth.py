"""Remarks on the metrics and the training of a branch, from its artifacts."""

from collections.abc import Mapping

from edt_core.evaluation.confusion import Accuracy
from edt_core.evaluation.worth import Measured, Remark, chance, remarks
from edt_core.store.artifact import Artifact
from edt_core.training.validation.overfitting import overfitting
from jobs.stages.train import history


def measured(evaluation: Artifact) -> Measured:
    """The metrics of an evaluation, and of how many samples they are."""
    protocol = evaluation.counts["protocol"]
    return Measured(evaluation.counts["metrics"], int(protocol["num_samples"]), int(protocol.get("repeats", 1)))


def remarks_on(inputs: Mapping[str, Artifact], metric: str, lower_is_better: bool) -> tuple[Remark, ...]:
    """Remarks on the metrics and the training of a branch, from its artifacts by role. `metric`: that of the gate."""
    evaluation, before = inputs["evaluation"], inputs.get("untrained_evaluation")
    classes = inputs["images"].counts["classes"]
    policy = evaluation.counts["protocol"].get("label_policy", "balanced")
    by_chance = chance(policy, classes, inputs["checkpoint"].counts.get("class_counts"))
    untrained = before.counts["metrics"] if before is not None and _comparable(before, evaluation) else None
    real = _real(inputs.get("classifier"))
    found = remarks(measured(evaluation), untrained, metric, lower_is_better, by_chance, real)
    return (*found, *_of_overfitting(inputs["checkpoint"]))


def _of_overfitting(checkpoint: Artifact) -> tuple[Remark, ...]:
    if "holdout" not in checkpoint.counts:
        return ()
    turn = overfitting(history(checkpoint))
    return () if turn is None else (Remark(str(turn), doubt=True),)


def _comparable(one: Artifact, other: Artifact) -> bool:
    return bool(one.counts["protocol"] == other.counts["protocol"])


def _real(classifier: Artifact | None) -> Accuracy | None:
    """The classifier's accuracy for the images that it was not fitted on; None if there are none."""
    if classifier is None or not (number := classifier.counts.get("holdout")):
        return None
    return Accuracy(number, round(classifier.counts["holdout_accuracy"] * number))
