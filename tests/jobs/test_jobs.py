"""The jobs on Ray, on real digits: each stage feeds the next, and says clearly what it cannot do."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edt_core.config import (
    AutoencoderConfig,
    ReferenceConfig,
    SampleConfig,
    TrainConfig,
)
from edt_core.data.images import center_crop, decode_rgb
from edt_core.data.latents import LatentShard
from edt_core.data.shards import read_image_shard, read_tar
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from jobs.stages import autoencoder, evaluate, reference, sample, train
from jobs.stages.training.context import CLOCK
from tests.support.jobs import TRAIN, Chain, execute
from tests.support.local_ray import local_ray
from tests.support.processes import beyond_loopback, listeners


def test_image_shards_hold_every_image_once_and_cropped(chain: Chain, digits_folder: Path) -> None:
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


def test_latent_shards_follow_the_image_shards_row_by_row(chain: Chain) -> None:
    latents, images = chain["latents"], chain["images"]
    shards = [LatentShard(path) for path in latents.paths("latents-*.arrow")]
    assert [entry.rows for entry in latents.entries("*.arrow")] == [12, 12, 8]
    for shard, image_path, twin in zip(
        shards, images.paths("images-*.tar"), latents.paths("latents-*.tar"), strict=True
    ):
        keys = [sample.key for sample in read_image_shard(image_path)]
        assert shard.keys.to_pylist() == keys == [json.loads(m["json"])["key"] for _, m in read_tar(twin)]
        assert shard.info.source_shard == image_path.name
        assert shard.info.scale.scaling_factor == chain["autoencoder"].counts["scaling_factor"]


class Told(Silent):
    """Leaves what it hears in files: Ray's workers have a copy of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        with (self.folder / "steps").open("a") as file:
            file.write(f"{step}\n")

    def image(self, name: str, png: bytes, step: int) -> None:
        (self.folder / f"{name}-{step}.png").write_bytes(png)

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None:
        lines = [f"{step} {uri.rsplit('/', 1)[-1]} {digest}\n" for step, (uri, digest) in sorted(kept.items())]
        (self.folder / f"checkpoints-{max(kept)}").write_text("".join(lines))

    def warn(self, message: str) -> None:
        with (self.folder / "warnings").open("a") as file:
            file.write(f"{message}\n")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the training by two workers tells."""
    return tmp_path_factory.mktemp("told")


def watched(job: Mapping[str, Any]) -> None:
    """A worker's part of a training, and at its end what listens in its process."""
    from jobs.stages.train import _worker

    _worker(job)
    seen = json.dumps(sorted(listeners(os.getpid())))
    (job["progress"].folder / f"listeners-{os.getpid()}.json").write_text(seen)


@pytest.fixture(scope="module")
def groups_before() -> set[Path]:
    return process_groups()


def process_groups() -> set[Path]:
    """The files by which workers of one machine meet."""
    return set(Path(tempfile.gettempdir()).glob("edt-process-group-*"))


