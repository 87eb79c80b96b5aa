"""A model as a diffusers pipeline: the folder that is registered, pulled, and loaded by other programs.

`EDTPipeline.from_pretrained(folder)`, or `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder,
trust_remote_code=True)`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edt_core.autoencoders.autoencoder import decode, to_pixels
from edt_core.autoencoders.kinds import KINDS, scale_of
from edt_core.config import ChainConfig, recorded_fields
from edt_core.data.scale import LatentScale, model_scale
from edt_core.diffusion import Objective, objective_of_model
from edt_core.errors import UserError
from edt_core.evaluation.extractors.classifier import Classifier
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.models.alignment import align_weights
from edt_core.sampling.flow_schedulers import FlowSchedulerChain
from edt_core.sampling.latent_classifier import LatentClassifier
from edt_core.sampling.pipeline_options import (
    PROTOCOL,
    CallNoise,
    call_chain,
    call_noise,
    chain_config,
    check_output_type,
)
from edt_core.sampling.sampler import LatentSampler, check_same_space, checked_labels
from edt_core.sampling.schedulers import (
    Generators,
    SchedulerChain,
    check_scheduler,
    is_training_scheduler,
    training_scheduler,
)

__all__ = ["PROTOCOL", "EDTPipeline", "EDTPipelineOutput", "EDTTransformer", "chain_config", "save_pipeline"]

if TYPE_CHECKING:
    Autoencoder: TypeAlias = ModelMixin
else:  # from_pipe of diffusers takes over only a part whose exact class is in the annotation
    Autoencoder = reduce(or_, (kind.model_class for kind in KINDS.values()))

_PIPELINE_FILE = "pipeline.py"
# For an import statement diffusers would advise "pip install edt_core", which is not the name of this package.
_PIPELINE_CODE = '''"""The class of this folder."""

import importlib

try:
    EDTPipeline = importlib.import_module("edt_core.pipeline").EDTPipeline
except ModuleNotFoundError as error:
    if error.name != "edt_core":
        raise
    message = "this pipeline is a class of the package edt-pipeline; install its wheel (edt_pipeline-*.whl)"
    raise ImportError(message) from error

__all__ = ["EDTPipeline"]
'''
_OF_SAMPLERS = ("sampler", "time_shift", "sde_diffusion", "temperature")  # options that an assigned scheduler replaces
_OURS = "edt_core.pipeline"  # the module named in folders and in every version of their pipeline.py


class EDTTransformer(ModelMixin, ConfigMixin):
    """A model in a form that diffusers can store: its ModelConfig as the diffusers config, its weights below `edt.`.

    After loading or moving with a dtype, all weights have that dtype. So do the position embeddings that are added to
    activations, since a sum with float32 embeddings would be float32. Quantities that must be exact are computed in
    float32 at each call: the embedding of the timestep, and the matrix of attention modulation.
    """

    # Otherwise diffusers assigns the file's tensors unchanged if the first one has the dtype of the model's first
    # tensor. That is a buffer, so weights would keep the file's dtype.
    _supports_param_buffer_assignment = False

    @register_to_config
    def __init__(self, edt_config: dict[str, Any]) -> None:
        super().__init__()
        self.edt = build_model(ModelConfig.from_dict(edt_config))
        # diffusers sets the requested dtype as the default, which parameters get but buffers do not.
        self.edt.to(next(self.edt.parameters()).dtype)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """latents [N, C, h, h], timesteps [N], labels [N] -> the model's output [N, 2C, h, h]."""
        output: Tensor = self.edt(x, t, y)
        return output


