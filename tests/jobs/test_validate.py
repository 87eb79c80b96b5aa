"""validate: planted samples, of which the classifier is right of some and wrong of others, are counted exactly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from edt_core.config import ClassifierConfig, SampleConfig, ValidateConfig, result_fields
from edt_core.data.shards import load_images
from edt_core.errors import UserError
from edt_core.evaluation.extractors.classifier import Classifier, classify, split_holdout
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import FEATURE_UNIT, REAL_CONFUSION, SAMPLE_CONFUSION, VALIDATION_NAME
from edt_core.store.store import Store
from jobs.stages import classifier, extractors, validate
from jobs.stages.validate import STAGE
from tests.support.jobs import Chain, command, execute

pytestmark = pytest.mark.usefixtures("here")

CLASSES = 4
# Of two repeats, seven samples each: class 0 often, class 2 never. Five of fourteen are taken for another class.
LABELS = ((0, 0, 0, 0, 1, 1, 3), (0, 0, 0, 1, 3, 3, 3))
PREDICTIONS = ((0, 0, 0, 1, 1, 2, 3), (0, 0, 3, 1, 3, 0, 0))
PAIRS = {(0, 0): 5, (0, 1): 1, (0, 3): 1, (1, 1): 2, (1, 2): 1, (3, 3): 2, (3, 0): 2}


def planted(folder: Path, judge: Artifact) -> Artifact:
    """A features artifact as `sample` leaves it, whose classifier says what PREDICTIONS say."""
    config = SampleConfig(num_samples=7, repeats=2, unit_size=4)
    out, number = ArtifactWriter(Folder.at(folder), "features", "f" * 64), 0
    for repeat, (labels, predictions) in enumerate(zip(LABELS, PREDICTIONS, strict=True)):
        for first in range(0, 7, 4):
            part = slice(first, min(first + 4, 7))
            indices = np.arange(part.start, part.stop)
            probabilities = np.full((len(indices), CLASSES), 0.1, np.float32)
            probabilities[np.arange(len(indices)), predictions[part]] = 0.7
            tensors = {
                "indices": indices,
                "seeds": np.full_like(indices, repeat),
                "labels": np.array(labels[part]),
                "classifier.probabilities": probabilities,
            }
            out.write_bytes(FEATURE_UNIT.format(number), save(tensors), len(indices))
            number += 1
    return out.commit(result_fields(config), {}, {"extractors": {"classifier": judge.manifest.digest}})


def stubborn(folder: Path, images: Artifact) -> Artifact:
    """A classifier that takes whatever it sees for class 1, and holds a quarter of the images back."""
    model = Classifier(CLASSES, 4, 8)
    model.logits.weight.data.zero_()
    model.logits.bias.data[:] = model.logits.bias.data.new_tensor([0.0, 1.0, 0.0, 0.0])
    model.save(folder / "weights")
    out = ArtifactWriter(Folder.at(folder / "artifact"), "classifier", "c" * 64)
    out.add_tree(folder / "weights", classifier.FOLDER)
    config = ClassifierConfig(holdout_fraction=0.25, seed=3)
    return out.commit(result_fields(config), {"images": images.fingerprint}, {"holdout": 8, "classes": CLASSES})


def files(made: Artifact) -> tuple[dict[str, Any], dict[str, dict[tuple[int, int], int]]]:
    """The JSON of a validation and its two confusions, read by what docs/formats.md says."""
    confusions = {}
    for side, name in (("samples", SAMPLE_CONFUSION), ("real", REAL_CONFUSION)):
        arrays = load_file(made.path(name))
        pairs = zip(*(arrays[key].tolist() for key in ("labels", "predictions", "counts")), strict=True)
        confusions[side] = {(label, prediction): count for label, prediction, count in pairs}
    return json.loads(made.path(VALIDATION_NAME).read_text()), confusions


def test_planted_samples_are_counted_class_by_class(chain: Chain, tmp_path: Path) -> None:
    images = chain["images"]
    judge = stubborn(tmp_path, images)
    features = planted(tmp_path / "features", judge)
    inputs = {"features": features, "classifier": judge, "images": images}
    made = execute(STAGE, ValidateConfig(), tmp_path / "made", **inputs)
    facts, confusions = files(made)
    assert confusions["samples"] == PAIRS
    assert sum(PAIRS.values()) == made.counts["samples"] == facts["samples"]["images"] == 14
    assert facts["samples"]["right"] == 9
    assert made.counts["metrics"]["conditional_accuracy"] == facts["samples"]["accuracy"] == 9 / 14
    low, high = facts["samples"]["low"], facts["samples"]["high"]
    assert (low, high) == (pytest.approx(0.38764, abs=1e-5), pytest.approx(0.83655, abs=1e-5))  # Wilson's, by hand
    assert made.counts["metrics"]["mean_class_accuracy"] == pytest.approx((5 / 7 + 2 / 3 + 2 / 4) / 3)
    by_class = {row["name"]: row for row in facts["classes"]}
    assert list(by_class) == ["0", "1", "2", "3"]
    told = {name: (row["samples"]["images"], row["samples"]["right"]) for name, row in by_class.items()}
    assert told == {"0": (7, 5), "1": (3, 2), "2": (0, 0), "3": (4, 2)}
    assert by_class["2"]["samples"]["accuracy"] is None
    assert by_class["0"]["mistaken_for"] == [["1", 1], ["3", 1]]
    assert (made.counts["classes"], made.counts["sampled_classes"]) == (4, 3)
    # The real images that were held back are all taken for class 1.
    assert {prediction for _, prediction in confusions["real"]} == {1}
    pixels, labels = load_images(images.paths("images-*.tar"), 32)
    held = labels[split_holdout(32, 0.25, 3)[1]]
    assert confusions["real"] == {(label, 1): int((held == label).sum()) for label in set(held.tolist())}
    assert made.counts["metrics"]["real_conditional_accuracy"] == (held == 1).mean()
    assert len(pixels) == 32


def test_the_ceiling_is_the_accuracy_of_the_hold_out(chain: Chain, tmp_path: Path) -> None:
    """Of a classifier that was fitted; an independent count of the same images, all of them in memory."""
    judge, images = chain["classifier"], chain["images"]
    features = planted(tmp_path / "features", judge)
    made = execute(STAGE, ValidateConfig(), tmp_path / "made", features=features, classifier=judge, images=images)
    assert made.counts["real_images"] == judge.counts["holdout"]
    assert made.counts["metrics"]["real_conditional_accuracy"] == pytest.approx(judge.counts["holdout_accuracy"])
    pixels, labels = load_images(images.paths("images-*.tar"), 32)
    fit = ClassifierConfig.model_validate(judge.manifest.config)
    held = split_holdout(32, fit.holdout_fraction, fit.seed)[1]
    model = Classifier.load(judge.directory(classifier.FOLDER))
    pairs = zip(labels[held].tolist(), classify(model, pixels[held])[1].argmax(1).tolist(), strict=True)
    expected: dict[tuple[int, int], int] = {}
    for pair in pairs:
        expected[pair] = expected.get(pair, 0) + 1
    assert files(made)[1]["real"] == expected


def test_classes_without_a_real_image_kept_back_are_told(chain: Chain, tmp_path: Path) -> None:
    judge = chain["classifier"]  # it keeps 3 images of 32 back, and there are 4 classes
    features = planted(tmp_path / "features", judge)
    inputs = {"features": features, "classifier": judge, "images": chain["images"]}
    progress = CollectedWarnings()
    made = execute(STAGE, ValidateConfig(), tmp_path / "made", progress, **inputs)
    lacking = 4 - made.counts["real_classes"]
    assert lacking > 0
    assert progress.warnings == [f"{lacking} of 4 classes have no held-out real image"]


def test_what_does_not_belong_together_is_refused(chain: Chain, tmp_path: Path) -> None:
    images, judge = chain["images"], chain["classifier"]
    other = stubborn(tmp_path, images)

    def run(**changed: Artifact) -> None:
        inputs: Mapping[str, Artifact] = {
            "features": planted(tmp_path / "features", judge),
            "classifier": judge,
            "images": images,
        }
        execute(STAGE, ValidateConfig(), tmp_path / "made", **{**inputs, **changed})

    with pytest.raises(
        UserError, match=r"were classified by classifier \w{12}, but this classifier is .* sampled with"
    ):
        run(classifier=other)
    out = ArtifactWriter(Folder.at(tmp_path / "others"), "images", "e" * 64)
    with pytest.raises(UserError, match=r"was fitted on images \w{12}, but these are eeeeeeeeeeee; pass"):
        run(images=out.commit({}, {}, dict(images.counts)))
    out = ArtifactWriter(Folder.at(tmp_path / "inception"), "features", "d" * 64)
    with pytest.raises(UserError, match="were classified by no classifier"):
        run(features=out.commit({}, {}, {"extractors": {"inception": "a" * 64}}))
    assert not (tmp_path / "made").exists()


def test_samples_of_more_classes_than_the_classifier_knows_are_refused(chain: Chain, tmp_path: Path) -> None:
    features = planted(tmp_path / "features", chain["classifier"])
    with pytest.raises(UserError, match="labels up to 3, but the classifier has 3 classes"):
        validate._of_samples(features, 3)


def test_what_an_earlier_attempt_has_finished_is_taken_over(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, judge = Store(Folder.at(tmp_path / "store")), chain["classifier"]
    inputs = {"features": planted(tmp_path / "f", judge), "classifier": judge, "images": chain["images"]}
    identity = STAGE.fingerprint(ValidateConfig(), {role: item.fingerprint for role, item in inputs.items()})
    whole = execute(STAGE, ValidateConfig(), tmp_path / "made", **inputs)
    store.writer(STAGE.kind, identity).write_bytes(REAL_CONFUSION, whole.path(REAL_CONFUSION).read_bytes())

    def never(*_: object) -> None:
        raise AssertionError("the real images are classified again")

    monkeypatch.setattr(extractors, "load", never)
    again = STAGE.execute(ValidateConfig(), inputs, store.writer(STAGE.kind, identity), Silent())
    assert again.manifest.digest == whole.manifest.digest
    assert store.find(STAGE.kind, identity) is not None


def test_the_verb_alone_makes_it_once(chain: Chain, tmp_path: Path) -> None:
    judge = chain["classifier"]
    features = planted(tmp_path / "features", judge)
    call = [str(features.folder.local), str(tmp_path / "made"), "--classifier", str(judge.folder.local)]
    call += ["--images", str(chain["images"].folder.local)]
    done = command("validate", *call, "--confidence", "0.9")
    assert done.returncode == 0, done.stderr
    made = Artifact.open(str(tmp_path / "made"))
    assert (made.manifest.kind, made.manifest.config) == ("validation", {"confidence": 0.9})
    again = command("validate", *call, "--confidence", "0.9", "--num-cpus", "2")
    assert (again.returncode, "reused" in again.stderr) == (0, True)
    assert command("validate", *call).returncode == 2  # another confidence is another artifact
