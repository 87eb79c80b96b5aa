"""The module that stored diffusers folders name: it stays, so that all of them load."""

from edt_core.sampling.diffusers_pipeline import EDTPipeline, EDTTransformer

__all__ = ["EDTPipeline", "EDTTransformer"]
