"""Samples of a compiled model: those of the model but for their last bits, and one message where compiling fails."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import CacheConfig, SampleConfig, result_fields
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.training.speed import compiled
from jobs.stages import sample
from tests.support.jobs import Chain, execute

pytestmark = pytest.mark.usefixtures("here", "one_thread")
CONFIG = SampleConfig(num_samples=6, unit_size=4, num_sampling_steps=2, cfg_scale=2, amm_blocks=(4,), keep_images="all")


def images(artifact: Artifact) -> np.ndarray:
    from safetensors.numpy import load_file

    return np.concatenate([load_file(path)["images"] for path in artifact.paths(sample.FEATURE_UNITS)])


def sampled(config: SampleConfig, folder: Path, trained: Artifact, chain: Chain) -> Artifact:
    return execute(sample.STAGE, config, folder, checkpoint=trained, autoencoder=chain["autoencoder"])


@pytest.mark.parametrize("cache", [None, CacheConfig(kind="delta", interval=2, warmup=1)], ids=["every step", "cached"])
def test_the_samples_are_those_of_the_model(
    cache: CacheConfig | None, trained: Artifact, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "compile_parts", partial(compiled.compile_parts, backend=backend))
    config = CONFIG.model_copy(update={"cache": cache})
    plain = sampled(config, tmp_path / "plain", trained, chain)
    assert not graphs
    ours = sampled(config.model_copy(update={"compile": True}), tmp_path / "ours", trained, chain)
    assert len(graphs) > 5, "blocks of five stages, in units of two sizes"
    assert np.abs(images(ours).astype(int) - images(plain)).max() <= 1
    assert (ours.counts.get("compiled"), plain.counts.get("compiled")) == (True, None)


def test_where_it_cannot_be_compiled_a_message_says_so(
    trained: Artifact, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise FileNotFoundError("no C++ compiler was found\nand more lines")

    monkeypatch.setattr(compiled, "compile_parts", partial(compiled.compile_parts, backend=broken))
    with pytest.raises(UserError, match=r"no C\+\+ compiler was found\); set sample\.compile=false"):
        sampled(CONFIG.model_copy(update={"compile": True}), tmp_path / "out", trained, chain)


def test_it_is_not_part_of_a_fingerprint_and_refuses_what_predicts_within_blocks() -> None:
    assert result_fields(CONFIG.model_copy(update={"compile": True})) == result_fields(CONFIG)
    with pytest.raises(ValueError, match="use kind delta, or compile=false"):
        SampleConfig(compile=True, cache=CacheConfig(kind="taylor"))
