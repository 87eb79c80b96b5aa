"""What a report tells of earlier champions: their line as it was decided, and nothing that moves afterwards."""

from pathlib import Path

import pytest

from pipelines.config.schema import PromoteConfig
from pipelines.registry.aliases import promote_version, rollback
from pipelines.registry.gate import Decision
from pipelines.report import history as report_registry
from pipelines.report.history import VersionRecord, record_options, version_record
from pipelines.report.step import STAGE, SummaryConfig
from tests.support.registry import NAME, PROTOCOL, Registry
from tests.support.reports import REGISTRY


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "store")


def record(registry: Registry, decision: Decision) -> VersionRecord:
    return version_record(registry.catalog, decision, str(registry.root))


def line(found: VersionRecord) -> list[tuple[str, float | None]]:
    return [(champion.version, champion.value) for champion in found.champions]


def test_champions_before_a_version_are_told_oldest_first(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first = registry.add("a", 9.0, fd_classifier_std=0.5)
    registry.add("bb", 9.5)  # a candidate, never champion
    third = registry.add("ccc", 8.0)
    fourth = registry.add("dddd", 8.5)
    assert line(record(registry, first)) == []
    assert line(record(registry, third)) == [("1", 9.0)]
    found = record(registry, fourth)
    assert line(found) == [("1", 9.0), ("3", 8.0)]  # a candidate too is told what it had to beat
    assert found.champions[0].spread == 0.5
    assert found.champions[0].registered == record(registry, first).registered
    version = registry.version("4")
    assert (found.metric, found.run_id) == ("fd_classifier", version.run_id)
    assert (found.lost, found.cut, found.code_version) == ("", False, version.tags["edt.code_version"])
    monkeypatch.setattr(report_registry, "MOST_CHAMPIONS", 1)
    assert (line(record(registry, fourth)), record(registry, fourth).cut) == ([("3", 8.0)], True)
    assert not record(registry, third).cut


def test_what_comes_later_changes_nothing_but_what_was_deleted(registry: Registry) -> None:
    registry.add("a", 9.0)
    second = registry.add("bb", 8.0)
    before = record(registry, second)
    rollback(registry.catalog, NAME)
    promote_version(registry.catalog, registry.version("2"))
    promote_version(registry.catalog, registry.version("1"), force=True)
    third = registry.add("ccc", 7.0)
    assert record(registry, second) == before
    assert line(record(registry, third)) == [("2", 8.0), ("1", 9.0)]  # 1 came back, and is told once
    registry.catalog.client.delete_model_version(NAME, "2")
    assert (line(record(registry, third)), record(registry, third).lost) == ([("1", 9.0)], "2")


def test_another_protocol_is_told_with_what_differs(registry: Registry) -> None:
    registry.add("a", 9.0)
    registry.add("bb", 8.0, protocol={**PROTOCOL, "cfg_scale": 1.5})
    promote_version(registry.catalog, registry.version("2"), force=True)
    third = registry.add("ccc", 7.0, gate=PromoteConfig(metric="fid", lower_is_better=True), fid=3.0)
    first, second = record(registry, third).champions
    assert (first.comparable, first.differences, first.value) == (True, (), None)  # fid was not measured
    assert (second.comparable, second.differences) == (False, ("cfg_scale 1.5 / 1.75",))


def test_the_run_is_found_in_the_store_or_on_the_server(registry: Registry, tmp_path: Path) -> None:
    from pipelines.tracking.catalog import Catalog

    store = tmp_path / "with space"
    assert record_options(registry.catalog, str(registry.root)) == f"--store {registry.root}"
    assert record_options(registry.catalog, str(store)) == f"--tracking-uri {registry.catalog.tracking_uri}"
    assert record_options(Catalog(f"sqlite:///{store}/mlflow.db", ""), str(store)) == f"--store '{store}'"
    assert record_options(Catalog("http://mlflow:5000", ""), "s3://bucket/store") == "--tracking-uri http://mlflow:5000"
    secret = record_options(Catalog("http://me:hidden@mlflow:5000", ""), "s3://bucket/store")
    assert secret == '--tracking-uri "$MLFLOW_TRACKING_URI"'


def test_where_the_record_lies_does_not_change_the_report_and_champions_do() -> None:
    def identity(**changes: object) -> str:
        config = SummaryConfig(
            title="t",
            pipeline="p",
            model={},
            decision="d",
            registry=REGISTRY.model_copy(update=changes),
            lineage={},
            config_yaml="",
        )
        return STAGE.fingerprint(config, {})

    assert identity(found_with="--store /moved") == identity()
    assert identity(champions=REGISTRY.champions[:1]) != identity()
