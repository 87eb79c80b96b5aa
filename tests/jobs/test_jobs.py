"""The jobs on Ray, on real digits: each stage feeds the next, and says clearly what it cannot do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import (
    AutoencoderConfig,
    ClassifierConfig,
    EncodeConfig,
    EvaluateConfig,
    PreprocessConfig,
    ReferenceConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)
from edt_core.data.images import center_crop, decode_rgb
from edt_core.data.latents import LatentDataset, LatentShard
from edt_core.data.shards import read_image_shard, read_tar
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.storage import Folder
from jobs import autoencoder, classifier, encode, evaluate, preprocess, reference, sample, train
from jobs.train_context import CLOCK
from jobs.verb import image_source
from tests.support.jobs import execute

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def chain(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Images, autoencoder, latents and classifier of 32 real digits."""
    root = tmp_path_factory.mktemp("chain")
    source = image_source(SourceConfig(path=str(digits_folder)))
    images = execute(preprocess.VERB, PreprocessConfig(image_size=32, images_per_shard=12), root / "i", source=source)
    vae = execute(
        autoencoder.VERB,
        AutoencoderConfig(downsample_factor=4, base_channels=8, steps=4, batch_size=8),
        root / "a",
        images=images,
    )
    latents = execute(
        encode.VERB, EncodeConfig(batch_size=5, write_webdataset=True), root / "l", images=images, autoencoder=vae
    )
    judge = execute(
        classifier.VERB, ClassifierConfig(steps=8, base_channels=4, feature_dim=8), root / "c", images=images
    )
    return {"source": source, "images": images, "autoencoder": vae, "latents": latents, "classifier": judge}


def test_image_shards_hold_every_image_once_and_cropped(chain: dict[str, Artifact], digits_folder: Path) -> None:
    images = chain["images"]
    assert [entry.rows for entry in images.entries("images-*.tar")] == [12, 12, 8]
    found = [sample for path in images.paths("images-*.tar") for sample in read_image_shard(path)]
    expected = sorted(path.relative_to(digits_folder) for path in digits_folder.glob("*/*"))
    assert [(s.source, str(s.label)) for s in found] == [(str(path), path.parent.name) for path in expected]
    assert [s.key for s in found] == [f"{i:08d}" for i in range(32)]
    for item in found[::7]:
        crop = center_crop(decode_rgb((digits_folder / item.source).read_bytes()), 32)
        assert np.array_equal(item.pixels(), np.asarray(crop))
    assert images.read_json("classes.json") == ["0", "1", "2", "3"]


def test_preprocess_gives_the_same_bytes_again(chain: dict[str, Artifact], tmp_path: Path) -> None:
    again = execute(
        preprocess.VERB,
        PreprocessConfig(image_size=32, images_per_shard=12),
        tmp_path,
        source=chain["source"],
    )
    assert again.manifest.digest == chain["images"].manifest.digest


def test_latent_shards_follow_the_image_shards_row_by_row(chain: dict[str, Artifact]) -> None:
    latents, images = chain["latents"], chain["images"]
    shards = [LatentShard(path) for path in latents.paths("latents-*.arrow")]
    assert [entry.rows for entry in latents.entries("*.arrow")] == [12, 12, 8]
    for shard, image_path, twin in zip(
        shards, images.paths("images-*.tar"), latents.paths("latents-*.tar"), strict=True
    ):
        keys = [sample.key for sample in read_image_shard(image_path)]
        assert shard.keys.to_pylist() == keys == [json.loads(m["json"])["key"] for _, m in read_tar(twin)]
        assert shard.info.source_shard == image_path.name
        assert shard.info.scaling_factor == chain["autoencoder"].counts["scaling_factor"]


TRAIN = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=6,
    log_every=2,
    checkpoint_every=3,
    num_workers=2,
    lr=1e-3,
)


