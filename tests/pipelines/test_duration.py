"""How long a run will take: at the pace of earlier artifacts that are alike, or of a few timed steps; else nothing."""

import pytest

from edt_core.config import ClassifierConfig, EncodeConfig, SampleConfig, TrainConfig
from edt_core.evaluation.config import EvaluateConfig
from edt_core.models import model_config
from edt_core.store.manifest import Manifest
from pipelines.setup.duration import Pace, Work, about, expected_seconds, timed_pace, training_seconds
from pipelines.setup.hardware import Hardware

LAPTOP = Hardware(cpus=2, memory=16 << 30)


def made(kind: str, seconds: float, counts: dict[str, object], reused: bool = False, **config: object) -> Manifest:
    again = {"rows": 3} if reused else None
    return Manifest(kind, "0" * 64, config, {}, (), counts, duration_s=seconds, reused=again)


def test_a_step_takes_as_long_as_its_work_at_the_pace_of_the_newest_like_it() -> None:
    encoded = [made("latents", 20.0, {"images": 400, "image_size": 32})]
    assert expected_seconds(Work("latents", EncodeConfig(), 1000, 32), encoded) == pytest.approx(50.0)
    assert expected_seconds(Work("latents", EncodeConfig(), 1000, 64), encoded) is None  # of another size
    assert expected_seconds(Work("latents", EncodeConfig(), None, 32), encoded) is None
    assert expected_seconds(Work("latents", EncodeConfig(), 4000, 32), encoded) is None  # start-up time would decide
    extended = [made("latents", 1.0, {"images": 1000, "image_size": 32}, reused=True), *encoded]
    assert expected_seconds(Work("latents", EncodeConfig(), 1000, 32), extended) == pytest.approx(50.0)
    fitted = [made("classifier", 30.0, {}, steps=300)]
    assert expected_seconds(Work("classifier", ClassifierConfig(steps=100)), fitted) == pytest.approx(10.0)
    assert expected_seconds(Work("evaluation", EvaluateConfig()), [made("evaluation", 2.0, {})]) == 2.0
    assert expected_seconds(Work("evaluation", EvaluateConfig()), []) is None


def test_a_training_and_its_samples_are_like_those_of_the_same_model() -> None:
    trained = [
        made("checkpoint", 100.0, {"images_seen": 4800, "model": "EDT-Tiny/2"}),
        made("checkpoint", 9.0, {"images_seen": 0, "model": "EDT-Tiny/2"}),
    ]
    config = TrainConfig(model="EDT-Tiny/2", max_steps=200, global_batch_size=48)
    assert expected_seconds(Work("checkpoint", config, 400, 32, "EDT-Tiny/2"), trained) == pytest.approx(200.0)
    assert expected_seconds(Work("checkpoint", config, 400, 32, "EDT-S/2"), trained) is None
    none = config.model_copy(update={"max_steps": 0})
    assert expected_seconds(Work("checkpoint", none, 400, 32, "EDT-Tiny/2"), trained) == 9.0
    sampled = [made("features", 10.0, {"model": "EDT-Tiny/2"}, num_samples=40, num_sampling_steps=10)]
    chain = SampleConfig(num_samples=80, num_sampling_steps=10)
    assert expected_seconds(Work("features", chain, model="EDT-Tiny/2"), sampled) == pytest.approx(20.0)
    assert expected_seconds(Work("features", chain, model=None), sampled) is None


def test_a_few_steps_are_timed_on_this_machine() -> None:
    config = TrainConfig(model="EDT-Tiny/2", max_steps=100, global_batch_size=8, num_workers=1)
    pace = timed_pace(config, model_config("EDT-Tiny/2", 32, num_classes=10), 1 << 20, LAPTOP)
    assert isinstance(pace, Pace)
    assert pace.images_per_s > 0
    assert 1 <= pace.steps <= 10
    assert training_seconds(config, 400, pace, LAPTOP) == pytest.approx(800 / pace.images_per_s)


def test_what_does_not_fit_here_is_not_timed() -> None:
    small = model_config("EDT-Tiny/2", 32, num_classes=10)
    config = TrainConfig(model="EDT-Tiny/2")
    assert "no" in str(timed_pace(config.model_copy(update={"use_gpu": True}), small, 1, LAPTOP))
    assert "memory" in str(timed_pace(config, small, 9 << 30, LAPTOP))


def test_workers_share_the_processors_and_have_a_gpu_each() -> None:
    pace, gpus = Pace(100.0, 5, 8), Hardware(cpus=8, gpus=("H100",) * 2)
    config = TrainConfig(max_steps=100, global_batch_size=40, num_workers=4)
    assert training_seconds(config, 400, pace, LAPTOP) == 40.0
    assert training_seconds(config.model_copy(update={"use_gpu": True}), 400, pace, gpus) == 20.0
    assert training_seconds(config.model_copy(update={"max_hours": 0.005}), 400, pace, LAPTOP) == 18.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45, "45 s"), (150, "2.5 min"), (1500, "25 min"), (7200, "2 h"), (12600, "3.5 h"), (2e6, "23 days")],
)
def test_an_estimate_has_two_digits(seconds: float, text: str) -> None:
    assert about(seconds) == text
