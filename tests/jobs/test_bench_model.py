"""`edt bench model`: what it compares is equal, and what it prints is whole. No times."""

import math

import pytest
import torch

from edt_core.acceptance.authors import plain_model
from edt_core.models import DIFFUSION_NAMES, count_macs, create_model, draw_masks
from jobs.benchmark import command, model
from jobs.benchmark.model import ModelBench, bench_models
from jobs.benchmark.networks import made_model
from jobs.benchmark.table import Row
from tests.support.models import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PAIR = ("EDT-Tiny/2", "MDTv2-Tiny/2")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("masked", [False, True])
def test_the_plain_model_is_ours(name: str, masked: bool) -> None:
    """Output and gradient; in a masked pass the last rows of the batch alone are masked."""
    ours = made_model(create_model(name, 32, 10).config).train()
    plain = plain_model(ours)
    masks = draw_masks(ours.config, 2, torch.Generator().manual_seed(0)) if masked else None
    inputs = torch.randn(4, 4, 8, 8), torch.arange(4) * 200, torch.arange(4)
    outputs = [network(*inputs, masks or None) for network in (ours, plain)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for own, other in zip(ours.parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_side", lambda device: 64)
    monkeypatch.setattr(model, "matmul_rate", lambda device, precision: 1e10)


@pytest.fixture
def tiny_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside S, B and XL, a pair of the tiny models, which no paper has."""
    monkeypatch.setitem(model._PAPER, "Tiny", (2.0, 3.0))


@pytest.mark.usefixtures("small_products", "tiny_pair")
def test_every_row_is_measured() -> None:
    measured = ModelBench(PAIR, (32,), ("fp32", "bf16"), CPU, batch_size=2, turns=1, processor_time=True)
    rows = [row for part in bench_models(measured) for row in part]
    assert [row.what.partition(" at")[0] for row in rows] == [
        *[f"{kind}, {name}" for name in PAIR for kind in ["forward"] * 2 + ["forward and backward"] * 2],
        *["inference, EDT-Tiny/2 and MDTv2-Tiny/2"] * 2,
        *["training pass, EDT-Tiny/2 and MDTv2-Tiny/2"] * 2,
    ]
    for row in rows:
        assert row.ratio is not None, row
        assert math.isfinite(row.ratio), row
        assert row.ratio > 0, row
        assert row.against, row
    assert [row.target for row in rows[:3]] == ["at least 1.3", "", ""]
    assert [row.target for row in rows[-2:]] == ["at least 1.92; the paper's 3.0"] * 2
    macs = [count_macs(create_model(name, 32)) for name in PAIR]
    assert f"the MDTv2 has {macs[1] / macs[0]:.2f} times the MACs" in rows[-4].figure


@pytest.mark.usefixtures("small_products", "tiny_pair")
def test_what_takes_too_long_or_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ModelBench(PAIR, (32,), ("fp32",), CPU, limit_s=0)
    slow = [row for part in bench_models(measured) for row in part]
    monkeypatch.setattr(model, "_free_memory", lambda device: 1 << 20)
    large = [row for part in bench_models(measured) for row in part]
    for rows, ending in ((slow, "s; --limit-s is 0"), (large, "GiB, and 0.0 GiB are free")):
        assert [row.what for row in rows] == [f"{name} at 32" for name in (*PAIR, " and ".join(PAIR))]
        assert all(row.figure.startswith("left out: takes about ") for row in rows)
        assert all(row.figure.endswith(ending) and row.ratio is None for row in rows)


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[ModelBench] = []

    def measured(bench: ModelBench) -> list[list[Row]]:
        seen.append(bench)
        return [[Row("forward", "1", "plain", 1.5)]]

    monkeypatch.setattr(model, "bench_models", measured)
    command.main(["model", "--models", "DiT-S/8, EDT-S/2", "--image-size", "256,512", "--precision", "fp32,bf16"])
    command.main(["model", "--batch-size", "1", "--turns", "3"])
    assert "| forward | 1 | plain | 1.50 |  |" in capsys.readouterr().out
    assert (seen[0].models, seen[0].image_sizes) == (("DiT-S/8", "EDT-S/2"), (256, 512))
    assert seen[0].precisions == ("fp32", "bf16")
    assert (seen[1].models, seen[1].image_sizes) == (DIFFUSION_NAMES, (256, 512))
    assert (seen[1].batch_size, seen[1].turns) == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--models", "EDT-Q/2"], "--models: unknown EDT-Q/2; known models: EDT-S/2, "),
        (["train", "--image-size", "256,512"], "but `edt bench train` measures one"),
        (["model", "--precision", "fp8"], "unknown fp8; known: fp32, tf32, bf16"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
