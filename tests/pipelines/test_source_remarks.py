"""What is reported of a source before anything runs: classes without images, and files that are left out."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from edt_core.config import SourceConfig
from edt_core.errors import UserError
from pipelines.cli import app
from pipelines.config.schema import load_config
from pipelines.setup import doctor_checks
from pipelines.setup.doctor import setup_of
from pipelines.setup.dry_run import source_counts
from pipelines.setup.init import look_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of two classes, a class without images, and a file that is no image."""
    for name in ("ant", "cat"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for k in range(10):
            Image.new("RGB", (32, 32), (k, k, k)).save(tmp_path / "source" / name / f"{k}.png")
    (tmp_path / "source" / "bee").mkdir()
    (tmp_path / "source" / "bee" / "notes.txt").write_text("later")
    return tmp_path / "source"


EMPTY, LEFT_OUT = "1 of 3 classes have no images: 'bee'", "1 .txt"


def test_a_dry_run_and_a_plan_report_them(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"base: quickstart\nname: mine\nsource: {{kind: auto, path: {folder}, allow_empty_classes: true}}\n"
        "sample: {num_samples: 80}\nevaluate: {allow_rank_deficient: true}\n"
    )
    for command in (["run", str(config), "--dry-run"], ["plan", str(config), "--store", str(tmp_path / "store")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert EMPTY in done.output
        assert LEFT_OUT in done.output


def test_init_and_the_doctor_report_them(folder: Path, tmp_path: Path) -> None:
    counts = source_counts(SourceConfig(path=str(folder), allow_empty_classes=True))
    assert (counts.images, counts.classes) == (20, 3)
    assert any(EMPTY in remark for remark in counts.remarks)
    config = tmp_path / "edt.yaml"
    arguments = ["init", "--images", str(folder), "--yes", "--out", str(config)]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UserError)
    assert "'bee' (1 .txt)" in str(refused.exception)
    done = CliRunner().invoke(app, [*arguments, "--allow-empty-classes"])
    assert done.exit_code == 0, done.output
    assert EMPTY in done.output
    assert load_config(str(config)).source.allow_empty_classes
    (folder / "bee").rename(tmp_path / "bee")
    (folder / "ant" / "notes.txt").write_text("later")
    assert any(LEFT_OUT in remark for remark in look_at(str(folder)).remarks)
    (tmp_path / "bee").rename(folder / "bee")
    choices = ["source.kind=auto", f"source.path={folder}", "source.allow_empty_classes=true"]
    setup = setup_of(load_config("quickstart", choices, str(tmp_path / "store")), None, None, True)
    status, found, _ = doctor_checks.images(setup)
    assert status == "warn"
    assert EMPTY in found
