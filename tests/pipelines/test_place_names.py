"""Folders with odd names: a whole run on them, and the refusal of the few that MLflow cannot record."""

import json
import os
import shlex
from pathlib import Path

import pytest
import sqlalchemy.engine
import yaml

from edt_core.data.digits import write_digits
from edt_core.errors import UserError
from edt_core.store.folder import Folder
from jobs.commands import stage
from jobs.runtime.tracking import SQLITE, own_uri, sqlite_path
from jobs.stages import preprocess
from pipelines.cluster.ui import run_link
from pipelines.config.schema import as_yaml, load_config
from pipelines.tracking.catalog import Catalog
from tests.support.small import MODEL, STEPS, edt, options

MARKS = " #%20?;:&=@+'\"\\*[a]{b,c}$HOME~!|<é日😀>"  # all at once
NAMES = [f"a{mark}b" for mark in " #?;:&=@+'\"\\*[]{}$~!|<>,^`é日😀"] + [
    "%20",
    "a%2Fb",
    "50%",
    "#sha256=ab",
    "~x",
    "a b ",
]
REFUSED = {
    "a\nb": r"'a\\nb' contains a line break \(U\+000A\)",
    "a\tb": r"contains a tab",
    "a\x7fb": r"contains the control character \(U\+007F\)",
    "a\u2028b": r"contains the control character \(U\+2028\)",
    "a\udcffb": r"contains the byte 0xff, which is not UTF-8",
    "a?token=b": r"'\?token=' in its path looks like a credential",
}


@pytest.mark.usefixtures("training_here")
def test_a_whole_run_among_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / MARKS
    images = write_digits(work / f"images{MARKS}\n\udcff")
    config = work / f"{MARKS}.yaml"
    config.write_text(yaml.safe_dump({"base": "quickstart", "source": {"kind": "image_folder", "path": str(images)}}))
    before = {*work.iterdir(), work / f"store{MARKS}"}
    monkeypatch.chdir(work)
    told = [config.name, "--store", f"store{MARKS}"]
    made = edt("run", *told, *options("source.kind=image_folder"), "--json")
    assert made.returncode == 0, made.stderr
    outcome = json.loads(made.stdout)
    assert outcome["executed"] == STEPS
    assert "WARNING mlflow" not in Path(outcome["log"]).read_text() + made.stderr

    planned = json.loads(edt("plan", *told, *options("source.kind=image_folder"), "--json").stdout)
    assert {step["action"] for step in planned} == {"reuse"}
    store = ("--store", f"store{MARKS}")
    drawn = edt("sample", f"{MODEL}@champion", *store, "--num", "1", "--num-sampling-steps", "2", "--out", "drawn.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (work / "drawn.png").is_file()
    for command in (["runs"], ["models", "list"], ["lineage", f"{MODEL}@champion"]):
        shown = edt(*command, *store)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.count("\n") > 1
    assert {*work.iterdir()} == {*before, work / "drawn.png"}
    assert [*tmp_path.iterdir()] == [work]


@pytest.mark.parametrize("name", NAMES)
def test_the_catalog_of_a_store_is_inside_it(tmp_path: Path, name: str) -> None:
    store = Folder.at(tmp_path / name / "store")
    assert store.local is not None
    store.local.mkdir(parents=True)
    path = store.local / SQLITE
    assert sqlite_path(own_uri(store)) == path
    with sqlalchemy.engine.create_engine(own_uri(store)).connect() as connection:
        connection.exec_driver_sql("CREATE TABLE made (here INTEGER)")
    assert path.stat().st_size > 0
    assert [p.name for p in tmp_path.rglob("*")] == [name, "store", SQLITE]


def test_mlflow_keeps_its_files_inside_a_store_with_all_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, root = tmp_path / "work", tmp_path / MARKS
    work.mkdir()
    root.mkdir()
    monkeypatch.chdir(work)
    catalog = Catalog.open(Folder.at(root), "e")
    run_id = catalog.start_run("r", {})
    catalog.log_text(run_id, "text \udcff", "folder/name.txt")
    assert Catalog.existing(Folder.at(root)).client.get_run(run_id).info.run_id == run_id
    assert [p.read_text() for p in root.rglob("name.txt")] == ["text \\udcff"]
    assert [*work.iterdir()] == []
    assert {*tmp_path.iterdir()} == {work, root}


def test_a_sqlalchemy_that_does_not_decode_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def before_2_1(uri: str) -> sqlalchemy.engine.URL:
        return sqlalchemy.engine.URL.create("sqlite", database=uri.removeprefix("sqlite:///").partition("?")[0])

    monkeypatch.setattr(sqlalchemy.engine, "make_url", before_2_1)
    assert own_uri(Folder(f"{tmp_path}/a%20b")) == f"sqlite:///{tmp_path}/a%20b/{SQLITE}"
    with pytest.raises(UserError, match=r"has '\?' in its name.*SQLAlchemy 2\.1"):
        load_config("quickstart", store=f"{tmp_path}/a?b")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", ["", "/store"])
def test_a_store_that_mlflow_cannot_record_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["run"], ["plan"], ["run", "--no-overlap"]):
        with pytest.raises(UserError, match=REFUSED[name]) as raised:
            load_config("quickstart", store=f"{tmp_path}/{name}{inside}")
        done = edt(*command, "--store", f"{name}{inside}")
        assert (done.returncode, done.stdout) == (2, "")
        assert str(raised.value).partition(" (got ")[0] in done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_alone_refuses_such_an_output_folder(
    tmp_path: Path, digits_folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        stage.main(preprocess.STAGE, [str(digits_folder), f"{tmp_path}/{name}"])
    assert ended.value.code == 2
    assert "cannot be used" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_other_stores_than_local_ones_keep_their_names() -> None:
    assert load_config("quickstart", store="s3://bucket/a\tb?token=c").store == "s3://bucket/a\tb?token=c"


@pytest.mark.parametrize("name", [*NAMES, "a\nb", "a\udcffb", "a: b", "a:", "[a]", "{a}", "a #b"])
def test_a_source_of_any_name_is_listed_and_recorded(digits_folder: Path, tmp_path: Path, name: str) -> None:
    from edt_core.data.sources import list_source
    from edt_core.progress import Silent

    (tmp_path / name).symlink_to(digits_folder)
    for location in (f"{tmp_path}/{name}", str(tmp_path / name / "0")):
        config = load_config("quickstart", ["source.kind=auto", f"source.path={location}"], str(tmp_path / "store"))
        assert config.source.path == location
        assert yaml.safe_load(as_yaml(config))["source"]["path"] == location
    config = load_config("quickstart", ["source.kind=auto", f"source.path={tmp_path}/{name}"])
    assert len(list_source(config.source, Silent())) == sum(len(files) for *_, files in os.walk(digits_folder))


def test_the_command_that_shows_a_run_can_be_pasted(tmp_path: Path) -> None:
    store = Folder.at(tmp_path / MARKS)
    assert shlex.split(run_link(own_uri(store), "1", "abc")) == ["edt", "ui", "--store", store.uri, "--run", "abc"]
