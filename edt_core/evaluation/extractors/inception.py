"""The Inception v3 of the FID, as TensorFlow's graph of 2015-12-05 computes it (Heusel et al. 2017).

It differs from the Inception v3 of model zoos: average pools do not count the padding, the last block uses max pooling,
there are 1008 logits, and images are resized as in TensorFlow 1. Names of tensors are those of the public weights
files. Legend: N images, C channels, H and W sides in pixels.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.errors import UserError
from edt_core.evaluation.extractors.pixels import exact_fp32, images_on, on_host
from edt_core.evaluation.extractors.spec import ExtractorSpec
from edt_core.evaluation.extractors.weights import load_tensors
from edt_core.models.alignment import align_weights

SIDE, FEATURE_DIM, NUM_LOGITS, SPATIAL_DIM = 299, 2048, 1008, 2023
SPATIAL_CHANNELS = 7  # of 17 x 17: 2023 numbers, about as many as there are pooled features (Nash et al. 2021)
NORM_EPS = 1e-3

# The convolutions of a block, in the order of their results: name -> (name of the previous one, or "" for the block's
# input; output channels; kernel height and width). Those without a next one are the block's output.
Convolutions = dict[str, tuple[str, int, tuple[int, int]]]
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)

BLOCK_A: Convolutions = {
    "branch1x1": ("", 64, ONE),
    "branch5x5_1": ("", 48, ONE),
    "branch5x5_2": ("branch5x5_1", 64, FIVE),
    "branch3x3dbl_1": ("", 64, ONE),
    "branch3x3dbl_2": ("branch3x3dbl_1", 96, THREE),
    "branch3x3dbl_3": ("branch3x3dbl_2", 96, THREE),
}
BLOCK_B: Convolutions = {
    "branch3x3": ("", 384, THREE),
    "branch3x3dbl_1": ("", 64, ONE),
    "branch3x3dbl_2": ("branch3x3dbl_1", 96, THREE),
    "branch3x3dbl_3": ("branch3x3dbl_2", 96, THREE),
}
BLOCK_D: Convolutions = {
    "branch3x3_1": ("", 192, ONE),
    "branch3x3_2": ("branch3x3_1", 320, THREE),
    "branch7x7x3_1": ("", 192, ONE),
    "branch7x7x3_2": ("branch7x7x3_1", 192, ROW),
    "branch7x7x3_3": ("branch7x7x3_2", 192, COLUMN),
    "branch7x7x3_4": ("branch7x7x3_3", 192, THREE),
}
BLOCK_E: Convolutions = {
    "branch1x1": ("", 320, ONE),
    "branch3x3_1": ("", 384, ONE),
    "branch3x3_2a": ("branch3x3_1", 384, (1, 3)),
    "branch3x3_2b": ("branch3x3_1", 384, (3, 1)),
    "branch3x3dbl_1": ("", 448, ONE),
    "branch3x3dbl_2": ("branch3x3dbl_1", 384, THREE),
    "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3)),
    "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1)),
}


def block_c(width: int) -> Convolutions:
    """The block of 7x7 convolutions factorised into rows and columns, with `width` inner channels."""
    return {
        "branch1x1": ("", 192, ONE),
        "branch7x7_1": ("", width, ONE),
        "branch7x7_2": ("branch7x7_1", width, ROW),
        "branch7x7_3": ("branch7x7_2", 192, COLUMN),
        "branch7x7dbl_1": ("", width, ONE),
        "branch7x7dbl_2": ("branch7x7dbl_1", width, COLUMN),
        "branch7x7dbl_3": ("branch7x7dbl_2", width, ROW),
        "branch7x7dbl_4": ("branch7x7dbl_3", width, COLUMN),
        "branch7x7dbl_5": ("branch7x7dbl_4", 192, ROW),
    }


def tf1_resize(images: Tensor, size: int = SIDE) -> Tensor:
    """float32 [N, C, size, size] of [N, C, H, W] by TensorFlow 1's bilinear resize.

    Output pixel i is at i x (input side / size): without aligned corners, and without half-pixel centres.
    """
    x = images.float()
    for axis in (3, 2):
        positions = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[axis] / size)
        low = positions.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        weight = (positions - low).view(-1, *[1] * (3 - axis))
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, high) - first) * weight
    return x


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Fold the batch norm of evaluation into the convolution, computed in float64.

        With kernels in channels-last layout, a CPU processes 1.6 times the images per second.
        """
        norm = {name: tensor.double() for name, tensor in self.bn.state_dict().items()}
        scale = norm["weight"] / (norm["running_var"] + NORM_EPS).sqrt()
        kernels = (self.conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
        self.conv.weight = nn.Parameter(kernels.contiguous(memory_format=torch.channels_last))
        self.conv.bias = nn.Parameter((norm["bias"] - norm["running_mean"] * scale).float())
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Branches of convolutions and a pool over the same input, their results concatenated along the channels.

    `pool_channels` is the width of a 1x1 convolution after the pool. With 0 there is none, and the block halves the
    side: its last convolutions and its max pool have stride 2 and no padding.
    """

    def __init__(self, channels: int, convolutions: Convolutions, pool_channels: int = 0, pool: str = "mean") -> None:
        super().__init__()
        self.previous = {name: previous for name, (previous, _, _) in convolutions.items()}
        self.last = [name for name in convolutions if name not in self.previous.values()]
        self.pool = pool if pool_channels else "halve"
        for name, (previous, out, kernel) in convolutions.items():
            width = convolutions[previous][1] if previous else channels
            halve = self.pool == "halve" and name in self.last
            self.add_module(name, ConvNorm(width, out, kernel, 2 if halve else 1, padded=not halve))
        if pool_channels:
            self.branch_pool = ConvNorm(channels, pool_channels, ONE)
        self.out_channels = (pool_channels or channels) + sum(convolutions[name][1] for name in self.last)

    def forward(self, x: Tensor) -> Tensor:
        results = {"": x}
        for name, previous in self.previous.items():
            results[name] = self.get_submodule(name)(results[previous])
        return torch.cat([*(results[name] for name in self.last), self._pool_branch(x)], dim=1)

    def _pool_branch(self, x: Tensor) -> Tensor:
        if self.pool == "halve":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


class InceptionNetwork(nn.Module):
    """The network from resized images to pooled features, logits and spatial features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, THREE, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, THREE, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, THREE)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, ONE)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, THREE, padded=False)
        self.Mixed_5b = Mixed(192, BLOCK_A, 32)
        self.Mixed_5c = Mixed(self.Mixed_5b.out_channels, BLOCK_A, 64)
        self.Mixed_5d = Mixed(self.Mixed_5c.out_channels, BLOCK_A, 64)
        self.Mixed_6a = Mixed(self.Mixed_5d.out_channels, BLOCK_B)
        self.Mixed_6b = Mixed(self.Mixed_6a.out_channels, block_c(128), 192)
        self.Mixed_6c = Mixed(self.Mixed_6b.out_channels, block_c(160), 192)
        self.Mixed_6d = Mixed(self.Mixed_6c.out_channels, block_c(160), 192)
        self.Mixed_6e = Mixed(self.Mixed_6d.out_channels, block_c(192), 192)
        self.Mixed_7a = Mixed(self.Mixed_6e.out_channels, BLOCK_D)
        self.Mixed_7b = Mixed(self.Mixed_7a.out_channels, BLOCK_E, 192)
        self.Mixed_7c = Mixed(self.Mixed_7b.out_channels, BLOCK_E, 192, pool="max")
        self.fc = nn.Linear(FEATURE_DIM, NUM_LOGITS)
        self.spatial_kernel: Tensor
        self.register_buffer("spatial_kernel", torch.empty(0), persistent=False)

    def fold(self) -> "InceptionNetwork":
        """Fold every batch norm after the weights are loaded, for evaluation only.

        The spatial features are taken before a batch norm, so their kernels are copied before the folding.
        """
        branch = self.Mixed_6d.get_submodule("branch1x1")
        assert isinstance(branch, ConvNorm)
        self.spatial_kernel = branch.conv.weight.detach()[:SPATIAL_CHANNELS].clone()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images float32 [N, 3, 299, 299] in -1..1 -> features [N, 2048], logits [N, 1008], spatial [N, 2023].

        Logits are without the bias of the last layer, as in the Inception score of the FID's authors. Spatial
        features are the first 7 channels of the 1x1 branch of Mixed_6d before its batch norm, channels last.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # [N, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [N, 768, 17, 17]
        spatial = F.conv2d(x, self.spatial_kernel).permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))  # [N, 2048, 8, 8]
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight), spatial


