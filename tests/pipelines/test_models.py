"""`edt models`: look-ups, and the files of a version pulled whole, checked, or not at all."""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from typer.testing import CliRunner

import edt_core
from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from jobs.models.initial import initial_source
from jobs.models.names import is_of_mlflow, registered_version
from jobs.models.open import check_model, use_mlflow
from jobs.models.registry_files import pull, safe_name
from pipelines.cli import app
from pipelines.config.schema import PromoteConfig
from pipelines.registry.lookup import config_of, find, name_of_champion, record_of
from pipelines.registry.registration import promote, source_of
from tests.support.registry import NAME, PROTOCOL, REAL, Registry, registered

OTHER = "edt-other"
LABELS = [3, 1, 0]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Three versions of one model and one of another; the tests read them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(tmp_path_factory.mktemp("registry") / "store")
        registry.add("a", 5.0, accuracy_classifier=0.8)
        registry.add("b", 4.0, assignments=("train.lr=0.002",), accuracy_classifier=0.9)
        registry.add("c", 3.0, protocol={**PROTOCOL, "cfg_scale": 2.0}, accuracy_classifier=0.95)
        registry.add("d", 2.0, name=OTHER, assignments=(f"models={{{OTHER}: {{lr: 0.01}}}}",))
        yield registry


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """One version, for tests that damage it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(tmp_path / "store")
    registry.add("a", 5.0)
    return registry


def edt(registry: Registry, *arguments: str) -> str:
    """Output of a command that ends well. A user's error is raised."""
    done = CliRunner().invoke(app, [*arguments, *registry.arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def listed(registry: Registry, *arguments: str) -> list[str]:
    rows = json.loads(edt(registry, "models", "list", "--json", *arguments))
    return [f"{row['name']}/{row['version']}" for row in rows]


ALL = [f"{OTHER}/1", f"{NAME}/3", f"{NAME}/2", f"{NAME}/1"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ALL),
        (["--name", NAME], ALL[1:]),
        (["--metric", "fd_classifier<5"], ALL[:3]),
        (["--metric", "fd_classifier <= 5", "--metric", "accuracy_classifier>=0.9"], ALL[1:3]),
        (["--config", "train.lr=2e-3"], [f"{NAME}/2"]),
        (["--config", "train.lr=0.01"], [f"{OTHER}/1"]),  # the model's own field, over the shared one
        (["--config", "train.model=EDT-Tiny/2", "--config", "sample.cfg_scale=1.75", "--name", OTHER], [f"{OTHER}/1"]),
        (["--commit", "not-a-commit"], []),
    ],
)
def test_versions_by_what_they_were_made_of(registry: Registry, arguments: list[str], expected: list[str]) -> None:
    assert listed(registry, *arguments) == expected


def test_versions_by_data_and_code(registry: Registry) -> None:
    tags = registry.version("1").tags
    for tag in ("edt.images", "edt.images.digest", "edt.source"):
        assert listed(registry, "--data", tags[tag][:9]) == ALL
    assert listed(registry, "--data", "0" * 64) == []
    assert listed(registry, "--commit", tags["edt.code_version"][:7]) == ALL


def test_without_a_command_all_versions_are_a_table(registry: Registry) -> None:
    lines = edt(registry, "models").splitlines()
    assert lines[0].split() == ["model", "version", "aliases", "metric", "data", "code", "created"]
    assert len(lines) == 1 + len(ALL)
    (second,) = (line for line in lines if line.startswith(f"{NAME}") and line.split()[1] == "2")
    assert "champion" in second
    assert "fd_classifier 4" in second


def test_options_before_the_command_are_not_lost_in_silence(registry: Registry) -> None:
    with pytest.raises(UserError, match="put options after the command, as in edt models show"):
        edt(registry, "models", "--json", "show", NAME)


def test_batches_of_runs_are_asked_for_not_one_each(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    asked = []
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: asked.append(a) or search(*a, **k))
    monkeypatch.setattr(MlflowClient, "get_run", None)
    assert listed(registry, "--config", "train.lr=2e-3")
    assert len(asked) == 1


