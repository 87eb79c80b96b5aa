"""An exported denoiser as ONNX: what somebody does who runs it without PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import ChainConfig
from edt_core.models import build_model
from edt_core.sampling.torch_export import PROGRAM, save_program
from tests.support.models import TINY, shallow_config

TOLERANCE = 1e-4  # of the largest value: ONNX Runtime has kernels of its own


@pytest.mark.extern
@pytest.mark.parametrize("name", TINY)
def test_onnx_runtime_computes_what_the_program_computes(name: str, tmp_path: Path) -> None:
    """From the file of `edt export --format torch-export`, for any batch, attention modulation included."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = build_model(shallow_config(name))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_program(tmp_path / PROGRAM, model.eval(), ChainConfig(amm_blocks=(1,)), 1000)

    program = torch.export.load(tmp_path / PROGRAM)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "denoiser.onnx")

    session = runtime.InferenceSession(tmp_path / "denoiser.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3, 8):
        generator = torch.Generator().manual_seed(size)
        x, t = torch.randn(size, 4, 8, 8, generator=generator), 999 * torch.rand(size, generator=generator)
        y = torch.arange(size) % 5
        inputs = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), (x, t, y), strict=True)}
        (found,) = session.run(None, inputs)
        expected = program.module()(x, t, y).numpy()
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), size
