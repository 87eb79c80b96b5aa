"""What is not Kubernetes: the images, the compose file, and Ray's own cluster file. Read, never built or started."""

import configparser
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.support.manifests import SECRET_NAME

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose"
DOCKERFILES = sorted(INFRA.glob("*Dockerfile"))
LOCK = dict(
    line.split("==")
    for name in ("requirements.lock", "requirements-dev.lock")
    for line in (ROOT / name).read_text().split()
)
REQUIRED = re.compile(r"\$\{(\w+):\?[^}]+\}")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def image_problems(text: str) -> Iterator[str]:
    """What is wrong with a Dockerfile."""
    found = instructions(text)
    users = [
        rest for name, rest in found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :] if name == "USER"
    ]
    if not users or users[-1] in ("root", "0"):
        yield "it ends as root"
    defaults = dict(rest.split("=", 1) for name, rest in found if name == "ARG" and "=" in rest)
    for name, rest in found:
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], rest.split()[0])
            tag = image.rpartition("/")[2].partition(":")[2]
            if not re.search(r"\d+\.\d+\.\d+", tag):
                yield f"the base {image} has no fixed version"
        if name == "ADD":
            yield "ADD, which takes addresses and unpacks archives"
        if name in ("ENV", "ARG") and SECRET_NAME.search(rest.partition("=")[0].upper()):
            yield f"a secret would stay in the image: {rest}"
        if name == "RUN" and re.search(r"\b(curl|wget)\b", rest):
            yield "something from the network without a version"


