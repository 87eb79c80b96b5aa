"""The store on S3: the same protocol against a server that speaks S3, and what it refuses as one clear message."""

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.cache import local_copy, local_directory
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from jobs.commands.verify import verify
from tests.support.small import edt


def writer(uri: str, attempt: str = "a1", previous: tuple[str, ...] = ()) -> ArtifactWriter:
    return ArtifactWriter(Folder.at(f"{uri}/store/images/00"), "images", "0" * 64, attempt, previous)


def committed(uri: str) -> Artifact:
    out = writer(uri)
    for k in range(5):
        out.write_bytes(f"images-{k:05d}.tar", bytes([k]) * 1000, rows=k)
    out.write_bytes("model/config.json", b"{}")
    out.write_bytes("model/weights/one.safetensors", b"w" * 100)
    return out.commit({"size": 32}, {"source": "s"}, {"images": 10})


def overwrite(artifact: Artifact, name: str, data: bytes) -> None:
    fs, path = artifact.data.filesystem()
    fs.pipe_file(f"{path}/{name}", data)


def test_an_artifact_on_s3_is_written_found_read_and_verified(s3: str) -> None:
    artifact = committed(s3)
    assert Artifact.open(f"{s3}/store/images/00").manifest == artifact.manifest
    assert ".journal" not in artifact.data.names()
    assert artifact.path("images-00003.tar").read_bytes() == b"\3" * 1000
    assert [path.name for path in artifact.paths("*.tar")] == [f"images-{k:05d}.tar" for k in range(5)]
    folder = artifact.directory("model")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "weights/one.safetensors",
    ]
    artifact.verify_once()
    assert artifact.problems(deep=True) == []
    assert "7 files, 5,102 bytes, sha256 of every file as stated" in verify(artifact.folder.uri, deep=True)


def test_a_flipped_object_is_found_where_it_lies_and_when_it_is_downloaded(s3: str) -> None:
    artifact = committed(s3)
    artifact.paths()  # a whole copy in the cache hides nothing
    overwrite(artifact, "images-00001.tar", b"\1" * 999 + b"\2")
    assert Artifact.open(artifact.folder).problems(deep=True) == [
        "images-00001.tar has 1000 bytes as in its manifest, but another sha256"
    ]
    with pytest.raises(UserError, match=r"(?s)1 problem in 7 files.*images-00001\.tar"):
        verify(artifact.folder.uri, deep=True)


def test_a_flipped_object_is_never_kept(s3: str, tmp_path: Path) -> None:
    artifact = committed(s3)
    overwrite(artifact, "images-00001.tar", b"\1" * 999 + b"\2")
    with pytest.raises(ManifestError, match=r"images-00001\.tar is damaged: it has 1000 bytes of sha256"):
        artifact.path("images-00001.tar")
    with pytest.raises(ManifestError, match=r"images-00001\.tar"):
        artifact.verify_once("*.tar")
    kept = [p for p in (tmp_path / "edt-cache").rglob("*") if p.is_file() and "locks" not in p.parts]
    assert not [p for p in kept if p.read_bytes().startswith(b"\1")]


@pytest.mark.parametrize("change", ["missing", "resized", "extra"])
def test_missing_resized_and_extra_objects_are_refused_at_once(s3: str, change: str) -> None:
    artifact = committed(s3)
    if change == "missing":
        artifact.data.remove("images-00001.tar")
    else:
        overwrite(artifact, "images-00001.tar" if change == "resized" else "model/more.json", b"x")
    with pytest.raises(ManifestError, match=r"is missing|has 1 bytes|is not in the manifest"):
        Artifact.open(artifact.folder)


def test_an_attempt_on_s3_takes_over_finished_files_and_no_others(s3: str) -> None:
    dead = writer(s3, "a1")
    dead.write_bytes("done.bin", b"done", rows=2)
    dead.write_bytes("sub/flipped.bin", b"good")
    dead.data.write_bytes("sub/flipped.bin", b"goof")
    dead.data.write_bytes("half.bin", b"no journal entry")
    new = writer(s3, "a2", previous=("a1",))
    entry = new.recover("done.bin")
    assert entry is not None
    assert new.recover("done.bin") == entry  # its own by now
    assert entry.rows == 2
    assert new.recover("sub/flipped.bin") is None
    assert new.recover("half.bin") is None
    artifact = new.commit({}, {}, {})
    assert [f.path for f in artifact.entries()] == ["done.bin"]
    assert artifact.path("done.bin").read_bytes() == b"done"


