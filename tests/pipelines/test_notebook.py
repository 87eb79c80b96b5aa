"""The notebook, run from its first cell to its last on a registered model, in a kernel that reaches no network."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.outcome import Outcome
from tests.support import notebook as support
from tests.support.notebook import NOTEBOOK
from tests.support.small import MODEL, environment

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

MOST = 500_000  # bytes of the notebook
PICTURES = {"samples", "guidance", "steps", "amm", "losses"}  # ids of the cells that draw
NO_NETWORK = """
import socket

def refused(*arguments):
    raise OSError(f"the notebook wants the network: {arguments}")

socket.getaddrinfo = refused
connect = socket.socket.connect

def local_only(self, address):
    return connect(self, address) if isinstance(address, str) or address[0] == "127.0.0.1" else refused(address)

socket.socket.connect = local_only
"""


def executed(notebook: Any, model: str, store: Path, home: Path) -> None:
    """Run the cells, which take their outputs. Raises what nbclient raises for a cell that raises."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_NETWORK))
    support.execute(notebook, environment(EDT_MODEL=model, EDT_STORE=str(store)), home)


def asked_for(model: str, notebook: Any) -> list[Any]:
    """The notebook's cells once more, up to where it looks its model up, for another model."""
    name = nbformat.v4.new_code_cell(f"os.environ['EDT_MODEL'] = {model!r}")
    ids = [cell["id"] for cell in notebook.cells]
    cells = notebook.cells[: ids.index("look-up") + 1]
    return [name, *(nbformat.v4.new_code_cell(cell["source"]) for cell in cells if cell["cell_type"] == "code")]


@pytest.mark.extern
def test_it_looks_up_loads_samples_and_plots_and_says_what_there_is(
    first: Outcome, store: Path, tmp_path: Path
) -> None:
    """In one kernel: all of it for a model that there is, then its look-up for one that there is not."""
    notebook = support.read()
    cells = {cell["id"]: cell for cell in notebook.cells}
    notebook.cells += asked_for("edt-tiny-digit-32", notebook)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=f"did you mean {MODEL}"):
        executed(notebook, f"{MODEL}@champion", store, tmp_path)
    assert not [
        name for name, cell in cells.items() if any(o["output_type"] == "error" for o in cell.get("outputs", []))
    ]
    for name in PICTURES:
        (data,) = (output["data"] for output in cells[name]["outputs"] if "image/png" in output.get("data", {}))
        assert _spread(data["image/png"]) > 5, f"the picture of the cell {name!r} shows nothing"
    told = {name: _text(cell) for name, cell in cells.items()}
    printed = {line.split()[0]: line.split()[-1] for line in told["metrics"].splitlines() if line.strip()}
    for name, value in first.metrics[MODEL][1].items():
        assert float(printed[name]) == pytest.approx(value, rel=1e-5, abs=1e-6)  # pandas shows six digits
    for fingerprint in _lineage(first):
        assert fingerprint[:12] in told["lineage"]
    assert "EDT-Tiny/2" in told["load"]
    assert not [name for name, text in told.items() if "Warning" in text]


def test_it_is_kept_with_an_output_of_each_cell_by_the_code_that_it_has() -> None:
    """`make notebook` runs it: from its first cell to its last, without a warning, and without this machine's paths."""
    notebook = support.read()
    cells = support.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [cell["id"] for cell in cells if not cell["outputs"]]
    assert notebook.metadata[support.CODE] == support.code(notebook), "the code was changed: make notebook"
    drawn = {cell["id"] for cell in cells if any("image/png" in output.get("data", {}) for output in cell["outputs"])}
    assert drawn == PICTURES
    said = "\n".join(_text(cell) for cell in cells)
    assert not re.findall(r"(?<![\w:.])/(?:tmp|home|root|work|mnt)/\S*|Warning|Traceback", said)
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < MOST


def test_changed_code_is_found() -> None:
    notebook = support.read()
    support.code_cells(notebook)[0]["source"] += "\n1"
    assert notebook.metadata[support.CODE] != support.code(notebook)


def _text(cell: Any) -> str:
    """All that a cell printed or showed as text."""
    outputs = cell.get("outputs", [])
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def _spread(png: str) -> float:
    """Standard deviation of the levels of a picture, 0..255."""
    from PIL import Image

    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")).std())


def _lineage(outcome: Outcome) -> set[str]:
    """Fingerprints of the run's steps that are behind the registered version."""
    from pipelines.registry.lineage import lineage
    from pipelines.tracking.catalog import Catalog

    nodes = lineage(Catalog(outcome.tracking_uri, ""), f"{MODEL}/1").nodes
    found = {name for name, node in nodes.items() if node.kind in ("images", "autoencoder", "latents", "checkpoint")}
    assert len(found) == 4
    return found
