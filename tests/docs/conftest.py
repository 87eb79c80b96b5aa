"""One folder in which commands of the pages run, for all tests of the documentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sandbox import Sandbox

if TYPE_CHECKING:
    from pipelines.outcome import Outcome

_PATIENCE = 3600.0  # seconds


@pytest.fixture(scope="session")
def sandbox(
    tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, store: Path, first: "Outcome"
) -> Iterator[Sandbox]:
    """The folder, with images and a store of its own; `edt doctor` waits for its checks on a busy machine as well."""
    import torch

    from pipelines.setup import doctor_checks

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        patient = {name: (check, _PATIENCE) for name, (check, _) in doctor_checks.CHECKS.items()}
        patch.setattr(doctor_checks, "CHECKS", patient)
        yield Sandbox.made(tmp_path_factory.mktemp("docs"), digits_folder, store)
    torch.set_num_threads(threads)
