"""The acceptance of a machine, small and on the CPU: its rows, its file, its exit codes, and what it compares."""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_optimizer import Adan as LibraryAdan

from edt_core.acceptance import authors, command, correctness, exactness, speed
from edt_core.acceptance.adan import Adan
from edt_core.acceptance.command import Section, main
from edt_core.acceptance.options import ChainOptions, TrainOptions
from edt_core.acceptance.rows import Measure, Report, Task, at_least, at_most, figure, run_task
from edt_core.acceptance.subjects import Setting
from edt_core.config import ChainConfig, TrainConfig
from edt_core.training import trainer
from pipelines.setup.acceptance_file import read_measurements
from tests.support.models import shallow_config

CPU = torch.device("cpu")
TINY = shallow_config("EDT-Tiny/2", 32, 10)


def test_options_are_those_of_the_configurations() -> None:
    """The attributes that steps and samplers read have the same defaults without pydantic.

    But for `compile`: on a GPU the default compiles, and a row states what it does.
    """
    train, chain = TrainConfig(), ChainConfig()
    for ours, theirs in ((TrainOptions(), train), (ChainOptions(), chain)):
        for field in (field for field in fields(ours) if field.name != "compile"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    small = {"global_batch_size": 10, "num_workers": 3, "masked_loss": False, "max_steps": 7}
    ours, theirs = TrainOptions(**small), TrainConfig(**small)
    for name in ("worker_range", "ema_decays", "passes"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.micro_batch() == theirs.micro_batch()
    assert ours.total_steps(5) == theirs.total_steps(5)


def test_adan_is_the_library_s() -> None:
    """The same weights and the same state after three steps, by names that a checkpoint has."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    both = [[torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2)]
    optimizers: list[Any] = [Adan(both[0], 1e-2), LibraryAdan(both[1], lr=1e-2, foreach=True)]
    for _ in range(3):
        gradients = [torch.randn_like(tensor) for tensor in start]
        for parameters, optimizer in zip(both, optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    for mine, reference in zip(both[0], both[1], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    assert ours["param_groups"][0]["step"] == theirs["param_groups"][0]["step"] == 3
    for index, state in theirs["state"].items():
        assert state.keys() == ours["state"][index].keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][index][name], value, rtol=1e-5, atol=1e-6)


# --- rows, budget, file, exit code


def planted(*tasks: Task) -> dict[str, Section]:
    return {"A": Section("correctness", 1, lambda setting: iter(tasks))}


def rows_of(measures: list[Measure]) -> Iterator[Measure]:
    yield from measures


def task(name: str, *measures: Measure, **more: Any) -> Task:
    return Task(name, lambda: rows_of(list(measures)), **more)


def failing(error: BaseException) -> Iterator[Measure]:
    yield figure("before", 1.0)
    raise error


def run_planted(monkeypatch: pytest.MonkeyPatch, out: Path, *tasks: Task) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr(command, "SECTIONS", planted(*tasks))
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--sections", "A", "--out", str(out)])
    return int(str(ended.value.code)), json.loads(out.read_text())["rows"]


def test_a_row_has_its_figures_and_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run_planted(monkeypatch, tmp_path / "rows.json", task("one", at_most("error", 0.5, 1.0, "rel. rms")))
    assert code == 0
    (row,) = rows
    assert {**row, "seconds": 0} == {
        "section": "A",
        "name": "error",
        "value": 0.5,
        "unit": "rel. rms",
        "bound": "<= 1",
        "passed": True,
        "seconds": 0,
        "note": "",
    }
    head = json.loads((tmp_path / "rows.json").read_text())
    assert {"card", "driver", "torch", "cuda", "cudnn", "nccl", "code"} <= head.keys()
    assert head["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert "A: 1 passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "measure",
    [at_most("error", 2.0, 1.0), at_most("error", float("nan"), 1.0), at_least("cosine", 0.9, 0.99)],
    ids=["above", "nan", "below"],
)
def test_a_failed_row_is_exit_code_1(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run_planted(monkeypatch, tmp_path / "rows.json", task("one", measure), task("two", figure("f", 1.0)))
    assert code == 1
    assert [row["passed"] for row in rows] == [False, None]
    assert f"failed: {measure.name}" in capsys.readouterr().err


def test_an_error_ends_its_task_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Task("broken", lambda: failing(ValueError("first line\nsecond")))
    code, rows = run_planted(monkeypatch, tmp_path / "rows.json", broken, task("after", figure("f", 1.0)))
    assert code == 1
    assert [(row["name"], row["passed"]) for row in rows] == [("before", None), ("broken", False), ("f", None)]
    assert rows[1]["note"] == "ValueError: first line"


def test_running_out_of_memory_where_it_is_expected_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    expected = Task("large", lambda: failing(error), may_run_out=True)
    code, rows = run_planted(monkeypatch, tmp_path / "rows.json", expected)
    assert code == 0
    assert rows[-1]["note"] == "out of memory, as expected"
    assert run_planted(monkeypatch, tmp_path / "rows.json", Task("small", lambda: failing(error)))[0] == 1


def test_a_task_that_does_not_fit_is_skipped_with_its_reason() -> None:
    report = Report({})
    run_task("A", task("long", figure("f", 1.0), seconds=30), report, deadline_in(10), CPU)
    run_task("A", task("large", figure("f", 1.0), gib=1 << 30), report, deadline_in(10), CPU)
    assert [row.value for row in report.rows] == [None, None]
    assert "takes about 30 s" in report.rows[0].note
    assert "GiB are free" in report.rows[1].note
    assert not report.failed
    assert report.not_measured == 2


def test_a_task_is_stopped_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edt_core.acceptance.rows._LEAST_S", 0.0)

    def endless() -> Iterator[Measure]:
        yield figure("first", 1.0)
        while True:
            try:
                torch.ones(2).sum()
            except Exception:  # a compiler does the same, and continues without what failed
                continue

    report = Report({})
    run_task("A", Task("endless", endless), report, deadline_in(1), CPU)
    assert [row.name for row in report.rows] == ["first", "endless"]
    assert "time of its section is up" in report.rows[1].note


def deadline_in(seconds: float) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--sections", "A,Z"], "--sections is 'A,Z'"),
        (["--scale", "0"], "--scale is 0"),
        (["--budget", "0"], "--budget is 0"),
        (["--authors", "nowhere"], "has no models_edt.py"),
        (["--out", "no/such/folder/rows.json"], "--out is no/such/folder/rows.json"),
    ],
)
def test_wrong_options_are_exit_code_2(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "cannot use a GPU" in capsys.readouterr().err


# --- what a wrong program looks like


def failed_rows(measures: Iterator[Measure]) -> list[str]:
    return [measure.name for measure in measures if measure.passed is False]


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A modulated attention that leaves the modulation out, and heads padded with something else than zeros."""
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        correctness, "fused_modulated_attention", lambda q, k, v, mask, scale, peak: plain(q, k, v, scale=scale)
    )
    assert failed_rows(correctness.amm_rows("exp_cos", (4,), CPU))
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, widths: pad(x, widths, value=0.1))
    assert failed_rows(correctness.padding_rows(CPU))


