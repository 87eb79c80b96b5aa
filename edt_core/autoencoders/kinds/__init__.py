"""The supported kinds of autoencoders, by their class: one file for each kind, registered in KINDS.

The classes are diffusers', except AutoencoderFSQ.
"""

from typing import Any

from edt_core.autoencoders.kinds.dc import DC
from edt_core.autoencoders.kinds.fsq import FSQ
from edt_core.autoencoders.kinds.kind import AutoencoderKind
from edt_core.autoencoders.kinds.kl import KL
from edt_core.autoencoders.kinds.tiny import TINY
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError

KINDS: dict[str, AutoencoderKind] = {kind.class_name: kind for kind in (KL, TINY, DC, FSQ)}


def supported(conjunction: str) -> str:
    """The class names as a list for a message, with `conjunction` ("and" or "or") before the last one."""
    *names, last = KINDS
    return f"{', '.join(names)} {conjunction} {last}"


def kind_of(model: Any) -> AutoencoderKind:
    """The kind of a loaded autoencoder, compiled or not. Raises UserError for a class that is not supported."""
    loaded = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    for base in type(loaded).__mro__:
        if base.__name__ in KINDS:
            return KINDS[base.__name__]
    raise UserError(f"the autoencoder is {type(loaded).__name__}; {supported('and')} are supported")


def scale_of(model: Any) -> LatentScale:
    """The scale in the configuration of a loaded autoencoder. Raises as `kind_of`."""
    return kind_of(model).scale(model.config)
