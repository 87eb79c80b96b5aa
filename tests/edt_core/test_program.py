"""The exported denoiser: one file that does as the model does."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edt_core.config import ChainConfig
from edt_core.models import DiffusionTransformer, build_model
from edt_core.precision import use_precision
from edt_core.sampling.torch_export import TOLERANCE, save_program
from tests.support.cases import suite_of
from tests.support.models import BESIDE_EDT, shallow_config


def shallow(name: str) -> DiffusionTransformer:
    torch.manual_seed(0)
    model = build_model(shallow_config(name))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    return shallow("EDT-Tiny/2")


@pytest.fixture(scope="module")
def path(model: DiffusionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "denoiser.pt2"
    save_program(path, model.train(), ChainConfig(amm_blocks=(1, 4)), 1000)
    return path


def batch(size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, 4, 8, 8, generator=generator)
    return x, 999 * torch.rand(size, generator=generator), torch.arange(size) % 5


def test_it_does_as_the_model_does_with_its_modulation(model: DiffusionTransformer, path: Path) -> None:
    program = torch.export.load(path).module()
    for size in (1, 2, 5, 16):
        inputs = batch(size)
        with torch.no_grad():
            expected = model.eval()(*inputs)
            found = program(*inputs)
            model.set_amm(())
            plain = model(*inputs)
            model.set_amm((1, 4))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), size
        assert (found - plain).abs().max() > 100 * TOLERANCE * expected.abs().max(), size


@pytest.mark.parametrize("name", suite_of(["UViT-Tiny/2"], BESIDE_EDT))  # a DiT: test_objectives.py
def test_every_architecture_takes_any_batch(name: str, tmp_path: Path) -> None:
    model = shallow(name)
    use_precision("fp32")  # as where images were drawn before
    save_program(tmp_path / "a.pt2", model, ChainConfig(amm_blocks=(2,)), 1000)
    inputs = batch(7)
    with torch.no_grad():
        expected = model(*inputs)
        found = torch.export.load(tmp_path / "a.pt2").module()(*inputs)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.extern
def test_it_runs_where_this_package_is_not(path: Path) -> None:
    code = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "print(list(program(torch.zeros(4, 4, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.int64)).shape))\n"
        "assert 'edt_core' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)
    assert done.stdout.strip() == "[4, 8, 8, 8]", done.stderr


def test_it_tells_which_model_it_is(model: DiffusionTransformer, path: Path) -> None:
    facts = {"model.json": ""}
    torch.export.load(path, extra_files=facts)
    assert json.loads(facts["model.json"])["name"] == "EDT-Tiny/2"
    assert json.loads(facts["model.json"])["amm_blocks"] == [1, 4]


def test_a_program_that_does_otherwise_is_not_left(
    model: DiffusionTransformer, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once before: what is looked at here is what becomes of it."""
    load = torch.export.load
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: load(path))

    def off(path: Path) -> object:
        program = load(io.BytesIO(path.read_bytes()))
        next(iter(program.state_dict.values())).add_(0.1)
        return program

    monkeypatch.setattr(torch.export, "load", off)
    with pytest.raises(RuntimeError, match=r"exported EDT-Tiny/2 is off by .* in a batch of 1"):
        save_program(tmp_path / "a.pt2", model, ChainConfig(amm_blocks=(1, 4)), 1000)
    assert list(tmp_path.iterdir()) == []
