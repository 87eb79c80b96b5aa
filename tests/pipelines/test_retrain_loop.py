"""The loop by itself: a schedule retrains a model while images arrive, and nobody looks after it.

A tick may meet a broken image, an MLflow server that is away, or the death of its run. The run of each tick is a
process. In the suite Ray's calls are done by that process; the slow test has five arrivals, and Ray.
"""

import json
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.stages.reuse.originals import Originals
from jobs.stages.reuse.siblings import NONE
from pipelines.registry.aliases import DECISION_TAG
from pipelines.schedule.record import UNCHANGED, Schedules
from pipelines.tracking.runs import search, step_tag, workflow_runs
from tests.support import small
from tests.support.retrain_loop import CLASSES, FIRST, HERE, MORE, NAME, STEPS, Loop, loop_in
from tests.support.small import MODEL


def assert_outcomes(loop: Loop, *outcomes: str) -> None:
    """Every tick has its outcome, also in MLflow, once. A tick whose run began names it, and a killed run is closed."""
    assert [tick.outcome for tick in loop.ticks] == list(outcomes)
    catalog = loop.catalog
    experiment = catalog.client.get_experiment_by_name("schedules")
    runs = catalog.client.search_runs([experiment.experiment_id])
    recorded = {run.data.tags["edt.tick"]: run.data.tags for run in runs}
    assert len(recorded) == len(runs) == len(loop.ticks)
    for tick in loop.ticks:
        tags = recorded[tick.tick.isoformat(timespec="seconds")]
        assert (tags["edt.outcome"], tags.get("edt.error"), tags.get("edt.run")) == (tick.outcome, tick.error, tick.run)
        is_killed = "the run was killed" in (tick.error or "")
        assert (tick.run is not None) == (tick.outcome == "finished" or is_killed)
        if is_killed:
            assert catalog.client.get_run(tick.run).info.status == "KILLED"
    assert not Schedules.at(str(loop.store)).state(NAME).unrecorded


