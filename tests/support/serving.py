"""A registry with small whole versions to serve: real weights and files, no training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.registry.aliases import CHAMPION, move_alias
from pipelines.registry.packaging import log_pipeline
from pipelines.registry.registration import add_logged
from tests.support.pipelines import small_pipeline
from tests.support.registry import Registry

NAME = "edt-served"


def add_served(registry: Registry, seed: int, **protocol: Any) -> str:
    """Register one more version, with weights of its own; its number. The first one becomes champion."""
    run = registry.catalog.start_run("serve", {})
    logged = log_pipeline(registry.catalog, run, NAME, lambda folder: _write(folder, seed, protocol))
    version = add_logged(registry.catalog, NAME, run, logged, {}, {"seed": str(seed)})
    if str(version.version) == "1":
        move_alias(registry.catalog, version, CHAMPION)
    return str(version.version)


def _write(folder: Path, seed: int, protocol: Mapping[str, Any]) -> None:
    small_pipeline(folder, seed=seed, **protocol)


def crown_served(registry: Registry, number: str) -> None:
    """Move the alias `champion` to a version."""
    move_alias(registry.catalog, registry.version(number, NAME), CHAMPION)
