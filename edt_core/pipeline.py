"""The diffusers pipeline under the module name that stored folders and registered models contain.

diffusers loads a folder's components from this module, and only if it is already imported. So import the pipeline from
here, not from the module that defines it.
"""

from diffusers import DiffusionPipeline, ModelMixin  # diffusers looks up the base classes of components here

from edt_core.sampling.diffusers_pipeline import (
    PROTOCOL,
    EDTPipeline,
    EDTPipelineOutput,
    EDTTransformer,
    chain_config,
    save_pipeline,
)

__all__ = [
    "PROTOCOL",
    "DiffusionPipeline",
    "EDTPipeline",
    "EDTPipelineOutput",
    "EDTTransformer",
    "ModelMixin",
    "chain_config",
    "save_pipeline",
]