def assert_decisions(loop: Loop) -> None:
    """For each arrival one version, made of the images that were there, from the champion of then, rightly decided."""
    versions, store = loop.versions, Store(Folder.at(loop.store))
    assert [version.version for version in versions] == [str(k + 1) for k in range(len(loop.arrivals))]
    champion = ""
    for version, arrival in zip(versions, loop.arrivals, strict=True):
        tags = version.tags
        images = store.find("images", tags["edt.images"])
        assert images is not None
        assert tags["edt.source"] == arrival.source == images.manifest.inputs["source"]
        assert tuple(images.read_json(CLASSES_NAME)) == CLASSES
        assert tuple(images.counts["class_counts"]) == arrival.counts
        if champion:
            assert (tags["edt.init_from"], tags["edt.cost.steps"]) == (f"models:/{MODEL}/{champion}", str(STEPS // 4))
        champion = rightly_decided(version, champion)
    model = loop.catalog.client.get_registered_model(MODEL)
    assert model.aliases == {"champion": champion, "candidate": versions[-1].version}


def rightly_decided(version: Any, champion: str) -> str:
    """Check a version's decision by the values that stand in the artifacts; returns the champion after it."""
    tags = version.tags
    decision = json.loads(tags[DECISION_TAG])
    assert (decision["name"], decision["version"]) == (MODEL, version.version)
    assert (decision["champion_before"] or "") == champion
    assert decision["value"] == float(tags[f"edt.metric.{decision['metric']}"])
    better = not champion
    if champion:
        again = decision["remeasured"]
        measured = Artifact.open(Folder.at(again["uri"])).counts["metrics"][decision["metric"]]
        assert (again["version"], again["protocol"]) == (champion, tags["edt.protocol"])
        assert decision["champion_value"] == again["metrics"][decision["metric"]] == measured
        better = decision["value"] < measured  # by the margin of the small pipeline, 0
    assert decision["became_champion"] == better
    return str(version.version) if better else champion


def assert_changes(loop: Loop) -> None:
    """Each retraining says which images came since its champion; a broken one counts once, when it comes."""
    made = [tick for tick in loop.ticks if tick.outcome == "finished"]
    for tick, version, arrival in zip(made, loop.versions[1:], loop.arrivals[1:], strict=True):
        before = loop.arrivals[int(json.loads(version.tags[DECISION_TAG])["champion_before"]) - 1]
        assert f"images    {arrival.files}: +{arrival.files - before.files} -0 images" in loop.log(tick)


def assert_nothing_twice(loop: Loop) -> None:
    """Each step was executed by one run and finished once; only what the killed run was at was begun again."""
    catalog, executed = loop.catalog, Counter[str]()
    for run in workflow_runs(catalog):
        steps = [name for name in run.data.tags.get("edt.executed", "").split(", ") if name]
        executed.update(run.data.tags[step_tag(name)] for name in steps)
    children = list(search(catalog, "tags.`edt.fingerprint` LIKE '%'"))
    finished = Counter(run.data.tags["edt.fingerprint"] for run in children)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert set(executed.values()) == set(finished.values()) == {1}
    restarted = [run.data.tags["edt.step"] for run in children if "edt.restarts" in run.data.tags]
    assert f"train {MODEL}" in restarted
    attempts = Counter[int]()
    for artifact in Store(Folder.at(loop.store)).artifacts():
        assert artifact.problems(deep=True) == []
        assert finished[artifact.fingerprint] == 1
        attempts[len([path for path in Path(artifact.folder.local or "").iterdir() if path.is_dir()])] += 1
    assert set(attempts) == {1, 2}
    assert attempts[2] <= len(restarted)


def assert_rows(loop: Loop) -> None:
    """Of each arrival, only the rows of new images were computed: all others are recorded as reused.

    `preprocess` also remembers that a broken image could not be read.
    """
    store, totals = Store(Folder.at(loop.store)), [sum(arrival.counts) for arrival in loop.arrivals]
    before = {"images": [arrival.files for arrival in loop.arrivals[:-1]]}
    for kind in ("images", "latents", "reference"):
        made = {artifact.counts["images"]: artifact.manifest.reused for artifact in store.committed(kind)}
        assert sorted(made) == totals, kind
        reused = [made[total] or {"rows": 0} for total in totals]
        assert [record["rows"] for record in reused] == [0, *before.get(kind, totals[:-1])], kind


def assert_nothing_lost(loop: Loop) -> None:
    """The last image artifact has every image; a broken one is listed there, with the reason."""
    images = Store(Folder.at(loop.store)).find("images", loop.versions[-1].tags["edt.images"])
    assert images is not None
    originals = Originals.of(images)
    written = {bytes(digest) for digest in originals.digests[originals.row != NONE]}
    files = [path for path in loop.images.rglob("*") if path.is_file()]
    assert written == {sha256(path.read_bytes()).digest() for path in files if path not in loop.broken}
    quarantined = images.counts["quarantined_images"]
    assert [loop.images / row["path"] for row in quarantined] == loop.broken
    assert all(row["reason"] for row in quarantined)


def assert_right(loop: Loop, *outcomes: str) -> None:
    assert_outcomes(loop, *outcomes)
    assert_decisions(loop)
    assert_changes(loop)
    assert_nothing_twice(loop)
    assert_rows(loop)
    assert_nothing_lost(loop)


@pytest.mark.faults
@pytest.mark.extern
def test_one_arrival_meets_a_broken_image_an_outage_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_in(tmp_path, HERE, monkeypatch) as loop:
        loop.arrive(FIRST)
        loop.train_first()
        loop.record_schedule()
        loop.arrive(MORE, broken=True)
        loop.outage()
        loop.killed()
        loop.night()
        loop.night()
        assert_right(loop, "failed", "failed", "finished", UNCHANGED)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_five_arrivals_are_five_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_in(tmp_path, "pipelines.cli", monkeypatch) as loop:
        loop.arrive(FIRST)
        loop.train_first()
        loop.record_schedule()
        loop.arrive(MORE)
        loop.night()
        loop.arrive(MORE, broken=True)
        loop.night()
        loop.arrive(MORE)
        loop.outage()
        loop.night()
        loop.arrive(MORE)
        loop.killed()
        loop.night()
        loop.arrive(MORE)
        loop.night()
        loop.night()
        for words in (("schedule", "list"), ("runs",), ("models", "list")):  # what a person sees of it
            print(small.edt(*words, "--store", str(loop.store), cwd=loop.root, env=dict(os.environ)).stdout)
        assert_right(loop, "finished", "finished", "failed", "finished", "failed", "finished", "finished", UNCHANGED)
