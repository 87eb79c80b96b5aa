"""The HTTP application on a real small model in this process, without Ray: pictures, refusals, metrics, versions."""

import asyncio
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline
from jobs.models.open import load_model
from jobs.serve.app import BusyError, Gate, Limits, make_app
from jobs.serve.follow import Follower
from jobs.serve.pictures import sheet
from jobs.serve.replica import Drawing, Pictures, Refused, Status
from jobs.serve.version import ServedVersion, VersionName
from tests.support.pipelines import quiet, small_pipeline

ONE, TWO = VersionName("edt-small", "1", "a" * 64), VersionName("edt-small", "2", "b" * 64)
SIZE = 4


class InProcess:
    """A backend that is a drawing of this process; full where it is said to be."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing, self.full = drawing, False

    async def sample(self, classes: Sequence[int | str], seed: int, settings: Mapping[str, Any]) -> Pictures | Refused:
        if self.full:
            raise BusyError
        return await self.drawing.sample(classes, seed, settings)

    async def status(self) -> Status:
        if self.full:
            raise BusyError
        return self.drawing.status()


class Registry:
    """An alias and the versions that it may point at."""

    def __init__(self, versions: Mapping[VersionName, ServedVersion]) -> None:
        self.versions, self.champion = versions, ONE
        self.away = False

    def find(self) -> VersionName:
        if self.away:
            raise UserError("MLflow does not answer")
        return self.champion

    def load(self, name: VersionName) -> ServedVersion:
        return self.versions[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[VersionName, Path]:
    work = tmp_path_factory.mktemp("served")
    return {name: small_pipeline(work / name.number, seed=int(name.number)) for name in (ONE, TWO)}


@pytest.fixture(scope="module")
def versions(folders: dict[VersionName, Path]) -> dict[VersionName, ServedVersion]:
    return {name: ServedVersion(name, load_model(str(folder)), "cpu") for name, folder in folders.items()}


@pytest.fixture
def registry(versions: dict[VersionName, ServedVersion]) -> Registry:
    return Registry(versions)


@pytest.fixture
def drawing(registry: Registry) -> Iterator[Drawing]:
    drawing = Drawing(Follower(registry.find, registry.load), SIZE, 1)
    drawing.follower.check()
    yield drawing
    drawing.close()


@pytest.fixture
def backend(drawing: Drawing) -> InProcess:
    return InProcess(drawing)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def client(backend: InProcess, gate: Gate) -> TestClient:
    return TestClient(make_app(backend, Limits(labels=6, steps=50), gate))


def post(client: TestClient, labels: list[Any], **more: Any) -> Any:
    return client.post("/sample", json={"labels": labels, **more})


def arrays(answer: Any) -> dict[str, NDArray[Any]]:
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content)) as file:
        return dict(file)


def test_the_images_are_those_of_the_pipeline(client: TestClient, folders: dict[VersionName, Path]) -> None:
    settings: dict[str, Any] = {"seed": 7, "num_inference_steps": 3, "cfg_scale": 1.5}
    answer = post(client, [3, "b", 3], format="npz", **settings)
    result = arrays(answer)
    expected = np.stack(quiet(EDTPipeline.from_pretrained(folders[ONE]))([3, 1, 3], **settings).images)
    assert result["labels"].tolist() == [3, 1, 3]
    assert np.abs(result["images"].astype(int) - expected).max() <= 1  # another batch size rounds differently
    assert answer.headers["X-EDT-Version"] == "1"
    assert answer.headers["X-EDT-Digest"] == ONE.digest
    assert not np.array_equal(result["images"][0], result["images"][2]), "image 2 has the noise of index 2"


def test_several_images_are_one_png(client: TestClient) -> None:
    images = arrays(post(client, [0, 1, 2], format="npz"))["images"]
    answer = post(client, [0, 1, 2])
    assert answer.headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    side = images.shape[1]
    assert picture.shape == (2 * side, 2 * side, 3)
    assert np.array_equal(picture[:side, side:], images[1])
    assert np.array_equal(picture[side:, :side], images[2])
    assert not picture[side:, side:].any()


def test_one_image_is_a_png_of_its_size(client: TestClient) -> None:
    images = arrays(post(client, [2], format="npz"))["images"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(post(client, [2]).content))), images[0])
    assert np.array_equal(sheet(images), images[0])


@pytest.mark.usefixtures("one_thread")
def test_the_pictures_of_a_request_do_not_depend_on_others(drawing: Drawing) -> None:
    """Alone, and between others that take other places of its batches, with other labels, seeds and settings."""

    async def ask(*requests: tuple[list[int], int, dict[str, Any]]) -> list[Any]:
        return await asyncio.gather(*(drawing.sample(*request) for request in requests))

    mine: tuple[list[int], int, dict[str, Any]] = ([3, 1], 7, {"num_inference_steps": 3})
    (alone,) = asyncio.run(ask(mine))
    others = [([0], 1, mine[2]), ([2, 2, 2], 9, mine[2]), ([1, 2], 7, {"num_inference_steps": 2})]
    for before in ([], others[:1], others[:2], others):
        *_, among = asyncio.run(ask(*before, mine))
        assert np.abs(among.images.astype(int) - alone.images).max() <= 1
        assert (among.images != alone.images).mean() < 1e-3  # single values, where a kernel rounds by position
    (again,) = asyncio.run(ask(mine))
    assert np.array_equal(again.images, alone.images)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"labels": [9]}, 400, "class labels [9] do not exist; the model has 0..3"),
        ({"labels": ["cat"]}, 400, "no class is called 'cat'"),
        ({"labels": [0] * 7}, 400, "7 labels in one request; the most is 6"),
        ({"labels": [0], "num_inference_steps": 51}, 400, "num_inference_steps is 51; the most is 50"),
        ({"labels": []}, 422, "labels: List should have at least 1 item"),
        ({"labels": [1.5]}, 422, "labels.0.int: Input should be a valid integer"),
        ({"labels": [True]}, 422, "labels.0.int: Input should be a valid integer"),
        ({"labels": [1], "seed": -1}, 422, "seed: Input should be greater than or equal to 0"),
        ({"labels": [1], "cfg_scale": 0.5}, 422, "cfg_scale"),
        ({"labels": [1], "steps": 4}, 422, "steps: Extra inputs are not permitted"),
        ({"labels": [1], "format": "gif"}, 422, "format: Input should be 'png' or 'npz'"),
    ],
)
def test_a_wrong_request_is_the_clients_error(
    client: TestClient, body: dict[str, Any], status: int, message: str
) -> None:
    answer = client.post("/sample", json=body)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


def test_steps_that_the_model_does_not_have_are_the_clients_error(backend: InProcess) -> None:
    client = TestClient(make_app(backend, Limits(6, 5000), Gate()))
    answer = post(client, [1], num_inference_steps=2000)
    assert answer.status_code == 400
    assert "takes 2 to 1000 steps" in answer.json()["detail"]


def test_a_full_queue_is_refused_with_a_time_to_retry(client: TestClient, backend: InProcess) -> None:
    assert client.get("/health").json()["version"] == "1"
    backend.full = True
    answer = post(client, [1])
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "queue is full" in answer.json()["detail"]
    assert client.get("/health").json()["ready"], "the last known status"


def test_metrics_count_what_was_answered_and_refused(client: TestClient, backend: InProcess) -> None:
    post(client, [0, 1])
    post(client, [9])
    backend.full = True
    post(client, [0])
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'edt_serve_requests_total{status="200"} 1.0',
        'edt_serve_requests_total{status="400"} 1.0',
        'edt_serve_requests_total{status="503"} 1.0',
        "edt_serve_rejected_total 1.0",
        "edt_serve_images_total 2.0",
        "edt_serve_seconds_count 1.0",
    ):
        assert line in lines


def test_a_moved_alias_is_followed_and_a_request_has_one_version(
    client: TestClient, drawing: Drawing, registry: Registry
) -> None:
    async def across() -> list[Any]:
        earlier = asyncio.ensure_future(drawing.sample([0] * 6, 0, {}))
        await asyncio.sleep(0)  # it is submitted, with the version of then
        registry.champion = TWO
        drawing.follower.check()
        return [await earlier, await drawing.sample([0] * 6, 0, {})]

    earlier, later = asyncio.run(across())
    assert [earlier.version, later.version] == [ONE, TWO]
    assert (earlier.images != later.images).any(axis=(1, 2, 3)).all()
    assert post(client, [0]).headers["X-EDT-Version"] == "2"
    registry.away = True
    drawing.follower.check()
    health = client.get("/health")
    assert (health.status_code, health.json()["version"]) == (200, "2")
    assert health.json()["problem"] == "MLflow does not answer"
    registry.away = False
    drawing.follower.check()
    assert client.get("/health").json()["problem"] is None


def test_without_a_version_nothing_is_ready(registry: Registry) -> None:
    registry.away = True
    drawing = Drawing(Follower(registry.find, registry.load), SIZE, 1)
    drawing.follower.check()
    client = TestClient(make_app(InProcess(drawing), Limits(6, 50), Gate()))
    assert client.get("/health").status_code == 503
    answer = post(client, [1])
    assert (answer.status_code, answer.json()["detail"]) == (503, "MLflow does not answer")
    drawing.close()


def test_a_closed_gate_refuses_and_waits_for_what_runs(client: TestClient, gate: Gate) -> None:
    async def drained() -> bool:
        gate.running = 1
        draining = asyncio.ensure_future(gate.drain())
        done, _ = await asyncio.wait([draining], timeout=0.2)
        assert not done
        gate.running = 0
        await draining
        return gate.closed

    assert asyncio.run(drained())
    answer = post(client, [1])
    assert (answer.status_code, answer.json()["detail"]) == (503, "the server is stopping")
    assert client.get("/health").status_code == 503


def test_the_api_describes_itself(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/sample", "/health", "/metrics"}
    assert set(schema["paths"]["/sample"]["post"]["responses"]) == {"200", "400", "422", "503"}
    assert client.get("/docs").status_code == 200
