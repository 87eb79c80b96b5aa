"""What a report says about the champion that its version was compared with."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SampleConfig, SourceConfig
from edt_core.data.sources.delta import ImageDelta
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact
from edt_core.store.layout import FEATURE_UNIT, REFERENCE_NAME
from edt_core.store.store import Store
from jobs.stages import preprocess, sample
from jobs.stages.preprocess import image_source
from pipelines.registry.gate import Decision, Remeasured
from pipelines.report.page import render_report
from pipelines.report.predecessor import (
    FEATURES,
    IMAGES,
    REFERENCE,
    Predecessor,
    PredecessorFacts,
    predecessor_facts,
    predecessor_inputs,
    read_predecessor,
)
from tests.support.local_ray import local_ray
from tests.support.reports import images, whole_report_data

FACTS = PredecessorFacts(
    version="2", metric="fd_classifier", value=2.25, measured="measured again on the new reference"
)
DELTA = ImageDelta(
    before=1000,
    now=1100,
    unchanged=980,
    added={"digit 1": 110, "digit 2": 7},
    removed={"digit 1": 17},
    moved={("digit 0", "digit 2"): 3},
    renamed={"nul": "digit 0"},
    gained=("digit 2",),
    lost=("old",),
)


def test_the_section_has_both_values_the_images_and_the_samples_beside_each_other() -> None:
    labels = np.arange(9) % 3
    page = render_report(whole_report_data(predecessor=Predecessor(FACTS, DELTA, images(9)[::-1], labels, True)))
    for text in (
        "<h2>Since version 2</h2>",
        "is 2.25, measured again on the new reference; this version has 1.5 by the same protocol.",
        "980 of its 1,000 images are unchanged; this version was trained on 1,100.",
        '<th scope="row">digit 1</th><td class="number">110</td><td class="number">17</td>',
        '<th scope="row">digit 2</th><td class="number">7</td><td class="number unknown">\N{EN DASH}</td>',
        "<li>class nul is now called digit 0</li>",
        "<li>3 images moved from digit 0 to digit 2</li>",
        "<li>new classes: digit 2</li>",
        "<li>classes that are gone: old</li>",
        "Those of version 2 start from the same noise.",
        '<th scope="col">Version 2</th>',
    ):
        assert text in page.replace("\n", ""), text


def test_a_report_without_a_champion_before_has_no_section() -> None:
    page = render_report(whole_report_data())
    assert "Since version" not in page
    assert 'href="#since"' not in page


def test_what_is_gone_is_said() -> None:
    facts = FACTS.model_copy(update={"value": None})
    page = render_report(whole_report_data(predecessor=Predecessor(facts, None)))
    assert "could not be compared" in page
    assert "Its images are no longer in the store" in page


def test_many_classes_are_cut() -> None:
    delta = ImageDelta(before=0, now=100, unchanged=0, added={f"c{k:03d}": k + 1 for k in range(100)})
    predecessor = Predecessor(FACTS, delta)
    assert [row.name for row in predecessor.changes] == [f"c{k:03d}" for k in range(70, 100)]
    assert "70 more classes changed." in render_report(whole_report_data(predecessor=predecessor))


def test_names_are_text() -> None:
    delta = ImageDelta(before=1, now=2, unchanged=1, added={"<b>x</b>": 1}, gained=("<script>",))
    page = render_report(whole_report_data(predecessor=Predecessor(FACTS, delta)))
    assert "<b>x</b>" not in page
    assert "<script>" not in page


def test_the_facts_of_a_decision() -> None:
    decision = Decision("digits", "3", "fd_classifier", 1.5, "2", 2.25, True)
    assert predecessor_facts(decision) == FACTS.model_copy(update={"measured": ""})
    again = Remeasured("2", {"fd_classifier": 2.25}, how="on the new reference")
    measured = Decision("digits", "3", "fd_classifier", 1.5, "2", 2.25, True, remeasured=again)
    assert predecessor_facts(measured) == FACTS
    assert predecessor_facts(Decision("digits", "1", "fd_classifier", 1.5, None, None, True)) is None


def _image_artifact(store: Store, root: Path, names: dict[str, list[int]]) -> Artifact:
    """An image artifact of a folder with these classes; equal numbers are equal images."""
    for name, numbers in names.items():
        (root / name).mkdir(parents=True)
        for number in numbers:
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            (root / name / f"{number}.png").write_bytes(buffer.getvalue())
    config = PreprocessConfig(image_size=8, images_per_shard=2)
    source = image_source(SourceConfig(path=str(root)))
    out = store.writer("images", preprocess.STAGE.fingerprint(config, {"source": source.fingerprint}))
    with local_ray():
        return preprocess.STAGE.execute(config, {"source": source}, out, Silent())


def _features(store: Store, identity: str, labels: list[int], seed: int = 0) -> Artifact:
    """A features artifact whose image i has the level i everywhere."""
    from safetensors.numpy import save

    config = SampleConfig(num_samples=len(labels), unit_size=len(labels), seed=seed)
    out = store.writer("features", identity)
    levels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    tensors = {"images": np.ones((1, 8, 8, 3), np.uint8) * levels, "labels": np.array(labels, np.int64)}
    out.write_bytes(FEATURE_UNIT.format(0), save(tensors), len(labels))
    return out.commit(config.model_dump(mode="json"), {}, {}, step_version=sample.STAGE.version)


def _reference(store: Store, identity: str, mean: float, source: str = "images", digest: str = "d") -> Artifact:
    """A reference of features in two dimensions with the unit covariance."""
    from safetensors.numpy import save

    out = store.writer("reference", identity)
    arrays = {"mean": np.array([mean, 0.0]), "covariance": np.eye(2), "count": np.array([9])}
    out.write_bytes(REFERENCE_NAME, save({f"classifier.{name}": value for name, value in arrays.items()}), 9)
    return out.commit({}, {}, {"source": source, "extractors": {"classifier": digest}}, step_version=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def test_images_and_samples_are_matched_by_class_name(store: Store, tmp_path: Path) -> None:
    """Class 1 of the champion is class 2 of the new version, and its class 0 is gone."""
    inputs = {
        IMAGES: _image_artifact(store, tmp_path / "a", {"ant": [1, 2], "cat": [3, 4, 5]}),
        "images": _image_artifact(store, tmp_path / "b", {"bee": [6, 2], "bug": [7], "cat": [3, 5, 8]}),
        FEATURES: _features(store, "1" * 64, [0, 1, 0, 1]),
        "features": _features(store, "2" * 64, [0, 1, 2, 0]),
        "reference": _reference(store, "3" * 64, 1.0),
    }
    found = read_predecessor(FACTS, inputs)
    assert found.delta is not None
    assert (dict(found.delta.added), dict(found.delta.removed)) == (
        {"bee": 1, "bug": 1, "cat": 1},
        {"ant": 1, "cat": 1},
    )
    assert dict(found.delta.moved) == {("ant", "bee"): 1}
    assert found.labels is not None
    assert found.samples is not None
    assert found.labels.tolist() == [2, 2]
    assert found.samples[:, 0, 0, 0].tolist() == [1, 3]
    assert not found.same_noise


def test_drift_is_the_distance_of_two_references_of_images_in_one_feature_space(store: Store) -> None:
    before, now = _reference(store, "3" * 64, 1.0), _reference(store, "4" * 64, 4.0)
    found = read_predecessor(FACTS, {REFERENCE: before, "reference": now})
    assert found.drift == {"classifier": pytest.approx(9.0)}  # the squared distance of the means
    page = render_report(whole_report_data(predecessor=found))
    assert "The Fréchet distance between the images of both versions is 9 in the features of classifier." in page
    for number, other in enumerate(
        (before, _reference(store, "5" * 64, 4.0, "published statistics"), _reference(store, "6" * 64, 4.0, digest="e"))
    ):
        assert read_predecessor(FACTS, {REFERENCE: before, "reference": other}).drift == {}, number
    assert read_predecessor(FACTS, {"reference": now}).drift == {}


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_the_same_noise_is_claimed_only_of_the_same_chain_and_classes(
    store: Store, tmp_path: Path, seed: int, same: bool
) -> None:
    images = _image_artifact(store, tmp_path / "a", {"ant": [1, 2], "cat": [3]})
    features = [_features(store, digit * 64, [0, 1], seed=int(digit == "2") * seed) for digit in "12"]
    inputs = {IMAGES: images, "images": images, FEATURES: features[0], "features": features[1]}
    inputs["reference"] = _reference(store, "3" * 64, 1.0)
    found = read_predecessor(FACTS, inputs)
    assert found.same_noise == same
    assert found.delta is not None
    assert not found.delta


def test_the_artifacts_of_the_champion_are_found_and_missing_ones_left_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from pipelines.report import predecessor

    images = _image_artifact(store, tmp_path / "a", {"ant": [1], "cat": [3]})
    features = _features(store, "1" * 64, [0, 1])
    out = store.writer("evaluation", "3" * 64)
    evaluation = out.commit({}, {"features": features.fingerprint}, {})
    tags = {"edt.images": images.fingerprint, "edt.evaluation.uri": evaluation.folder.uri}
    version = SimpleNamespace(version="2", tags=tags)
    monkeypatch.setattr(predecessor, "version_at", lambda catalog, name, number: version)
    decision = Decision("digits", "3", "fd_classifier", 1.5, "2", 2.25, True)
    found = predecessor_inputs(None, decision, store)  # type: ignore[arg-type]
    assert {role: future.fingerprint for role, future in found.items()} == {
        IMAGES: images.fingerprint,
        FEATURES: features.fingerprint,
    }
    tags["edt.evaluation.uri"] = f"{tmp_path}/gone"
    assert set(predecessor_inputs(None, decision, store)) == {IMAGES}  # type: ignore[arg-type]
    tags["edt.images"] = "4" * 64
    assert predecessor_inputs(None, decision, store) == {}  # type: ignore[arg-type]
