"""Marks, the order of the tests, and what several packages' tests share: one Ray session, an S3 server, images.

Every test has one of the marks `light`, `ray`, `faults`, `extern` (pyproject.toml says what they mean); one that has no
other is light, and is kept from starting Ray or a Python process.
"""

# ruff: noqa: E402
import os
import sys

# Each process that a test starts would compile the project's modules again, and each of pytest's all tests as well:
# half a second, and 12 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Before torch is imported, here and in each process that a test starts: small models are done sooner by one thread, and
# threads that share a core with another process wait for each other most of the time.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers are what the tests wait for
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how often Ray Train looks whether its workers ended
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more; the cluster of nodes has it

# What tests write need not outlive the machine: 60,000 times in a suite a test would wait for the disk, 3 ms each.
os.fsync = lambda _file: None

import ctypes
import gc
import importlib.util
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edt_core.environment import quiet_defaults
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.folder import Folder
from tests.support.first_run import first_run, shared_first_run
from tests.support.local_ray import local_ray, local_ray_train
from tests.support.mlflow_tables import do_not_wait_for_disks, make_tables_once
from tests.support.servers import moto_server

if TYPE_CHECKING:
    from pipelines.outcome import Outcome
    from tests.support.cluster import Nodes

quiet_defaults()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background: tests send it to their processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

HEAVY = ("ray", "faults", "extern", "slow", "gpu")
S3_SECRET = "test-secret-canary-7f3a9c"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# Side by side (pytest-xdist) all tests of a module are done by one process, and so are all that share one Ray session,
# and all modules that share what takes long to make: by the fixture that makes it.
SHARED = {
    "first": "store",
    "resampled": "store",
    "sandbox": "store",
    "chain": "chain",
    "trained": "chain",
    "forks": "ranks",
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing of what the tests import is garbage: to look for it takes each process two seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is light, put Ray's tests first, for they wait the most, and say which tests one process runs."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(item.get_closest_marker(name) for name in HEAVY):
            item.add_marker("light")
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    for module, tests in modules.items():
        used = set[str]().union(*map(_fixtures, tests))
        beside_ray = next((group for name, group in SHARED.items() if name in used), module)
        for item in tests:
            group = "ray" if item.get_closest_marker("ray") else beside_ray
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """What the tests have imported stays, so Python's collector need not look at it again: that takes it a second."""
    if "mlflow" in sys.modules:
        make_tables_once()
        do_not_wait_for_disks()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a module the process gives back what it freed: glibc keeps it, and two processes would hold 4 GB each."""
    if nextitem is not None and nextitem.path == item.path:
        return
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _turn(item: pytest.Item) -> int:
    """Ray's shared session, sessions of their own, and nodes, for which the shared session ends; then the others."""
    fixtures = _fixtures(item)
    if item.get_closest_marker("ray") is None:
        return 3 if SHARED.keys() & fixtures else 4
    if "two_nodes" in fixtures:
        return 2
    return 0 if "ray_session" in fixtures else 1


def _fixtures(item: pytest.Item) -> set[str]:
    return set(item._fixtureinfo.name2fixturedefs) - set(getattr(getattr(item, "callspec", None), "params", ()))


@pytest.fixture(autouse=True)
def _stays_light(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A light test starts neither Ray nor a Python process: both cost seconds, and light tests run side by side."""
    if request.node.get_closest_marker("light") is None:
        yield
        return
    start = subprocess.Popen.__init__

    def guarded(self: "subprocess.Popen[bytes]", args: object, *rest: object, **named: object) -> None:
        if isinstance(args, list | tuple) and args and str(args[0]) == sys.executable:
            pytest.fail("a light test started a Python process; mark it extern, or call what the process does")
        start(self, args, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)
    before = _ray_runs()  # where light tests come after others in one process
    yield
    if _ray_runs() and not before:
        sys.modules["ray"].shutdown()
        pytest.fail("a light test started Ray; mark it ray, and use the fixture ray_session")


@pytest.fixture(autouse=True)
def own_mlflow() -> Iterator[None]:
    """`mlflow.set_tracking_uri` sets a variable for all that comes after: no test's own reaches the next.

    After the test as well as before it: the fixtures of the next module are made before its first test begins.
    """
    _forget_mlflow()
    yield
    _forget_mlflow()


def _forget_mlflow() -> None:
    if (mlflow := sys.modules.get("mlflow")) and mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def sample(name: str) -> Path:
    """A folder of sample data, or a skip that says what is missing."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the sample images are not here ({folder})")
    return folder


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(scope="session", autouse=True)
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The node's cache in a folder of these tests, set before any worker process starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray session for all tests: starting it costs seconds."""
    import ray

    from jobs.runtime.cluster import connect

    connect(min_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture
def here() -> Iterator[None]:
    """What is Ray's is done in this process."""
    with local_ray():
        yield


@pytest.fixture
def training_here() -> Iterator[None]:
    """What is Ray's or Ray Train's is done in this process, by one worker."""
    with local_ray_train():
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `first`. Who changes what is in it takes a copy (`tests.support.small.copy_store`)."""
    return tmp_path_factory.mktemp("store") / "edt-store"


@pytest.fixture(scope="session")
def first(store: Path, tmp_path_factory: pytest.TempPathFactory) -> "Outcome":
    """One whole run of the small pipeline in this process, for every test that looks at what a run leaves.

    Of the processes of pytest-xdist one makes it, and the others take a copy. tests/test_packaging.py shows that a run
    on Ray leaves the same.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return first_run(store)
    return shared_first_run(store, tmp_path_factory.getbasetemp().parent / "first")


@pytest.fixture(scope="session")
def two_nodes() -> Iterator["Nodes"]:
    """A cluster whose worker nodes come and go, most often two with a CPU each; the shared Ray session ends for it."""
    from tests.support.cluster import cluster_of_nodes

    with cluster_of_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def photos() -> Path:
    """250 full-size ImageNet photos, one a class; not part of the project."""
    return sample("imagenet_sample")


@pytest.fixture(scope="session")
def cifar() -> Path:
    """3,000 CIFAR-10 training images as JPEG, 300 a class; not part of the project."""
    return sample("cifar10_sample")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server of our own, on loopback, in a process of its own."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("S3 tests need moto[server] and s3fs")
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of a new bucket, with credentials, endpoint and this node's cache set for it and no others in sight."""
    import fsspec

    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "edt-cache"))
    file_systems = fsspec.get_filesystem_class("s3")
    file_systems.clear_instance_cache()  # they keep the environment of their making
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}"
    file_systems.clear_instance_cache()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real digits of each of four classes, as an image folder."""
    from edt_core.data.digits import write_digits

    whole = write_digits(tmp_path_factory.mktemp("source") / "digits")
    folder = tmp_path_factory.mktemp("small") / "digits"
    for label in "0123":
        (folder / label).mkdir(parents=True)
        for path in sorted((whole / label).iterdir())[:8]:
            (folder / label / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose sha256 is taken."""
    names: list[str] = []
    digest = Folder.digest

    def counted(self: Folder, name: str) -> str:
        names.append(name)
        return digest(self, name)

    monkeypatch.setattr(Folder, "digest", counted)
    return names


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So narrow a model is done sooner by one: more wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def silent() -> Silent:
    return Silent()


