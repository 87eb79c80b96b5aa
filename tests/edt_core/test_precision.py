"""Float32 products on a GPU: the same under both generations of PyTorch's names, in every state of a process."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import fit_autoencoder, measure_scaling_factor
from edt_core.config import AutoencoderConfig, ClassifierConfig
from edt_core.evaluation.extractors.classifier import fit_classifier
from edt_core.evaluation.extractors.pixels import exact_fp32
from edt_core.precision import exact_products, use_precision
from tests.support.precision import precisions_of_layers

CPU = torch.device("cpu")
MATMUL: Any = torch.backends.cuda.matmul
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with exact_products():
        yield


def _new_names_only() -> None:
    MATMUL.fp32_precision = "tf32"


# What other code may have set before: by the older names, by the newer ones, by neither
STATES: dict[str, Callable[[], object]] = {
    "as it was": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda.matmul.allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(CUDNN, "allow_tf32", True),
    "new names only": _new_names_only,
    **{precision: lambda precision=precision: use_precision(precision) for precision in ("fp32", "tf32", "bf16")},
}


def flags() -> dict[str, object]:
    """Every flag by every name. Raises RuntimeError where PyTorch finds two names in conflict."""
    with torch.backends.cudnn.flags(enabled=True):
        pass
    return {
        "matmul precision": torch.get_float32_matmul_precision(),
        "cuda.matmul.allow_tf32": MATMUL.allow_tf32,
        "cublas": torch._C._get_cublas_allow_tf32(),
        "cudnn.allow_tf32": CUDNN.allow_tf32,
        "cuda.matmul": MATMUL.fp32_precision,
        "cpu": {MKLDNN.matmul.fp32_precision, MKLDNN.conv.fp32_precision} - {"none"},
    }


def expected(*, tf32: bool) -> dict[str, object]:
    return {
        "matmul precision": "high" if tf32 else "highest",
        "cuda.matmul.allow_tf32": tf32,
        "cublas": tf32,
        "cudnn.allow_tf32": tf32,
        "cuda.matmul": "tf32" if tf32 else "ieee",
        "cpu": {"ieee"},  # its bits never depend on the precision
    }


@pytest.mark.parametrize(("state", "precision"), itertools.product(STATES, ("fp32", "tf32", "fp16", "bf16")))
def test_flags_agree_after_each_precision_whatever_was_set_before(state: str, precision: str) -> None:
    STATES[state]()
    use_precision(precision)
    assert CUDNN.conv.fp32_precision == CUDNN.rnn.fp32_precision == ("tf32" if precision == "tf32" else "ieee")
    assert flags() == expected(tf32=precision == "tf32")


@pytest.mark.parametrize("state", STATES)
def test_flags_agree_within_exact_inference_and_are_restored(state: str) -> None:
    STATES[state]()
    names = [(backend, backend.fp32_precision) for backend in (MATMUL, CUDNN.conv, CUDNN.rnn, MKLDNN.matmul)]
    readable = state != "new names only"
    before = torch.get_float32_matmul_precision() if readable else None
    for context in (exact_fp32(CPU), exact_products()):
        with context:
            assert CUDNN.conv.fp32_precision == CUDNN.rnn.fp32_precision == "ieee"
            assert flags() == expected(tf32=False)
        assert [(backend, backend.fp32_precision) for backend, _ in names] == names
        if readable:
            assert torch.get_float32_matmul_precision() == before


def test_tf32_for_a_gpu_changes_no_bit_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(shape, generator=generator) for shape in ((8, 16, 24, 24), (32, 16, 3, 3)))
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    found = {}
    for precision in ("fp32", "tf32"):
        use_precision(precision)
        found[precision] = (torch.conv2d(images, weight).numpy().tobytes(), (a @ b).numpy().tobytes())
    assert found["fp32"] == found["tf32"]


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
FITTED = AutoencoderConfig(downsample_factor=2, base_channels=8, steps=1, batch_size=4)


def _fit_classifier() -> None:
    labels = np.arange(len(PIXELS)) % 4
    fit_classifier(ClassifierConfig(steps=1, base_channels=4, feature_dim=8), PIXELS, labels, 4)


@pytest.mark.parametrize("scaling_alone", [False, True])
def test_fits_compute_in_float32_where_a_process_has_tf32(scaling_alone: bool) -> None:
    model = fit_autoencoder(FITTED, PIXELS)[0]
    use_precision("tf32")
    with precisions_of_layers() as found:
        if scaling_alone:
            measure_scaling_factor(model, PIXELS, 4)
        else:
            fit_autoencoder(FITTED, PIXELS)
            _fit_classifier()
    assert found == {"ieee"}
    assert MATMUL.fp32_precision == "tf32"  # of the caller


def test_a_layer_in_tf32_is_noticed() -> None:
    use_precision("tf32")
    with precisions_of_layers() as found:
        torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    assert found == {"tf32"}