def test_wrong_gradients_are_found() -> None:
    """One tensor of a gradient off by 1 %, as a kernel with a wrong gradient of the bias would make it."""
    name, gradients = "table", {"table": torch.ones(4), "weight": torch.ones(400)}
    exact = correctness.Outcome(torch.ones(8).double(), {key: value.double() for key, value in gradients.items()})
    found = correctness.Outcome(exact.output, {**exact.gradients, name: exact.gradients[name] * 1.01})
    rows = list(correctness.compare("model", found, exact, "fp32"))
    assert [row.passed for row in rows] == [True, False, True]
    assert rows[1].note == name


def test_an_overwritten_buffer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that read the buffer only after it was filled again."""
    setting = Setting(CPU, 0.02, tmp_path)
    assert not failed_rows(exactness.copy_rows(TINY, setting))
    digest, late = exactness._digest, iter([False, True] * 1000)
    monkeypatch.setattr(exactness, "_digest", lambda x: digest(x + 1.0) if next(late) else digest(x))
    assert failed_rows(exactness.copy_rows(TINY, setting))


def test_a_state_that_is_not_restored_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(CPU, 0.02, tmp_path)
    assert not failed_rows(exactness.resume_rows("resumed", TINY, setting, False))
    monkeypatch.setattr(exactness, "restore_state", lambda *_: None)
    assert failed_rows(exactness.resume_rows("resumed", TINY, setting, False))


def test_a_resumed_training_has_the_same_bits_with_the_acceptance_s_adan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert not failed_rows(exactness.resume_rows("resumed", TINY, Setting(CPU, 0.02, tmp_path), False))


def test_every_section_is_measured_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, small: every row of correctness passes, and no other task fails."""
    few_blocks = cache(lambda name: shallow_config(f"{name.partition('-')[0]}-Tiny/2", 32, 10))
    monkeypatch.setattr(Setting, "model", lambda _setting, name: few_blocks(name))
    out, table = tmp_path / "rows.json", tmp_path / "attention.json"
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--budget", "3000", "--out", str(out), "--attention-table", str(table)])
    rows = json.loads(out.read_text())["rows"]
    assert ended.value.code == 0, capsys.readouterr().err
    graphs = [row for row in rows if row["note"] == "not run: a CPU has no CUDA graphs"]
    assert [(row["section"], row["value"], row["passed"]) for row in graphs] == [("C", None, None)]
    wrong = [row for row in rows if row["value"] is None or (row["section"] == "A" and row["passed"] is False)]
    assert wrong == graphs, wrong
    names = {section: " ".join(row["name"] for row in rows if row["section"] == section) for section in "ABCDE"}
    for section, parts in EXPECTED.items():
        assert all(part in names[section] for part in parts), names[section]
    measured = read_measurements(out)  # as `edt cost --acceptance` does
    assert (measured.on_gpu, measured.is_checked, measured.products.keys()) == (False, True, {"bf16", "fp32"})
    jobs = {(rate.job.work, rate.job.precision, rate.job.compiled, rate.job.amm) for rate in measured.rates}
    assert jobs == {
        *(("train", "bf16", compiled, False) for compiled in (False, True)),
        *(("sample", precision, False, amm) for precision in ("bf16", "fp32") for amm in (False, True)),
        ("sample", "bf16", True, False),
        *((work, "fp32", False, False) for work in ("encode", "decode")),
    }
    for part in ("training", "inference"):
        by_tokens = json.loads(table.read_text())[part]
        assert [row["tokens"] for row in by_tokens] == [16, 64]
        assert all(row["ms"][row["fastest"]] == min(row["ms"].values()) for row in by_tokens)


