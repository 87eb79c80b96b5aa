"""reference takes features of unchanged images from earlier references; its file is what it would be from nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edt_core.config import ReferenceConfig
from edt_core.data.shards import ImageSample
from edt_core.evaluation.references import load_reference
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import sha256_file
from edt_core.store.layout import IMAGE_FEATURES, REFERENCE_NAME
from edt_core.store.store import Store
from jobs.stages import extractors, reference
from tests.jobs.test_reuse_images import assert_same, here_with_every_artifact, picture, write  # noqa: F401
from tests.jobs.test_reuse_images import make as make_images
from tests.support.models import classifier_artifact, clip_folder


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("judges")
    one, other = (classifier_artifact(folder / str(dims), 3, dims) for dims in (6, 8))
    return [one, replace(other, manifest=replace(other.manifest, fingerprint="d" * 64))]


def make(store: Path, images: Artifact, progress: Silent | None = None, **given: Artifact | Source) -> Artifact:
    config, inputs = ReferenceConfig(keep_features=7), {"images": images, **given}
    return made(store, config, inputs, progress)


def made(store: Path, config: ReferenceConfig, inputs: dict[str, Any], progress: Silent | None) -> Artifact:
    identity = reference.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    out = Store.open(str(store)).writer("reference", identity)
    return reference.STAGE.execute(config, inputs, out, progress or Silent())


def rows(artifact: Artifact) -> int:
    return artifact.manifest.reused["rows"] if artifact.manifest.reused else 0


def test_features_of_added_images_alone_are_computed(
    tmp_path: Path, judges: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = write(tmp_path / "images"), tmp_path / "store"
    first = make(store, make_images(store, root), classifier=judges[0])
    assert first.manifest.reused is None
    assert len(first.entries("features/*")) == 4
    (root / "class0").rename(root / "zebra")
    (root / "class1" / "2.png").unlink()
    (root / "class1" / "new.png").write_bytes(picture())
    images = make_images(store, root)
    decoded: list[str] = []
    plain = ImageSample.pixels
    monkeypatch.setattr(ImageSample, "pixels", lambda sample: decoded.append(sample.key) or plain(sample))
    second = make(store, images, classifier=judges[0])
    assert second.manifest.reused == {"rows": 17, "checked": 4, "from": {first.fingerprint: 17}}
    assert len(decoded) == 5
    monkeypatch.setattr(ImageSample, "pixels", plain)
    nothing = made(
        tmp_path / "nothing",
        ReferenceConfig(keep_features=7, batch_size=3),
        {"images": make_images(tmp_path / "nothing", root), "classifier": judges[0]},
        None,
    )
    assert_same(second, nothing)


def test_each_space_reuses_what_its_network_made(tmp_path: Path, judges: list[Artifact]) -> None:
    pytest.importorskip("transformers")
    clip = extractors.extractor_source("clip", str(clip_folder(tmp_path / "clip")))
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    images = make_images(store, root)
    first = make(store, images, classifier=judges[0])
    both = make(store, images, classifier=judges[0], clip=clip)
    assert both.manifest.reused == {"rows": 8, "checked": 2, "from": {first.fingerprint: 8}}
    other = make(store, images, classifier=judges[1], clip=clip)
    assert other.manifest.reused == {"rows": 8, "checked": 2, "from": {both.fingerprint: 8}}
    assert_same(other, make(tmp_path / "nothing", images, classifier=judges[1], clip=clip))
    assert {"clip", "classifier"} == set(other.counts["extractors"])


def test_a_reference_without_features_by_row_stays_readable(tmp_path: Path, judges: list[Artifact]) -> None:
    """References of the version before have one file alone."""
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    images = make_images(store, root)
    first = make(store, images, classifier=judges[0])
    for entry in first.entries("features/*"):
        first.path(entry.path).unlink()
    old = replace(first.manifest, files=tuple(first.entries(REFERENCE_NAME)))
    assert first.folder.local is not None
    (first.folder.local / "manifest.json").write_text(old.to_json())
    found = Store.open(str(store)).find("reference", first.fingerprint)
    assert found is not None
    assert load_reference(found, "classifier").features.shape == (7, 6)
    (root / "class0" / "new.png").write_bytes(picture())
    assert rows(make(store, make_images(store, root), classifier=judges[0])) == 0


def test_a_wrong_row_is_found_and_nothing_is_reused(tmp_path: Path, judges: list[Artifact]) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    first = make(store, make_images(store, root), classifier=judges[0])
    entries = {entry.path: entry for entry in first.manifest.files}
    for number in range(2):
        path = first.path(IMAGE_FEATURES.format(number))
        save_file({name: values + np.float32(1e-6) for name, values in load_file(path).items()}, path)
        name = IMAGE_FEATURES.format(number)
        entries[name] = replace(entries[name], bytes=path.stat().st_size, sha256=sha256_file(path))
    assert first.folder.local is not None
    planted = replace(first.manifest, files=tuple(entries.values()))
    (first.folder.local / "manifest.json").write_text(planted.to_json())
    (root / "class0" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(store, make_images(store, root), warned, classifier=judges[0])
    assert second.manifest.reused is None
    (warning,) = [text for text in warned.warnings if "reused" in text]
    assert first.folder.uri in warning
    assert_same(second, make(tmp_path / "nothing", make_images(tmp_path / "nothing", root), classifier=judges[0]))
