"""`edt bench train`: what it compares is equal, and what it prints is whole. No times."""

import math
from pathlib import Path

import pytest
import torch

from edt_core.acceptance.authors import PlainStep, plain_model
from edt_core.acceptance.subjects import step_inputs
from edt_core.models import EDT
from edt_core.training.ranks import Ranks
from edt_core.training.state import initial_state
from jobs.benchmark import train as bench
from jobs.benchmark.command import main
from jobs.benchmark.table import Row
from jobs.benchmark.train import BareStep, Subject, bench_train

CPU = torch.device("cpu")
SUBJECT = Subject("EDT-Tiny/2", 64, batch_size=4)


def drawn(model: EDT) -> EDT:
    """Weights at random everywhere: a fresh model's output is zero, whatever it computes before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model


def test_the_plain_step_is_ours() -> None:
    """Losses, and weights and averages after three steps: the two differ in nothing but how they compute."""
    config, model_config = SUBJECT.train_config("fp32", ema_decay=0.9), SUBJECT.model_config
    inputs = step_inputs(config, model_config, CPU)
    ours = BareStep(config, model_config, inputs, Ranks())
    drawn(ours.state.model)
    ours.state.ema.averages[0].update({k: v.clone() for k, v in ours.state.model.state_dict().items()})
    plain = PlainStep(config, ours.state.model, inputs)
    for _ in range(3):
        mse, vb = ours().split(2)
        torch.testing.assert_close(plain(), mse + vb, rtol=1e-5, atol=1e-5)
    weights = dict(plain.model.named_parameters())
    for name, parameter in ours.state.model.named_parameters():
        # Adan divides by the size of the gradient: where that is next to nothing, a last bit is a whole step.
        assert (parameter - weights[name]).abs().mean() < 1e-5, name
        assert (ours.state.ema.averages[0][name] - plain.ema[name]).abs().mean() < 1e-5, name


def test_the_plain_model_shares_nothing_with_ours() -> None:
    model = drawn(initial_state(SUBJECT.train_config("fp32"), SUBJECT.model_config).model)
    plain = plain_model(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in plain.parameters())
    assert {type(module).__name__ for module in plain.modules()}.isdisjoint({"Attention", "TokenLinear"})


def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_seconds_of_workers", lambda config, *_: float(config.worker_range[1]))
    monkeypatch.setattr(bench, "matmul_rate", lambda device, precision: 1e10)
    subject = Subject("EDT-Tiny/2", 32, batch_size=2)
    rows = [row for part in bench_train(tmp_path, subject, ("fp32", "bf16"), turns=1) for row in part]
    names = [*["step"] * 4, "training loop", "checkpoint", *["draws"] * 2, "2 workers"]
    assert [row.what.split(",")[0] for row in rows] == names
    for row in rows:
        assert row.ratio is not None, row
        assert math.isfinite(row.ratio), row
        assert row.ratio > 0, row
        assert row.figure, row
        assert row.against, row
    assert rows[-1].ratio == pytest.approx(1.0)


@pytest.mark.extern
def test_the_steps_of_several_processes_are_timed() -> None:
    config = SUBJECT.train_config("fp32", num_workers=2)
    assert bench._seconds_of_workers(config, SUBJECT.model_config, "cpu", 1) > 0


def test_gpu_is_a_command_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Its options, and its exit codes: 2 for wrong ones, and for those of the other parts."""
    for arguments, message in (
        (["gpu", "--sections", "Z"], "--sections is 'Z'"),
        (["--scale", "0.5", "gpu"], "write gpu first"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments, "edt bench")
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[Subject, tuple[str, ...], int]] = []

    def measured(work: Path, subject: Subject, precisions: tuple[str, ...], turns: int) -> list[list[Row]]:
        assert work.is_dir()
        seen.append((subject, precisions, turns))
        return [[Row("step", "1", "plain", 1.5)], [Row("training loop", "2", "bare", 1.0)]]

    monkeypatch.setattr(bench, "bench_train", measured)
    main(["train", "--model", "EDT-Tiny/2", "--image-size", "32", "--precision", "fp32", "--scale", "0.1"])
    assert "| step | 1 | plain | 1.50 |  |\n| training loop | 2 | bare | 1.00 |" in capsys.readouterr().out
    ((subject, precisions, turns),) = seen
    assert (subject.model, subject.image_size, subject.batch_size) == ("EDT-Tiny/2", 32, 2)
    assert (precisions, turns) == (("fp32",), 1)
