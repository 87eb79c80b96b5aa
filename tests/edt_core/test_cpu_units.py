"""Networks on a CPU in units of 16 images: a row is a function of its image, to the last bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import build_autoencoder, encode_both_sides
from edt_core.config import AutoencoderConfig
from edt_core.cpu_units import UNIT, UnitExtractor, units, whole_units
from edt_core.evaluation.extractors.classifier import Classifier, ClassifierExtractor
from tests.support.models import clip_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
SIZES = (1, 3, 16, 64)
Rows = Callable[[np.ndarray], np.ndarray]


def posterior(pixels: np.ndarray, size: int, model: torch.nn.Module) -> np.ndarray:
    batches = ((None, pixels[start : start + size]) for start in range(0, len(pixels), size))
    return np.concatenate([rows for _, rows in encode_both_sides(model, batches)])


def features(pixels: np.ndarray, size: int, extract: UnitExtractor) -> dict[str, np.ndarray]:
    parts = [extract(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_units_are_whole_and_padded_with_what_is_there() -> None:
    found = [(unit.copy(), count) for unit, count in units(np.arange(20))]
    assert [(len(unit), count) for unit, count in found] == [(UNIT, 16), (UNIT, 4)]
    assert np.concatenate([unit[:count] for unit, count in found]).tolist() == list(range(20))
    assert set(found[1][0].tolist()) == {16, 17, 18, 19}
    assert list(units(np.arange(0))) == []
    assert [whole_units(size) for size in (1, 16, 17, 64)] == [16, 16, 32, 64]


def test_latents_do_not_depend_on_batch_size_or_order() -> None:
    model = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).eval()
    expected = posterior(PIXELS, 16, model)
    assert expected.std() > 0
    for size in SIZES:
        assert posterior(PIXELS, size, model).tobytes() == expected.tobytes(), size
    order = np.random.default_rng(1).permutation(len(PIXELS))
    assert posterior(PIXELS[order], 64, model).tobytes() == expected[order].tobytes()


@pytest.fixture(scope="module", params=["classifier", "clip"])
def extract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnitExtractor:
    if request.param == "classifier":
        torch.manual_seed(0)
        return UnitExtractor(ClassifierExtractor(Classifier(10)))
    from edt_core.evaluation.extractors import load_extractor

    pytest.importorskip("transformers")
    return UnitExtractor(load_extractor("clip", clip_folder(tmp_path_factory.mktemp("clip") / "clip")))


def test_features_do_not_depend_on_batch_size_or_order(extract: UnitExtractor) -> None:
    expected = features(PIXELS, 16, extract)
    for size in SIZES:
        found = features(PIXELS, size, extract)
        assert {name: values.tobytes() for name, values in found.items()} == {
            name: values.tobytes() for name, values in expected.items()
        }, size
    order = np.random.default_rng(1).permutation(len(PIXELS))
    for name, values in features(PIXELS[order], 64, extract).items():
        assert values.tobytes() == expected[name][order].tobytes(), name