def test_of_many_commits_at_once_one_manifest_wins(s3: str) -> None:
    writers = [writer(s3, f"a{k}") for k in range(6)]
    for k, out in enumerate(writers):
        out.write_bytes("x", f"by {k}".encode())
    together = threading.Barrier(len(writers))
    found: list[str] = []

    def commit(out: ArtifactWriter) -> None:
        together.wait()
        found.append(out.commit({}, {}, {}).manifest.attempt)

    threads = [threading.Thread(target=commit, args=(out,)) for out in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(writers)
    assert set(found) == {Artifact.open(writers[0].folder).manifest.attempt}


def test_exclusive_creation_is_one_conditional_write(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the look before it saw nothing, the object that came between stays."""
    folder = Folder.at(f"{s3}/exclusive")
    assert folder.write_bytes("name", b"first", exclusive=True)
    fs, _ = folder.filesystem()
    monkeypatch.setattr(type(fs), "exists", lambda self, path: False)
    assert not folder.write_bytes("name", b"second", exclusive=True)
    assert folder.read_bytes("name") == b"first"


def test_a_folder_lists_walks_and_forgets(s3: str) -> None:
    folder = Folder.at(f"{s3}/a")
    assert (folder.names(), folder.walk(), folder.size("x"), folder.exists("x")) == ([], {}, None, False)
    for name in ("x", "b/c/d", ".journal/e"):
        folder.write_bytes(name, b"123")
    fs, path = folder.filesystem()
    fs.pipe_file(f"{path}/b/", b"")  # how some clients note a folder
    assert folder.walk() == {"x": 3, "b/c/d": 3}
    assert folder.names() == [".journal", "b", "x"]
    copy = local_directory(folder.child("b"))
    assert (copy / "c" / "d").read_bytes() == b"123"
    folder.write_bytes("b/c/d", b"456")  # same size, another version
    assert (local_directory(folder.child("b")) / "c" / "d").read_bytes() == b"456"
    assert local_copy(folder, "x").read_bytes() == b"123"
    with pytest.raises(FileNotFoundError):
        local_copy(folder, "y")
    folder.remove("b")
    assert folder.walk() == {"x": 3}


@pytest.mark.extern
def test_a_folder_works_after_a_pickle_and_in_another_process(s3: str) -> None:
    folder = Folder.at(f"{s3}/a")
    folder.write_bytes("x", b"123")
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_bytes('x'))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(folder), capture_output=True, check=True)
    assert done.stdout == b"b'123'\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_folder_works_after_a_fork(s3: str) -> None:
    folder = Folder.at(f"{s3}/a")
    folder.write_bytes("x", b"123")
    child = os.fork()
    if child == 0:
        os._exit(0 if folder.read_bytes("x") == b"123" else 1)
    assert os.waitpid(child, 0)[1] == 0


REFUSALS = {
    "no bucket": ({}, "s3://no-such-bucket-here/store", "there is no such bucket"),
    "no credentials": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "", "no credentials were found"),
    "no profile": ({"AWS_PROFILE": "nobody"}, "", "no credentials were found"),
    "unreachable": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "", "the store cannot be reached"),
    "no endpoint": ({"AWS_ENDPOINT_URL": "nonsense"}, "", "the store cannot be reached"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_store_refuses_is_one_clear_message(
    s3: str, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    caplog.set_level(logging.INFO)
    variables, uri, message = REFUSALS[case]
    uri = uri or f"{s3}/store"
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    for use in (
        lambda: Folder.at(uri).check_writable(),
        lambda: Artifact.open(uri),
        lambda: Folder.at(uri).walk(),
        lambda: Folder.at(uri).write_bytes(MANIFEST_NAME, b"", exclusive=True),
    ):
        with pytest.raises(UserError, match=f"(?s)^cannot use {uri}.*{message}") as caught:
            use()
        assert "AWS_" in str(caught.value)
        assert secret not in str(caught.value) + repr(caught.value.__cause__)
    assert secret not in caplog.text


def test_denied_access_is_one_clear_message(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", denied)
    with pytest.raises(UserError, match="access denied; check the rights of these credentials"):
        writer(s3).write_bytes("x", b"")


def test_a_clock_that_the_store_refuses_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's S3 refuses requests that were signed a quarter of an hour ago, or will be."""
    import s3fs
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    def refused(*arguments: object, **options: object) -> None:
        cause = ClientError({"Error": {"Code": "RequestTimeTooSkewed", "Message": "too large"}}, "PutObject")
        raise translate_boto_error(cause) from cause

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", refused)
    with pytest.raises(UserError, match=f"the clock of {socket.gethostname()} differs too much"):
        writer(s3).write_bytes("x", b"")


def test_the_secret_is_written_nowhere(s3: str, tmp_path: Path) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    artifact = committed(s3)
    artifact.paths()
    artifact.verify_once()
    fs, _ = artifact.folder.filesystem()
    objects = fs.find(s3)
    assert len(objects) >= 8
    assert not [name for name in objects if secret in fs.cat_file(name)]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_verify_as_a_command_on_s3(s3: str) -> None:
    artifact = committed(s3)
    arguments = ["verify", artifact.folder.uri, "--deep"]
    done = edt(*arguments, env=os.environ)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
    overwrite(artifact, "images-00001.tar", b"\1" * 999 + b"\2")
    done = edt(*arguments, env=os.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: s3://")
    assert "another sha256" in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr
