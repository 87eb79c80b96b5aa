"""The command that measures a version with averaged weights by the protocol of the version that it is made from."""

import json
import shlex
from contextlib import suppress
from typing import Any

from edt_core.config import SampleConfig, Section, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import EXTRACTORS, FITTED_SPACES, extractor_spec
from edt_core.store.artifact import Artifact
from edt_core.store.store import store_of


def measuring_command(parent: Any, std: float) -> str:
    """`edt evaluate` of the version `parent` with its own weights and with those of an average of this width.

    Both are measured with one reference, sampling configuration and seed, so that their values can be compared: those
    of the evaluation of `parent`. Published weights of feature networks are W. If that evaluation is not in its store
    any more, the command has no options of a protocol.
    """
    name = str(parent.name)
    command = ["edt", "evaluate", f"{name}/{parent.version}", f"./{name}-averages", "--sweep", f"ema=off,{std:g}"]
    with suppress(UserError, OSError, KeyError):
        evaluation = Artifact.read(parent.tags["edt.evaluation.uri"])
        if (store := store_of(evaluation.folder, evaluation.manifest.kind, evaluation.fingerprint)) is None:
            return shlex.join(command)
        features = Artifact.read(store.folder("features", evaluation.manifest.inputs["features"]))
        command += ["--reference", store.folder("reference", evaluation.manifest.inputs["reference"]).uri]
        for space in EXTRACTORS:
            if (identity := features.manifest.inputs.get(space)) is not None:
                place = store.folder(space, identity).uri if space in FITTED_SPACES else "W"
                command += [extractor_spec(space).option, place]
        command += _options(SampleConfig.model_validate(features.manifest.config))
        command += _options(EvaluateConfig.model_validate(evaluation.manifest.config))
    return shlex.join(command)


def _options(config: Section) -> list[str]:
    """The options of the fields that count and have no default."""
    usual = result_fields(type(config)())
    options: list[str] = []
    for name, value in result_fields(config).items():
        if value != usual.get(name):
            options += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return options