def compose_problems(compose: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a compose file."""
    for name, service in compose["services"].items():
        if "healthcheck" not in service:
            yield f"{name} has no health check"
        if not re.search(r":[\w.-]*\d", service["image"]):
            yield f"{name}: the image {service['image']} has no fixed tag"
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:"):
                yield f"{name}: port {port} is open to others"
        if service.get("privileged") or service.get("network_mode") == "host":
            yield f"{name} has the host's rights"
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key) and not REQUIRED.fullmatch(value):
                yield f"{name}: {key} has a default"
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] != "service_healthy":
                yield f"{name} does not wait for {needed}"
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if not source.startswith("./") and source not in compose["volumes"]:
                yield f"{name}: the volume {source} has no name"


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return loaded


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_safe_and_repeatable(path: Path) -> None:
    assert list(image_problems(path.read_text())) == []
    for name, rest in instructions(path.read_text()):
        if name == "COPY" and "--from" not in rest:
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\nUSER ray", "", "ends as root"),
        ("\nUSER ray", "\nUSER root", "ends as root"),
        ("2.60.0-py311-${VARIANT}", "latest", "no fixed version"),
        ("COPY --chown=ray requirements.lock requirements-dev.lock", "ADD https://example.com/lock", "ADD"),
        ("ENV RAY", "ENV MLFLOW_TRACKING_PASSWORD=x RAY", "a secret would stay"),
        ("RUN pip wheel", "RUN curl -O https://example.com/x && pip wheel", "from the network"),
    ],
)
def test_what_is_wrong_with_an_image_is_found(old: str, new: str, said: str) -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert old in text
    assert any(said in problem for problem in image_problems(text.replace(old, new)))


def test_versions_are_those_of_the_lock() -> None:
    ray, mlflow = (path.read_text() for path in (INFRA / "Dockerfile", INFRA / "mlflow.Dockerfile"))
    assert set(re.findall(r"rayproject/ray:([\d.]+)", ray)) == {LOCK["ray"]}
    assert f"mlflow[auth]=={LOCK['mlflow']}" in mlflow
    cluster = yaml.safe_load((INFRA / "kuberay" / "base" / "raycluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == LOCK["ray"]
    pythons = re.findall(r"(?:-py3|python:3\.)(\d+)", ray + mlflow)
    assert len(pythons) == 3
    assert set(pythons) == {"11"}


def test_torch_comes_from_pypi_unless_another_index_is_named() -> None:
    """With its local version, such as 2.13.0+cu126, torch of the other index is newer than that of PyPI to pip."""
    found = instructions((INFRA / "Dockerfile").read_text())
    assert ("ARG", "TORCH_INDEX=") in found
    (run,) = (rest for name, rest in found if name == "RUN" and "$wheel[" in rest)
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in run
    assert SpecifierSet(f"=={LOCK['torch']}").contains(f"{LOCK['torch']}+cu126")
    assert Version(f"{LOCK['torch']}+cu126") > Version(LOCK["torch"])


def test_the_cluster_image_reports_no_use() -> None:
    settings = " ".join(rest for name, rest in instructions((INFRA / "Dockerfile").read_text()) if name == "ENV")
    assert "RAY_USAGE_STATS_ENABLED=0" in settings
    assert "MLFLOW_DISABLE_TELEMETRY=true" in settings


def test_compose_is_closed_and_waits(compose: dict[str, Any]) -> None:
    assert list(compose_problems(compose)) == []


def _mlflow(compose: dict[str, Any]) -> dict[str, Any]:
    service: dict[str, Any] = compose["services"]["mlflow"]
    return service


SPOILT: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: _mlflow(c).pop("healthcheck"), "no health check"),
    (lambda c: _mlflow(c).update(ports=["5000:5000"]), "open to others"),
    (lambda c: _mlflow(c)["environment"].update(PGPASSWORD="${POSTGRES_PASSWORD:-mlflow}"), "has a default"),
    (lambda c: c["services"]["postgres"].update(image="postgres:latest"), "no fixed tag"),
    (lambda c: _mlflow(c)["depends_on"].update(s3={"condition": "service_started"}), "does not wait"),
    (lambda c: c["volumes"].pop("s3"), "has no name"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT, ids=[said for _, said in SPOILT])
def test_what_is_wrong_with_compose_is_found(
    spoil: Callable[[dict[str, Any]], object], said: str, compose: dict[str, Any]
) -> None:
    spoilt = copy.deepcopy(compose)
    spoil(spoilt)
    assert any(said in problem for problem in compose_problems(spoilt))


def test_the_example_names_what_is_required_and_gives_nothing() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    lines = [line for line in (COMPOSE / ".env.example").read_text().splitlines() if line and line[0] != "#"]
    given = dict(line.split("=", 1) for line in lines)
    assert set(given) == set(REQUIRED.findall(text))
    assert set(given.values()) == {""}, "a value in the example would become everybody's"
    others = set(re.findall(r"\$\{(\w+):-(\w+)\}", text))
    assert others == {("S3_PORT", "8333"), ("MLFLOW_PORT", "5000")}


def test_mlflow_has_users_and_takes_these_options(compose: dict[str, Any]) -> None:
    from mlflow.cli import server

    command = _mlflow(compose)["command"]
    known = {option for parameter in server.params for option in parameter.opts}
    assert command[:2] == ["mlflow", "server"]
    assert {word.partition("=")[0] for word in command[2:]} <= known
    assert "--app-name=basic-auth" in command
    settings = configparser.ConfigParser()
    settings.read(COMPOSE / "mlflow-auth.ini")
    assert settings["mlflow"]["authorization_function"] == "mlflow.server.auth:authenticate_request_basic_auth"
    assert "admin_password" not in settings["mlflow"]
    uris = [settings["mlflow"]["database_uri"], dict(word.split("=", 1) for word in command[2:])["--backend-store-uri"]]
    for uri in uris:
        # SQLAlchemy 2.1 would take another driver than the one that the image has.
        assert re.fullmatch(r"postgresql\+psycopg2://mlflow@postgres:5432/mlflow", uri), "no password in a URI"


def test_mlflow_answers_to_its_names_only(compose: dict[str, Any]) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    allowed = _mlflow(compose)["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert all(is_allowed_host_header(allowed, host) for host in ("127.0.0.1:5000", "localhost:5001", "mlflow:5000"))
    assert not any(
        is_allowed_host_header(allowed, host) for host in ("example.com", "mlflow", "127.0.0.1.example.com:80")
    )


def test_rays_own_cluster_file() -> None:
    import ray

    config = yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    for kind in ("head", "worker"):
        started = config[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in started
        assert "RAY_AUTH_TOKEN" not in started
        assert "RAY_USAGE_STATS_ENABLED=0" in started
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
