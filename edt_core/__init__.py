"""The method: EDT models, diffusion, data formats, training and metrics. Imports neither Ray nor MLflow."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edt_core.pipeline import EDTPipeline

__all__ = ["EDTPipeline"]


def __getattr__(name: str) -> Any:
    """EDTPipeline, imported when it is asked for: diffusers takes seconds."""
    if name != "EDTPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edt_core.pipeline import EDTPipeline

    return EDTPipeline