@pytest.fixture(scope="session")
def latents_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """96 made-up latents 4x8x8 of 4 classes in two shards, committed as an artifact."""
    from edt_core.data.latents import LatentInfo, LatentShardWriter
    from edt_core.data.scale import LatentScale

    out = ArtifactWriter(Folder.at(tmp_path_factory.mktemp("latents")), "latents", "f" * 64)
    rng = np.random.default_rng(0)
    for k, rows in enumerate((40, 56)):
        info = LatentInfo("test", LatentScale(0.5), 32, (4, 8, 8), f"images-{k:05d}.tar")
        labels = rng.integers(0, 4, rows)
        mean = rng.normal(size=(rows, 4, 8, 8)) + labels[:, None, None, None]
        std = np.full_like(mean, 0.1)
        sides = np.stack([np.stack([side, std], axis=1) for side in (mean, mean[..., ::-1])], axis=1)
        values = [f"{k}-{i}" for i in range(rows)], labels, sides.astype(np.float32)

        def write(path: Path, info=info, values=values) -> int:
            with LatentShardWriter(path, info) as writer:
                writer.write(*values)
            return writer.rows

        out.write(f"latents-{k:05d}.arrow", write)
    counts = {"images": 96, "classes": 4, "image_size": 32, "latent_shape": [4, 8, 8], "scaling_factor": 0.5}
    counts["autoencoder_digest"] = "0" * 64
    return out.commit({}, {}, counts)


@pytest.fixture
def source(digits_folder: Path) -> Source:
    from edt_core.config import SourceConfig
    from jobs.stages.preprocess import image_source

    return image_source(SourceConfig(path=str(digits_folder)))
