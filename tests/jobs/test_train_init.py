"""`train.init_from`: what it names, and what a training makes of it, as a step and by its command."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, model_config
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS, MODEL_WEIGHTS
from edt_core.training.checkpoint import ema_model, load_checkpoint
from jobs.models.initial import Initial, initial_source
from jobs.models.open import load_model
from jobs.stages import train
from tests.support.jobs import Chain, command
from tests.support.local_ray import local_ray_train
from tests.support.models import released
from tests.support.trainings import with_version

CONFIG = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, max_steps=2, log_every=1, checkpoint_every=1)


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def config_from(location: object, **fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({**CONFIG.model_dump(), "init_from": str(location), **fields})


def source(location: object, **fields: Any) -> Initial:
    found = initial_source(config_from(location, **fields))
    assert found is not None
    return found


def made(folder: Path, latents: Artifact, location: object, progress: Silent | None = None, **fields: Any) -> Artifact:
    """What the train stage makes from the model at a location."""
    config = config_from(location, **fields)
    inputs: dict[str, Any] = {"latents": latents, "init": source(location, **fields)}
    identity = train.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    out = ArtifactWriter(Folder.at(folder), "checkpoint", identity)
    return train.STAGE.execute(config, inputs, out, progress or Heard())


def final_weights(artifact: Artifact, name: str = EMA_WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(artifact.directory(artifact.counts["final"]) / name)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_name_is_no_part_of_the_fingerprint_and_what_it_names_is(trained: Artifact, folder: Path) -> None:
    plain, named = {"latents": "a" * 64}, config_from("x@champion")
    assert train.STAGE.fingerprint(named, plain) == train.STAGE.fingerprint(CONFIG, plain)
    one = train.STAGE.fingerprint(named, {**plain, "init": source(folder).fingerprint})
    other = train.STAGE.fingerprint(named, {**plain, "init": source(trained.folder.uri).fingerprint})
    assert len({one, other, train.STAGE.fingerprint(CONFIG, plain)}) == 3
    assert train.STAGE.fingerprint(named, {**plain, "images": "b" * 64}) == train.STAGE.fingerprint(CONFIG, plain)
    raw = config_from("x@champion", init_weights="raw")
    assert train.STAGE.fingerprint(raw, plain) != train.STAGE.fingerprint(named, plain)


def test_an_artifact_and_its_checkpoint_are_one_model(trained: Artifact) -> None:
    final = trained.directory(trained.counts["final"])
    by_artifact, by_folder = source(trained.folder.uri), source(final)
    assert by_artifact.fingerprint == by_folder.fingerprint
    assert by_artifact.checkpoint == by_folder.checkpoint == trained.fingerprint
    earlier = source(final.parent / trained.counts["checkpoints"][0])
    assert earlier.fingerprint != by_folder.fingerprint
    assert source(trained.folder.uri, init_weights="raw").fingerprint != by_artifact.fingerprint


@pytest.mark.parametrize("form", ["artifact", "checkpoint", "raw", "diffusers", "released"])
def test_each_form_gives_its_weights(
    form: str, trained: Artifact, model: DiffusionTransformer, folder: Path, latents_artifact: Artifact, tmp_path: Path
) -> None:
    """With max_steps 0 the artifact holds the model as the first step would find it."""
    final = trained.directory(trained.counts["final"])
    location = {"diffusers": folder, "checkpoint": final}.get(form, trained.folder.uri)
    if form == "released":
        location = released(tmp_path, "EDT-Tiny/2")
    fields = {"init_weights": "raw"} if form == "raw" else {}
    artifact = made(tmp_path / "out", latents_artifact, location, max_steps=0, **fields)
    expected = {
        "diffusers": model.state_dict(),
        "raw": load_file(final / MODEL_WEIGHTS),
        "released": torch.load(location, weights_only=False)["ema"] if form == "released" else {},
    }.get(form, load_file(final / EMA_WEIGHTS))
    for name in (EMA_WEIGHTS, MODEL_WEIGHTS):
        assert equal(final_weights(artifact, name), {key: value.float() for key, value in expected.items()})
    assert artifact.manifest.inputs["init"] == source(location, **fields).fingerprint


def test_a_checkpoint_of_the_version_before_gives_its_weights(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path
) -> None:
    final = trained.directory(trained.counts["final"])
    before = with_version(Path(shutil.copytree(final, tmp_path / "before")), 2)
    artifact = made(tmp_path / "out", latents_artifact, before, max_steps=0)
    assert equal(final_weights(artifact), load_file(final / EMA_WEIGHTS))
    assert load_checkpoint(artifact.directory(artifact.counts["final"])).version == 3


def test_a_training_goes_on_from_it_and_leaves_nothing_beside(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, training_here: None
) -> None:
    heard = Heard()
    artifact = made(tmp_path / "one", latents_artifact, trained.folder.uri, heard, lr=1e-12, lr_final=1e-12)
    before = load_file(trained.directory(trained.counts["final"]) / EMA_WEIGHTS)
    after = final_weights(artifact, MODEL_WEIGHTS)
    assert max(float((after[name].float() - before[name]).abs().max()) for name in before) < 1e-6
    assert not [name for name in artifact.data.walk() if name.startswith(".")]
    assert not (tmp_path / "one" / ".initial").exists()
    again = made(tmp_path / "two", latents_artifact, trained.folder.uri, lr=1e-12, lr_final=1e-12)
    assert again.manifest.digest == artifact.manifest.digest


def test_an_attempt_that_ended_before_its_first_checkpoint_begins_with_the_model_again(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, training_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tmp_path / "whole", latents_artifact, trained.folder.uri)
    with monkeypatch.context() as patch:
        patch.setattr("edt_core.training.trainer.Trainer.train_step", _killed)
        with pytest.raises(MemoryError):
            made(tmp_path / "cut", latents_artifact, trained.folder.uri)
    assert (tmp_path / "cut" / ".initial").exists()
    assert made(tmp_path / "cut", latents_artifact, trained.folder.uri).manifest.digest == whole.manifest.digest


def _killed(*_: object) -> None:
    raise MemoryError("killed")


def test_a_checkpoint_that_is_there_needs_no_base_model(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, training_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is resumed reads its own checkpoint, also where the base model is gone by then."""
    final = trained.directory(trained.counts["final"])
    shutil.copytree(final, tmp_path / "base")
    whole = made(tmp_path / "whole", latents_artifact, tmp_path / "base")
    config, inputs = config_from(tmp_path / "base"), {"latents": latents_artifact, "init": source(tmp_path / "base")}
    out = ArtifactWriter(Folder.at(tmp_path / "cut"), "checkpoint", whole.fingerprint)
    from edt_core.training.trainer import Trainer

    step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "train_step", lambda self, batch, draws: step(self, batch, draws) if batch.step == 0 else _killed()
        )
        with pytest.raises(MemoryError):
            train.STAGE.execute(config, inputs, out, Heard())
    shutil.rmtree(tmp_path / "base")
    assert train.STAGE.execute(config, inputs, out, Heard()).manifest.digest == whole.manifest.digest


