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
from edt_core.models import ModelConfig, build_model
from edt_core.training import loop, trainer
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.optim import flatten_state
from edt_core.training.ranks import Ranks
from edt_core.training.speed import compiled
from edt_core.training.speed.compiled import failure
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.trainer import COMPILE_SECONDS, Trainer
from tests.support.models import shallow_config
from tests.support.trainings import OneOfOne, contents, narrow, place, plain_update, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")
Backend = Any
SHORT = TrainConfig(global_batch_size=8, max_steps=4, checkpoint_every=2, log_every=2, max_grad_norm=1.0, lr=1e-3)


def with_options(options: dict[str, Any]) -> TrainConfig:
    return SHORT.model_copy(update=options)


PLAIN = {"model": "DiT-Tiny/2", "masked_loss": False}


@pytest.fixture(scope="module")
def speck() -> ModelConfig:
    return narrow()


@pytest.fixture(scope="module")
def plain_blocks() -> ModelConfig:
    """A model whose blocks are all of one shape: compiling it takes the fewest graphs."""
    return shallow_config("DiT-Tiny/2")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compile_with(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "eager" the update is not even traced, with "aot_eager" no more than that: see test_training_update.py."""

    def compile_parts(model: Any, **options: Any) -> None:
        compiled.compile_parts(model, backend, **options)

    monkeypatch.setattr(loop, "compile_parts", compile_parts)
    traced = partial(CompiledUpdate, backend="eager" if backend == "aot_eager" else backend)
    monkeypatch.setattr(loop, "CompiledUpdate", plain_update if backend == "eager" else traced)


def test_a_compiled_training_is_the_same_and_says_how_long_compiling_took(
    plain_blocks: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with("aot_eager", monkeypatch)
    plain = train(with_options(PLAIN), plain_blocks, dataset, LocalContext(tmp_path / "a"))
    context = LocalContext(tmp_path / "b")
    ours = train(with_options({**PLAIN, "compile": True}), plain_blocks, dataset, context)
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()
    for row, other in zip(plain.history.rows, ours.history.rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert [row["step"] for row in context.reported if COMPILE_SECONDS in row] == [0]
    assert not context.warnings


@pytest.mark.slow
@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_parts_and_the_exchange_of_gradients_train_the_same(
    checkpointing: bool, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP around compiled blocks, in micro-batches of two sizes; test_training_ranks.py has two processes."""
    compile_with("aot_eager", monkeypatch)
    rows = []
    for value in (False, True):
        config = with_options({"compile": value, "micro_batch_size": 3, "activation_checkpointing": checkpointing})
        context = LocalContext(tmp_path / str(value), OneOfOne())
        rows.append(train(config, speck, dataset, context).history.rows)
        assert not context.warnings
    for row, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_without_a_compiler_a_training_continues_with_the_same_bits(
    when: str, plain_blocks: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that failed is computed again with the same draws, and the user reads why, once."""

    def broken(graph: GraphModule, example_inputs: list[Tensor]) -> Any:
        raise FileNotFoundError("no C++ compiler was found\nand more lines")

    def breaks_later(graph: GraphModule, example_inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        return aot_autograd(fw_compiler=nop, bw_compiler=broken)(graph, example_inputs)

    compile_with(broken if when == "forward" else breaks_later, monkeypatch)
    plain = train(with_options(PLAIN), plain_blocks, dataset, LocalContext(tmp_path / "a"))
    context = LocalContext(tmp_path / "b")
    ours = train(with_options({**PLAIN, "compile": True}), plain_blocks, dataset, context)
    assert same(ours.model.state_dict(), plain.model.state_dict())
    assert contents(place(tmp_path / "a", SHORT.max_steps)) == contents(place(tmp_path / "b", SHORT.max_steps))
    (warning,) = context.warnings
    assert "could not be compiled" in warning
    assert "no C++ compiler was found" in warning
    assert "more lines" not in warning
    assert "train.compile=false" in warning
    assert not any(COMPILE_SECONDS in row for row in context.reported)


GRAPHS = "reduce-overhead"


def test_with_cuda_graphs_asked_for_a_training_on_a_cpu_is_the_compiled_one(
    plain_blocks: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no graphs: this is what is around them, updates that are masked and come before the check."""
    compile_with("eager", monkeypatch)
    states, contexts = [], []
    for value in (True, GRAPHS):
        contexts.append(LocalContext(tmp_path / str(value)))
        config = with_options({**PLAIN, "compile": value, "timestep_sampler": "uniform"})
        states.append(train(config, plain_blocks, dataset, contexts[-1]))
    assert same(states[0].model.state_dict(), states[1].model.state_dict())
    assert states[0].history == states[1].history
    for step in (2, 4):
        assert contents(place(tmp_path / "True", step)) == contents(place(tmp_path / GRAPHS, step))
    (warning,) = contexts[1].warnings
    assert not contexts[0].warnings
    assert "train.compile is reduce-overhead" in warning
    assert "a CPU, which has no CUDA graphs" in warning


def test_a_masked_step_that_is_not_finite_changes_nothing_and_is_left_out(
    plain_blocks: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages and optimizer have the same bits after the step that is not finite as before it."""
    compile_with("eager", monkeypatch)
    accumulate, update, begin = trainer.accumulate_gradient, Trainer._update, loop._begin
    running, kept = list[Trainer](), list[list[str]]()
    bad, masks = 3, list[bool]()

    def spoiled(model: Any, config: TrainConfig, *others: Any) -> Tensor:
        losses = accumulate(model, config, *others)
        if running[0].state.step == bad and not running[0].untried and bad not in running[0].state.skipped:
            for parameter in model.parameters():
                parameter.grad.fill_(torch.nan)
            return losses * torch.nan
        return losses

    def watched(self: Trainer, norm: Tensor, wanted: Tensor | None = None) -> None:
        before = tensors(self)
        update(self, norm, wanted)
        if wanted is not None and not wanted:
            kept.append([name for name, value in tensors(self).items() if not torch.equal(value, before[name])])
        masks.append(wanted is not None)

    def run(value: Any) -> Any:
        running.clear()
        config = with_options({**PLAIN, "compile": value, "max_steps": 6})
        return train(config, plain_blocks, dataset, LocalContext(tmp_path / str(value)))

    monkeypatch.setattr(loop, "_begin", lambda *args: running.append(begin(*args)) or running[-1])
    monkeypatch.setattr(trainer, "accumulate_gradient", spoiled)
    monkeypatch.setattr(Trainer, "_update", watched)
    plain = run(True)
    assert not any(masks)
    assert not kept
    ours = run(GRAPHS)
    assert kept == [[]]
    assert (ours.rollbacks, ours.skipped) == (1, {bad}) == (plain.rollbacks, plain.skipped)
    assert same(ours.model.state_dict(), plain.model.state_dict())
    assert contents(place(tmp_path / "True", 6)) == contents(place(tmp_path / GRAPHS, 6))


def tensors(running: Trainer) -> dict[str, Tensor]:
    """Copies of all that an update changes."""
    state = running.state
    found = {**state.model.state_dict(), **flatten_state(state.optimizer)[0]}
    found |= {f"average {name}": value for name, value in state.ema.averages[0].items()}
    return {name: value.clone() for name, value in found.items()}


def test_graphs_are_warmed_up_before_the_first_step_and_begin_anew_with_each(
    plain_blocks: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with("eager", monkeypatch)
    begin, begun = loop._begin, list[int]()

    def on_gpu(*arguments: Any) -> Trainer:
        made = begin(*arguments)
        made.graphs = True
        monkeypatch.setattr(trainer, "begin_step", lambda: begun.append(made.state.step))
        return made

    monkeypatch.setattr(loop, "_begin", on_gpu)
    plain = train(with_options({**PLAIN, "compile": True}), plain_blocks, dataset, LocalContext(tmp_path / "a"))
    assert begun == [0, 0, 0, 0, 1, 2, 3]  # three passes that are thrown away
    assert plain.step == 4


def test_inductor_is_asked_for_graphs_by_the_names_that_it_has(
    speck: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another backend gets no options of inductor's."""
    seen = []

    def compile_(function: Any, **options: Any) -> Any:
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    for backend, graphs in (("inductor", True), ("inductor", False), ("aot_eager", True)):
        compiled.compile_parts(build_model(speck), backend, graphs=graphs)
    kinds = len(seen) // 3
    asked, *others = seen[0]["options"], *(options["options"] for options in seen[kinds:])
    assert set(asked) <= set(torch._inductor.list_options())
    assert asked["triton.cudagraphs"] is True
    assert others == [None] * (2 * kinds)
    assert torch._inductor.list_mode_options("reduce-overhead")["triton.cudagraphs"] is True


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
