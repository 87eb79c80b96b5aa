"""`encode.store`: latents rounded to half precision, with the largest error in the manifest, reused or not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, TrainConfig
from edt_core.data.latents import NUMBER_FORMATS, LatentShard
from edt_core.data.shards import ImageSample
from edt_core.errors import UserError
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.stages import encode
from jobs.stages.autoencoder import published_artifact
from jobs.stages.reuse import latents as reuse
from jobs.stages.training.latents import open_latents
from tests.jobs.test_reuse_images import assert_same, here_with_every_artifact, picture, write  # noqa: F401
from tests.jobs.test_reuse_images import make as make_images
from tests.jobs.test_reuse_latents import make, planted, rows


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("vae")
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 16).save_pretrained(folder / "vae")
    return published_artifact(str(folder / "vae"), Folder.at(folder / "artifact"))


def posterior(artifact: Artifact) -> np.ndarray:
    return np.concatenate([LatentShard(path).posterior() for path in artifact.paths("*.arrow")])


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the images that are decoded from now on."""
    keys: list[str] = []
    plain = ImageSample.pixels
    monkeypatch.setattr(ImageSample, "pixels", lambda sample: keys.append(sample.key) or plain(sample))
    return keys


@pytest.mark.parametrize("store", ["fp16", "bf16"])
def test_latents_are_those_of_fp32_rounded_and_the_error_is_stated(store: str, tmp_path: Path, vae: Artifact) -> None:
    root = write(tmp_path / "images")
    exact, half = (make(tmp_path / s, make_images(tmp_path / s, root), vae, store=s) for s in ("fp32", store))
    assert not {"store", "store_error"} & exact.counts.keys()
    whole, numbers = posterior(exact), NUMBER_FORMATS[store]
    assert np.array_equal(posterior(half), numbers.widened(numbers.narrowed(whole, "")))
    gap = np.abs(posterior(half).astype(np.float64) - whole).max((0, 1, 4, 5))  # [mean or std, C]
    assert half.counts["store"] == store
    for name, largest in zip(("mean", "std"), gap, strict=True):
        error = half.counts["store_error"][name]
        assert error["max"] == largest.max() > 0
        assert error["in_std"] == pytest.approx((largest / half.counts["channel_std"]).max(), rel=1e-12)
    assert half.counts["channel_std"] == pytest.approx(exact.counts["channel_std"], rel=1e-2)
    assert half.counts["store_error"]["mean"]["in_std"] < 2.0 ** (-8 if store == "fp16" else -5)
    assert half.fingerprint != exact.fingerprint


