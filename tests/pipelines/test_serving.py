"""A registered model behind MLflow's interfaces: what a client does wrong is answered as the client's error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.pipeline import EDTPipeline
from pipelines.registry.packaging import log_pipeline
from tests.support.pipelines import quiet, small_pipeline
from tests.support.registry import Registry

WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    ([9], {}, r"class labels [9] do not exist; the model has 0..3"),
    ([-1, 2], {}, r"class labels [-1] do not exist; the model has 0..3"),
    ([1], {"seed": -5}, "seed is -5; use an integer of at least 0"),
    (
        [1],
        {"num_inference_steps": 1},
        "option 'num_inference_steps': Input should be greater than or equal to 2 (got 1)",
    ),
    ([1], {"num_inference_steps": 5000}, "takes 2 to 1000 steps"),
    ([1], {"cfg_scale": 0.5}, "option 'cfg_scale': Input should be greater than or equal to 1 (got 0.5)"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A model that was logged as a registration logs it, loaded by MLflow, and its diffusers folder."""
    import mlflow

    work = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(work / "store")
        patch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)  # given back in the end
        run = registry.catalog.start_run("serve", {})
        logged = log_pipeline(registry.catalog, run, "edt-served", small_pipeline)
        yield mlflow.pyfunc.load_model(logged.uri), small_pipeline(work / "folder")


@pytest.fixture
def client(served: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of MLflow's scoring server, whose application runs in this process."""
    from fastapi.testclient import TestClient
    from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
    from mlflow.pyfunc.scoring_server import init

    monkeypatch.setenv(_MLFLOW_IS_IN_SERVING_ENVIRONMENT.name, "true")  # which the server sets for good
    return TestClient(init(served[0]))


def post(client: Any, labels: list[Any], params: dict[str, Any]) -> Any:
    return client.post("/invocations", json={"inputs": labels, "params": params})


def test_it_serves_the_images_of_the_pipeline(served: tuple[Any, Path], client: Any) -> None:
    model, folder = served
    expected = np.stack(quiet(EDTPipeline.from_pretrained(folder))([3, 1], seed=2, num_inference_steps=3).images)
    params = {"seed": 2, "num_inference_steps": 3}
    assert np.array_equal(model.predict(np.array([3, 1]), params=params), expected)
    answer = post(client, [3, 1], params)
    assert answer.status_code == 200
    assert np.array_equal(np.array(answer.json()["predictions"], np.uint8), expected)


@pytest.mark.parametrize(("labels", "params", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_a_wrong_request_is_the_clients_error(
    served: tuple[Any, Path], client: Any, labels: list[Any], params: dict[str, Any], message: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as raised:
        served[0].predict(np.array(labels, np.int64), params=params)
    assert message in raised.value.message
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"
    answer = post(client, labels, params)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert message in answer.json()["message"]


@pytest.mark.parametrize("labels", [["cat"], [], {"a": 1}, None])
def test_labels_of_another_kind_are_refused_by_the_signature(client: Any, labels: Any) -> None:
    answer = post(client, labels, {})
    assert answer.status_code == 400
    assert "unexpected error" not in answer.json()["message"]
