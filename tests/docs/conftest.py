"""One folder in which commands of the pages run, for all tests of the documentation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, ray_session: None) -> Iterator[Sandbox]:
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        yield Sandbox.made(tmp_path_factory.mktemp("docs"), digits_folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_store(sandbox: Sandbox) -> Path:
    """The store of one whole run of the small pipeline."""
    done = sandbox.run("edt run quickstart")
    assert done.code == 0, done.said
    return sandbox.store
