"""Every layout of a source, on disk and in a store: the same images, labels and bytes as the plain folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import SourceConfig
from edt_core.data.sources import Listing, combine_identity, image_digest, list_source, source_identity
from edt_core.errors import UserError
from tests.support.sources import (
    WNIDS,
    Images,
    folder_of_class_tars,
    image_folder,
    labelled,
    parquet_folder,
    parquet_glob,
    renamed_train_tar,
    shards,
    shards_by_braces,
    train_tar,
)

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PER_CLASS = 7


@pytest.fixture(scope="module")
def images() -> Images:
    """Real photos of three classes, with the names that ILSVRC2012 would give them."""
    root = SHARED_DATA / "cifar10_sample"
    if not root.is_dir():
        pytest.skip(f"the sample photos are not here ({root})")
    return [
        (f"{wnid}/{wnid}_{path.stem}.JPEG", label, path.read_bytes())
        for label, (name, wnid) in enumerate(WNIDS.items())
        for path in sorted((root / name).iterdir())[:PER_CLASS]
    ]


LAYOUTS = [
    image_folder,
    labelled,
    train_tar,
    renamed_train_tar,
    folder_of_class_tars,
    shards,
    shards_by_braces,
    parquet_folder,
    parquet_glob,
]


@pytest.fixture(scope="module")
def s3_store() -> Iterator[str]:
    """URI of an empty bucket of a store on this machine."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import fsspec
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("images")
        yield "s3://images"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], str]:
    """Writes files below a new folder and returns its path or URI."""
    if request.param == "disk":

        def to_disk(files: dict[str, bytes]) -> str:
            for name, data in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(data)
            return str(tmp_path)

        return to_disk
    store = request.getfixturevalue("s3_store")

    def to_store(files: dict[str, bytes]) -> str:
        import fsspec

        root = f"{store}/{tmp_path.name}"
        fsspec.filesystem("s3").pipe({f"{root}/{name}": data for name, data in files.items()})
        return root

    return to_store


def listed(path: str, **options: Any) -> Listing:
    return list_source(SourceConfig(path=path, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_images_of_the_folder(
    images: Images, put: Callable[[dict[str, bytes]], str], layout: Callable[[Images], tuple[dict[str, bytes], str]]
) -> None:
    files, inside = layout(images)
    root = put(files)
    listing = listed(f"{root}/{inside}".rstrip("/"))
    assert listing.classes == tuple(WNIDS.values())
    found = list(listing.images())
    assert [(image.label, image.data) for image in found] == [(label, data) for _, label, data in images]
    if listing.access == "parquet":
        names = [image.name.removeprefix("data/") for image in (found[0], found[13])]
        assert names == ["train-0.parquet#0", "train-1.parquet#3"]
    else:
        assert [image.name for image in found] == [name for name, _, _ in images]
        assert listing.table["size"].to_pylist() == [len(data) for _, _, data in images]
    part = listing.slice(5, 17)
    assert list(part.images()) == found[5:17]
    assert part.slice(2, 4).table.equals(listing.slice(7, 9).table)
    few = listed(f"{root}/{inside}".rstrip("/"), classes=("n00000003", "n00000001"), limit=4)
    assert few.classes == ("n00000001", "n00000003")
    every = [image for image in found if image.label != 1]
    assert [image.data for image in few.images()] == [every[i * len(every) // 4].data for i in range(4)]
    assert listing.remote == root.startswith("s3://")
    identity = source_identity(listing)
    if not listing.remote:
        digests = b"".join(map(image_digest, found))
        names = [image.name for image in found]
        assert identity == combine_identity(listing.classes, names, [image.label for image in found], digests)
    assert identity == source_identity(listed(f"{root}/{inside}".rstrip("/")))


def test_an_archive_and_its_extracted_folder_are_the_same_source(images: Images, tmp_path: Path) -> None:
    identities = set()
    for layout in (image_folder, labelled, train_tar, folder_of_class_tars):
        files, inside = layout(images)
        for name, data in files.items():
            path = tmp_path / layout.__name__ / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        identities.add(source_identity(listed(str(tmp_path / layout.__name__ / inside))))
    assert len(identities) == 1


@pytest.mark.parametrize("layout", [image_folder, train_tar, shards, parquet_folder])
def test_a_changed_object_changes_the_identity_and_nothing_is_read(
    images: Images, s3_store: str, layout: Callable[[Images], tuple[dict[str, bytes], str]], tmp_path: Path
) -> None:
    import fsspec

    store, root = fsspec.filesystem("s3"), f"{s3_store}/changed-{layout.__name__}"
    files, inside = layout(images)
    store.pipe({f"{root}/{name}": data for name, data in files.items()})
    path = f"{root}/{inside}".rstrip("/")
    before = source_identity(listed(path))
    name, label, data = images[3]
    changed, _ = layout([*images[:3], (name, label, data[:-1] + bytes([data[-1] ^ 1])), *images[4:]])
    store.pipe({f"{root}/{name}": data for name, data in changed.items()})  # same names and sizes
    listing = listed(path)
    store.rm(root, recursive=True)
    assert source_identity(listing) != before


def test_an_object_that_vanishes_is_an_error_of_its_image_and_one_that_grows_stops_the_job(
    images: Images, s3_store: str
) -> None:
    import fsspec

    store, root = fsspec.filesystem("s3"), f"{s3_store}/moving"
    store.pipe({f"{root}/{name}": data for name, data in image_folder(images)[0].items()})
    listing = listed(root)
    store.rm(f"{root}/{images[2][0]}")
    found = list(listing.images())
    assert found[2].data is None
    assert found[2].error == "FileNotFoundError: No such file or directory"
    assert all(image.data for k, image in enumerate(found) if k != 2)
    store.pipe({f"{root}/{images[4][0]}": images[4][2] + b"more"})
    with pytest.raises(UserError, match="changed after it was listed"):
        list(listing.images())


def test_remote_errors_say_what_and_where(s3_store: str) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        listed(f"{s3_store}/nowhere")
    with pytest.raises(UserError, match="no-such-bucket"):
        listed("s3://no-such-bucket/x")
    with pytest.raises(UserError, match="Invalid bucket name"):
        listed("s3://no bucket/x")
    with pytest.raises(UserError, match="in the environment") as caught:
        listed("s3://somebody:hidden-word@images/nowhere")
    assert "hidden-word" not in str(caught.value)
