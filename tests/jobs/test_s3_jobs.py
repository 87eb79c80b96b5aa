"""The jobs on a store that speaks S3: the artifacts of a local disk, byte for byte, and no secret anywhere."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, PreprocessConfig, SourceConfig, TrainConfig
from edt_core.data.shards import read_image_shard
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, FileEntry, ManifestError
from edt_core.store.cache import cache_folder
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME, REPORT_OF_SHARD
from edt_core.training.store import CheckpointStore
from jobs.stages import encode, preprocess, train
from jobs.stages.autoencoder import published_artifact
from jobs.stages.preprocess import image_source
from jobs.stages.training.latents import open_latents, shard_stream, stream_text
from tests.support.jobs import command, execute
from tests.support.local_ray import local_ray
from tests.support.small import edt, edt_process
from tests.support.sources import WNIDS, Images, image_folder, parquet_folder, shards, train_tar
from tests.support.trainings import narrow

# Each test has an S3 server, a process of its own; those that are Ray's as well say so.
pytestmark = pytest.mark.extern

PER_CLASS, SIZE, IMAGES_PER_SHARD = 20, 32, 24
PREPROCESS = PreprocessConfig(image_size=SIZE, images_per_shard=IMAGES_PER_SHARD)
ENCODE = EncodeConfig(batch_size=8, write_webdataset=True, num_workers=1)
LATENTS = [f"latents-{k:05d}.{kind}" for k in range(3) for kind in ("arrow", "tar")]


# --- what is made on the local disk


def preprocessed(source: str, out: str | Path) -> Artifact:
    return execute(preprocess.STAGE, PREPROCESS, out, source=image_source(SourceConfig(path=source)))


@dataclass(frozen=True)
class Made:
    """The chain on the local disk."""

    source: Path
    images: Artifact
    vae_folder: Path
    vae: Artifact
    latents: Artifact


@pytest.fixture(scope="module")
def pictures(cifar: Path) -> Images:
    """Sixty real photos of three classes."""
    return [
        (f"{wnid}/{wnid}_{path.stem}.JPEG", label, path.read_bytes())
        for label, (name, wnid) in enumerate(WNIDS.items())
        for path in sorted((cifar / name).iterdir())[:PER_CLASS]
    ]


@pytest.fixture(scope="module")
def made(pictures: Images, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("local")
    with local_ray():
        images = preprocessed(put(image_folder(pictures)[0], str(root / "source")), root / "images")
    assert [entry.rows for entry in images.entries("images-*.tar")] == [24, 24, 12]
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), SIZE).save_pretrained(root / "vae")
    vae = published_artifact(str(root / "vae"), Folder.at(root / "autoencoder"))
    with local_ray():
        latents = execute(encode.STAGE, ENCODE, root / "latents", images=images, autoencoder=vae)
    return Made(root / "source", images, root / "vae", vae, latents)


def put(files: dict[str, bytes], root: str) -> str:
    """Write files below a local folder or a URI."""
    if "://" in root:
        import fsspec

        fsspec.filesystem("s3").pipe({f"{root}/{name}": data for name, data in files.items()})
        return root
    for name, data in files.items():
        (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(root) / name).write_bytes(data)
    return root


def uploaded(artifact: Artifact, uri: str) -> Artifact:
    """A copy of a local artifact in the store."""
    names = [MANIFEST_NAME, *(entry.path for entry in artifact.entries())]
    put({name: artifact.folder.read_bytes(name) for name in names}, uri)
    return Artifact.open(uri)


def samples(artifact: Artifact) -> list[tuple[str, int, np.ndarray]]:
    """Key, label and pixels of every image."""
    found = (sample for path in artifact.paths("images-*.tar") for sample in read_image_shard(path))
    return [(sample.key, sample.label, sample.pixels()) for sample in found]


def overwrite(artifact: Artifact, name: str, place: int) -> None:
    """Flip a bit of an object."""
    data = bytearray(artifact.data.read_bytes(name))
    data[place] ^= 1
    artifact.data.write_bytes(name, bytes(data))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are downloaded to this node's cache."""
    names: list[str] = []
    fetch = Folder.fetch

    def counted(self: Folder, name: str, target: Path) -> str:
        names.append(name)
        return fetch(self, name, target)

    monkeypatch.setattr(Folder, "fetch", counted)
    return names


