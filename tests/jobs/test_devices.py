"""A GPU that was asked for is used, or refused with what was found; the manifest states the worker's device."""

from pathlib import Path

import pytest
import torch

import jobs.stages.encode
import jobs.stages.sample
from edt_core.config import AutoencoderConfig, ClassifierConfig, EncodeConfig, ReferenceConfig, SampleConfig, Section
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from jobs.commands import draw
from jobs.runtime import devices
from jobs.runtime.devices import check_gpu, device_name, kind_of_devices
from tests.support.jobs import STAGE_OF, TRAIN, Chain, execute


def machine(
    monkeypatch: pytest.MonkeyPatch, *, usable: bool = False, built: str | None = None, driver: str | None = None
) -> None:
    """A machine whose PyTorch and driver are simulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)


def test_a_worker_without_a_gpu_is_on_the_cpu_even_beside_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, usable=True)
    assert device_name(0) == "cpu"
    assert device_name(0.25) == device_name(1) == "cuda"


@pytest.mark.parametrize(
    ("built", "driver", "found", "remedy"),
    [
        (None, None, "is built for CPUs, no NVIDIA driver", "install the CUDA build of torch"),
        (None, "570.86.10", "is built for CPUs, NVIDIA driver 570.86.10", "install the CUDA build of torch"),
        ("13.0", None, "is built for CUDA 13.0, no NVIDIA driver", "install the NVIDIA driver"),
        ("13.0", "535.54.03", "is built for CUDA 13.0, NVIDIA driver 535.54.03", "supports CUDA 13.0 (580 or newer)"),
        ("12.6", "535.54.03", "is built for CUDA 12.6, NVIDIA driver 535.54.03", "the driver is new enough"),
        ("99.0", "535.54.03", "is built for CUDA 99.0, NVIDIA driver 535.54.03", "supports CUDA 99.0, or install"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_what_was_found(
    built: str | None, driver: str | None, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, built=built, driver=driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError) as raised:
        device_name(0.5)
    text = str(raised.value)
    assert text.startswith("num_gpus is 0.5 for this worker, but PyTorch finds no usable GPU on ")
    assert torch.__version__ in text
    assert "CUDA_VISIBLE_DEVICES is '3'" in text
    assert found in text
    assert remedy in text
    assert "num_gpus_per_worker=0" in text


def test_sample_names_its_own_option(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(UserError, match=r"--device is cuda, but .*; or leave --device out, or use cpu"):
        draw._device("cuda")
    assert draw._device("auto") == "cpu"
    machine(monkeypatch, usable=True)
    assert draw._device("auto") == draw._device("cuda") == "cuda"
    check_gpu("something")


ASKING: dict[str, Section] = {
    "autoencoder": AutoencoderConfig(downsample_factor=4, base_channels=8, steps=1, num_gpus=1),
    "classifier": ClassifierConfig(steps=1, base_channels=4, feature_dim=8, num_gpus=1),
    "encode": EncodeConfig(num_gpus_per_worker=1),
    "reference": ReferenceConfig(keep_features=4, num_gpus_per_worker=1),
    "train": TRAIN.model_copy(update={"use_gpu": True, "num_workers": 1}),
}


@pytest.mark.parametrize("name", ASKING)
def test_every_stage_refuses_and_writes_nothing(
    name: str, chain: Chain, tmp_path: Path, training_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, built="13.0")
    stage = STAGE_OF[name]
    extras = ("classifier",) if name == "reference" else ()
    inputs = {role: chain[role] for role in (*stage.roles, *extras)}
    with pytest.raises(UserError, match=r"PyTorch finds no usable GPU on .*built for CUDA 13\.0"):
        execute(stage, ASKING[name], tmp_path, None, **inputs)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_manifest_states_the_device_of_the_worker_not_of_the_driver(
    chain: Chain, trained: Artifact, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may be on a head node without a GPU. What the workers report is simulated."""

    assert kind_of_devices(["cpu", "cuda"]) == kind_of_devices(["cuda:1"]) == "gpu"
    assert kind_of_devices(["cpu"]) == "cpu"
    inputs = {role: chain[role] for role in ("images", "autoencoder")}
    encoded = execute(STAGE_OF["encode"], EncodeConfig(), tmp_path / "latents", None, **inputs)
    assert encoded.manifest.environment["device"] == "cpu"

    def reported(work: object) -> object:
        def call(worker: object, number: int) -> object:
            result = work(worker, number)  # type: ignore[operator]
            return {**result, "device": "cuda"} if isinstance(result, dict) else (result[0], "cuda")

        return call

    for worker in (jobs.stages.encode.Encoder, jobs.stages.sample.Sampler):
        monkeypatch.setattr(worker, "work", reported(worker.work))
    machine(monkeypatch)  # of the driver
    latents = execute(STAGE_OF["encode"], EncodeConfig(), tmp_path / "again", None, **inputs)
    models = {role: chain[role] for role in ("autoencoder", "classifier")}
    config = SampleConfig(num_samples=4, num_sampling_steps=2, unit_size=4)
    features = execute(STAGE_OF["sample"], config, tmp_path / "features", None, checkpoint=trained, **models)
    assert latents.manifest.environment["device"] == features.manifest.environment["device"] == "gpu"
    assert latents.fingerprint == encoded.fingerprint
    for name in ("autoencoder", "classifier"):
        assert chain[name].manifest.environment["device"] == "cpu"
