"""A training whose model is compiled, and one whose compiler does not work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.models import ModelConfig
from edt_core.training import loop
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.ranks import Ranks
from edt_core.training.speed import compiled
from edt_core.training.speed.compiled import failure
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.trainer import COMPILE_SECONDS
from tests.support.trainings import contents, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")
Backend = Any
SHORT = TrainConfig(global_batch_size=8, max_steps=4, checkpoint_every=2, log_every=2, max_grad_norm=1.0, lr=1e-3)


def with_options(options: dict[str, Any]) -> TrainConfig:
    return SHORT.model_copy(update=options)


@pytest.fixture(scope="module")
def speck() -> ModelConfig:
    return narrow()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compile_with(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_parts(model: Any) -> None:
        compiled.compile_parts(model, backend)

    monkeypatch.setattr(loop, "compile_parts", compile_parts)
    monkeypatch.setattr(loop, "CompiledUpdate", partial(CompiledUpdate, backend=backend))


def test_a_compiled_training_is_the_same_and_says_how_long_compiling_took(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with("aot_eager", monkeypatch)
    plain = train(SHORT, speck, dataset, LocalContext(tmp_path / "a"))
    context = LocalContext(tmp_path / "b")
    ours = train(with_options({"compile": True}), speck, dataset, context)
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()
    for row, other in zip(plain.history.rows, ours.history.rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert [row["step"] for row in context.reported if COMPILE_SECONDS in row] == [0]
    assert not context.warnings


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_without_a_compiler_a_training_continues_with_the_same_bits(
    when: str, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that failed is computed again with the same draws, and the user reads why, once."""

    def broken(graph: GraphModule, example_inputs: list[Tensor]) -> Any:
        raise FileNotFoundError("no C++ compiler was found\nand more lines")

    def breaks_later(graph: GraphModule, example_inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        return aot_autograd(fw_compiler=nop, bw_compiler=broken)(graph, example_inputs)

    compile_with(broken if when == "forward" else breaks_later, monkeypatch)
    plain = train(SHORT, speck, dataset, LocalContext(tmp_path / "a"))
    context = LocalContext(tmp_path / "b")
    ours = train(with_options({"compile": True}), speck, dataset, context)
    assert same(ours.model.state_dict(), plain.model.state_dict())
    assert contents(place(tmp_path / "a", SHORT.max_steps)) == contents(place(tmp_path / "b", SHORT.max_steps))
    (warning,) = context.warnings
    assert "could not be compiled" in warning
    assert "no C++ compiler was found" in warning
    assert "more lines" not in warning
    assert "train.compile=false" in warning
    assert not any(COMPILE_SECONDS in row for row in context.reported)


class OneOfTwo(Ranks):
    """A rank whose other rank has failed."""

    def gather(self, values: Tensor, sizes: Any) -> Tensor:
        return torch.cat([values, torch.ones_like(values)], dim=1)


def test_ranks_compile_together_or_not_at_all() -> None:
    """Their weights would differ in the last bits, and so more and more."""
    assert failure(lambda: None, Ranks()) is None
    assert failure(lambda: None, OneOfTwo()) == "on another worker"
    assert failure(lambda: 1 / 0, Ranks()) == "ZeroDivisionError: division by zero"


def test_a_lack_of_memory_is_not_the_compiler_s() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        failure(run, Ranks())
