"""The method: EDT models, diffusion, data formats, training and metrics. Imports neither Ray nor MLflow."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edt_core.pipeline import EDTPipeline

__all__ = ["EDTPipeline"]


def __getattr__(name: str) -> Any:
    """Import EDTPipeline on first use, because diffusers takes seconds."""
    if name != "EDTPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edt_core.pipeline import EDTPipeline

    return EDTPipeline
