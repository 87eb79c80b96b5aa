"""Load feature networks from a folder or hub id in the transformers format, with weights in safetensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edt_core.errors import UserError
from edt_core.evaluation.extractors.spec import ExtractorSpec
from edt_core.files.tensor_files import check_folder_headers
from edt_core.models.alignment import align_weights
from edt_core.network.hub import hub_is_away, loading_failure


def load_pretrained(spec: ExtractorSpec, location: str | Path, model_class: str, kinds: Sequence[str]) -> Any:
    """The model, in float32, of the transformers class `model_class`; `kinds` are the accepted model types.

    Raises UserError if transformers or the model is missing, and for a model of another kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{spec.title} needs transformers; pip install edt-pipeline[{spec.extra}]") from error
    place, away = str(location), hub_is_away(location)
    local = away or Path(location).is_dir()  # without the hub, its cache on this machine may have the model
    try:
        if Path(location).is_dir():
            check_folder_headers(Path(location))
        load_config: Any = transformers.AutoConfig.from_pretrained
        kind = load_config(place, local_files_only=local, trust_remote_code=False).model_type
        if kind not in kinds:
            raise ValueError(f"it is a {kind}")
        load: Any = getattr(transformers, model_class).from_pretrained
        model, loading = load(
            place, local_files_only=local, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
            raise ValueError(f"{len(missing)} tensors are missing or have another shape, {missing[0]} first")
    except Exception as error:  # the libraries under transformers raise many kinds of errors for unreadable files
        cause = loading_failure(error, away)
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise UserError(f"no {spec.title} at {place}: {reason}. Needed are {spec.needed}") from error
    return align_weights(model)