def test_what_a_form_does_not_have_is_refused(folder: Path, trained: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init_weights is raw, but .* has averaged weights alone"):
        source(folder, init_weights="raw")
    with pytest.raises(UserError, match=r"init_optimizer is keep, but .* has no optimizer state"):
        source(folder, init_optimizer="keep")
    with pytest.raises(UserError, match=r"train.init_from: there is no model at .*nowhere; give a registered model"):
        source(tmp_path / "nowhere")
    assert source(trained.folder.uri, init_optimizer="keep").fingerprint != source(trained.folder.uri).fingerprint


def test_a_model_that_cannot_fit_is_known_before_anything_runs(folder: Path, trained: Artifact) -> None:
    final = trained.directory(trained.counts["final"])
    damaged = replace(source(folder), model_config={"architecture": "edt", "name": 3})
    with pytest.raises(UserError, match=r"the model configuration of .* cannot be read"):
        damaged.check(model_config("EDT-Tiny/2", 32, 4))
    for location in (folder, trained.folder.uri, final):
        start = source(location)
        start.check(model_config("EDT-Tiny/2", 64, 7))
        with pytest.raises(
            UserError, match=r"\(EDT-Tiny/2\) does not fit DiT-Tiny/2.*architecture 'edt', and .* 'dit'"
        ):
            start.check(model_config("DiT-Tiny/2", 32, 4))


def test_a_model_that_changed_meanwhile_is_refused(folder: Path, trained: Artifact, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    looked_up = source(tmp_path / "model")
    (path,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"model has changed since it was looked up.*run again"):
        looked_up.read(CONFIG)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match=r"model is gone; put it back"):
        looked_up.read(CONFIG)


def test_fields_of_a_start_without_one_are_refused(latents_artifact: Artifact, tmp_path: Path) -> None:
    for fields in ({"init_weights": "raw"}, {"init_optimizer": "keep"}, {"trainable": "difffit"}):
        config = CONFIG.model_copy(update=fields)
        out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "0" * 64)
        (name,) = fields
        with pytest.raises(UserError, match=rf"train.{name} is {fields[name]}, but train.init_from is not set"):
            train.STAGE.execute(config, {"latents": latents_artifact}, out, Silent())


