"""Artifacts of the version before are reused: nothing that moves, is renamed or is added may change a fingerprint.

`store_before.json` has the manifests that the small pipeline left, each at the commit that its `code_version` names.
When what a step makes changes on purpose, its version rises, and the manifests of this step and of those after it are
taken again from a finished store.
"""

import json
from pathlib import Path

import pytest

from edt_core.store.store import Store
from pipelines.config.schema import load_config
from pipelines.plan import plan
from tests.support.small import MODEL, SMALL, STEPS

MANIFESTS = json.loads((Path(__file__).parents[1] / "golden" / "store_before.json").read_text())
RECORDED = tuple(text for text in SMALL if "batch_size" not in text)  # the manifests are of batches of the usual size


def lay_out(store: Path) -> None:
    """The artifacts of these manifests, their files of the right sizes and empty."""
    for manifest in MANIFESTS:
        folder = store / manifest["kind"] / manifest["fingerprint"]
        for entry in manifest["files"]:
            path = folder / manifest["attempt"] / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(entry["bytes"])
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_the_version_before_is_reused(tmp_path: Path) -> None:
    lay_out(tmp_path)
    steps = plan(load_config("quickstart", RECORDED, str(tmp_path)))
    assert len(steps) == STEPS + 1  # and the promotion, which this store has no MLflow to look up in
    assert {step.step: step.action for step in steps if step.fingerprint} == {
        step.step: "reuse" for step in steps if step.fingerprint
    }
    assert len(list(Store.open(str(tmp_path)).artifacts())) == len(MANIFESTS) == STEPS


@pytest.mark.parametrize("field", ["train.objective=v_prediction", "train.latent_norm=true"])
def test_another_objective_or_scale_is_another_model_trained_or_not_of_the_same_data(
    field: str, tmp_path: Path
) -> None:
    lay_out(tmp_path)
    steps = plan(load_config("quickstart", [*RECORDED, field], str(tmp_path)))
    actions = {step.step: step.action for step in steps if step.fingerprint}
    assert {actions["encode"], actions["reference"], actions["classifier"]} == {"reuse"}
    for prefix in ("", "untrained "):
        assert actions[f"{prefix}train {MODEL}"] != "reuse", prefix


def test_latents_in_half_precision_are_other_latents_of_the_same_autoencoder(tmp_path: Path) -> None:
    lay_out(tmp_path)
    steps = plan(load_config("quickstart", [*RECORDED, "encode.store=fp16"], str(tmp_path)))
    actions = {step.step: step.action for step in steps if step.fingerprint}
    kept = {"preprocess", "autoencoder", "reference", "classifier"}
    assert {step: action for step, action in actions.items() if step in kept} == dict.fromkeys(kept, "reuse")
    assert not {actions["encode"], actions[f"train {MODEL}"]} & {"reuse"}