# --- preprocess


def without_reports(artifact: Artifact) -> list[FileEntry]:
    """Files but for the reports, which also have the version tokens of images in an object store."""
    return [entry for entry in artifact.entries() if not fnmatch(entry.path, REPORT_OF_SHARD.format("*"))]


def test_preprocess_from_store_to_store_is_that_of_the_disk(s3: str, pictures: Images, made: Made, here: None) -> None:
    source = put(image_folder(pictures)[0], f"{s3}/source")
    images = preprocessed(source, f"{s3}/images")
    assert without_reports(images) == without_reports(made.images)
    assert images.counts == made.images.counts
    assert images.fingerprint != made.images.fingerprint  # a store's word for what is in it is a version, not a digest
    assert images.problems(deep=True) == []
    assert ".journal" not in images.data.names()
    listed = image_source(SourceConfig(path=source)).fingerprint
    assert preprocess.STAGE.fingerprint(PREPROCESS, {"source": listed}) == images.fingerprint


@pytest.mark.parametrize("layout", [shards, parquet_folder, train_tar])
def test_preprocess_of_every_archive_is_that_of_the_disk(
    s3: str, pictures: Images, made: Made, layout: Any, tmp_path: Path, here: None
) -> None:
    files, inside = layout(pictures)
    on_disk, in_store = (
        preprocessed(f"{put(files, root)}/{inside}".rstrip("/"), tmp_path / out)
        for root, out in ((str(tmp_path / "source"), "disk"), (f"{s3}/source", "store"))
    )
    assert without_reports(in_store) == without_reports(on_disk)
    assert in_store.counts == on_disk.counts
    for (key, label, pixels), (_, expected, original) in zip(samples(in_store), samples(made.images), strict=True):
        assert label == expected, key
        assert np.array_equal(pixels, original), key


# --- encode


def encoder_inputs(store: str, made: Made) -> dict[str, Artifact]:
    """Images and autoencoder in the store, the latter as `python -m jobs.encode` takes it from a folder."""
    vae = published_artifact(str(made.vae_folder), Folder.at(f"{store}/latents/.autoencoder"))
    assert vae.manifest.digest == made.vae.manifest.digest
    return {"images": uploaded(made.images, f"{store}/images"), "autoencoder": vae}


def test_encode_from_store_to_store_is_that_of_the_disk(s3: str, made: Made, here: None) -> None:
    inputs = encoder_inputs(s3, made)
    latents = execute(encode.STAGE, ENCODE, f"{s3}/latents", **inputs)
    assert latents.manifest.digest == made.latents.manifest.digest
    assert latents.counts == made.latents.counts
    assert latents.fingerprint == made.latents.fingerprint  # artifacts are known by what is in them, wherever they lie
    assert latents.problems(deep=True) == []
    # Without its manifest the artifact is none, and is made again: the journal went when it was committed.
    latents.folder.remove(MANIFEST_NAME)
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        Artifact.open(f"{s3}/latents")
    again = execute(encode.STAGE, ENCODE, f"{s3}/latents", **inputs)
    assert again.manifest.digest == made.latents.manifest.digest