def test_few_parameters_give_an_ordinary_model(
    folder: Path, model: DiffusionTransformer, latents_artifact: Artifact, tmp_path: Path, training_here: None
) -> None:
    """Its final weights are whole; of its checkpoints each holds the delta; it can be started from again."""
    artifact = made(tmp_path / "one", latents_artifact, folder, trainable="difffit", lr=1e-2, ema_decay=0.5)
    final = artifact.directory(artifact.counts["final"])
    base, model = model.state_dict(), ema_model(final)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base[name])}
    assert moved >= {"blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.bias"}  # the scales are merged into the first
    assert not any(name.endswith(("gamma", "qkv.weight", "fc1.weight")) for name in moved)
    delta = load_file(artifact.directory("checkpoints/step-00000002") / EMA_WEIGHTS)
    assert sum(value.numel() for value in delta.values()) == artifact.counts["trained_parameters"]
    assert artifact.counts["trained_parameters"] < 0.2 * artifact.counts["parameters"]
    assert artifact.counts["trainable"] == "difffit"
    assert not [name for name in artifact.data.walk() if name.startswith(".")]
    for use in (source, load_model):
        with pytest.raises(UserError, match=r"step-00000002 holds only the trained tensors of a fine-tuning"):
            use(str(artifact.directory("checkpoints/step-00000002")))
    again = made(tmp_path / "two", latents_artifact, artifact.folder.uri, max_steps=0)
    assert equal(final_weights(again), model.state_dict())


def test_few_parameters_are_resumed_with_their_base(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, training_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edt_core.training.trainer import Trainer

    whole = made(tmp_path / "whole", latents_artifact, trained.folder.uri, trainable="difffit")
    step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "train_step", lambda self, batch, draws: step(self, batch, draws) if batch.step == 0 else _killed()
        )
        with pytest.raises(MemoryError):
            made(tmp_path / "cut", latents_artifact, trained.folder.uri, trainable="difffit")
    assert (tmp_path / "cut" / "checkpoints" / "step-00000001").exists()
    cut = made(tmp_path / "cut", latents_artifact, trained.folder.uri, trainable="difffit")
    assert cut.manifest.digest == whole.manifest.digest


def test_untrained_few_parameters_are_the_base_model(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path
) -> None:
    artifact = made(tmp_path, latents_artifact, trained.folder.uri, trainable="difffit", max_steps=0)
    base = load_file(trained.directory(trained.counts["final"]) / EMA_WEIGHTS)
    assert equal(dict(ema_model(artifact.directory(artifact.counts["final"])).state_dict()), base)


@pytest.mark.slow  # each of these is tested without Ray: test_training_ranks, _shards, test_streaming_shards
@pytest.mark.ray
@pytest.mark.parametrize(("trainable", "shard"), [("all", "none"), ("difffit", "optimizer")])
def test_two_workers_train_what_one_process_trains(
    trainable: str, shard: str, folder: Path, latents_artifact: Artifact, tmp_path: Path, ray_session: None
) -> None:
    """Each of the two reads the base model and adapts it alike; gradients of scales and biases are exchanged.

    Those of all parameters are exchanged in test_jobs.py. With a divided state both write one checkpoint. Streamed,
    each has its share of the batches of one.
    """
    fields = {"trainable": trainable, "shard": shard, "reader": "stream"}
    together = made(tmp_path / "two", latents_artifact, folder, Silent(), **fields, num_workers=2)
    with local_ray_train():
        alone = made(tmp_path / "one", latents_artifact, folder, Silent(), **fields)
    assert together.fingerprint == alone.fingerprint
    weights, others = final_weights(together), final_weights(alone)
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-5), name


def test_the_command_takes_it(chain: Chain, folder: Path, tmp_path: Path, training_here: None) -> None:
    """The model's classes are called `class 0` and so on, the images' 0 to 3: without --images rows go in order."""
    arguments = (chain["latents"].folder.uri, str(tmp_path / "out"), "--model", "EDT-Tiny/2", "--max-steps", "0")
    assert "--init INPUT" not in command("train", "--help").stdout
    named = command("train", *arguments, "--init-from", str(folder), "--images", chain["images"].folder.uri)
    assert named.returncode == 2
    assert "no class name in common: the base model has class 0, class 1, class 2, class 3" in named.stderr
    done = command("train", *arguments, "--init-from", str(folder))
    assert done.returncode == 0, done.stderr
    assert "class rows are taken in order" in done.stderr
    artifact = Artifact.open(str(tmp_path / "out"))
    assert artifact.manifest.inputs["init"] == source(folder).fingerprint
    assert "nothing has changed" in command("train", *arguments, "--init-from", str(folder)).stderr
