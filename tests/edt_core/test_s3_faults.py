"""Buckets that throttle, break off, list late or have no conditional writes: the right bytes, or one clear message."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.folder import Folder
from tests.support.bad_bucket import Front, bad_bucket

DATA = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def front(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """A front of the S3 server, by which everything goes from here on."""
    # Both ask again, five times by default: botocore for each request, s3fs for each call.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    with bad_bucket(s3_server) as front:
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield front
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def written(s3: str, front: Front) -> Artifact:
    out = ArtifactWriter(Folder.at(f"{s3}/store/images/00"), "images", "0" * 64, "a1")
    for name in ("one.bin", "two.bin", "three.bin"):
        out.write_bytes(name, DATA)
    return out.commit({}, {}, {})


def first_times(fault: str, times: int) -> object:
    """A fault of the first requests of each kind."""
    seen: Counter[tuple[str, str]] = Counter()

    def of(method: str, path: str, headers: dict[str, str]) -> str:
        seen[method, path] += 1
        return fault if seen[method, path] <= times else ""

    return of


def test_a_bucket_that_throttles_is_asked_again(written: Artifact, front: Front, tmp_path: Path) -> None:
    front.fault = first_times("SlowDown", 2)  # type: ignore[assignment]
    again = Artifact.open(written.folder)
    assert [path.read_bytes() for path in again.paths()] == [DATA] * 3
    written.folder.write_bytes("more", b"text")
    assert written.folder.read_bytes("more") == b"text"
    assert max(front.asked.values()) >= 3


def test_a_bucket_that_never_stops_throttling_is_one_message(
    written: Artifact, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.fault = lambda *_: "SlowDown"
    refuses = r"cannot use s3://.*: the store refuses so many requests \((SlowDown|503)\)"
    for call in (lambda: Artifact.open(written.folder), lambda: written.folder.write_bytes("more", b"text")):
        with pytest.raises(UserError, match=refuses):
            call()


def test_an_answer_that_breaks_off_is_never_taken_as_whole(written: Artifact, front: Front, tmp_path: Path) -> None:
    front.fault = lambda method, path, _: "cut" if method == "GET" and path.endswith(".bin") else ""
    with pytest.raises(Exception, match=r"(?i)closed|incomplete|payload|peer|damaged|reached|content"):
        written.paths()
    front.fault = lambda *_: ""
    assert [path.read_bytes() for path in written.paths()] == [DATA] * 3


def test_a_listing_that_breaks_off_is_an_error_and_not_a_shorter_one(written: Artifact, front: Front) -> None:
    front.fault = lambda method, path, _: "cut" if "list-type" in path else ""
    with pytest.raises(Exception, match=r"(?i)closed|incomplete|payload|peer|content"):
        written.folder.walk()
    front.fault = first_times("cut", 1)  # type: ignore[assignment]
    assert len(written.data.walk()) == 3


def test_a_store_that_lists_late_has_its_artifacts(written: Artifact, front: Front) -> None:
    """What a listing lacks is looked for by its name before it is called missing."""
    front.hidden = {"two.bin"}
    assert sorted(written.data.walk()) == ["one.bin", "three.bin"]
    assert len(Artifact.open(written.folder).paths()) == 3
    written.data.remove("two.bin")
    with pytest.raises(ManifestError, match=r"1 problem: two\.bin is missing"):
        Artifact.open(written.folder)


def test_a_store_without_conditional_writes_is_written_to(s3: str, front: Front) -> None:
    front.fault = lambda method, path, headers: "NotImplemented" if "If-None-Match" in headers else ""
    folder = Folder.at(f"{s3}/plain")
    assert folder.write_bytes("name", b"first", exclusive=True)
    assert not folder.write_bytes("name", b"second", exclusive=True)  # by a look before
    assert folder.read_bytes("name") == b"first"