def test_encode_goes_on_from_the_journal_in_the_store(s3: str, made: Made, here: None) -> None:
    """Before its manifest a job was killed: whole shards stay, one half noted and one spoiled are made again."""
    import fsspec

    inputs = encoder_inputs(s3, made)
    identity = encode.STAGE.fingerprint(ENCODE, {role: item.fingerprint for role, item in inputs.items()})
    out = ArtifactWriter(Folder.at(f"{s3}/latents"), "latents", identity)
    encode.encode(ENCODE, inputs, out, Silent())
    assert [entry.path for entry in out.written()] == LATENTS
    out.data.remove(".journal/latents-00001.arrow.json")  # killed between the shard and its entry
    data = bytearray(out.data.read_bytes("latents-00002.tar"))
    data[1000] ^= 1
    out.data.write_bytes("latents-00002.tar", bytes(data))
    files = fsspec.filesystem("s3")
    for name in LATENTS:  # a mark on the object itself, which a write takes away
        files.setxattr(f"{s3}/latents/{name}", mark="kept")
    latents = encode.STAGE.execute(ENCODE, inputs, out, Silent())
    kept = [name for name in LATENTS if files.getxattr(f"{s3}/latents/{name}", "mark") == "kept"]
    assert kept == [name for name in LATENTS if name not in ("latents-00001.arrow", "latents-00002.tar")]
    assert latents.manifest.digest == made.latents.manifest.digest
    assert latents.problems(deep=True) == []


# --- this node's cache


def test_latents_are_downloaded_once_a_node(s3: str, made: Made, fetched: list[str]) -> None:
    latents = uploaded(made.latents, f"{s3}/latents")
    first = latents.paths("*.arrow")
    assert sorted(fetched) == LATENTS[::2]
    assert all(path.is_relative_to(cache_folder()) for path in first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in made.latents.paths("*.arrow")]
    assert len(open_latents(TrainConfig(), Artifact.open(latents.folder), Silent())) == 60
    latents.paths()
    assert sorted(fetched) == LATENTS  # by now the tars, and no Arrow shard twice
    # The same latents elsewhere in the store are the same latents here.
    uploaded(made.latents, f"{s3}/copy").paths()
    assert len(fetched) == len(LATENTS)
    # Another process reads them with nothing left in the store to download.
    manifest = latents.folder.read_bytes(MANIFEST_NAME)
    latents.folder.remove("")
    latents.folder.write_bytes(MANIFEST_NAME, manifest)
    code = "import sys; from edt_core.store.artifact import Artifact as A; print(len(A.read(sys.argv[1]).paths()))"
    done = subprocess.run([sys.executable, "-c", code, latents.folder.uri], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(LATENTS)}\n"
    with pytest.raises(ManifestError, match=r"is damaged, 6 problems: latents-00000\.arrow is missing"):
        open_latents(TrainConfig(), latents, Silent())


def test_a_corrupted_object_is_not_trained_on_and_not_kept(s3: str, made: Made) -> None:
    latents = uploaded(made.latents, f"{s3}/latents")
    overwrite(latents, "latents-00001.arrow", 20_000)
    message = (
        rf"{s3}/latents/latents-00001\.arrow is damaged: it has \d+ bytes of sha256 \w+, but its manifest says \d+ of "
        r"\w+; remove its artifact's manifest\.json and rerun its step"
    )
    for _ in range(2):
        with pytest.raises(ManifestError, match=message):
            open_latents(TrainConfig(), latents, Silent())
    entry = next(entry for entry in latents.entries() if entry.path == "latents-00001.arrow")
    assert not [path for path in cache_folder().rglob("*") if entry.sha256 in path.name or path.suffix == ".part"]
    overwrite(latents, "latents-00001.arrow", 20_000)
    assert len(open_latents(TrainConfig(), latents, Silent())) == 60


# --- train


def trained(latents: Artifact, folder: Path, reader: str) -> dict[str, Any]:
    """Weights after three steps in this process, by what the workers of Ray Train call."""
    from edt_core.training.context import LocalContext
    from edt_core.training.loop import train as loop

    config = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, max_steps=3, log_every=1, lr=1e-3, reader=reader)
    context = LocalContext(folder)
    dataset = open_latents(config, latents, Silent())
    state = loop(config, train.config_of(config, latents.counts), dataset, context)
    assert [row["step"] for row in state.history.rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in state.history.rows)
    return {name: value.numpy() for name, value in state.model.state_dict().items()}