def test_graphs_are_compared_with_launches_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a GPU, here without graphs: the losses are the same, but not if a replay has an earlier batch."""
    setting = Setting(CPU, 0.02, tmp_path)
    monkeypatch.setattr(Setting, "on_gpu", True)
    begun: list[None] = []
    monkeypatch.setattr(trainer, "begin_step", lambda: begun.append(None))
    without, with_graphs, losses = speed.graph_rows(speed.SMALL_BATCH, setting)
    assert without.value > 0 < with_graphs.value
    assert (losses.value, losses.passed) == (0.0, True)
    assert len(begun) == speed._FIRST_STEPS + 1  # one turn of the clock at this scale
    kept = iter((2, 1))
    monkeypatch.setattr(speed, "cycle", lambda steps: cycle(steps[: next(kept)]))
    assert [row.passed for row in speed.graph_rows(speed.SMALL_BATCH, setting)] == [None, None, False]


EXPECTED = {
    "A": (
        "on 8 ranks",
        "copies",
        "resumed",
        "EDT-",
        "DiT-",
        "MDTv2-",
        "bias tables",
        "padded to 56",
        "cos",
        "compiled",
    ),
    "B": ("training bf16", "sampling bf16: fused"),
    "C": (
        "eager: MFU",
        "compiled: first step",
        "plain",
        "peak memory",
        "backward",
        "AdamW fused",
        "64 tokens",
        "CUDA graphs",
    ),
    "D": ("no AMM", "compiled", "encoding", "channels last"),
    "E": ("one rank of 8",),
}


CHECKOUT = """
import torch
from torch import nn
from einops import rearrange
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from timm.models.layers import DropPath, to_2tuple, trunc_normal_


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = PatchEmbed(8, 2, 4, 64, bias=True)
        self.mlp = Mlp(in_features=64, hidden_features=128, act_layer=nn.GELU, drop=0)
        self.expand = nn.Linear(64, 128, bias=False)

    def forward(self, x):
        cells = self.expand(self.mlp(self.x_embedder(x))).view(-1, 4, 4, 128)
        return rearrange(cells, 'b h w (p1 p2 c)-> b (h p1) (w p2) c', p1=2, p2=2, c=32)


EDT_models = {"Model": Model}
"""


def test_the_authors_file_runs_without_timm_and_einops(tmp_path: Path) -> None:
    """A file with the imports of theirs; what stands in for the two packages is gone afterwards."""
    (tmp_path / authors.MODELS_FILE).write_text(CHECKOUT)
    before = set(sys.modules)
    with authors._stand_ins():
        ours = authors._run_file(tmp_path / authors.MODELS_FILE).EDT_models["Model"]()
    theirs = authors.load_model(tmp_path, "Model", ours)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(theirs(x), ours(x))
    assert ours(x).shape == (2, 8, 8, 32)
    tokens = ours.expand(ours.mlp(ours.x_embedder(x))).view(2, 4, 4, 2, 2, 32)
    assert torch.equal(ours(x)[:, 1::2, 0::2], tokens[:, :, :, 1, 0])
    assert not {"timm", "einops"} & (set(sys.modules) - before)


def test_an_error_that_is_no_number_is_the_largest() -> None:
    """Whatever its place, also where `max` would pass over it."""
    for place in range(3):
        errors = dict.fromkeys(range(3), 0.1) | {place: math.nan}
        measure = correctness._worst("gradient", {str(key): error for key, error in errors.items()}, 1.0)
        assert (measure.passed, measure.note) == (False, str(place))
