"""Evaluations that begin beside a training, and the training that they end."""

import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import ReferenceConfig, TrainConfig
from edt_core.errors import Stopped, UserError
from edt_core.evaluation.config import AlongConfig
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact
from edt_core.store.store import Store
from jobs.runtime.cluster import room_for
from jobs.stages import along, reference, sample, train
from jobs.stages.training import context, follow
from jobs.stages.training.follow import ALONG, UNTIL, Beside, Follower, Made, ran_out
from tests.jobs.test_train_init import Heard
from tests.support.jobs import Chain, command, execute

METRIC = "fd_classifier"
CURVE = AlongConfig(every=2, num_samples=12, num_sampling_steps=2, unit_size=4, cfg_scale=1)
PLAIN = TrainConfig(
    model="EDT-Tiny/2", global_batch_size=8, max_steps=8, log_every=1, checkpoint_every=3, keep_every=2, lr=1e-3
)
PATIENT = PLAIN.model_copy(update={"patience": 1})
WORSE_AT_6 = {2: 5.0, 4: 3.0, 6: 3.5, 8: 1.0}


@pytest.fixture(scope="module")
def networks(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    from tests.support.local_ray import local_ray

    with local_ray():
        real = execute(
            reference.STAGE,
            ReferenceConfig(),
            tmp_path_factory.mktemp("reference"),
            images=chain["images"],
            classifier=chain["classifier"],
        )
    return {"autoencoder": chain["autoencoder"], "classifier": chain["classifier"], "reference": real}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides look for news without a pause."""
    monkeypatch.setattr(follow, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(context, "_LOOK_EVERY_S", 0.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first sample of every unit that is drawn."""
    found: list[int] = []
    draw = sample.Sampler._draw
    monkeypatch.setattr(
        sample.Sampler, "_draw", lambda self, unit: found.append(int(unit.indices[0])) or draw(self, unit)
    )
    return found


def beside(networks: Mapping[str, Artifact]) -> Beside:
    made = {role: Made(item.manifest.kind, item.fingerprint) for role, item in networks.items()}
    return Beside(CURVE, made, METRIC, True)


def trained(
    root: Path, chain: Chain, networks: Mapping[str, Artifact], config: TrainConfig, progress: Silent | None = None
) -> Artifact:
    """A training in its place of a store, with evaluations beside it."""
    role = ALONG if config.patience is None else UNTIL
    inputs: dict[str, Any] = {"latents": chain["latents"], role: beside(networks), **networks}
    identity = train.STAGE.fingerprint(config, {name: item.fingerprint for name, item in inputs.items()})
    out = Store.open(str(root)).writer("checkpoint", identity)
    return train.STAGE.execute(config, inputs, out, progress or Silent())


def curve(root: Path, checkpoint: Artifact, networks: Mapping[str, Artifact]) -> Artifact:
    inputs = {**networks, "checkpoint": checkpoint}
    identity = along.STAGE.fingerprint(CURVE, {role: item.fingerprint for role, item in inputs.items()})
    return along.STAGE.execute(CURVE, inputs, Store.open(str(root)).writer("along", identity), Silent())


def waits(step: int, until: threading.Event, reached: list[int]) -> Callable[..., None]:
    """A report of a training's steps that waits at one of them until something has happened."""

    def step_done(self: Any, done: int, total_steps: int, loss: float) -> None:
        reached.append(done)
        if done == step:
            assert until.wait(timeout=300)

    return step_done


@pytest.fixture
def measured_values(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The values that are measured, by step, in place of those of samples."""
    values = dict(WORSE_AT_6)
    monkeypatch.setattr(along, "sampled", lambda *_: iter(()))
    monkeypatch.setattr(along, "rows", lambda config, steps, *_: [{METRIC: values[step]} for step in steps])
    return values


def test_the_patience_runs_out_after_so_many_evaluations_without_a_better_value() -> None:
    assert ran_out(WORSE_AT_6, 1, True) == 6
    assert ran_out(WORSE_AT_6, 2, True) is None
    assert ran_out(WORSE_AT_6, 1, False) == 4
    assert ran_out({}, 1, True) is None
    assert ran_out({2: math.nan, 4: 2.0, 6: 2.0}, 1, True) == 2
    assert ran_out({2: math.nan, 4: 2.0, 6: 2.0}, 2, True) is None
    assert ran_out({8: 3.0, 2: 5.0, 6: 4.0, 4: 4.0}, 1, True) == 6  # in order of step


@pytest.mark.usefixtures("training_here", "at_once")
def test_what_is_drawn_beside_the_training_is_not_drawn_again(
    chain: Chain, networks: dict[str, Artifact], tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = threading.Event()
    rows = along.rows

    def counted(*arguments: Any) -> list[dict[str, float]]:
        found = rows(*arguments)
        measured.set()
        return found

    monkeypatch.setattr(along, "rows", counted)
    monkeypatch.setattr(context.RayContext, "step_done", waits(5, measured, []))
    training = trained(tmp_path, chain, networks, PLAIN)
    early = len(drawn)
    assert early >= 3  # the checkpoint of step 2 has three units
    made = curve(tmp_path, training, networks)
    assert len(drawn) == 4 * 3
    assert len(list(made.folder.names())) == 2  # the manifest and this attempt: that of the training is gone
    alone = execute(along.STAGE, CURVE, tmp_path / "alone", **networks, checkpoint=training)
    assert alone.manifest.digest == made.manifest.digest
    assert len(drawn) == 2 * 4 * 3


@pytest.mark.usefixtures("training_here", "at_once")
@pytest.mark.parametrize("when", ["at once", "after the training"])
def test_a_training_ends_where_the_patience_ran_out_whenever_that_is_known(
    chain: Chain,
    networks: dict[str, Artifact],
    tmp_path: Path,
    measured_values: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    reached: list[int] = []
    if when == "at once":
        known = threading.Event()
        look = Follower._follow

        def followed(self: Follower) -> bool:
            found = look(self)
            if self.ended_at() is not None:
                known.set()
            return found

        monkeypatch.setattr(Follower, "_follow", followed)
        monkeypatch.setattr(context.RayContext, "step_done", waits(7, known, reached))
    else:
        monkeypatch.setattr(follow, "room_for", lambda most, **needed: 0)
    heard = Heard()
    ended = trained(tmp_path, chain, networks, PATIENT, heard)
    assert reached[-1:] in ([], [7])  # not 8
    assert ended.counts["steps"] == 6
    assert ended.counts["patience"] == {"metric": METRIC, "evaluations": 1, "of": 8}
    assert [int(name[-8:]) for name in ended.counts["checkpoints"]] == [2, 4, 6]
    assert [row["step"] for row in train.history(ended)] == [1, 2, 3, 4, 5, 6]
    assert "ended at step 6 of 8: fd_classifier was not better in 1 evaluations" in heard.warnings[-1]
    whole = execute(train.STAGE, PLAIN, tmp_path / "whole", latents=chain["latents"])
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-00000006/{name}"
        digests = [[e.sha256 for e in artifact.entries(path)] for artifact in (ended, whole)]
        assert digests[0] == digests[1]


@pytest.mark.usefixtures("training_here", "at_once", "measured_values")
def test_a_training_that_was_killed_beyond_its_end_ends_at_the_same_step(
    chain: Chain, networks: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "room_for", lambda most, **needed: 0)
    whole = trained(tmp_path / "whole", chain, networks, PATIENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, chain, networks, PATIENT)
    assert trained(tmp_path, chain, networks, PATIENT).manifest.digest == whole.manifest.digest


def _killed(self: Follower) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("training_here", "at_once", "measured_values")
def test_a_stop_request_is_heard_between_two_evaluations(
    chain: Chain, networks: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "room_for", lambda most, **needed: 0)
    rows, heard = along.rows, Heard()

    def stops(*arguments: Any) -> list[dict[str, float]]:
        monkeypatch.setattr(heard, "stopping", lambda: True)
        return rows(*arguments)

    monkeypatch.setattr(along, "rows", stops)
    with pytest.raises(Stopped, match="run again to continue"):
        trained(tmp_path, chain, networks, PATIENT, heard)
    assert trained(tmp_path, chain, networks, PATIENT).counts["steps"] == 6


@pytest.mark.usefixtures("training_here", "at_once")
def test_a_checkpoint_that_cannot_be_measured_does_not_end_the_training(
    chain: Chain, networks: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, heard = threading.Event(), Heard()
    monkeypatch.setattr(heard, "warn", lambda message: heard.warnings.append(message) or said.set())
    monkeypatch.setattr(context.RayContext, "step_done", waits(5, said, []))
    monkeypatch.setattr(along, "check_networks", _refused)
    assert trained(tmp_path, chain, networks, PLAIN, heard).counts["steps"] == 8
    assert "patience" not in trained(tmp_path, chain, networks, PLAIN).counts
    assert heard.warnings == ["no evaluations beside the training, they are made after it: another reference"]


def _refused(*_: Any) -> None:
    raise UserError("another reference")


def test_networks_are_taken_when_the_store_has_them(networks: dict[str, Artifact], tmp_path: Path) -> None:
    store, evaluations = Store.open(str(tmp_path)), beside(networks)
    given = {name: networks[name] for name in ("autoencoder", "classifier")}
    assert evaluations.networks(store, given) is None
    real = networks["reference"]
    assert real.folder.local is not None
    shutil.copytree(real.folder.local, tmp_path / "reference" / real.fingerprint)
    found = evaluations.networks(store, given)
    assert found is not None
    assert {role: item.fingerprint for role, item in found.items()} == {
        role: item.fingerprint for role, item in networks.items()
    }


def test_only_what_can_end_a_training_is_part_of_its_identity(networks: dict[str, Artifact]) -> None:
    plain, inputs = {"latents": "a" * 64}, {role: item.fingerprint for role, item in networks.items()}
    evaluations = beside(networks)
    alone = train.STAGE.fingerprint(PLAIN, plain)
    assert train.STAGE.fingerprint(PLAIN, {**plain, **inputs, ALONG: evaluations.fingerprint}) == alone
    more = Beside(CURVE.model_copy(update={"num_samples": 13}), evaluations.inputs, METRIC, True)
    identities = {
        train.STAGE.fingerprint(PATIENT, {**plain, UNTIL: identity})
        for identity in (evaluations.fingerprint, more.fingerprint)
    }
    assert len(identities | {alone}) == 3


def test_evaluations_begin_on_what_nobody_uses_or_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    states: list[str] = ["CREATED", "REMOVED"]
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.9, "GPU": 1.0})
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: {str(i): {"state": s} for i, s in enumerate(states)})
    assert room_for(4, CPU=1, GPU=0) == 2
    assert room_for(4, CPU=0.5, GPU=0.5) == 2
    assert room_for(4, CPU=0.5, GPU=1) == 1
    assert room_for(1, CPU=0.5, GPU=0) == 1
    assert room_for(4, CPU=4, GPU=0) == 0
    states.append("PENDING")
    assert room_for(4, CPU=1, GPU=0) == 0


def test_patience_needs_a_pipeline(chain: Chain, tmp_path: Path) -> None:
    refused = command("train", chain["latents"].folder.uri, str(tmp_path), "--patience", "2")
    assert refused.returncode == 2
    assert "train.patience is 2, but nothing is evaluated along this training" in refused.stderr