def test_fp32_latents_are_rounded_and_not_encoded_again(
    tmp_path: Path, vae: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = write(tmp_path / "images"), tmp_path / "store"
    first = make(store, make_images(store, root), vae)
    keys = decoded(monkeypatch)
    half = make(store, make_images(store, root), vae, store="fp16")
    assert rows(half) == 18
    assert half.manifest.reused is not None
    assert half.manifest.reused["from"] == {first.fingerprint: 18}
    assert len(keys) == half.manifest.reused["checked"]
    nothing = tmp_path / "nothing"
    assert_same(half, make(nothing, make_images(nothing, root), vae, store="fp16", batch_size=3))
    # The other way nothing is reused: what was rounded is not known any more, and bf16 is not rounded from fp16.
    other = tmp_path / "other"
    make(other, make_images(other, root), vae, store="fp16")
    assert rows(make(other, make_images(other, root), vae, store="bf16")) == 0
    assert rows(make(other, make_images(other, root), vae)) == 0


@pytest.mark.parametrize("store", ["fp16", "bf16"])
def test_rows_of_half_precision_are_reused_with_their_errors(store: str, tmp_path: Path, vae: Artifact) -> None:
    """From an artifact in fp32 and one in half precision at once: the counts are those from nothing."""
    root, place = write(tmp_path / "images"), tmp_path / "store"
    make(place, make_images(place, root), vae)
    (root / "class1" / "new.png").write_bytes(picture())
    make(place, make_images(place, root), vae, store=store, write_webdataset=True)
    (root / "class2" / "new.png").write_bytes(picture())
    last = make(place, make_images(place, root), vae, store=store)
    assert rows(last) == 19
    assert_same(last, make(tmp_path / "nothing", make_images(tmp_path / "nothing", root), vae, store=store))


def test_a_wrong_row_of_half_precision_is_found(tmp_path: Path, vae: Artifact) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    planted(make(store, make_images(store, root), vae, store="fp16"), 1e-2)
    (root / "class0" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(store, make_images(store, root), vae, warned, store="fp16")
    assert second.manifest.reused is None
    assert [text for text in warned.warnings if "reused" in text]


def test_on_a_gpu_a_row_may_round_to_the_next_number(tmp_path: Path, vae: Artifact) -> None:
    root, store = write(tmp_path / "images", classes=2, each=4), tmp_path / "store"
    make(store, make_images(store, root), vae, store="bf16")
    (root / "class0" / "new.png").write_bytes(picture())
    images = make_images(store, root)
    out = Store.open(str(store)).writer("latents", "1" * 64)
    (places, *_) = reuse.earlier_latents(out, EncodeConfig(store="bf16"), encode.STAGE.version, images, vae)
    assert places is not None
    earlier = reuse.EarlierLatents(places)
    row = earlier.row(0).posterior
    numbers = NUMBER_FORMATS["bf16"]
    moved, far = (numbers.widened(numbers.narrowed(row, "") + np.uint16(steps)) for steps in (1, 16))
    assert np.array_equal(earlier.check(0, moved, 1e-9).posterior, row)
    with pytest.raises(reuse.WrongRowError):
        earlier.check(0, moved, 0.0)
    with pytest.raises(reuse.WrongRowError):
        earlier.check(0, far, 1e-9)


def test_finished_shards_keep_their_errors(tmp_path: Path, vae: Artifact) -> None:
    """An interrupted attempt leaves rounded latents: what they lost is read from their rows."""
    images = make_images(tmp_path / "store", write(tmp_path / "images"))
    inputs = {"images": images, "autoencoder": vae}
    config = EncodeConfig(store="fp16", write_webdataset=True)
    identity = encode.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    dead = replace(Store.open(str(tmp_path / "a")).writer("latents", identity), attempt="a1")
    for shard in range(len(images.entries("*.tar"))):
        encode.Encoder(config, inputs, dead, Silent(), "cpu").work(shard)
    recovered = encode.STAGE.execute(config, inputs, replace(dead, attempt="a2", previous=("a1",)), Silent())
    fresh = encode.STAGE.execute(config, inputs, Store.open(str(tmp_path / "b")).writer("latents", identity), Silent())
    assert recovered.counts == fresh.counts
    assert recovered.counts["store_error"]["mean"]["max"] > 0
    assert recovered.manifest.digest == fresh.manifest.digest
    stream: Any = open_latents(TrainConfig(reader="webdataset"), fresh, Silent())
    assert stream.store == "fp16"
    dataset: Any = open_latents(TrainConfig(), fresh, Silent())
    assert dataset.info.store == "fp16"


def test_latents_beyond_fp16_are_refused_by_the_encoder(tmp_path: Path, vae: Artifact) -> None:
    inputs = {"images": make_images(tmp_path / "store", write(tmp_path / "images")), "autoencoder": vae}
    out = Store.open(str(tmp_path / "latents")).writer("latents", "1" * 64)
    for store in ("fp16", "bf16"):
        encoder = encode.Encoder(EncodeConfig(store=store), inputs, out, Silent(), "cpu")
        encoder.model.quant_conv.bias.data[:4] = 1e5
        if store == "fp16":
            with pytest.raises(UserError, match=r"images-00000\.tar reach 1000.*, and fp16 ends at 65504; set"):
                encoder.work(0)
            assert not list(tmp_path.rglob("*.arrow"))
        else:
            assert encoder.work(0)["rounding"][0].max() > 100
