"""The form of attention by number of tokens, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.acceptance.attention_forms import Table
from edt_core.config import TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.models import attention, create_model
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.speed.attention_table import read_attention_table
from tests.support.models import TINY
from tests.support.trainings import narrow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", TINY)
def test_each_form_computes_the_same(name: str) -> None:
    """Outputs and gradients, in float64, of all numbers of tokens that the model has."""
    model = create_model(name, 64, 10).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    tokens = {part.grid**2 + part.extra_tokens for part in model.modules() if isinstance(part, attention.Attention)}
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    results = []
    for forms in ({}, dict.fromkeys(tokens, "written_out"), dict.fromkeys(tokens, "sdpa")):
        model.set_attention_forms(forms)
        model.zero_grad()
        out = model(x, torch.arange(2) * 400, torch.arange(2))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert (value - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_table_chooses_by_the_number_of_tokens(
    dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """narrow() has stages of 16, 4 and 1 tokens; what the table leaves out stays written out, as on any CPU."""
    path, seen = tmp_path / "table.json", set()
    path.write_text(json.dumps({"16": "sdpa", "4": "written_out", "4096": "sdpa"}))
    written_out = attention.written_out_attention

    def record(q: Any, *others: Any) -> Any:
        seen.add(q.shape[2])
        return written_out(q, *others)

    monkeypatch.setattr(attention, "written_out_attention", record)
    config = TrainConfig(global_batch_size=4, max_steps=1, attention_table=str(path))
    assert train(config, narrow(), dataset, LocalContext(tmp_path / "out")).step == 1
    assert seen == {4, 1}
    assert "attention_table" not in result_fields(config)


@pytest.mark.parametrize("text", ["", "[]", '{"x": "sdpa"}', '{"16": "flash"}', '{"16": ["sdpa"]}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"train\.attention_table"):
        read_attention_table(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_attention_table(tmp_path / "none.json")


def test_the_file_of_the_acceptance_is_a_table(tmp_path: Path) -> None:
    """Whatever it writes can be given to a training; other forms than the model's are passed over."""
    path, measured = tmp_path / "attention.json", Table()
    measured.training = {
        16: {"fused": 2.0, "written out": 3.0, "written out, compiled": 1.0, "flex, compiled": 0.5},
        64: {"fused": 2.0, "written out": 3.0},
        256: {"written out": 3.0},
    }
    measured.write(path, torch.device("cpu"))
    assert read_attention_table(path) == {16: "written_out", 64: "sdpa", 256: "written_out"}
    measured.training = {16: {"flex, compiled": 0.5}}
    measured.write(path, torch.device("cpu"))
    with pytest.raises(UserError, match="neither fused nor written out was measured"):
        read_attention_table(path)
