"""A small model and its diffusers folder, for the jobs that take any model."""

from pathlib import Path

import pytest

from edt_core.models import EDT
from tests.support.models import made_model, pipeline_folder


@pytest.fixture(scope="module")
def model() -> EDT:
    return made_model()


@pytest.fixture(scope="module")
def folder(model: EDT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("model") / "pipeline", model)