class EDTClassifier(ModelMixin, ConfigMixin):
    """The classifier of a data set in a form that diffusers can store: its sizes, and its weights below `network.`."""

    @register_to_config
    def __init__(self, num_classes: int, base_channels: int = 16, feature_dim: int = 64) -> None:
        super().__init__()
        self.network = Classifier(num_classes, base_channels, feature_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, S, S] in -1..1 -> features [N, D] and logits [N, K]."""
        output: tuple[Tensor, Tensor] = self.network(images.to(next(self.network.parameters()).dtype))
        return output


@dataclass
class EDTPipelineOutput(BaseOutput):
    """N `images` of S x S pixels, in the form of `output_type`:

    "pil": PIL images. "np": float32 [N, S, S, 3] in 0..1. "pt": a tensor [N, 3, S, S] in 0..1, in the autoencoder's
    dtype. "latent": the latents before the decoder, float32 [N, C, h, h], on the model's scale (about unit variance);
    the autoencoder's own follow from them by the pipeline's `latent_scale`, or if it has none by the autoencoder's
    scaling_factor, see `edt_core.data.scale`.
    """

    images: list[Image.Image] | NDArray[np.float32] | Tensor


class EDTPipeline(DiffusionPipeline):
    """Class labels -> images, with the sampler the model was evaluated with.

    With its original scheduler, a pipeline samples by `protocol` and its `sampler`. Any other supported diffusers
    scheduler that is assigned replaces that sampler. One that does not fit the model is rejected.
    With a `guide`, a weaker model, samples are guided away from it (autoguidance) instead of from no class. The
    `classifier` is that of `guidance_reference: confused`.
    """

    model_cpu_offload_seq = "transformer->guide->vae->classifier"
    _optional_components = ["guide", "classifier"]  # noqa: RUF012  the name and the type are those of diffusers

    def __init__(
        self,
        transformer: EDTTransformer,
        vae: Autoencoder,
        scheduler: Any,
        classes: list[str] | None = None,
        protocol: dict[str, Any] | None = None,
        class_counts: list[int] | None = None,
        latent_scale: dict[str, Any] | None = None,
        num_timesteps: int | None = None,
        guide: EDTTransformer | None = None,
        classifier: EDTClassifier | None = None,
    ) -> None:
        super().__init__()
        _check_scale(vae, transformer.edt.config, latent_scale)
        if guide is not None:
            check_same_space(transformer.edt.config, guide.edt.config)
            align_weights(guide)
        timesteps = int(scheduler.config.num_train_timesteps if num_timesteps is None else num_timesteps)
        objective = objective_of_model(transformer.edt.config)
        # A folder of an older version has fewer fields; the others get the values that were fixed in that version.
        chain = chain_config({**objective.usual_chain, **(protocol or {})})
        if chain.time_shift != 1.0 and is_training_scheduler(scheduler, timesteps, objective):
            # The scheduler of a folder whose protocol alone states the shift.
            scheduler = training_scheduler(timesteps, objective, chain.time_shift)
        if not is_training_scheduler(scheduler, timesteps, objective, chain.time_shift):
            check_scheduler(scheduler, timesteps, objective)
        align_weights(transformer)  # diffusers memory-maps the files
        align_weights(vae)
        parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
        self.register_modules(**parts, guide=guide, classifier=classifier)
        fields = recorded_fields(chain)
        counts = None if class_counts is None else list(class_counts)
        self.register_to_config(
            classes=list(classes or []), protocol=fields, class_counts=counts, num_timesteps=timesteps
        )
        if latent_scale is not None:
            self.register_to_config(latent_scale=dict(latent_scale))

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; raises UserError for a scheduler that cannot sample from the model."""
        if name == "scheduler" and name in self.__dict__:
            self._check_scheduler(value)
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """All arguments of the constructor: the modules, and the settings for the same images."""
        settings = ("classes", "protocol", "class_counts", "latent_scale", "num_timesteps")
        return {**super().components, **{name: self.config[name] for name in settings if name in self.config}}

    @property
    def objective(self) -> Objective:
        """The objective that the transformer was trained for."""
        return objective_of_model(self.transformer.edt.config)

    def uses_own_samplers(self, scheduler: Any) -> bool:
        """Whether a scheduler is the pipeline's original one, with which it samples by `protocol`."""
        shift = self.config.protocol.get("time_shift", 1.0)
        return is_training_scheduler(scheduler, self.config.num_timesteps, self.objective, shift)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **protocol: Any,
    ) -> EDTPipelineOutput | tuple[Any]:
        """One image per label. Noise i depends only on (seed, i), and image i only on that and its label.

        The noise is equal to the last bit, independent of the rest of the call. The image is equal up to rounding:
        kernels round differently for other batch sizes, which changes single values of an image by a level of 255.

        `protocol`: fields of ChainConfig, such as sampler, cfg_scale or amm_blocks; the others are as in the model's
        evaluation. diffusers' names are accepted too: `num_inference_steps` for num_sampling_steps, `guidance_scale`
        for cfg_scale (up to 1 is no guidance).
        Noise is that of `seed`, by default 0, or is drawn from `generator`, a torch.Generator or a list with one for
        each image. The chain starts from `latents` [N, C, h, h] instead of noise if they are passed.
        `output_type` is "pil", "np", "pt" or "latent", see `EDTPipelineOutput`; with return_dict=False the result is a
        tuple with the images.
        Raises UserError, a ValueError, for labels that the model does not have, for options that are unknown, invalid
        or contradict each other, and for results that are not finite.
        """
        check_output_type(output_type)
        chain = call_chain(self.config.protocol, guidance_scale, num_inference_steps, protocol)
        sampler = self._sampler(chain)
        array = class_labels.cpu().numpy() if isinstance(class_labels, Tensor) else np.asarray(class_labels)
        labels = checked_labels(array, array.size, sampler.model.config.num_classes)
        noise = call_noise(seed, generator, latents, (len(labels), *sampler.latent_shape), sampler.device)
        solver = self._solver(chain, noise, [name for name in _OF_SAMPLERS if name in protocol])
        with self.progress_bar(total=chain.num_sampling_steps if solver is None else len(solver)) as bar:
            sampled = sampler.from_noise(labels, noise, range(len(labels)), lambda _done, _all: bar.update(), solver)
        images = self._images(sampled, output_type)
        self.maybe_free_model_hooks()
        return EDTPipelineOutput(images=images) if return_dict else (images,)

    def _sampler(self, chain: ChainConfig) -> LatentSampler:
        device = self._execution_device
        if device.type == "meta":
            raise UserError(
                "the weights of this pipeline are on the device meta, which has no values; load it again with "
                "EDTPipeline.from_pretrained"
            )
        # The transformer is called, not the model within it, since it may be compiled or have hooks that move it.
        timesteps, guide = self.config.num_timesteps, None if chain.cfg_scale == 1.0 else self.guide
        return LatentSampler(
            self.transformer.edt,
            chain,
            timesteps,
            None if guide is None else guide.edt,
            network=self.transformer,
            guide_network=guide,
            device=device,
            classify=self._classify(),
        )

    def _classify(self) -> LatentClassifier | None:
        if self.classifier is None:
            return None
        parts = self.classifier.network, self.transformer.edt.config, self.classifier
        return LatentClassifier(self.vae, *parts)

    def _solver(
        self, chain: ChainConfig, noise: CallNoise, given: Sequence[str]
    ) -> SchedulerChain | FlowSchedulerChain | None:
        """The chain of an assigned scheduler; None for the original one, with which the own samplers are used.

        `given`: options of a call that only the own samplers have.
        """
        self._check_scheduler(self.scheduler)  # its configuration may have changed since the assignment
        if self.uses_own_samplers(self.scheduler):
            return None
        if given:
            raise UserError(
                f"{given[0]} is {getattr(chain, given[0])!r}, but the pipeline has a {type(self.scheduler).__name__}, "
                "which replaces it; leave the option out, or load the pipeline again for its original scheduler"
            )
        chain_of = FlowSchedulerChain if self.objective.continuous else SchedulerChain
        return chain_of(self.scheduler, self.objective, chain.num_sampling_steps, noise.device, noise.generators())

    def _check_scheduler(self, scheduler: Any) -> None:
        if not self.uses_own_samplers(scheduler):
            check_scheduler(scheduler, self.config.num_timesteps, self.objective)

    def _images(self, latents: Tensor, output_type: str) -> list[Image.Image] | NDArray[np.float32] | Tensor:
        if output_type == "latent":
            return latents
        decoded = decode(self.vae, latents, self.transformer.edt.config)
        if not torch.isfinite(decoded).all():
            raise UserError(
                f"the autoencoder decodes to numbers that are not finite in {decoded.dtype}; use a dtype with more "
                "range: pipeline.vae.to(torch.float32) or torch.bfloat16"
            )
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_pixels(decoded)]
        images = (decoded / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array: NDArray[np.float32] = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return array

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the folder as diffusers does, with its `pipeline.py` and without the paths it was loaded from.

        Raises UserError if the folder has a `pipeline.py` of another program.
        """
        file = Path(save_directory) / _PIPELINE_FILE
        if file.exists() and _OURS not in file.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{file} is of another program and would be overwritten; save to another folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_PIPELINE_CODE, encoding="utf-8")  # custom_pipeline=folder imports it
        with _without_origin([part for part in (self, *super().components.values()) if part is not None]):
            super().save_pretrained(save_directory, *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: raises UserError. Attention reads weights of layers that it does not call."""
        raise UserError(
            "enable_sequential_cpu_offload is not supported by this pipeline; use enable_model_cpu_offload, which "
            "moves the transformer and the autoencoder as a whole"
        )


@contextmanager
def _without_origin(parts: Sequence[Any]) -> Iterator[None]:
    """Context in which the configurations lack the path of this machine that diffusers loaded them from.

    And an optional part that is not there, so that folders without it are as in versions that did not know it.
    """
    modules = [getattr(part, "_orig_mod", part) for part in parts]  # torch.compile wraps a module
    configs = [module._internal_dict for module in modules]
    try:
        for module, config in zip(modules, configs, strict=True):
            absent = [name for name in EDTPipeline._optional_components if config.get(name) == (None, None)]
            stated = {name: value for name, value in config.items() if name not in ("_name_or_path", *absent)}
            module._internal_dict = FrozenDict(stated)
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module._internal_dict = config


# model_index.json and pipeline.py refer to the classes by this module, independent of where their code is.
EDTTransformer.__module__ = EDTClassifier.__module__ = EDTPipeline.__module__ = _OURS


def _check_scale(vae: Autoencoder, config: ModelConfig, trained: Mapping[str, Any] | None) -> None:
    """Raise UserError unless latents are centred and scaled by channel as those that the model was trained on.

    `trained` is the scale that `save_pipeline` wrote; None in folders of versions that ignored it.
    """
    own = scale_of(vae)
    scale = model_scale(config, own)
    if LatentScale.of({**(trained or {}), "scaling_factor": scale.scaling_factor}) == scale:
        return
    if trained is None and config.latents_mean is None:
        raise UserError(
            f"the autoencoder of this pipeline has {own.beyond_factor()}, which the version that trained the model "
            "ignored: decoded images would be wrong. Remove these settings from vae/config.json to decode as the model "
            "was trained, or train it again"
        )
    of_model = "" if config.latents_mean is None else " and its transformer"
    raise UserError(
        f"the model was trained on latents with {dict(trained or {})}, but the autoencoder of this pipeline{of_model} "
        f"has {scale.record()}; use the files of its training"
    )


def save_pipeline(
    folder: Path,
    edt: DiffusionTransformer,
    vae: Autoencoder,
    *,
    num_timesteps: int,
    classes: Sequence[str],
    protocol: dict[str, Any],
    class_counts: Sequence[int] | None = None,
    guide: DiffusionTransformer | None = None,
    classifier: Classifier | None = None,
) -> None:
    """Write a diffusers pipeline folder: transformer, vae, scheduler, class names, and the sampling protocol.

    `class_counts` [K]: number of training images of each class, if known. `guide`: a weaker model of the same latents
    and classes, away from which the samples are guided. `classifier`: that of `guidance_reference: confused`.
    """
    transformer, weaker = _transformer(edt), None if guide is None else _transformer(guide)
    counts = None if class_counts is None else list(class_counts)
    scale = model_scale(edt.config, scale_of(vae))
    centred = None if scale.is_plain else scale.record()
    shift = chain_config(protocol).time_shift
    scheduler = training_scheduler(num_timesteps, objective_of_model(edt.config), shift)
    judge = None if classifier is None else EDTClassifier(**classifier.sizes)
    if judge is not None and classifier is not None:
        judge.network.load_state_dict(classifier.state_dict())
    facts = list(classes), protocol, counts, centred, num_timesteps
    pipeline = EDTPipeline(transformer, vae, scheduler, *facts, weaker, judge)
    pipeline.save_pretrained(folder, safe_serialization=True)


def _transformer(model: DiffusionTransformer) -> EDTTransformer:
    transformer = EDTTransformer(edt_config=model.built_config.to_dict())
    transformer.edt.load_state_dict(model.state_dict())
    return transformer
