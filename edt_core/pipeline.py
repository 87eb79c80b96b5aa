"""The diffusers pipeline, by the module name that stored folders and registered models give: it stays.

diffusers loads a folder's components from this module, and only where it has been imported: import the pipeline from
here, not from where its code lies.
"""

from diffusers import DiffusionPipeline, ModelMixin  # diffusers looks for the bases of the components here

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