def trained_into(latents: Artifact, out: ArtifactWriter) -> None:
    """Four steps and as many checkpoints, from the newest that is there."""
    from edt_core.training.context import LocalContext
    from edt_core.training.loop import train as loop

    config = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, max_steps=4, log_every=1, lr=1e-3, checkpoint_every=1)
    context = LocalContext(Path())
    context.store = CheckpointStore(out, 2, print)
    dataset = open_latents(config, latents, Silent())
    loop(config, narrow(), dataset, context)


def test_a_node_whose_cache_is_too_small_for_its_blocks_is_told_before_it_trains(
    s3: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = uploaded(made.latents, f"{s3}/latents")
    monkeypatch.setenv("EDT_CACHE_BYTES", "90000")
    config = TrainConfig(reader="stream", global_batch_size=8, shuffle_block=1, num_canonical_nodes=2)
    message = r"this machine reads 2 of the 2 canonical nodes, and two blocks of 1 shards of each, \d+,\d+ bytes, must"
    with pytest.raises(UserError, match=message):
        open_latents(config, latents, Silent())
    with pytest.raises(UserError, match="reads 1 of the 2 canonical nodes"):
        open_latents(config, latents, Silent(), rows=slice(4, 8))
    need = shard_stream(config, latents).bytes_of
    assert need(1) < need(2)
    assert "keeps at most 9e-05 GB, enough for no canonical node: raise EDT_CACHE" in stream_text(config, latents)
    monkeypatch.setenv("EDT_CACHE_BYTES", str(need(1)))
    assert "enough for 1 of the 2 canonical nodes: raise" in stream_text(config, latents)
    monkeypatch.setenv("EDT_CACHE_BYTES", "100MB")
    assert stream_text(config, latents).endswith("The cache of a machine like this one keeps at most 0.1 GB")
    assert len(open_latents(config, latents, Silent())) == 60


@pytest.mark.parametrize("reader", ["arrow", "stream", "webdataset"])
def test_training_on_latents_in_the_store_is_that_on_the_disk(
    reader: str, s3: str, made: Made, fetched: list[str], tmp_path: Path
) -> None:
    here = trained(made.latents, tmp_path / "here", reader)
    assert fetched == []
    there = trained(uploaded(made.latents, f"{s3}/latents"), tmp_path / "there", reader)
    assert sorted(fetched) == ([] if reader == "webdataset" else LATENTS[::2])  # streamed tars are not kept
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)


def test_a_training_in_the_store_goes_on_as_on_the_disk(s3: str, made: Made, tmp_path: Path) -> None:
    """Checkpoints written to the store, taken over by the next attempt, pruned: the same files as on the disk."""
    written = []
    for root in (str(tmp_path / "here"), f"{s3}/there"):
        first = ArtifactWriter(Folder.at(root), "checkpoint", "f" * 64, "a1")
        trained_into(made.latents, first)
        CheckpointStore(first, 2, print).remove(4)
        second = ArtifactWriter(Folder.at(root), "checkpoint", "f" * 64, "a2", ("a1",))
        CheckpointStore(second, 2, print).adopt()
        assert CheckpointStore(second, 2, print).newest() == 3
        trained_into(made.latents, second)
        assert CheckpointStore(second, 1, print).prune(at_end=True)[-1] == 4
        written.append([(entry.path, entry.bytes, entry.sha256) for entry in second.written()])
    here, there = written
    assert there == here
    assert there


# --- by the command line


def holding_the_secret(store: str, *folders: Path) -> list[str]:
    """Objects of the bucket and files below the folders in which the secret key stands."""
    import fsspec

    secret, files = os.environ["AWS_SECRET_ACCESS_KEY"].encode(), fsspec.filesystem("s3")
    objects = [name for name in files.find(store) if secret in files.cat_file(name)]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    return objects + [str(path) for path in paths]