def inception_network(weights: Mapping[str, Tensor]) -> InceptionNetwork:
    """The folded network with the tensors of a public file, in which `num_batches_tracked` may be missing.

    Raises UserError for any other tensor that is missing, has another shape, or is unexpected.
    """
    with torch.device("meta"):
        network = InceptionNetwork()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    wrong = [f"{name} is missing" for name in shapes if name not in weights and name not in counters]
    wrong += [f"{name} is unexpected" for name in weights if name not in shapes]
    wrong += [
        f"{name} has shape {list(tensor.shape)}, not {list(shapes[name])}"
        for name, tensor in weights.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    if wrong:
        raise UserError(
            f"this is not the Inception of the FID: {len(wrong)} of its {len(shapes)} tensors are wrong ({wrong[0]}); "
            "use the file of github.com/mseitzer/pytorch-fid/releases or github.com/toshas/torch-fidelity/releases "
            "(inception.weights, --inception-weights)"
        )
    tensors = {name: tensor.float() for name, tensor in weights.items() if name not in counters}
    network.load_state_dict(tensors | dict.fromkeys(counters, torch.tensor(0)), assign=True)
    return align_weights(network.fold())


class Inception:
    """The feature network of FID, KID, precision and recall (features), IS (probabilities) and sFID (spatial)."""

    space = "inception"

    def __init__(self, network: InceptionNetwork, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device)

    @classmethod
    def load(cls, location: str | Path, device: torch.device | str = "cpu") -> "Inception":
        """Load from a public weights file. Raises UserError for any other file."""
        return cls(inception_network(load_tensors(Path(location), SPEC.needed)), device)

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> features [N, 2048], probabilities [N, 1008], spatial [N, 2023]."""
        images = images_on(self.device, pixels)
        with exact_fp32(self.device):
            scaled = (tf1_resize(images) - 128) / 128
            features, logits, spatial = self.network(scaled.contiguous(memory_format=torch.channels_last))
            return on_host({"features": features, "probabilities": logits.softmax(1), "spatial": spatial})


SPEC = ExtractorSpec(
    name="inception",
    title="Inception",
    help="Inception's published weights, for fid and related metrics: file, URL#sha256=..., or MLflow URI",
    suggestion="--inception-weights for FID (pt_inception-2015-12-05-6726825d.pth from "
    "github.com/mseitzer/pytorch-fid/releases)",
    load=Inception.load,
    source="the weights of the FID's Inception (pt_inception-2015-12-05-6726825d.pth of "
    "github.com/mseitzer/pytorch-fid/releases, or weights-inception-2015-12-05-6726825d.pth of "
    "github.com/toshas/torch-fidelity/releases); put the file where this machine can read it",
    dimensions=FEATURE_DIM,
    spatial_dimensions=SPATIAL_DIM,
    values_per_sample=FEATURE_DIM + SPATIAL_DIM + NUM_LOGITS,
    metrics=("fid", "sfid", "inception_score", "kid", "precision", "recall"),
    always_recorded=True,
)