@pytest.fixture(scope="module")
def trained(chain: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return execute(train.VERB, TRAIN, tmp_path_factory.mktemp("t"), latents=chain["latents"])


def test_two_ddp_workers_train_what_one_process_trains(
    chain: dict[str, Artifact], trained: Artifact, tmp_path: Path
) -> None:
    from edt_core.training.checkpoint import ema_model
    from edt_core.training.context import LocalContext
    from edt_core.training.loop import train as loop

    dataset = LatentDataset(chain["latents"].paths("*.arrow"))
    alone = loop(TRAIN, train.config_of(TRAIN.model, chain["latents"].counts), dataset, LocalContext(tmp_path))
    rows = [json.loads(line) for line in trained.path("history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for one, two in zip(alone.history.rows, rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    together = ema_model(trained.directory(trained.counts["final"])).state_dict()
    for name, value in alone.ema.averages[0].items():
        assert np.allclose(together[name].numpy(), value.numpy(), atol=2e-5), name


def test_a_training_leaves_its_checkpoints_and_no_debris(trained: Artifact) -> None:
    assert trained.counts["checkpoints"] == ["step-00000003", "step-00000006"]
    assert trained.counts["final"] == "checkpoints/step-00000006"
    assert trained.counts["parameters"] > 0
    names = [path.name for path in trained.data.local.rglob("*")]
    debris = (".ray-train", ".verdict", ".staging", ".journal", ".device_time")
    assert not [name for name in names if name.startswith(debris)]


def test_what_a_training_took_is_counted(chain: dict[str, Artifact], trained: Artifact) -> None:
    from edt_core.models import training_flops

    counts, config = trained.counts, train.config_of(TRAIN.model, chain["latents"].counts)
    assert counts["images_seen"] == 6 * TRAIN.global_batch_size
    assert counts["training_flops"] == counts["images_seen"] * training_flops(config, masked=True)
    assert 0 < counts["device_hours"] < trained.manifest.duration_s * TRAIN.num_workers / 3600


def test_a_training_goes_on_from_an_earlier_attempt(
    chain: dict[str, Artifact], trained: Artifact, tmp_path: Path
) -> None:
    """What a killed driver leaves: a first attempt with one checkpoint, half of another, and no manifest."""
    identity = train.VERB.fingerprint(TRAIN, {"latents": chain["latents"].fingerprint})
    killed = ArtifactWriter(Folder.at(tmp_path), "checkpoint", identity, "a1")
    killed.add_tree(trained.directory("checkpoints/step-00000003"), "checkpoints/step-00000003")
    killed.write_bytes("checkpoints/step-00000005/model.safetensors", b"half a checkpoint")
    killed.data.write_bytes(CLOCK, b"7200.0")
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", identity, "a2", ("a1",))

    class Told(Silent):
        def __init__(self) -> None:
            self.folder = str(tmp_path / "told")

        def metrics(self, values, step) -> None:
            with open(self.folder, "a") as file:
                file.write(f"{step}\n")

    artifact = train.VERB.execute(TRAIN, {"latents": chain["latents"]}, out, Told())
    assert (tmp_path / "told").read_text().split() == ["4", "6"]  # not 2: steps 1 to 3 were not trained again
    name = f"{artifact.counts['final']}/ema.safetensors"
    assert artifact.path(name).read_bytes() == trained.path(name).read_bytes()
    assert 2 < artifact.counts["device_hours"] < 3, "the time of the attempt that was killed is part of it"
    assert artifact.counts["training_flops"] == trained.counts["training_flops"]


@pytest.mark.parametrize("model", ["EDT-Tiny/2", "DiT-Tiny/2"])
def test_no_steps_is_the_untrained_model(model: str, chain: dict[str, Artifact], tmp_path: Path) -> None:
    """Also of a DiT, which has no masked pass to train with, by the default recipe."""
    untrained = execute(train.VERB, TrainConfig(model=model, max_steps=0), tmp_path, latents=chain["latents"])
    assert untrained.counts["final"] == "checkpoints/step-00000000"
    assert untrained.path("history.jsonl").read_bytes() == b""
    assert (untrained.counts["images_seen"], untrained.counts["training_flops"]) == (0, 0)


SAMPLE = SampleConfig(num_samples=22, num_sampling_steps=3, cfg_scale=1.5, unit_size=3, keep_images=10, num_workers=1)


@pytest.fixture(scope="module")
def features(chain: dict[str, Artifact], trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return execute(sample.VERB, SAMPLE, tmp_path_factory.mktemp("f"), checkpoint=trained, **models(chain))


def models(chain: dict[str, Artifact]) -> dict[str, Artifact]:
    return {role: chain[role] for role in ("autoencoder", "classifier")}


def test_features_do_not_hang_on_the_number_of_workers(
    chain: dict[str, Artifact], trained: Artifact, features: Artifact, tmp_path: Path
) -> None:
    """Nor on the order of units: seven workers finish them as they come."""
    seven = SAMPLE.model_copy(update={"num_workers": 7, "num_cpus_per_worker": 0})
    again = execute(sample.VERB, seven, tmp_path, checkpoint=trained, **models(chain))
    assert len(again.manifest.files) == 8
    assert again.fingerprint == features.fingerprint
    assert again.manifest.digest == features.manifest.digest


def test_units_join_to_every_sample_once(features: Artifact) -> None:
    joined = sample.load_units(features)
    assert joined["classifier.features"].shape == (22, 8)
    assert joined["labels"].tolist() == [i % 4 for i in range(22)]
    assert joined["images"].shape == (10, 32, 32, 3)


def test_missing_doubled_and_shuffled_units_are_refused(features: Artifact, tmp_path: Path) -> None:
    """Also where the manifest agrees with what is there."""
    names = [entry.path for entry in features.manifest.files]
    orders = {"missing": names[:-1], "doubled": [names[0], *names[:-1]], "shuffled": [names[1], names[0], *names[2:]]}
    for case, order in orders.items():
        out = ArtifactWriter(Folder.at(tmp_path / case), "features", features.fingerprint)
        for name, source in zip(names, order, strict=False):
            out.write_bytes(name, features.path(source).read_bytes())
        broken = out.commit(features.manifest.config, {}, features.counts)
        with pytest.raises(UserError, match=r"samples 0..21 of seed 0 once each and in order"):
            sample.load_units(broken)


def test_a_flipped_bit_of_a_unit_is_found(features: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(features.folder.local, copy)
    unit = copy / "unit-00004.safetensors"
    data = bytearray(unit.read_bytes())
    data[-1] ^= 1
    unit.write_bytes(data)
    with pytest.raises(UserError, match="unit-00004"):
        sample.load_units(Artifact.open(copy))


def test_metrics_come_from_the_kept_features_with_their_protocol(
    chain: dict[str, Artifact], features: Artifact, tmp_path: Path
) -> None:
    real = execute(
        reference.VERB,
        ReferenceConfig(),
        tmp_path / "r",
        images=chain["images"],
        classifier=chain["classifier"],
    )
    result = execute(evaluate.VERB, EvaluateConfig(), tmp_path / "e", features=features, reference=real)
    metrics, protocol = result.counts["metrics"], result.counts["protocol"]
    names = {"fd", "kid", "precision", "recall", "accuracy"}
    assert set(metrics) == {f"{name}_classifier" for name in names}
    assert all(np.isfinite(value) for value in metrics.values())
    assert protocol["num_samples"] == 22
    assert protocol["reference_images"] == 32
    assert "22 samples" in result.counts["warnings"][0]
    assert "kid_classifier" in result.counts["warnings"][0]
    foreign = {**real.counts, "extractors": {"classifier": "f" * 64}}
    other = replace(real, manifest=replace(real.manifest, counts=foreign))
    larger = replace(real, manifest=replace(real.manifest, counts={**real.counts, "image_size": 64}))
    with pytest.raises(UserError, match="samples are images of 32 px and the reference of 64 px"):
        execute(evaluate.VERB, EvaluateConfig(), tmp_path / "y", features=features, reference=larger)
    with pytest.raises(UserError, match="different extractors"):
        execute(evaluate.VERB, EvaluateConfig(), tmp_path / "x", features=features, reference=other)


def test_a_published_autoencoder_from_a_local_folder(chain: dict[str, Artifact], tmp_path: Path) -> None:
    folder = chain["autoencoder"].directory("autoencoder")
    config = AutoencoderConfig(pretrained=str(folder), downsample_factor=4)
    published = autoencoder.published_source(config)
    assert published is not None
    taken = execute(autoencoder.VERB, config, tmp_path / "a", published=published)
    assert taken.counts["scaling_factor"] == chain["autoencoder"].counts["scaling_factor"]
    with pytest.raises(UserError, match=r"'downsample_factor': 4.*'downsample_factor': 8"):
        execute(autoencoder.VERB, AutoencoderConfig(pretrained=str(folder)), tmp_path / "b", published=published)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = AutoencoderConfig(pretrained=str(copy), downsample_factor=4)
    before = autoencoder.published_source(config)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert autoencoder.published_source(config) != before  # the same name, but not the same thing
