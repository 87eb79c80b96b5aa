"""The diffusers folder of a version that is made from another one without training, its parent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edt_core.printing.redaction import redacted
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG
from jobs.models.open import Loaded
from pipelines.config.schema import PromoteConfig
from pipelines.registry.aliases import GATE_TAG, GUIDE_CHECKPOINT_TAG, GUIDE_FROM_TAG, GUIDE_TAG
from pipelines.registry.model_card import README, ModelCard
from pipelines.registry.registration import OBJECTIVE_TAG

TAKEN_OVER = (  # tags of the version that are true of its training
    "edt.uri",
    "edt.digest",
    "edt.images",
    "edt.images.digest",
    "edt.autoencoder",
    "edt.source",
    INIT_TAG,
    INIT_FROM_TAG,
    INIT_CHECKPOINT_TAG,
    GUIDE_TAG,
    GUIDE_FROM_TAG,
    GUIDE_CHECKPOINT_TAG,
    OBJECTIVE_TAG,
)


def write_derived(
    folder: Path,
    parent: Any,
    loaded: Loaded,
    protocol: Mapping[str, Any],
    origin: Mapping[str, str],
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of `loaded`, which is `parent` with its changes, and its card, which says its `origin`.

    `measured`: the counts of its evaluation, with `metrics` and their `protocol`.
    """
    from edt_core.models import count_macs, count_parameters
    from edt_core.pipeline import save_pipeline

    save_pipeline(
        folder,
        loaded.model,
        loaded.autoencoder,
        num_timesteps=loaded.num_timesteps,
        classes=loaded.classes,
        protocol=dict(protocol),
        class_counts=loaded.class_counts,
        guide=loaded.guide,
        classifier=loaded.classifier,
    )
    card = ModelCard(
        name=str(parent.name),
        config=loaded.model.config,
        parameters=count_parameters(loaded.model),
        macs=count_macs(loaded.model),
        sampling=protocol,
        license=_license_of(parent),
        origin=origin,
        metrics=(measured or {}).get("metrics", {}),
        protocol=(measured or {}).get("protocol", {}),
    )
    (folder / README).write_text(redacted(card.text()), encoding="utf-8")


def _license_of(version: Any) -> str | None:
    """The license that a version was registered with."""
    gate = version.tags.get(GATE_TAG)
    return PromoteConfig.model_validate(json.loads(gate)).license if gate else None
