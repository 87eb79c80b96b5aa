"""`edt models push`: a registered folder in a model hub, whole or not at all, and what is checked before."""

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline
from pipelines.cli import app
from tests.support.hub import FakeHub, fake_hub
from tests.support.registry import REAL, Registry, registered

TOKEN = "hf_canaryWordOfTheToken"
REPO = "me/digits"
LABELS = [3, 1, 0]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One whole model with a program of its denoiser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(tmp_path_factory.mktemp("registry") / "store")
        registered(registry, tmp_path_factory.mktemp("model"))
        yield registry


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(registry: Registry, *arguments: str) -> str:
    """Output of a push that ends well. A user's error is raised."""
    done = CliRunner().invoke(app, ["models", "push", *arguments, *registry.arguments])
    assert TOKEN not in done.output
    if done.exception is not None:
        raise done.exception
    return done.output


def refused(registry: Registry, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        push(registry, *arguments)
    assert TOKEN not in str(error.value)
    assert error.value.__cause__ is None or TOKEN not in repr(error.value.__cause__)
    return str(error.value)


def images(folder: Path) -> np.ndarray:
    return np.stack(EDTPipeline.from_pretrained(folder)(LABELS).images)


def test_what_the_hub_received_loads_and_draws_the_same(registry: Registry, hub: FakeHub, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    output = push(registry, f"{REAL}@champion", REPO)
    assert f"{REAL} version 1, " in output
    assert f"is in {REPO}: {hub.url}/{REPO}/commit/" in output
    received = hub.write(REPO, tmp_path / "received")
    CliRunner().invoke(app, ["models", "pull", REAL, str(tmp_path / "pulled"), *registry.arguments])
    assert np.array_equal(images(received), images(tmp_path / "pulled"))
    general = DiffusionPipeline.from_pretrained(received, custom_pipeline=str(received), trust_remote_code=True)
    assert np.array_equal(np.stack(general(LABELS).images), images(received))
    card = ModelCard.load(received / "README.md")
    assert [(found.metric_type, found.metric_value) for found in card.data.eval_results] == [("fd_classifier", 3.0)]
    assert (received / "denoiser.pt2").is_file()


@pytest.mark.parametrize("fault", ["/commit/", "/lfs/"])
def test_a_push_that_broke_off_is_repeated_without_loss(
    registry: Registry, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Large files go apart from the commit; a break before the commit leaves the branch as it was."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet's storage is no HTTP API that a test can play
    hub.large_from = 2000
    hub.fails = {fault: None if fault == "/commit/" else 403}
    said = refused(registry, REAL, REPO)
    assert REPO in said
    assert list(hub.repos[REPO]["main"]) == [".gitattributes"]
    arrived = set(hub.large)
    assert bool(arrived) == (fault == "/commit/")
    hub.fails, hub.requests = {}, []
    push(registry, REAL, REPO)
    assert not arrived or not [line for line in hub.requests if line.startswith("PUT")]
    assert images(hub.write(REPO, tmp_path / "received")).shape == (3, 32, 32, 3)


def test_a_second_push_replaces_the_files_of_a_model_and_no_others(registry: Registry, hub: FakeHub) -> None:
    push(registry, REAL, REPO)
    main = hub.repos[REPO]["main"]
    first = dict(main)
    main |= {"vae/old.safetensors": b"old", "samples/grid.png": b"mine"}
    push(registry, REAL, REPO)
    assert hub.repos[REPO]["main"] == first | {"samples/grid.png": b"mine"}
    commits = hub.commits
    push(registry, REAL, REPO)
    assert hub.commits == commits  # nothing changed: no commit


def test_a_branch_is_made_and_the_main_one_stays(registry: Registry, hub: FakeHub) -> None:
    push(registry, REAL, REPO, "--revision", "v2")
    assert list(hub.repos[REPO]["main"]) == [".gitattributes"]
    assert "model_index.json" in hub.repos[REPO]["v2"]
    push(registry, REAL, REPO, "--revision", "v2")


def test_private_is_only_private(registry: Registry, hub: FakeHub) -> None:
    push(registry, REAL, REPO, "--private")
    assert hub.private == {REPO}
    hub.repos["me/open"] = {"main": {}}
    assert "me/open exists and is public; make it private there" in refused(registry, REAL, "me/open", "--private")
    assert hub.repos["me/open"] == {"main": {}}


def test_a_dry_run_lists_the_files_and_asks_nobody(
    registry: Registry, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    output = push(registry, REAL, REPO, "--dry-run")
    for name in ("model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors", "denoiser.pt2"):
        assert name in output
    assert f"would be pushed to {REPO}: nothing was sent" in output
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits",), "'digits' has no owner; give OWNER/NAME, as in my-name/digits"),
        (("me/a b",), "'me/a b' is not the name of a repository: "),
        (("a/b/c",), "'a/b/c' is not the name of a repository: "),
        (("https://hub/me/digits",), "is not the name of a repository: "),
        ((REPO, "--revision", "../v2"), "--revision '../v2' is not the name of a branch"),
        ((REPO, "--revision", ""), "--revision '' is not the name of a branch"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_asked(
    registry: Registry, hub: FakeHub, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(registry, REAL, *arguments)
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(
    registry: Registry, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token of a model hub; set HF_TOKEN, or log in" in refused(registry, REAL, REPO)
    assert hub.requests == []
    (tmp_path / "token").write_text(TOKEN)  # the library's own login
    assert REPO in push(registry, REAL, REPO)
    hub.fails = {"/preupload/": 418}
    assert "<token>" in refused(registry, REAL, REPO)  # no variable holds it


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"/whoami": 401}, "the token is not valid: set HF_TOKEN"),
        ({"/repos/create": 403}, "the token may not write there"),
        ({"/repos/create": 404}, "check the name, --revision and HF_ENDPOINT"),
        ({"/preupload/": 403}, "the token may not write there"),
        ({"/whoami": None}, "Rerun the command: what has arrived is not sent again"),
        ({"/commit/": 413}, "Rerun the command: what has arrived is not sent again"),
    ],
    ids=str,
)
def test_a_refusal_of_the_hub_is_one_message(
    registry: Registry, hub: FakeHub, fails: dict[str, int | None], message: str
) -> None:
    hub.fails = fails
    said = refused(registry, REAL, REPO)
    assert message in said
    assert "\n" not in said
    assert "model_index.json" not in hub.repos.get(REPO, {}).get("main", {})


def test_a_hub_that_is_silent_or_away_is_given_up(
    registry: Registry, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDT_ANSWER_S", "0.4")
    with socket.create_server(("127.0.0.1", 0)) as port:
        place = f"http://127.0.0.1:{port.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", place)
        said = refused(registry, REAL, REPO)
    assert f"no answer in 0.4 s from {place}, where a model hub was expected" in said
    monkeypatch.setenv("EDT_ANSWER_S", "60")
    assert "was not pushed" in refused(registry, REAL, REPO)  # nobody listens there now
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be pushed" in refused(registry, REAL, REPO)


def test_a_damaged_version_is_not_pushed(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(tmp_path / "store")
    registry.add("a", 5.0)
    (weights,) = registry.root.rglob("transformer/weights.safetensors")
    weights.write_bytes(b"b" * 99)
    for extra in ((), ("--dry-run",)):
        assert "weights.safetensors has another sha256" in refused(registry, "edt-small/1", REPO, *extra)
    assert hub.repos == {}
