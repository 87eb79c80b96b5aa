"""The examples of docs/formats.md that need a package of their own run as they are written."""

from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.support.pages import ROOT, Block, blocks

INSTALL = "# pip install "
EXAMPLES = [block for block in blocks(ROOT / "docs" / "formats.md") if block.lines[0].startswith(INSTALL)]


def package(block: Block) -> str:
    """The package that an example begins with."""
    return block.lines[0].removeprefix(INSTALL)


@pytest.mark.extern
@pytest.mark.parametrize("example", EXAMPLES, ids=package)
def test_an_example_runs(
    example: Block, images: Images, latent_shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(package(example))
    (tmp_path / "images").symlink_to(images.shards[0].parent)
    (tmp_path / "latents").symlink_to(latent_shards[0].parent)
    if package(example) == "datasets":
        monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(example.lines), f"{example.page}:{example.line}", "exec"), {})


def test_each_package_has_an_example() -> None:
    assert list(dict.fromkeys(map(package, EXAMPLES))) == ["datasets", "polars", "duckdb"]