OPTIONS = ("--image-size", str(SIZE))  # one shard, so one worker to start


@pytest.mark.ray
def test_the_commands_on_the_store_as_a_user_gives_them(
    s3: str, pictures: Images, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first as a process with a Ray session of its own, whose workers have the variables of the store from it."""
    from jobs.runtime import cluster

    source = put(image_folder(pictures)[0], f"{s3}/source")
    preprocessing = (source, f"{s3}/images", *OPTIONS)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = [sys.executable, "-m", "jobs.preprocess", *preprocessing]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.split()[:1]) == (0, [f"{s3}/images"]), done.stderr
    checked = edt_process("verify", f"{s3}/images", "--deep", env=environment)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("what is found made needs no Ray"))
    again = command("preprocess", *preprocessing)
    assert again.returncode == 0
    assert "reused, nothing has changed" in again.stderr
    images = Artifact.open(f"{s3}/images")
    for (_, label, pixels), (_, expected, original) in zip(samples(images), samples(made.images), strict=True):
        assert label == expected
        assert np.array_equal(pixels, original)
    images.paths()
    for text in (done.stdout, done.stderr, checked.stdout, again.stdout, again.stderr):
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert len([path for path in cache_folder().rglob("*") if path.is_file()]) > len(images.manifest.files)
    assert holding_the_secret(s3, cache_folder(), tmp_path) == []


@contextmanager
def keys_are_checked(server: str) -> Iterator[None]:
    """moto takes any key until it is told to check them, and then it knows none."""

    def allowed_calls(number: bytes) -> None:
        url, kind = f"{server}/moto-api/reset-auth", {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(url, number, kind), timeout=10).close()

    allowed_calls(b"0")
    try:
        yield
    finally:
        allowed_calls(b"inf")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2 and one message. What is not a terminal gets progress as lines, so it may follow some."""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("preprocess: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr


@pytest.fixture
def asked_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is asked once where it refuses: to ask again takes seconds."""
    import fsspec

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.usefixtures("asked_once")
def test_wrong_credentials_are_one_message(
    s3: str, s3_server: str, pictures: Images, made: Made, tmp_path: Path
) -> None:
    """Refused by the store itself: for a source, for a place to write to, and for an artifact."""
    put(image_folder(pictures)[0], f"{s3}/source")
    uploaded(made.images, f"{s3}/images")
    with keys_are_checked(s3_server):
        for arguments, uri in (
            (("preprocess", f"{s3}/source", str(tmp_path / "out")), f"{s3}/source"),
            (("preprocess", str(made.source), f"{s3}/out"), f"{s3}/out"),
            (("verify", f"{s3}/images"), f"{s3}/images"),
        ):
            # 403 of a HEAD, which has no body to say more, or the code in the answer to a PUT
            run = edt if arguments[0] == "verify" else command
            refused(run(*arguments), f"cannot use {uri}: access denied (")
    assert not (tmp_path / "out").exists()
    assert holding_the_secret(s3, cache_folder(), tmp_path) == []


@pytest.mark.usefixtures("asked_once", "here")
def test_a_missing_bucket_is_one_message(s3: str, made: Made, tmp_path: Path) -> None:
    nowhere = "s3://no-such-bucket-here"
    refused(command("preprocess", f"{nowhere}/source", str(tmp_path / "out")), f"{nowhere}/source")
    done = command("preprocess", str(made.source), f"{nowhere}/out")
    refused(done, "there is no such bucket; create it, or")
    refused(edt("verify", f"{nowhere}/images"), f"cannot use {nowhere}/images: there is no such bucket")
    assert not (tmp_path / "out").exists()
    assert holding_the_secret(s3, cache_folder(), tmp_path) == []
