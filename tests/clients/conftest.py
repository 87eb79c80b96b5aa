"""What the pipeline writes, made once in this process, for programs of other people to read.

Packages that are not part of the environment are skipped with their name: `pip install datasets polars duckdb clean-fid
onnx onnxscript onnxruntime` has them all.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edt_core.data.shards import read_image_shard
from tests.support.jobs import Chain, made_chain
from tests.support.local_ray import local_ray


class Images(NamedTuple):
    """What is in the image shards, as our own reader has it. pixels: uint8 [N, S, S, 3]; labels: int64 [N]."""

    shards: list[Path]
    keys: list[str]
    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8]


@pytest.fixture(scope="session")
def chain(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Images, autoencoder, latents with their tars, and classifier of 32 real digits."""
    with local_ray():
        return made_chain(digits_folder, tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def images(chain: Chain) -> Images:
    """32 digits of 4 classes in three shards."""
    shards = chain["images"].paths("images-*.tar")
    samples = [sample for path in shards for sample in read_image_shard(path)]
    labels = np.array([sample.label for sample in samples])
    return Images(shards, [s.key for s in samples], labels, np.stack([s.pixels() for s in samples]))


@pytest.fixture(scope="session")
def latent_shards(chain: Chain) -> list[Path]:
    """The Arrow files of the latents."""
    return chain["latents"].paths("latents-*.arrow")
