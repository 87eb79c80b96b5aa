"""Small models with weights that were never trained, as what a job takes: enough to tell samples apart."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.diffusion import with_objective
from edt_core.evaluation.extractors.classifier import Classifier
from edt_core.models import (
    MODEL_NAMES,
    DiffusionTransformer,
    EDTConfig,
    ModelConfig,
    build_model,
    create_model,
    model_config,
)
from edt_core.pipeline import save_pipeline
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from jobs.models.open import Opened, open_model

TINY = tuple(name for name in MODEL_NAMES if "-Tiny/" in name)  # one of each family
BESIDE_EDT = tuple(name for name in TINY if not name.startswith("EDT"))


def shallow_config(name: str, image_size: int = 32, num_classes: int = 4) -> ModelConfig:
    """A tiny model with every kind of block and few of each: tracing takes as long as there are blocks."""
    config = model_config(name, image_size, num_classes)
    if isinstance(config, EDTConfig):
        return replace(config, depths=(1,) * len(config.depths))
    for depth in range(3, config.num_blocks + 1):
        try:
            return replace(config, depth=depth)
        except ValueError:  # a family that wants an odd or an even number
            continue
    return config


def drawn_weights(name: str = "EDT-Tiny/2", seed: int = 0, objective: str = "epsilon") -> DiffusionTransformer:
    """A shallow model with weights that are drawn, none of them zero."""
    model = build_model(with_objective(shallow_config(name), objective))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def made_model(
    seed: int = 0, image_size: int = 32, num_classes: int = 4, factor: int = 4, name: str = "EDT-Tiny/2"
) -> DiffusionTransformer:
    """A tiny model none of whose weights is zero, so that labels, guidance and modulation all make a difference."""
    model = create_model(name, image_size, num_classes, autoencoder_factor=factor)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def pipeline_folder(
    folder: Path, model: DiffusionTransformer, factor: int = 4, class_counts: list[int] | None = None
) -> Path:
    """A diffusers folder of a model and an unfitted autoencoder."""
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=factor, base_channels=8), model.config.image_size)
    names = [f"class {label}" for label in range(model.config.num_classes)]
    save_pipeline(folder, model, vae, num_timesteps=1000, classes=names, protocol={}, class_counts=class_counts)
    return folder


def opened(folder: Path, model: DiffusionTransformer, factor: int = 4) -> Opened:
    """The artifacts of a model and its autoencoder, below a folder."""
    return open_model(str(pipeline_folder(folder / "pipeline", model, factor)), Folder.at(folder / "work"))


def classifier_artifact(folder: Path, num_classes: int = 4, feature_dim: int = 8) -> Artifact:
    """An unfitted classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(num_classes, base_channels=4, feature_dim=feature_dim)
    out = ArtifactWriter(Folder.at(folder), "classifier", "c" * 64)
    model.save(folder / ".made")
    out.add_tree(folder / ".made", "classifier")
    return out.commit({}, {}, {"classes": num_classes, "feature_dim": feature_dim})


def weights(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = create_model(name, 32, 4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.state_dict()


def released(folder: Path, name: str, seed: int = 0) -> Path:
    """A file as the authors publish it: of EDT with everything of the training, of DiT and MDT the weights alone."""
    state = weights(name, seed)
    whole = {"model": weights(name, seed + 1), "ema": state, "opt": {"state": {}}, "args": argparse.Namespace()}
    torch.save(whole if name.startswith("EDT") else state, folder / "released.pt")
    return folder / "released.pt"


def sit(dit: Path, path: Path) -> Path:
    """The file of a DiT as that of a SiT, which never trains the second half of its output."""
    state = torch.load(dit, weights_only=True)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key].unflatten(0, (-1, 2, 4))[:, 1] = 0
    torch.save(state, path)
    return path


def clip_folder(folder: Path, whole: bool = False, **preprocessor: Any) -> Path:
    """A small CLIP image encoder with random weights, as transformers saves it; `whole`: with its text encoder.

    `preprocessor`: settings for its preprocessor_config.json, which is left out where there are none.
    """
    import transformers

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 40,
        "patch_size": 8,
        "projection_dim": 12,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        if whole:
            config = transformers.CLIPConfig(
                text_config={**text, "vocab_size": 50}, vision_config=vision, projection_dim=12
            )
            both = transformers.CLIPModel(config)
            both.load_state_dict(model.state_dict(), strict=False)
            model = both
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def dinov2_folder(folder: Path, width: int = 32) -> Path:
    """A small DINOv2 with random weights and positions of 37 x 37 patches, as transformers saves it."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder
