"""The diffusers pipeline under the module name that stored folders and registered models contain.

diffusers loads a folder's components from this module, and only if it is already imported. So import the pipeline from
here, not from the module that defines it.
"""

# diffusers looks up the base classes of components here.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from edt_core.autoencoders.fsq import AutoencoderFSQ
from edt_core.sampling.diffusers_pipeline import (
    PROTOCOL,
    EDTClassifier,
    EDTPipeline,
    EDTPipelineOutput,
    EDTTransformer,
    chain_config,
    save_pipeline,
)
from edt_core.sampling.token_schedulers import TokenScheduler

__all__ = [
    "PROTOCOL",
    "AutoencoderFSQ",
    "DiffusionPipeline",
    "EDTClassifier",
    "EDTPipeline",
    "EDTPipelineOutput",
    "EDTTransformer",
    "ModelMixin",
    "SchedulerMixin",
    "TokenScheduler",
    "chain_config",
    "save_pipeline",
]
