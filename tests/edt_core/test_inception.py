"""The FID's Inception against figures of the published definition, and the files that may hold its weights."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.evaluation.extractors import load_extractor
from edt_core.evaluation.extractors.inception import Inception, InceptionNetwork, inception_network, tf1_resize

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BOUND = 1e-5  # of the largest value; the worst measured on a CPU is 1.5e-6


def formula(name: str, shape: list[int]) -> Tensor:
    """The tensor that the golden figures were computed with."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    values = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
    if name.endswith("running_var"):
        values = 0.5 + abs(values)
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * values
    else:
        values = values * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    manifest = json.loads((GOLDEN / "inception_manifest.json").read_text())
    return {name: formula(name, shape) for name, shape in manifest.items()}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "inception.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def inception(weights: dict[str, Tensor]) -> Inception:
    return Inception(inception_network(weights))


def pixels(golden: dict[str, np.ndarray], side: int) -> np.ndarray:
    return golden[f"img{side}"].transpose(0, 2, 3, 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    return float(abs(found - expected).max() / abs(expected).max())


def test_names_and_shapes_are_those_of_the_public_files(weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        state = InceptionNetwork().state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in weights.items()}


def test_the_resize_is_tensorflows(golden: dict[str, np.ndarray]) -> None:
    row = tf1_resize(torch.from_numpy(golden["img32"][:1]))[0, :, 7].numpy()
    np.testing.assert_allclose(row, golden["tf_resize_32_row7"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [1, 7, 299, 512])
def test_the_resize_takes_any_side(side: int) -> None:
    ramp = torch.arange(side, dtype=torch.uint8 if side < 256 else torch.float32).expand(1, 3, side, side)
    resized = tf1_resize(ramp)
    # TensorFlow 1 maps pixel i to i x scale and repeats the last pixel beyond the end.
    places = (torch.arange(299, dtype=torch.float64) * side / 299).clamp(max=side - 1)
    torch.testing.assert_close(resized.double(), places.expand(1, 3, 299, 299), rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [32, 64])
def test_outputs_are_the_golden_ones(inception: Inception, golden: dict[str, np.ndarray], side: int) -> None:
    found = inception(pixels(golden, side))
    assert distance(found["features"], golden[f"pool{side}"]) < BOUND
    assert distance(found["spatial"], golden[f"spatial{side}"]) < BOUND
    assert distance(found["probabilities"], softmax(golden[f"logits{side}"])) < BOUND


def test_logits_have_no_bias_and_are_the_golden_ones(inception: Inception, golden: dict[str, np.ndarray]) -> None:
    with torch.inference_mode():
        _, logits, _ = inception.network((tf1_resize(torch.from_numpy(golden["img64"])) - 128) / 128)
    assert distance(logits.numpy(), golden["logits64"]) < BOUND


def test_features_do_not_hang_on_the_batch(inception: Inception, golden: dict[str, np.ndarray]) -> None:
    images = np.concatenate([pixels(golden, 64), 255 - pixels(golden, 64)[:1]])
    together = inception(images)
    for place in (0, 2):
        alone = inception(images[place : place + 1])
        for name, values in alone.items():
            assert distance(values, together[name][place : place + 1]) < BOUND


def test_autocast_and_low_precision_outside_change_nothing(inception: Inception, golden: dict[str, np.ndarray]) -> None:
    images = pixels(golden, 32)
    expected = inception(images)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = inception(torch.from_numpy(images))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def without_counters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("layout", "zipped"),
    [(dict, False), (without_counters, True)],
    ids=["counters, old format", "none, zip"],
)
def test_both_layouts_of_the_public_files_load(
    inception: Inception,
    weights: dict[str, Tensor],
    tmp_path: Path,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    zipped: bool,
) -> None:
    path = tmp_path / "inception.pth"
    torch.save(layout(weights), path, _use_new_zipfile_serialization=zipped)
    extractor = load_extractor("inception", path)
    assert extractor.space == "inception"
    assert isinstance(extractor, Inception)
    expected = inception.network.state_dict()
    found = extractor.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


FC = "fc.weight"
KERNEL = "Mixed_7c.branch3x3_1.conv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KERNEL: None}, rf"not the Inception of the FID: 1 of its 566 tensors are wrong \({KERNEL} is missing"),
        ({"AuxLogits.fc.bias": torch.zeros(9)}, r"1 of its 566 tensors are wrong \(AuxLogits.fc.bias is unexpected"),
        (
            {FC: torch.zeros(1000, 2048), KERNEL: None},
            rf"2 of its 566 tensors are wrong \({KERNEL} is missing.*pytorch-fid/releases",
        ),
        ({FC: torch.zeros(1000, 2048)}, rf"{FC} has shape \[1000, 2048\], not \[1008, 2048\]"),
    ],
)
def test_another_network_is_refused(weights: dict[str, Tensor], change: dict[str, Tensor | None], message: str) -> None:
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        inception_network(changed)
