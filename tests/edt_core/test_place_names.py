"""How a path is read from what was typed, and shards in folders whose names mean something in a URL."""

import os
from pathlib import Path

import pytest

from edt_core.data.shards import ImageSample, read_image_shard, write_image_shard
from edt_core.printing.redaction import redacted, redacted_values
from edt_core.store.folder import Folder
from jobs.commands.inputs import split_digest
from jobs.commands.options import parse_assignment


def test_a_tilde_is_a_home_only_where_a_shell_takes_it_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Folder.at("~/store").uri == "/home/me/store"
    assert Folder.at("./~/store").uri == f"{tmp_path}/~/store"
    assert Folder.at("~no-such-user-5e1f/store").uri == f"{tmp_path}/~no-such-user-5e1f/store"


def test_what_starts_as_a_path_is_no_uri() -> None:
    assert Folder.at("/data/s3://bucket").uri == "/data/s3:/bucket"
    assert Folder.at("./s3://bucket").local == Path.cwd() / "s3:" / "bucket"
    assert Folder.at("s3://bucket/a/").uri == "s3://bucket/a"


@pytest.mark.parametrize("path", ["/a: b", "/a:", "/a #b", "./[a]", "../{a}", "~/a: b", "/a\nb", "/a\udcff ", "/a, b"])
def test_a_path_is_assigned_as_it_is(path: str) -> None:
    assert parse_assignment(f"source.path={path}") == ("source.path", path)


def test_a_digest_follows_the_last_mark() -> None:
    assert split_digest("/a#sha256=b/w.pth") == ("/a#sha256=b/w.pth", None)
    assert split_digest("/a#sha256=b/w.pth#sha256=0f") == ("/a#sha256=b/w.pth", "0f")
    assert split_digest("https://host/w.pth#sha256=0f") == ("https://host/w.pth", "0f")


def test_a_name_that_is_not_utf_8_can_be_shown_and_is_kept_in_json() -> None:
    name = os.fsdecode(b"/data/\xff\xc3\xa9")
    assert redacted(name) == "/data/\\udcffé"
    assert redacted_values({"path": [name]}) == {"path": [name]}


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "s3:", "pipe:true", "a{0..1}b", "a::b", "a\nb", "a\udcffb"])
def test_a_shard_is_read_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    shard = tmp_path / name / "images-00000.tar"
    sample = ImageSample("000", b"pixels", 1, "0/1.png", "0" * 64)
    write_image_shard(shard, [sample], "png")
    assert list(read_image_shard(shard)) == [sample]
