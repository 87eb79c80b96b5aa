"""A GPU that is too small for its micro-batch: told once, with the one that fits. How long workers wait."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.store.artifact import Artifact
from edt_core.training.estimate import estimate, largest_micro_batch
from edt_core.training.trainer import Trainer
from jobs.runtime.process_group import OneMachineConfig
from jobs.runtime.verdict import device_full
from jobs.stages import train
from jobs.stages.train import _trainer
from tests.support import local_ray
from tests.support.local_training import trained

CONFIG = TrainConfig(
    model="EDT-Tiny/2", global_batch_size=8, max_steps=4, log_every=1, checkpoint_every=1, max_failures=3
)
EDT = model_config("EDT-Tiny/2", 32, 10)


class Restarting(local_ray.Trainer):
    """A Ray Train job of one worker, which is started again after any error."""

    starts = 0

    def fit(self) -> None:
        for failure in range(1 + CONFIG.max_failures):
            type(self).starts += 1
            try:
                super().fit()
                break
            except Exception:
                if failure == CONFIG.max_failures:
                    raise


@pytest.fixture
def restarting(training_here: None, monkeypatch: pytest.MonkeyPatch) -> type[Restarting]:
    monkeypatch.setattr(train, "_trainer", Restarting)
    monkeypatch.setattr(Restarting, "starts", 0)
    return Restarting


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int], Exception | None]) -> None:
    """Steps that fail as `fails(step, samples)` says, where samples are those of a forward pass."""
    step = Trainer.train_step

    def failing_step(self: Trainer, batch: Any, draws: Any) -> Any:
        error = fails(batch.step, self.config.micro_batch())
        if error is not None:
            raise error
        return step(self, batch, draws)

    monkeypatch.setattr(Trainer, "train_step", failing_step)


def test_a_full_gpu_is_told_once_and_the_micro_batch_that_it_names_resumes(
    restarting: type[Restarting], latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def too_much(step: int, samples: int) -> Exception | None:
        tried.append(step)
        full = step > 1 and samples > 4
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if full else None

    failing(monkeypatch, too_much)
    with pytest.raises(UserError, match="ran out of memory with 8 samples in a forward pass") as raised:
        trained(CONFIG, latents_artifact, tmp_path / "out")
    assert tried == [0, 1, 2]
    assert restarting.starts == 2  # the second one finds the record, and ends
    named = re.search(r"--set train\.micro_batch_size=(\d+)", str(raised.value))
    assert named is not None
    assert named[1] == "4"
    artifact = trained(CONFIG.model_copy(update={"micro_batch_size": 4}), latents_artifact, tmp_path / "out")
    assert tried == [0, 1, 2, 2, 3]
    assert artifact.counts["steps"] == 4


def test_another_failure_is_still_tried_again(
    restarting: type[Restarting], latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([RuntimeError("a cable"), MemoryError("of the host"), OSError("a disk")])
    failing(monkeypatch, lambda step, samples: next(failures, None) if step == 2 else None)
    assert trained(CONFIG, latents_artifact, tmp_path / "out").counts["steps"] == 4
    assert restarting.starts == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_named_micro_batch_is_the_largest_that_the_estimate_allows(precision: str) -> None:
    config = CONFIG.model_copy(update={"global_batch_size": 256, "precision": precision})

    def needed(size: int) -> int:
        return estimate(config.model_copy(update={"micro_batch_size": size}), EDT, 1).memory

    assert largest_micro_batch(config, EDT, needed(100)) == 100
    assert largest_micro_batch(config, EDT, needed(101) - 1) == 100
    assert largest_micro_batch(config, EDT, needed(1)) >= 1
    assert largest_micro_batch(config, EDT, needed(1) - 1) == 0
    memory = needed(120)
    usable = largest_micro_batch(config, EDT, int(0.9 * memory))
    assert 1 < usable < 120
    message = str(device_full(config, EDT, 1, memory))
    assert f"--set train.micro_batch_size={usable} (edt train: --micro-batch-size {usable})" in message
    assert "train.shard" not in message
    assert "--set train.shard=optimizer also saves memory" in str(device_full(config, EDT, 2, memory))
    divided = config.model_copy(update={"shard": "optimizer"})
    assert "--set train.shard=full also saves memory" in str(device_full(divided, EDT, 2, memory))
    assert "train.shard" not in str(device_full(divided.model_copy(update={"optimizer": "muon"}), EDT, 2, memory))
    assert f"with 256 samples in a forward pass and {memory / (1 << 30):.1f} GiB for the worker" in message


def test_the_named_micro_batch_fits_also_where_the_optimizer_s_copies_exceed_the_activations_of_one() -> None:
    """EDT-XL: with one sample or two, the optimizer needs more than the activations, and memory does not grow."""
    model = model_config("EDT-XL/2", 256)
    config = CONFIG.model_copy(update={"global_batch_size": 64, "precision": "bf16", "use_gpu": True})

    def needed(size: int) -> int:
        return estimate(config.model_copy(update={"micro_batch_size": size}), model, 1).memory

    assert needed(1) == needed(2) < needed(32)
    assert largest_micro_batch(config, model, needed(32)) == 32
    assert largest_micro_batch(config, model, needed(33) - 1) == 32
    assert largest_micro_batch(config, model, 1 << 50) == 64


@pytest.mark.parametrize(
    ("memory", "workers", "advice"),
    [
        (1 << 40, 1, "--set train.micro_batch_size=4 "),  # the estimate says that it fits, and it did not
        (1 << 40, 8, "no smaller micro-batch fits. Rerun with --set train.activation_checkpointing=true"),
        (1 << 10, 1, "no smaller micro-batch fits"),
        (None, 3, "--set train.micro_batch_size=1 "),  # a share of 3
    ],
)
def test_what_is_advised_where_the_estimate_does_not_help(memory: int | None, workers: int, advice: str) -> None:
    assert advice in str(device_full(CONFIG, EDT, workers, memory))


@pytest.mark.parametrize("own", [True, False])
def test_workers_wait_for_each_other_as_long_as_configured(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "is_own", lambda: own)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **options: SimpleNamespace(**options))
    out = SimpleNamespace(data=SimpleNamespace(child=lambda name: SimpleNamespace(uri=name)))
    for config, seconds in ((CONFIG, 7200), (CONFIG.model_copy(update={"timeout_s": 60}), 60)):
        made = _trainer(config, {"out": out}, "run-0").torch_config
        assert (made.timeout_s, isinstance(made, OneMachineConfig)) == (seconds, own)
