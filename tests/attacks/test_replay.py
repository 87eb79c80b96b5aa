"""Something old put in the place of something newer: a manifest, a folder, a model's files, an alias.

What is found out is refused. What is not is written down here as it is, because whoever writes the store, or the MLflow
server, is trusted (docs/security.md): their records are no signatures.
"""

import shutil
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.models.registry_files import pull
from pipelines.registry.gate import Decision
from tests.support.registry import NAME, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Version 1 is the champion; version 2 was refused, because it is worse."""
    made = Registry(tmp_path / "store")
    assert made.add("a", 4.0).became_champion
    assert not made.add("b", 5.0).became_champion
    return made


def checkpoints(registry: Registry) -> tuple[Path, Path]:
    """Folders of the checkpoints of the two versions, the older first."""
    folders = (registry.root / "checkpoint").iterdir()
    first, second = sorted(folders, key=lambda folder: (folder / "attempt" / "ema").read_bytes())
    return first, second


def found(registry: Registry, folder: Path) -> tuple[Artifact | None, str]:
    """What a step would reuse of an artifact's folder, and the warning."""
    warnings: list[str] = []
    artifact = Store(Folder.at(registry.root)).find("checkpoint", folder.name, warnings.append)
    return artifact, "\n".join(warnings)


def test_another_artifact_s_manifest_is_not_taken_for_this_one_s(registry: Registry) -> None:
    older, newer = checkpoints(registry)
    assert found(registry, newer)[0] is not None
    shutil.copy(older / "manifest.json", newer / "manifest.json")
    artifact, warning = found(registry, newer)
    assert artifact is None
    assert f"contains the artifact {older.name}: it was moved" in warning


def test_another_artifact_s_folder_is_not_taken_for_this_one(registry: Registry) -> None:
    older, newer = checkpoints(registry)
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    artifact, warning = found(registry, newer)
    assert artifact is None
    assert "it was moved" in warning


def test_an_older_version_s_files_are_not_pulled_as_the_newer_one_s(registry: Registry, tmp_path: Path) -> None:
    """With their own `digests.json`, which fits them: the tag of the version does not."""
    models = registry.root / "models"
    shutil.rmtree(models / "b")
    shutil.copytree(models / "a", models / "b")
    with pytest.raises(UserError, match=r"digests\.json has another sha256 than its tag"):
        pull(registry.catalog.client, registry.version("2"), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_an_alias_that_was_moved_by_hand_counts_and_the_version_s_decision_tells(registry: Registry) -> None:
    """Not found out: who writes the MLflow server says which version is champion. The refusal stays in its tags."""
    registry.catalog.client.set_registered_model_alias(NAME, "champion", "2")
    assert registry.champion() == "2"
    decision = Decision.from_json(registry.version("2").tags["edt.decision"])
    assert not decision.became_champion
    assert "edt.promoted" not in registry.version("2").tags