@pytest.fixture(scope="module")
def by_two(
    chain: Chain, told: Path, groups_before: set[Path], tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> Artifact:
    """A training by two workers of Ray Train, with pictures on the way."""
    config = TRAIN.model_copy(update={"preview_every": 3})
    inputs = {role: chain[role] for role in ("latents", "autoencoder")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_worker", watched)
        return execute(train.STAGE, config, tmp_path_factory.mktemp("t"), Told(told), **inputs)


@pytest.mark.ray
def test_two_ddp_workers_train_what_one_process_trains(by_two: Artifact, trained: Artifact) -> None:
    alone, rows = train.history(trained), train.history(by_two)
    assert [row["step"] for row in alone] == [row["step"] for row in rows] == [2, 4, 6]
    for one, two in zip(alone, rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    together, apart = (sample.averaged_model(made, "cpu").state_dict() for made in (by_two, trained))
    for name, value in apart.items():
        assert np.allclose(together[name].numpy(), value.numpy(), atol=2e-5), name


@pytest.mark.ray
def test_a_training_leaves_its_checkpoints_and_no_debris(by_two: Artifact) -> None:
    assert by_two.counts["checkpoints"] == ["step-00000003", "step-00000006"]
    assert by_two.counts["final"] == "checkpoints/step-00000006"
    assert by_two.counts["parameters"] > 0
    names = [path.name for path in by_two.data.local.rglob("*")]
    debris = (".ray-train", ".verdict", ".staging", ".journal", ".device_time")
    assert not [name for name in names if name.startswith(debris)]


@pytest.mark.ray
def test_pictures_metrics_and_checkpoints_are_told_on_the_way(chain: Chain, by_two: Artifact, told: Path) -> None:
    assert by_two.manifest.inputs == {"latents": chain["latents"].fingerprint}
    assert (told / "steps").read_text().split() == ["2", "4", "6"]
    for step in (3, 6):
        assert Image.open(io.BytesIO((told / f"samples-{step}.png").read_bytes())).size == (128, 128)
    lines = (told / "checkpoints-6").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["3", "step-00000003"], ["6", "step-00000006"]]
    assert by_two.counts["best"] in by_two.counts["checkpoints"]
    assert by_two.counts["steps"] == 6


@pytest.mark.ray
def test_workers_of_a_training_on_one_machine_listen_on_loopback_alone(
    by_two: Artifact, told: Path, groups_before: set[Path]
) -> None:
    """PyTorch's TCP store would listen on every interface, and let anybody change what the workers agree on."""
    seen = [json.loads(path.read_text()) for path in told.glob("listeners-*.json")]
    assert len(seen) == 2
    found = {(str(title), str(address), int(port)) for worker in seen for title, address, port in worker}
    assert found
    assert beyond_loopback(found) == []
    assert process_groups() <= groups_before


@pytest.mark.ray
def test_what_a_training_took_is_counted(chain: Chain, by_two: Artifact) -> None:
    from edt_core.models import training_flops

    counts, config = by_two.counts, train.config_of(TRAIN, chain["latents"].counts)
    assert counts["images_seen"] == 6 * TRAIN.global_batch_size
    assert counts["training_flops"] == counts["images_seen"] * training_flops(config, masked=True)
    assert 0 < counts["device_hours"] < by_two.manifest.duration_s * TRAIN.num_workers / 3600


def test_no_worker_makes_a_step_on_a_damaged_shard(chain: Chain, tmp_path: Path, training_here: None) -> None:
    """It opens the latents, and that is all it does."""
    name = chain["latents"].entries("*.arrow")[1].path
    shutil.copytree(chain["latents"].folder.local, tmp_path / "latents")
    data = bytearray((tmp_path / "latents" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "latents" / name).write_bytes(data)
    damaged = Artifact.open(str(tmp_path / "latents"))
    config = TRAIN.model_copy(update={"num_workers": 1, "max_failures": 0, "checkpoint_every": 1})
    with pytest.raises(UserError, match=rf"{name} has .* another sha256"):
        execute(train.STAGE, config, tmp_path / "out", Told(tmp_path / "told"), latents=damaged)
    assert not (tmp_path / "told" / "steps").exists()
    assert not list((tmp_path / "out").rglob("step-*"))
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_training_goes_on_from_an_earlier_attempt(
    chain: Chain, trained: Artifact, tmp_path: Path, training_here: None
) -> None:
    """What a killed driver leaves: a first attempt with one checkpoint, half of another, and no manifest."""
    identity = train.STAGE.fingerprint(TRAIN, {"latents": chain["latents"].fingerprint})
    killed = ArtifactWriter(Folder.at(tmp_path), "checkpoint", identity, "a1")
    killed.add_tree(trained.directory("checkpoints/step-00000003"), "checkpoints/step-00000003")
    killed.write_bytes("checkpoints/step-00000005/model.safetensors", b"half a checkpoint")
    killed.data.write_bytes(CLOCK, b"7200.0")
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", identity, "a2", ("a1",))

    artifact = train.STAGE.execute(TRAIN, {"latents": chain["latents"]}, out, Told(tmp_path / "told"))
    assert (tmp_path / "told" / "steps").read_text().split() == ["4", "6"]  # not 2: steps 1 to 3 were not trained again
    name = f"{artifact.counts['final']}/ema.safetensors"
    assert artifact.path(name).read_bytes() == trained.path(name).read_bytes()
    assert 2 < artifact.counts["device_hours"] < 3, "the time of the attempt that was killed is part of it"
    assert artifact.counts["training_flops"] == trained.counts["training_flops"]


@pytest.mark.parametrize("model", ["EDT-Tiny/2", "DiT-Tiny/2"])
def test_no_steps_is_the_untrained_model(model: str, chain: Chain, tmp_path: Path) -> None:
    """Also of a DiT, which has no masked pass to train with, by the default recipe."""
    untrained = execute(train.STAGE, TrainConfig(model=model, max_steps=0), tmp_path, latents=chain["latents"])
    assert untrained.counts["final"] == "checkpoints/step-00000000"
    assert untrained.path("history.jsonl").read_bytes() == b""
    assert (untrained.counts["images_seen"], untrained.counts["training_flops"]) == (0, 0)


SAMPLE = SampleConfig(num_samples=22, num_sampling_steps=3, cfg_scale=1.5, unit_size=3, keep_images=10, num_workers=1)


@pytest.fixture(scope="session")
def features(chain: Chain, trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with local_ray():
        return execute(sample.STAGE, SAMPLE, tmp_path_factory.mktemp("f"), checkpoint=trained, **models(chain))


def models(chain: Chain) -> dict[str, Artifact]:
    return {role: chain[role] for role in ("autoencoder", "classifier")}


@pytest.mark.ray
@pytest.mark.slow
def test_features_do_not_hang_on_the_number_of_workers(
    chain: Chain, trained: Artifact, features: Artifact, tmp_path: Path, ray_session: None
) -> None:
    """Nor on the order of units: two workers, two units at once in each, finish them as they come.

    The suite has two workers on two nodes, one of which is lost: test_nodes.py.
    """
    two = SAMPLE.model_copy(update={"num_workers": 2, "num_cpus_per_worker": 0})
    again = execute(sample.STAGE, two, tmp_path, checkpoint=trained, **models(chain))
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
        with pytest.raises(UserError, match=r"samples 0..21 of seed 0, each once and in order"):
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
    chain: Chain, features: Artifact, tmp_path: Path, here: None
) -> None:
    inputs = {"images": chain["images"], "classifier": chain["classifier"]}
    real = execute(reference.STAGE, ReferenceConfig(), tmp_path / "r", **inputs)
    result = execute(evaluate.STAGE, EvaluateConfig(), tmp_path / "e", features=features, reference=real)
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
    with pytest.raises(UserError, match="samples are images of 32 px, those of the reference have 64 px"):
        execute(evaluate.STAGE, EvaluateConfig(), tmp_path / "y", features=features, reference=larger)
    with pytest.raises(UserError, match="different extractors"):
        execute(evaluate.STAGE, EvaluateConfig(), tmp_path / "x", features=features, reference=other)


def test_a_published_autoencoder_from_a_local_folder(chain: Chain, tmp_path: Path) -> None:
    folder = chain["autoencoder"].directory("autoencoder")
    config = AutoencoderConfig(pretrained=str(folder), downsample_factor=4)
    published = autoencoder.published_source(config)
    assert published is not None
    taken = execute(autoencoder.STAGE, config, tmp_path / "a", published=published)
    assert taken.counts["scaling_factor"] == chain["autoencoder"].counts["scaling_factor"]
    with pytest.raises(UserError, match=r"'downsample_factor': 4.*'downsample_factor': 8"):
        execute(autoencoder.STAGE, AutoencoderConfig(pretrained=str(folder)), tmp_path / "b", published=published)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = AutoencoderConfig(pretrained=str(copy), downsample_factor=4)
    before = autoencoder.published_source(config)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert autoencoder.published_source(config) != before  # the same name, but not the same thing
