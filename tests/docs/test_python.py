"""Python in the pages runs, in the folder in which the commands run."""

import os
import re

import pytest

from tests.support.pages import Block, blocks, pages
from tests.support.sandbox import Sandbox
from tests.support.small import MODEL

STANDS_FOR = (
    (r'"(FOLDER|DIR)"', '"./model"'),
    (r"\bNAME\b", MODEL),
    (r"\[207, 360\]", "[3, 1]"),
    (r"\[3, 1, 4\]", "[3, 1, 2]"),  # the champion here may be of the four classes of small images
    (r"max_steps=\d+", "max_steps=2, global_batch_size=4"),
)
# A block that imports nothing goes on from another, or is a sketch: `test_pages.py` reads it as Python.
PYTHON = [
    block
    for page in pages()
    for block in blocks(page)
    if block.language in ("", "python") and block.lines[0].startswith(("import ", "from "))
]


@pytest.mark.usefixtures("training_here")
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_of_a_page_runs(
    block: Block, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    text = "\n".join(block.lines)
    for pattern, instead in STANDS_FOR:
        text = re.sub(pattern, instead, text)
    for needed in ("./model", "./latents"):
        sandbox.need(needed)
    monkeypatch.chdir(sandbox.root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{sandbox.store}/mlflow.db")
    exec(compile(text, f"{block.page}:{block.line}", "exec"), {})
    assert os.getcwd() == str(sandbox.root)
