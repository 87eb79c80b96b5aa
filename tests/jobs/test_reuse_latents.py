"""encode takes unchanged rows from earlier latents, and on a CPU the artifact is what it would be from nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig
from edt_core.data.latents import LatentShard, LatentShardWriter
from edt_core.data.shards import ImageSample
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder, sha256_file
from edt_core.store.store import Store
from jobs.stages import encode
from jobs.stages.autoencoder import published_artifact
from jobs.stages.reuse import latents as reuse
from jobs.stages.reuse import siblings
from tests.jobs import test_reuse_images as history
from tests.jobs.test_reuse_features import make as make_reference
from tests.jobs.test_reuse_images import assert_same, here_with_every_artifact, picture, write  # noqa: F401
from tests.jobs.test_reuse_images import make as make_images
from tests.support.models import classifier_artifact


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    """Two autoencoders of the same form."""
    folder, made = tmp_path_factory.mktemp("vae"), []
    for seed in (0, 1):
        config = AutoencoderConfig(downsample_factor=4, base_channels=8, seed=seed)
        build_autoencoder(config, 16).save_pretrained(folder / f"vae{seed}")
        made.append(published_artifact(str(folder / f"vae{seed}"), Folder.at(folder / f"artifact{seed}")))
    return made


def make(place: Path, images: Artifact, vae: Artifact, progress: Silent | None = None, **fields: Any) -> Artifact:
    config, inputs = EncodeConfig(**fields), {"images": images, "autoencoder": vae}
    identity = encode.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    out = Store.open(str(place)).writer("latents", identity)
    return encode.STAGE.execute(config, inputs, out, progress or Silent())


def rows(artifact: Artifact) -> int:
    return artifact.manifest.reused["rows"] if artifact.manifest.reused else 0


def test_added_images_alone_are_encoded(tmp_path: Path, vaes: list[Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    root, store = write(tmp_path / "images"), tmp_path / "store"
    first = make(store, make_images(store, root), vaes[0])
    assert first.manifest.reused is None
    (root / "class0").rename(root / "zebra")
    (root / "class1" / "2.png").unlink()
    (root / "class1" / "new.png").write_bytes(picture())
    images = make_images(store, root)
    decoded: list[str] = []
    plain = ImageSample.pixels
    monkeypatch.setattr(ImageSample, "pixels", lambda sample: decoded.append(sample.key) or plain(sample))
    second = make(store, images, vaes[0], write_webdataset=True)
    checked = second.manifest.reused["checked"]  # type: ignore[index]
    assert second.manifest.reused == {"rows": 17, "checked": checked, "from": {first.fingerprint: 17}}
    assert len(decoded) == 1 + checked
    assert checked == 4
    monkeypatch.setattr(ImageSample, "pixels", plain)
    nothing = make_images(tmp_path / "nothing", root)
    assert_same(second, make(tmp_path / "nothing", nothing, vaes[0], write_webdataset=True, batch_size=3))


def test_what_shapes_a_latent_must_be_the_same(tmp_path: Path, vaes: list[Artifact]) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    images = make_images(store, root)
    make(store, images, vaes[0])
    assert rows(make(store, make_images(store, root, jpeg_quality=80), vaes[0])) == 8
    assert rows(make(store, images, vaes[1])) == 0
    assert rows(make(store, images, vaes[0], precision="bf16")) == 0
    assert rows(make(store, make_images(store, root, image_size=24), vaes[0])) == 0
    assert rows(make(store, make_images(store, root, rotate_by_exif=True), vaes[0])) == 0


def test_rows_of_which_the_images_are_gone_are_not_used(tmp_path: Path, vaes: list[Artifact]) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    images = make_images(store, root)
    make(store, images, vaes[0])
    (root / "class0" / "new.png").write_bytes(picture())
    second = make_images(store, root)
    assert images.folder.local is not None
    (images.folder.local / "manifest.json").unlink()
    assert rows(make(store, second, vaes[0])) == 0


def planted(artifact: Artifact, move: float) -> None:
    """Move every latent of an artifact, with digests and a seal that agree."""
    entries = {entry.path: entry for entry in artifact.manifest.files}
    for path in artifact.paths("*.arrow"):
        shard = LatentShard(path)
        keys, labels, posterior = shard.keys.to_pylist(), shard.labels.copy(), shard.posterior()
        with LatentShardWriter(path, shard.info) as writer:
            writer.write(keys, labels, posterior + np.float32(move))
        entries[path.name] = replace(entries[path.name], bytes=path.stat().st_size, sha256=sha256_file(path))
    manifest = replace(artifact.manifest, files=tuple(entries.values()))
    assert artifact.folder.local is not None
    (artifact.folder.local / "manifest.json").write_text(manifest.to_json())


def test_a_wrong_row_is_found_and_nothing_is_reused(tmp_path: Path, vaes: list[Artifact]) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    first = make(store, make_images(store, root), vaes[0])
    planted(first, 1e-6)
    (root / "class0" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(store, make_images(store, root), vaes[0], warned)
    assert second.manifest.reused is None
    (warning,) = [text for text in warned.warnings if "reused" in text]
    assert first.folder.uri in warning
    assert_same(second, make(tmp_path / "nothing", make_images(tmp_path / "nothing", root), vaes[0]))


def test_rows_of_a_gpu_are_not_taken_on_a_cpu(tmp_path: Path, vaes: list[Artifact]) -> None:
    """They may differ in the last bits, which a sample of one in a hundred could miss."""
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    first = make(store, make_images(store, root), vaes[0])
    assert first.manifest.environment["device"] == "cpu"
    manifest = replace(first.manifest, environment={**first.manifest.environment, "device": "gpu"})
    assert first.folder.local is not None
    (first.folder.local / "manifest.json").write_text(manifest.to_json())
    (root / "class0" / "new.png").write_bytes(picture())
    assert rows(make(store, make_images(store, root), vaes[0])) == 0


def test_on_a_gpu_rows_may_differ_by_rounding(tmp_path: Path, vaes: list[Artifact]) -> None:
    """The comparison alone, with the tolerance that a GPU has."""
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    first = make(store, make_images(store, root), vaes[0])
    (root / "class0" / "new.png").write_bytes(picture())
    images = make_images(store, root)
    inputs = {"images": images, "autoencoder": vaes[0]}
    out = Store.open(str(store)).writer("latents", "1" * 64)
    (places, *_) = reuse.earlier_latents(out, EncodeConfig(), encode.STAGE.version, *inputs.values())
    assert places is not None
    earlier = reuse.EarlierLatents(places)
    row = LatentShard(first.paths("*.arrow")[0]).posterior()[places.row[0]]
    moved = row + np.float32(1e-4 * row.std())
    assert earlier.check(0, moved, reuse.GPU_TOLERANCE["fp32"]).posterior.tobytes() == row.tobytes()
    with pytest.raises(siblings.WrongRowError, match="differs from what is computed"):
        earlier.check(0, moved, 0.0)
    with pytest.raises(siblings.WrongRowError, match="differs from what is computed"):
        earlier.check(0, row[::-1] + np.float32(row.std()), reuse.GPU_TOLERANCE["bf16"])


def test_a_damaged_shard_is_not_used(tmp_path: Path, vaes: list[Artifact]) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    first = make(store, make_images(store, root), vaes[0])
    path = first.paths("*.arrow")[0]
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    (root / "class1" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(store, make_images(store, root), vaes[0], warned)
    assert any("cannot be read" in text for text in warned.warnings)
    assert_same(second, make(tmp_path / "nothing", make_images(tmp_path / "nothing", root), vaes[0]))


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_latents_and_features_are_those_from_nothing(
    seed: int, tmp_path: Path, vaes: list[Artifact]
) -> None:
    """Images are added, removed, renamed, moved, encoded again, spoiled and doubled, and classes swapped."""
    history.RNG = np.random.default_rng(seed)
    root, store = write(tmp_path / "images", each=4), tmp_path / "store"
    judge = classifier_artifact(tmp_path / "judge", 3, 6)
    steps = [history.add, history.remove, history.move, history.encode_again, history.spoil, history.double]
    steps += [history.swap_classes, history.rename]
    for number in range(4):
        images, nothing = make_images(store, root), make_images(tmp_path / f"nothing{number}", root)
        earlier = len(Store.open(str(store)).manifests("latents"))
        latents = make(store, images, vaes[0])
        features = make_reference(store, images, classifier=judge)
        assert rows(latents) == rows(features)
        assert (rows(latents) > 0) is (earlier > 0)
        assert_same(latents, make(tmp_path / f"nothing{number}", nothing, vaes[0]))
        assert_same(features, make_reference(tmp_path / f"nothing{number}", nothing, classifier=judge))
        for _ in range(2):
            steps[history.RNG.integers(len(steps))](root)
        history.add(root)
