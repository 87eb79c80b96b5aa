"""Small models and artifacts that the jobs take, made once in this process and never written to."""

from pathlib import Path

import pytest

from edt_core.models import DiffusionTransformer
from edt_core.store.artifact import Artifact
from tests.support.jobs import TRAIN, Chain, execute, made_chain
from tests.support.local_ray import local_ray, local_ray_train
from tests.support.models import classifier_artifact, made_model, pipeline_folder


@pytest.fixture(scope="session")
def model() -> DiffusionTransformer:
    return made_model()


@pytest.fixture(scope="session")
def folder(model: DiffusionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a diffusers folder."""
    return pipeline_folder(tmp_path_factory.mktemp("model") / "pipeline", model)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An unfitted classifier."""
    return classifier_artifact(tmp_path_factory.mktemp("judge") / "classifier")


@pytest.fixture(scope="session")
def chain(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Images, autoencoder, latents and classifier of 32 real digits."""
    with local_ray():
        return made_chain(digits_folder, tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def images(chain: Chain) -> Artifact:
    """32 real digits at 32 px in shards of 12, 12 and 8."""
    return chain["images"]


@pytest.fixture(scope="session")
def trained(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A training of six steps by one worker."""
    from jobs.stages import train

    with local_ray_train():
        return execute(train.STAGE, TRAIN, tmp_path_factory.mktemp("trained"), latents=chain["latents"])
