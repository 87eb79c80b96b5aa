"""A registered model behind the scoring server of `mlflow models serve`: each form of JSON gives the same images."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.small import MODEL

if TYPE_CHECKING:
    from pipelines.outcome import Outcome

LABELS = [1, 2]


@pytest.fixture(scope="module")
def server(first: "Outcome") -> Any:
    """The application that `mlflow models serve` runs, called in this process."""
    import mlflow
    from mlflow.pyfunc.scoring_server import init

    client = pytest.importorskip("fastapi.testclient").TestClient
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow.set_tracking_uri(first.tracking_uri)
        return client(init(mlflow.pyfunc.load_model(f"models:/{MODEL}/1")), raise_server_exceptions=False)


def images(server: Any, **body: Any) -> np.ndarray:
    answer = server.post("/invocations", json=body)
    assert answer.status_code == 200, answer.text[:500]
    return np.array(answer.json()["predictions"])


def test_every_form_of_json_gives_the_same_images(server: Any) -> None:
    expected = images(server, inputs=LABELS)
    assert expected.shape == (2, 32, 32, 3)
    assert 0 <= expected.min() < expected.max() <= 255
    forms: list[dict[str, Any]] = [
        {"instances": LABELS},
        {"dataframe_split": {"columns": ["label"], "data": [[label] for label in LABELS]}},
        {"dataframe_records": [{"label": label} for label in LABELS]},
    ]
    for form in forms:
        assert np.array_equal(images(server, **form), expected), form


def test_parameters_are_taken(server: Any) -> None:
    drawn = [images(server, inputs=LABELS, params={"seed": seed, "num_inference_steps": 2}) for seed in (3, 3, 4)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "body",
    [{"inputs": [99]}, {"inputs": ["cat"]}, {"inputs": []}, {}, {"inputs": LABELS, "params": {"seed": "x"}}],
)
def test_a_request_that_is_wrong_is_refused_and_the_server_stays(server: Any, body: dict[str, Any]) -> None:
    assert server.post("/invocations", json=body).status_code == 400
    assert server.get("/ping").status_code == 200
