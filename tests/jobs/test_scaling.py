"""The step that compares the trainings of a ladder, on planted checkpoints and evaluations."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from edt_core.errors import UserError
from edt_core.evaluation.config import Rung, ScalingConfig
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import SCALING_FIGURES
from jobs.stages.scaling import figures
from jobs.stages.scaling.step import STAGE, roles_of

BUDGETS, SIZES = (1e12, 3e12, 1e13), {24: 0.3, 48: 0.6, 96: 1.2, 192: 2.4}  # times the best size, by width
EXPONENT = 0.5
Made = dict[str, tuple[Artifact, Artifact]]  # checkpoint and evaluation of each rung


def config(budgets: tuple[float, ...] = BUDGETS) -> ScalingConfig:
    rungs = tuple(
        Rung(name=f"w{width}-{budget:g}", model="DiT-Tiny/2", width=width, budget=budget, seed=0)
        for width in SIZES
        for budget in budgets
    )
    return ScalingConfig(
        rungs=rungs, passes=50.0, metric="fd_classifier", lower_is_better=True, resamples=40, confidence=0.9
    )


def artifact(folder: Path, kind: str, rung: Rung, counts: dict[str, Any]) -> Artifact:
    out = ArtifactWriter(Folder.at(folder / kind / rung.name), kind, (rung.name.encode().hex() * 64)[:64])
    out.write_json("metrics.json", counts)
    return out.commit({}, {}, counts)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Trainings whose best size grows with the square root of the budget."""
    folder, draw = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    found = {}
    for rung in config().rungs:
        best = 0.02 * rung.budget**EXPONENT
        size = int(best * SIZES[rung.width])
        loss = 0.05 + 5 * rung.budget**-0.1 + 0.01 * np.log(size / best) ** 2 + 1e-5 * draw.normal()
        cost = {"training_flops": int(rung.budget), "macs": 2 * size, "steps": 10, "images_seen": 160}
        counts = {"parameters": size, **cost, "holdout": {"loss": float(loss)}}
        metrics = {"fd_classifier": float(100 * loss), "accuracy_classifier": float(1 - loss)}
        evaluation = artifact(folder, "evaluation", rung, {"metrics": metrics})
        found[rung.name] = artifact(folder, "checkpoint", rung, counts), evaluation
    return found


def made(config: ScalingConfig, trainings: Made, folder: Path, attempt: str = "") -> Artifact:
    inputs: dict[str, Artifact] = {}
    for number, rung in enumerate(config.rungs):
        inputs |= zip(roles_of(number), trainings[rung.name], strict=True)
    identity = STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return STAGE.execute(config, inputs, ArtifactWriter(Folder.at(folder), "scaling", identity, attempt), Silent())


@pytest.fixture(scope="module")
def whole(trainings: Made, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(config(), trainings, tmp_path_factory.mktemp("whole"))


def test_the_step_finds_the_planted_exponent(whole: Artifact) -> None:
    (laws,) = whole.counts["models"].values()
    low, high = laws["intervals"]["size_exponent"]
    assert low <= EXPONENT <= high
    assert laws["numbers"]["size_exponent"] == pytest.approx(EXPONENT, abs=0.01)


def test_points_are_rows_of_a_table_and_figures_show_something(whole: Artifact) -> None:
    points = whole.read_json("scaling.json")["points"]
    assert pq.read_table(io.BytesIO(whole.folder.read_bytes("points.parquet"))).to_pylist() == points
    assert [row["name"] for row in points] == [rung.name for rung in config().rungs]
    assert all(row["inference_flops"] == 2 * 50 * 2 * row["parameters"] for row in points)
    for name in SCALING_FIGURES:
        with Image.open(io.BytesIO(whole.folder.read_bytes(name))) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not an empty page


def test_a_step_that_was_killed_makes_the_same_files(
    whole: Artifact, trainings: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", killed)
        with pytest.raises(KilledError):
            made(config(), trainings, tmp_path, "first")
    assert not (tmp_path / "manifest.json").exists()
    again = made(config(), trainings, tmp_path, "second")
    digests = [{entry.path: entry.sha256 for entry in each.manifest.files} for each in (again, whole)]
    assert digests[0] == digests[1]


def test_points_that_determine_no_law_are_kept_with_the_reason(trainings: Made, tmp_path: Path) -> None:
    few = config(budgets=BUDGETS[:2])
    result = made(few, trainings, tmp_path)
    assert "2 budgets, and a fit needs 3" in result.counts["models"]["DiT-Tiny/2"]["problem"]
    assert len(json.loads((tmp_path / "scaling.json").read_text())["points"]) == len(few.rungs)


def test_a_training_without_a_held_out_loss_is_refused(trainings: Made, tmp_path: Path) -> None:
    rung = config().rungs[0]
    without = artifact(tmp_path, "checkpoint", rung, {"parameters": 1})
    with pytest.raises(UserError, match=r"has no held-out loss at its end.*set train\.holdout"):
        made(config(), {**trainings, rung.name: (without, trainings[rung.name][1])}, tmp_path / "out")
