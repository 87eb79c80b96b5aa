"""The notebook: run its cells, and keep it with its outputs. `python -m tests.support.notebook` does both.

It runs on the store in ./edt-store, which `make quickstart` fills; EDT_STORE and EDT_MODEL name others.
"""

import base64
import io
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.pages import ROOT
from tests.support.small import environment

NOTEBOOK = ROOT / "notebooks" / "explore_model.ipynb"
COLOURS = 256
CODE = "edt_code_sha256"  # of the notebook's metadata: the code that gave its outputs


def read() -> Any:
    """The notebook as it is kept."""
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: Any) -> str:
    """The sha256 of all code, in order."""
    return sha256("\n\n".join(cell["source"] for cell in code_cells(notebook)).encode()).hexdigest()


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell["cell_type"] == "code"]


def execute(notebook: Any, env: Mapping[str, str], home: Path) -> None:
    """Run the cells, which take their outputs. Raises what nbclient raises for a cell that raises."""
    import nbclient

    for cell in code_cells(notebook):
        cell["outputs"], cell["execution_count"] = [], None
    env = {**env, "IPYTHONDIR": str(home), "JUPYTER_RUNTIME_DIR": str(home)}
    client = nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(NOTEBOOK.parent), env=env)


def small(png: str) -> str:
    """A picture in base64 with at most 256 colours, in which nobody sees a difference: a third of the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Run the notebook and write it with its outputs, and without what depends on this machine's kernel."""
    import nbformat

    notebook = read()
    metadata = {name: value for name, value in notebook.metadata.items() if name in ("kernelspec", "language_info")}
    given = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI",) if name in os.environ}
    with TemporaryDirectory() as home:
        execute(notebook, environment(**given), Path(home))
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        if png := output.get("data", {}).get("image/png"):
            output["data"]["image/png"] = small(png)
    notebook.metadata.clear()
    notebook.metadata.update({**metadata, "language_info": {"name": "python"}, CODE: code(notebook)})
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
