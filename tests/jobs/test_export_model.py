"""`edt export --format torch-export`: any model as one file."""

import copy
import re
from pathlib import Path

import pytest
import torch

from edt_core.models import EDT
from jobs.commands.export import main


def test_a_model_with_the_modulation_that_is_asked_for(
    model: EDT, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(folder), str(tmp_path / "new" / "denoiser"), "--format", "torch-export", "--amm-blocks", "0,5"])
    path = tmp_path / "new" / "denoiser.pt2"
    assert capsys.readouterr().out == f"{path}\n"
    assert list(path.parent.iterdir()) == [path]
    inputs = torch.randn(5, 4, 8, 8), torch.linspace(0, 999, 5), torch.arange(5)
    modulated = copy.deepcopy(model)
    modulated.set_amm((0, 5))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(*inputs), modulated(*inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("there.pt2", [], "there.pt2 already exists; use a new file"),
        ("/dev/null/a.pt2", [], "cannot write to /dev/null"),
        ("a.pt2", ["--amm-blocks", "9"], r"\[9\] do not exist"),
    ],
)
def test_mistakes_leave_nothing_half_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, options: list[str], message: str
) -> None:
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with pytest.raises(SystemExit) as ended:
        main([str(folder), str(tmp_path / target), "--format", "torch-export", *options])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
