"""A small image classifier fitted on the data set itself: the feature space of `fd_classifier`.

It is used if no published network suits the domain or none is available. Its Fréchet distance is never called FID.
Legend: N images, S image side in pixels, D features, K classes.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.data.images import to_model_range
from edt_core.errors import UserError
from edt_core.evaluation.extractors.pixels import check_pixels, exact_fp32
from edt_core.evaluation.extractors.spec import ExtractorSpec
from edt_core.files.small_files import read_json_object
from edt_core.files.tensor_files import load_state
from edt_core.one_cycle import one_cycle
from edt_core.precision import exact_products

if TYPE_CHECKING:
    from edt_core.config import ClassifierConfig

WEIGHTS, CONFIG = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Three convolutions of stride 2, average pooling to 4 x 4, D features, K logits."""

    def __init__(self, num_classes: int, base_channels: int = 16, feature_dim: int = 64) -> None:
        super().__init__()
        self.sizes = {"num_classes": num_classes, "base_channels": base_channels, "feature_dim": feature_dim}
        widths = [3, base_channels, 2 * base_channels, 4 * base_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4 if width % 4 == 0 else 1, width) for width in widths[1:])
        self.features = nn.Linear(16 * widths[-1], feature_dim)
        self.logits = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images float32 [N, 3, S, S] in -1..1 -> features [N, D] and logits [N, K]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        features = self.features(x)
        return features, self.logits(F.silu(features))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.sizes, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Classifier":
        model = cls(**read_json_object(folder / CONFIG))
        load_state(model, folder / WEIGHTS)
        return model.to(device).eval()


@torch.inference_mode()
def classify(model: Classifier, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features float32 [N, D] and class probabilities float32 [N, K] of uint8 [N, S, S, 3]."""
    images = torch.from_numpy(to_model_range(pixels)).to(next(model.parameters()).device)
    features, logits = model(images)
    return features.float().cpu().numpy(), logits.float().softmax(1).cpu().numpy()


def split_holdout(num_images: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to fit on and indices held out for measuring: a random split that depends on the seed."""
    order = np.random.default_rng([seed, num_images]).permutation(num_images)
    size = max(1, round(num_images * fraction))
    return np.sort(order[size:]), np.sort(order[:size])


@exact_products()
def fit_classifier(
    config: "ClassifierConfig",
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    num_classes: int,
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Classifier, dict[str, float]]:
    """Fit on uint8 [N, S, S, 3] and labels [N]; return the classifier and its accuracy on held-out images.

    The fit computes in float32, without TF32.
    """
    training, holdout = split_holdout(len(pixels), config.holdout_fraction, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(num_classes, config.base_channels, config.feature_dim).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01, foreach=True)
    schedule = one_cycle(optimizer, config.lr, config.steps)
    for step in range(config.steps):
        rng = np.random.default_rng([config.seed, step])
        batch = rng.choice(training, min(config.batch_size, len(training)), replace=False)
        images = torch.from_numpy(to_model_range(_random_shift(pixels[batch], rng))).to(device)
        loss = F.cross_entropy(model(images)[1], torch.from_numpy(labels[batch]).to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    model.eval()
    probabilities = np.concatenate(
        [classify(model, pixels[part])[1] for part in np.array_split(holdout, -(-len(holdout) // 256))]
    )
    return model, {
        "holdout_accuracy": float((probabilities.argmax(1) == labels[holdout]).mean()),
        "holdout": len(holdout),
    }


def _random_shift(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The batch shifted by up to a sixteenth of its side, edges repeated, so that features ignore the position."""
    reach = max(1, pixels.shape[1] // 16)
    dy, dx = rng.integers(-reach, reach + 1, 2)
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    side = pixels.shape[1]
    return padded[:, reach + dy : reach + dy + side, reach + dx : reach + dx + side]


class ClassifierExtractor:
    """The small classifier that was fitted on the data set itself."""

    space = "classifier"

    def __init__(self, model: Classifier) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, location: str | Path, device: torch.device | str = "cpu") -> "ClassifierExtractor":
        """Load from the folder of a classifier artifact. Raises UserError for any other folder."""
        from safetensors import SafetensorError

        try:
            return cls(Classifier.load(Path(location), device))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise UserError(
                f"no classifier at {location}: {reason}; use the folder of a classifier artifact, or rerun its step"
            ) from error

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> features [N, D] and probabilities [N, K]."""
        check_pixels(pixels)
        levels = pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels
        with exact_fp32(self.device):
            features, probabilities = classify(self.model, levels)
        return {"features": features, "probabilities": probabilities}


SPEC = ExtractorSpec(
    name="classifier",
    title="classifier",
    help="classifier artifact, for fd_classifier",
    suggestion="--classifier",
    load=ClassifierExtractor.load,
)