def test_show_tells_all_that_is_recorded(registry: Registry) -> None:
    shown = json.loads(edt(registry, "models", "show", NAME, "--json"))  # the champion
    assert (shown["version"], shown["aliases"], shown["champion_before"]) == ("2", ["champion"], "1")
    assert shown["metrics"] == {"fd_classifier": 4.0, "accuracy_classifier": 0.9}
    assert shown["protocol"] == PROTOCOL
    assert (shown["config"]["train.lr"], shown["decision"]["required"]) == ("0.002", pytest.approx(0.05))
    assert set(shown["parents"]) == {"checkpoint", "evaluation", "latents"}
    text = edt(registry, "models", "show", f"{NAME}/2")
    for needed in (
        "new champion: fd_classifier 4; version 1 has 5",
        "cfg_scale",
        shown["run"][:12],
        shown["data"]["source"][:12],
    ):
        assert needed in text


def test_compare_puts_metrics_side_by_side_and_says_what_differs(registry: Registry) -> None:
    found = json.loads(edt(registry, "models", "compare", f"{NAME}/1", f"{NAME}/2", "--json"))
    assert found["same_protocol"]
    assert {row["metric"]: row["difference"] for row in found["metrics"]}["fd_classifier"] == -1.0
    assert found["config"] == {"train.lr": ["0.004", "0.002"]}
    assert set(found["recorded"]) == {"checkpoint"}
    text = edt(registry, "models", "compare", f"{NAME}/1", f"{NAME}/3")
    assert "NOT comparable" in text
    assert "cfg_scale 1.75 / 2.0" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edt-smal", f"no registered model 'edt-smal'; did you mean {NAME}"),
        ("zzz", f"models are {OTHER}, {NAME}"),
        (f"{NAME}@champoin", "no alias 'champoin'; did you mean champion"),
        (f"{NAME}/77", "no version 77; there are 3, the newest: 1, 2, 3"),
        ("../x", "is not the name of a version"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(registry.catalog, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "fd_clasifier<5"], "no version has a metric 'fd_clasifier'; did you mean fd_classifier"),
        (["--metric", "fd_classifier~5"], "is not a comparison"),
        (["--config", "train.lrr=5"], r"no run has a configuration field 'train\.lrr'; did you mean train\.lr"),
        (["--name", "edt-smal"], "did you mean"),
    ],
)
def test_conditions_that_nothing_can_meet(registry: Registry, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        edt(registry, "models", "list", *arguments)


def test_a_models_own_fields_take_the_place_of_the_shared_ones() -> None:
    params = {"train.lr": "1", "train.seed": "0", "models.a.lr": "2", "models.b.lr": "3"}
    assert config_of(params, "a") == {"train.lr": "2", "train.seed": "0"}
    assert config_of(params, "c") == {"train.lr": "1", "train.seed": "0"}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pull_brings_the_very_files_and_nothing_else(registry: Registry, tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    assert "every file checked" in edt(registry, "models", "pull", f"{NAME}/1", str(target))
    assert contents(target) == contents(registry.root / "models" / "a" / "artifacts" / "pipeline")
    assert list(target.parent.iterdir()) == [target]
    assert "is already at" in edt(registry, "models", "pull", f"{NAME}/1", str(target))
    with pytest.raises(UserError, match=r"does not contain edt-small version 2: .* has another sha256"):
        edt(registry, "models", "pull", f"{NAME}/2", str(target))
    (target / "own.txt").write_text("mine")
    with pytest.raises(UserError, match=r"own\.txt is not in digests\.json"):
        edt(registry, "models", "pull", f"{NAME}/1", str(target))
    assert (target / "own.txt").read_text() == "mine"


def test_what_was_changed_in_the_store_is_named_and_not_pulled(fresh: Registry, tmp_path: Path) -> None:
    artifacts = fresh.root / "models" / "a" / "artifacts"
    pipeline, digests = artifacts / "pipeline", artifacts / "digests.json"
    weights = pipeline / "transformer" / "weights.safetensors"
    data, text = weights.read_bytes(), digests.read_text()

    def link() -> None:
        weights.unlink()
        weights.symlink_to("/etc/hostname")

    named = "transformer/weights.safetensors"
    damages: list[tuple[Callable[[], object], str]] = [
        (lambda: weights.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:]), named),
        (lambda: weights.write_bytes(data[:-1]), named),
        (weights.unlink, named),
        (link, named),
        (lambda: (pipeline / "pipeline.py").write_text("import os"), r"pipeline\.py is not in"),
        (
            lambda: digests.write_text(json.dumps({**json.loads(text), "pipeline.py": "0" * 64})),
            r"digests\.json has another sha256",
        ),
    ]
    for damage, message in damages:
        damage()
        with pytest.raises(UserError, match=message):
            pull(fresh.catalog.client, fresh.version("1"), tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["store"]
        weights.unlink(missing_ok=True)
        (pipeline / "pipeline.py").unlink(missing_ok=True)
        weights.write_bytes(data)
        digests.write_text(text)
    assert pull(fresh.catalog.client, fresh.version("1"), tmp_path / "target")


HOSTILE = ["../../escaped", "/etc/passwd", "..\\escaped", "C:/escaped", "a/../../b", "./a", "a//b", "a\nb", "pipeline"]


def test_a_store_that_lists_names_outside_is_refused(
    fresh: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real repository of MLflow, whose listing is the store's word."""
    from mlflow.entities import FileInfo
    from mlflow.store.artifact import artifact_repository_registry as known
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    listed, downloaded = [], []

    class Hostile(LocalArtifactRepository):
        def __init__(self, uri: str, *arguments: Any, **more: Any) -> None:
            super().__init__(uri.replace("hostile://", "file://"))

        def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
            listed.append(name)
            return [*super().list_artifacts(path), FileInfo(name, False, 1)]

        def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
            downloaded.append(artifact_path)
            return str(super().download_artifacts(artifact_path, dst_path))

    monkeypatch.setitem(known._artifact_repository_registry._registry, "hostile", Hostile)
    location = (fresh.root / "models" / "a").as_uri().replace("file://", "hostile://")
    tags = fresh.version("1").tags
    version = fresh.catalog.client.create_model_version(NAME, location, tags=tags)
    for name in HOSTILE:
        with pytest.raises(UserError, match=r"file name|lists"):
            pull(fresh.catalog.client, version, tmp_path / "target")
        assert (listed[-1], downloaded) == (name, [])
        assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_names_that_stay_inside() -> None:
    for name in ("a", "a/b.json", "a b/ä.bin", ".hidden", "a..b", "c:"[:1]):
        assert safe_name(name) == name
    for name in (*HOSTILE[:-1], "", "d:x", "~/../x", "a/.."):
        with pytest.raises(UserError):
            safe_name(name)


@pytest.mark.faults
def test_killed_halfway_nothing_is_there_and_the_next_pull_cleans_up(fresh: Registry, tmp_path: Path) -> None:
    target = tmp_path / "target"
    code = (
        "import signal, jobs.models.registry_files as files\n"
        "from pipelines.cli import main\n"
        "bring = files._Remote.download\n"
        "def slow(self, name, target):\n"
        "    bring(self, name, target)\n"
        "    if name.endswith('safetensors'):\n"
        "        print('half', flush=True)\n"
        "        signal.pause()\n"
        "files._Remote.download = slow\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "models", "pull", f"{NAME}/1", str(target), *fresh.arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "half"
        assert not target.exists()
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 2  # the store, and what the killed one has left
    assert pull(fresh.catalog.client, fresh.version("1"), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "target"]


def test_a_version_without_digests_is_not_pulled(fresh: Registry, tmp_path: Path) -> None:
    fresh.catalog.client.delete_model_version_tag(NAME, "1", "edt.pipeline_digest")
    with pytest.raises(UserError, match="was registered without digests"):
        pull(fresh.catalog.client, fresh.version("1"), tmp_path / "target")


@pytest.fixture(scope="module")
def real(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return registered(registry, tmp_path_factory.mktemp("model"))


def test_a_registered_model_is_pulled_and_loads_by_every_door(
    registry: Registry, real: SimpleNamespace, tmp_path: Path
) -> None:
    import mlflow
    from diffusers import DiffusionPipeline

    from edt_core.pipeline import EDTPipeline

    nothing = "there is no champion and no value of an untrained model to compare with"
    assert str(real.decision) == f"first champion: fd_classifier 3; {nothing}"
    assert [check.passed for check in real.decision.checks] == [True] * 5
    folder = tmp_path / "pulled"
    edt(registry, "models", "pull", f"{REAL}@champion", str(folder))
    own = np.stack(EDTPipeline.from_pretrained(folder)(LABELS).images)
    general = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    mlflow.set_tracking_uri(registry.catalog.tracking_uri)
    served = mlflow.pyfunc.load_model(f"models:/{REAL}@champion").predict(np.array(LABELS))
    card = HubCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert [(found.metric_type, found.metric_value) for found in card.data.eval_results] == [("fd_classifier", 3.0)]
    for line in ("| num_samples | 500 |", "| num_sampling_steps | 3 |", "| steps | 0 |", "| source | digits |"):
        assert line in card.text
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([5.0, 500.0, 900.0]), torch.tensor(LABELS)
    with torch.no_grad():
        found = torch.export.load(folder / "denoiser.pt2").module()(*inputs)
        expected = EDTPipeline.from_pretrained(folder).transformer.eval()(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert own.shape == (3, 32, 32, 3)
    assert np.array_equal(own, np.stack(general(LABELS).images))
    assert np.array_equal(own, served)


def test_a_registered_folder_tells_nothing_of_the_machine_that_made_it(
    registry: Registry, real: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "pulled"
    edt(registry, "models", "pull", f"{REAL}@champion", str(folder))
    secrets = {
        str(Path(edt_core.__file__).parents[1]),
        str(registry.root.parent),
        str(Path.home()),
        socket.gethostname(),
    }
    secrets |= {tempfile.gettempdir(), sys.prefix, sysconfig.get_path("purelib")}
    texts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with zipfile.ZipFile(folder / "denoiser.pt2") as program:
        texts |= {f"denoiser.pt2/{name}": program.read(name) for name in program.namelist()}
    assert len(texts) > 15
    for name, text in texts.items():
        assert not [secret for secret in secrets if len(secret) > 4 and secret.encode() in text], name
    assert b"_name_or_path" not in texts["vae/config.json"]


def test_a_card_names_no_folders_of_the_machine() -> None:
    for path in ("/home/somebody/birds", "~somebody/birds", "file:///home/somebody/birds"):
        assert source_of({"source.kind": "folder", "source.path": path}) == "folder birds"
    for path in ("birds", "data/birds", "s3://bucket/birds"):
        assert source_of({"source.kind": "folder", "source.path": path}) == f"folder {path}"
    assert source_of({"source.kind": "digits", "source.path": "None"}) == "digits"


def test_a_job_takes_a_registered_model_through_the_same_checks(
    registry: Registry, real: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edt_core.training.checkpoint import ema_model
    from jobs.models.open import open_model

    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)
    found = open_model(f"{REAL}@champion", Folder.at(tmp_path / "work")).checkpoint

    def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
        return dict(ema_model(artifact.directory(artifact.counts["final"])).state_dict())

    ours, theirs = weights(found), weights(real.entry.checkpoint)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_two_drivers_log_at_once_is_kept_once(
    registry: Registry, real: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second driver looked before the first had registered; its version and its logged model go again."""
    from pipelines.registry import registration

    monkeypatch.setattr(registration, "find_version", lambda *arguments: None)
    before = {m.model_id for m in registry.catalog.client.search_logged_models([registry.catalog.experiment_id])}
    again = promote(registry.catalog, real.run, REAL, PromoteConfig(), real.entry)
    assert again == real.decision
    assert listed(registry, "--name", REAL) == [f"{REAL}/1"]
    after = {m.model_id for m in registry.catalog.client.search_logged_models([registry.catalog.experiment_id])}
    assert after == before
    assert record_of(registry.catalog, REAL).aliases == ("candidate", "champion")


@pytest.mark.extern
@pytest.mark.slow
def test_a_model_of_an_mlflow_server_is_registered_checked_and_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files go through the server's artifact proxy, as they do where the store is not this machine's."""
    from tests.support.servers import MlflowServer

    server = MlflowServer(tmp_path)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        there = Registry(tmp_path / "store")
        made = registered(there, tmp_path / "model")
        assert [check.passed for check in made.decision.checks] == [True] * 5
        catalog = there.catalog
        assert promote(catalog, made.run, REAL, made.config.promote, made.entry) == made.decision
        assert listed(there, "--config", "train.model=EDT-Tiny/2") == [f"{REAL}/1"]
        assert f"model {REAL}/1" in edt(there, "lineage", REAL)
        assert pull(catalog.client, find(catalog, f"{REAL}@champion"), tmp_path / "pulled")
        (weights,) = (tmp_path / "artifacts").rglob("artifacts/pipeline/transformer/*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(UserError, match=r"transformer/.*safetensors has another sha256"):
            pull(catalog.client, find(catalog, REAL), tmp_path / "again")
        with pytest.raises(UserError, match="has no alias"):
            find(catalog, f"{REAL}@nothing")
        with pytest.raises(UserError, match="there is no previous one"):
            edt(there, "models", "rollback", REAL)
    finally:
        server.kill()


def test_an_empty_registry_says_so(tmp_path: Path) -> None:
    empty = Registry(tmp_path / "store")
    assert edt(empty, "models").startswith("no models are registered; `edt run` registers")
    assert edt(empty, "models", "list", "--commit", "abc").strip() == "no versions match"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edt-smal", f"has no model edt-smal; did you mean {NAME}.*\\? If it is in another MLflow, set"),
        (f"{NAME}@champoin", f"has no model {NAME}@champoin; did you mean champion\\?"),
        (f"{NAME}/77", "there is no version 77"),
        ("zzz", f"has no model zzz; models are {OTHER}, .*{NAME}\\."),
    ],
)
def test_commands_that_take_a_model_name_the_nearest_first(registry: Registry, text: str, message: str) -> None:
    use_mlflow(text, None, str(registry.root))
    try:
        with pytest.raises(UserError, match=message):
            check_model(text)
        with pytest.raises(UserError, match=message):
            initial_source(TrainConfig(init_from=text), registry.catalog.tracking_uri)
    finally:
        mlflow.set_tracking_uri(None)


CHAMPION_FORMS = [NAME, f"models:/{NAME}", f"{NAME}@champion", f"{NAME}/2", f"models:/{NAME}/2"]


@pytest.mark.parametrize("text", CHAMPION_FORMS)
def test_a_command_on_the_champion_takes_every_name_of_it(registry: Registry, text: str) -> None:
    assert name_of_champion(registry.catalog, text, "edt retrain") == NAME
    assert str(find(registry.catalog, text).version) == registry.champion()


def test_another_version_than_the_champion_is_not_retrained_and_the_ways_are_named(registry: Registry) -> None:
    refusal = (
        f"{NAME}/1 is not the champion of {NAME} \\(that is version 2\\), and `edt retrain` uses the champion. Make it "
        f"champion with `edt models promote {NAME}/1 --force`, or fine-tune it with `edt run CONFIG --set "
        f"train.init_from={NAME}/1`"
    )
    with pytest.raises(UserError, match=refusal):
        edt(registry, "retrain", f"{NAME}/1", "--plan")
    for text, message in (
        (f"{NAME}/77", "has no version 77"),
        (f"{NAME}@champoin", "has no alias 'champoin'; did you mean champion"),
        ("edt smal", "is not the name of a version; give NAME@ALIAS, NAME/NUMBER or NAME"),
    ):
        with pytest.raises(UserError, match=message):
            edt(registry, "retrain", text, "--plan")


@pytest.mark.parametrize("text", CHAMPION_FORMS[2:])
@pytest.mark.parametrize("command", ["models rollback", "models list --name"])
def test_a_command_on_a_whole_model_says_how_it_is_written(registry: Registry, command: str, text: str) -> None:
    said = f"{text} names one version, but `edt {command}` takes a model; write `edt {command} {NAME}`"
    with pytest.raises(UserError, match=f"^{said}$"):
        edt(registry, *command.split(), text)
    assert listed(registry, "--name", f"models:/{NAME}") == ALL[1:]


@pytest.mark.parametrize("text", [f"{NAME}@candidate", f"{NAME}/3"])
def test_a_schedule_retrains_the_champion_alone(registry: Registry, text: str) -> None:
    with pytest.raises(UserError, match=f"--retrain {text}: a schedule retrains the champion; write --retrain {NAME}"):
        edt(registry, "schedule", "--retrain", text, "--cron", "0 3 * * *", "--no-serve")
    said = edt(registry, "schedule", "--retrain", f"{NAME}@champion", "--cron", "0 3 * * *", "--no-serve")
    assert f"schedule retrain-{NAME} is " in said


def test_a_bare_name_is_its_champion(registry: Registry) -> None:
    client = registry.catalog.client
    for text in (NAME, f"models:/{NAME}", f"{NAME}@champion"):
        assert registered_version(client, text).version == find(registry.catalog, NAME).version
    assert not is_of_mlflow("missing.safetensors")  # a mistyped file


def test_a_name_without_any_registry_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    with pytest.raises(UserError, match=f"there is no model at {NAME}: no such file or folder, and no registry"):
        use_mlflow(NAME, None, "./edt-store")
    assert list(tmp_path.iterdir()) == []
