"""A run of masked tokens from images to the registry: the version loads everywhere."""

from pathlib import Path

import mlflow
import numpy as np
import pytest

from edt_core.pipeline import EDTPipeline
from tests.support.pipelines import quiet
from tests.support.small import MODEL, edt, pipeline

pytestmark = pytest.mark.usefixtures("training_here")
TOKENS = (
    "autoencoder.kind=fsq",
    "train.model=MaskGIT-Tiny",
    "train.objective=masked_tokens",
    "train.timestep_sampler=uniform",
    "train.preview_every=null",
    "sample.num_sampling_steps=4",
    "source.limit=100",
    "autoencoder.steps=4",
    "classifier.steps=4",
    "train.max_steps=4",
    "train.global_batch_size=16",
)


def test_a_run_registers_a_model_of_tokens(tmp_path: Path) -> None:
    store = tmp_path / "store"
    outcome = pipeline(store, *TOKENS)
    drawn = edt("sample", f"{MODEL}/1", "--store", str(store), "--num", "4", "--out", str(tmp_path / "samples.png"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "samples.png").stat().st_size > 0
    mlflow.set_tracking_uri(outcome.tracking_uri)
    pulled = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}/1", dst_path=str(tmp_path / "pulled")))
    folder = next(pulled.rglob("model_index.json")).parent
    own = quiet(EDTPipeline.from_pretrained(folder))
    assert (own.config.protocol["sampler"], own.config.protocol["guidance_channels"]) == ("halton", None)
    images = np.stack(own([3, 1, 4], seed=2).images)
    served = mlflow.pyfunc.load_model(f"models:/{MODEL}/1").predict(np.array([3, 1, 4]), params={"seed": 2})
    assert np.array_equal(served, images)
    card = (folder / "README.md").read_text()
    assert "Class-conditional images by masked tokens." in card
    assert "masked-token-transformer" in card
