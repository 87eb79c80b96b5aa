"""`edt import`: a released checkpoint becomes a version that everything else takes."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from huggingface_hub import ModelCard as HubCard
from typer.testing import CliRunner

from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.store.folder import Folder
from jobs.models.open import load_model, open_model
from jobs.models.registry_files import pull
from pipelines.cli import app
from pipelines.registry.importing import _protocol, read_released
from pipelines.registry.lookup import find, origin_of
from tests.support.models import TINY, made_model, pipeline_folder, released, sit, weights
from tests.support.registry import Registry
from tests.support.small import edt, edt_process


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Registry(tmp_path_factory.mktemp("registry") / "store")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("vae") / "p", made_model()) / "vae"


def imported(registry: Registry, path: Path, vae: Path, *options: str) -> str:
    arguments = ["import", str(path), "--autoencoder", str(vae), *registry.arguments, *options]
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.mark.parametrize("name", TINY)
def test_an_imported_model_is_a_candidate_that_loads_as_it_was(
    registry: Registry, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = released(tmp_path, name)
    registered = name.lower().replace("/", "-") + "-32"
    told = imported(registry, path, vae, "--source", "https://example.org/released.pt", "--license", "cc-by-nc-4.0")
    taken = "ema weights" if name.startswith("EDT") else "weights"  # a bare state dict does not say which they are
    assert f"{registered} version 1 is {name} at 32 px with 4 classes, {taken} of" in told
    assert "note: the file does not say what its model predicts; noise (epsilon) prediction" in told
    version = find(registry.catalog, f"{registered}@candidate")
    assert "champion" not in registry.catalog.client.get_registered_model(registered).aliases

    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)
    there, state = load_model(f"{registered}@candidate"), weights(name)
    assert there.model.config == model_config(name, 32, 4)
    assert all(torch.equal(value, state[key]) for key, value in there.model.state_dict().items())
    assert (there.num_timesteps, there.classes) == (1000, ())
    assert there.protocol["amm_blocks"] == "model"  # nothing is published for small models
    assert there.protocol["cfg_power"] == (4.0 if name.startswith("MDT") else None)
    opened = open_model(f"{registered}@candidate", Folder.at(tmp_path / "work"))  # as `edt evaluate` takes it
    assert (opened.checkpoint.counts["model"], opened.autoencoder is None) == (name, False)

    assert pull(registry.catalog.client, version, tmp_path / "pulled")
    card = HubCard.load(tmp_path / "pulled" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "https://example.org/released.pt" in card.text
    assert "Not measured" in card.text
    assert str(tmp_path.parent) not in card.text  # the autoencoder's folder lies there


@pytest.mark.parametrize(
    ("name", "image_size", "amm_blocks"),
    [("EDT-S/2", 512, "paper"), ("EDT-XL/2", 256, "paper"), ("EDT-XL/2", 512, "model"), ("DiT-XL/2", 256, "model")],
)
def test_the_placement_of_the_paper_is_kept_where_there_is_one(name: str, image_size: int, amm_blocks: str) -> None:
    assert _protocol(model_config(name, image_size)).amm_blocks == amm_blocks


def test_it_is_shown_listed_traced_and_drawn_from(registry: Registry, vae: Path, tmp_path: Path) -> None:
    name, path = "from-elsewhere", released(tmp_path, "DiT-Tiny/2", seed=5)
    imported(registry, path, vae, "--name", name, "--model", "DiT-Tiny/2", "--image-size", "32")

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *registry.arguments])
        assert done.exit_code == 0, done.output
        return done.output

    shown = said("models", "show", f"{name}@candidate")
    assert "imported, not measured here" in shown
    assert "released.pt" in shown
    facts = json.loads(said("models", "show", name, "--json"))["origin"]
    assert set(facts) == {"file", "sha256", "weights", "autoencoder", "autoencoder_digest"}
    assert name in said("models", "list")
    assert f"released (published) {facts['sha256'][:12]}  released.pt ema" in said("lineage", name)
    out = tmp_path / "grid.png"
    drawn = said("sample", f"{name}@candidate", "--num", "1", "--num-sampling-steps", "2", "--out", str(out))
    assert "4 x 1 images of DiT-Tiny/2 (0, 1, 2, 3)" in drawn
    with pytest.raises(UserError, match="was imported, or not registered by edt"):
        CliRunner().invoke(app, ["models", "promote", f"{name}/1", *registry.arguments], catch_exceptions=False)


def test_the_same_file_is_found_again_and_another_is_a_new_version(
    registry: Registry, vae: Path, tmp_path: Path
) -> None:
    path = released(tmp_path, "EDT-Tiny/2", seed=9)
    assert "version 1 " in imported(registry, path, vae, "--name", "again")
    assert "(imported before)" in imported(registry, path, vae, "--name", "again")
    assert "version 2 is EDT-Tiny/2 at 32 px with 4 classes, model weights" in imported(
        registry, path, vae, "--name", "again", "--weights", "model"
    )
    assert "version 1 " in imported(registry, path, vae, "--name", "again")
    assert find(registry.catalog, "again@candidate").version in (2, "2")  # an old file does not take the alias back


def test_a_sit_is_a_version_that_is_sampled_by_its_authors_sde(registry: Registry, vae: Path, tmp_path: Path) -> None:
    path = sit(released(tmp_path, "DiT-Tiny/2"), tmp_path / "bare.pt")
    assert "DiT-Tiny/2 at 32 px" in imported(registry, path, vae, "--name", "sit", "--objective", "flow")
    version = find(registry.catalog, "sit@candidate")
    assert version.tags["edt.objective"] == "flow"
    assert pull(registry.catalog.client, version, tmp_path / "pulled")
    assert json.loads((tmp_path / "pulled" / "model_index.json").read_text())["protocol"]["sampler"] == "sde"
    assert "(prediction type flow_prediction)" in (tmp_path / "pulled" / "README.md").read_text()


def test_killed_before_the_alias_moved_it_goes_on(
    registry: Registry, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = released(tmp_path, "EDT-Tiny/2", seed=11)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.registry.importing.move_alias", killed)
        with pytest.raises(BaseException):  # noqa: B017, PT011  whatever the runner makes of it
            imported(registry, path, vae, "--name", "killed")
    with pytest.raises(UserError, match="no alias 'candidate'"):
        find(registry.catalog, "killed@candidate")
    assert "version 1 " in imported(registry, path, vae, "--name", "killed")
    assert str(find(registry.catalog, "killed@candidate").version) == "1"


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def bad_file(folder: Path, damage: str) -> Path:
    path = released(folder, "EDT-Tiny/2")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "code":
        path.write_bytes(pickle.dumps({"model": Malicious(folder / "was-run")}, protocol=2))
    elif damage == "other shapes":
        state = weights("EDT-Tiny/2")
        torch.save({**state, "final_layer.linear.bias": torch.zeros(3)}, path)
    elif damage == "of a velocity":
        args = argparse.Namespace(model="SiT-XL/2", path_type="GVP", prediction="velocity")
        torch.save({"model": weights("DiT-Tiny/2"), "ema": weights("DiT-Tiny/2"), "args": args}, path)
    elif damage == "not finite":
        state = weights("EDT-Tiny/2")
        torch.save({**state, "final_layer.linear.bias": state["final_layer.linear.bias"] * torch.nan}, path)
    elif damage == "empty":
        torch.save({}, path)
    elif damage == "gone":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        ("truncated", [], "is not a checkpoint of the authors' code, or is damaged"),
        ("code", [], "needs code to be run"),
        ("other shapes", [], "The closest is EDT-Tiny/2 at 32 pixels with 4 classes, but 'final_layer.linear.bias'"),
        ("of a velocity", [], "path_type='GVP': its path from noise to data is not the straight one"),
        ("not finite", [], "32 of the 32 values of 'final_layer.linear.bias' are not finite"),
        ("empty", [], "it contains a dict without weights"),
        ("gone", [], "is not a file"),
        (
            "",
            ["--model", "DiT-XL/2"],
            "is EDT-Tiny/2 at 32 px with 4 classes; give --model EDT-Tiny/2 --image-size 32",
        ),
        ("", ["--image-size", "64"], "is EDT-Tiny/2 at 32 px with 4 classes"),
        ("", ["--name", "a/b"], "invalid model name 'a/b'"),
        ("", ["--autoencoder", "/nowhere"], "no autoencoder at /nowhere"),
    ],
)
def test_what_cannot_be_imported_leaves_nothing(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, options: list[str], message: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # other tests of the process may have left it
    registry = Registry(tmp_path / "store")
    with pytest.raises(UserError) as refused:
        imported(registry, bad_file(tmp_path, damage), vae, *options)
    assert message in str(refused.value)
    assert not (tmp_path / "was-run").exists()
    assert registry.catalog.client.search_registered_models() == []


def test_an_autoencoder_of_another_factor_is_refused(registry: Registry, tmp_path: Path) -> None:
    other = pipeline_folder(tmp_path / "p", made_model(image_size=64, factor=8), factor=8) / "vae"
    with pytest.raises(UserError, match="the autoencoder has factor 8 and 4 latent channels, but EDT-Tiny/2"):
        imported(registry, released(tmp_path, "EDT-Tiny/2"), other)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model whose latents are those of the papers' autoencoder."""
    path = tmp_path_factory.mktemp("published") / "DiT-S-8.pt"
    torch.save(made_model(name="DiT-S/8", image_size=64, factor=8).state_dict(), path)
    return path


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of this test's own; the hub itself is not asked."""
    for name, value in {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(folder), raising=False)
    return folder


def put_in_cache(cache: Path, vae: Path, hub_id: str = "stabilityai/sd-vae-ft-ema") -> None:
    """What a download of a model leaves in the hub's cache."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(vae, place / "snapshots" / ("0" * 40))


def test_without_an_autoencoder_it_is_that_of_the_papers_and_the_record_says_so(
    registry: Registry, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline_folder(tmp_path / "p", made_model(name="DiT-S/8", image_size=64, factor=8), factor=8) / "vae"
    put_in_cache(hub_cache(tmp_path / "hub", monkeypatch), folder)
    arguments = ["import", str(published), "--name", "by-default", *registry.arguments]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "stabilityai/sd-vae-ft-ema decodes the latents" in done.output
    assert "by-default version 1 is DiT-S/8 at 64 px" in done.output
    origin = origin_of(find(registry.catalog, "by-default@candidate"))
    assert (origin["autoencoder"], origin["autoencoder_choice"]) == ("stabilityai/sd-vae-ft-ema", "default")
    assert "(imported before)" in imported(registry, published, folder, "--name", "by-default")  # the same weights


def test_a_default_that_cannot_be_loaded_is_one_message_with_the_remedy(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(tmp_path / "hub", monkeypatch)
    done = edt("import", str(published), "--store", str(tmp_path / "s"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the default, stabilityai/sd-vae-ft-ema, could not be loaded: it is not complete in this" in done.stderr
    assert "give --autoencoder ./sd-vae-ft-ema" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_hub_that_does_not_answer_is_asked_once(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(tmp_path / "hub", monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    asked: list[str] = []

    def refused(url: str, **options: Any) -> Any:
        asked.append(url)
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(requests, "get", refused)
    with pytest.raises(UserError, match="could not be loaded: it is not complete in this machine's hub cache"):
        read_released(published, None)
    assert asked == ["http://127.0.0.1:1"]


@pytest.mark.parametrize("damage", ["another factor", "another autoencoder"])
def test_a_model_of_other_latents_needs_its_autoencoder(published: Path, tmp_path: Path, damage: str) -> None:
    path = released(tmp_path, "EDT-Tiny/2")
    message = r"--autoencoder is missing: .* is EDT-Tiny/2 for latents of factor 4 with 4 channels, but the default"
    if damage == "another autoencoder":
        path = tmp_path / "trained.pt"
        args = argparse.Namespace(vae="stabilityai/sdxl-vae")
        torch.save({"model": torch.load(published, weights_only=True), "args": args}, path)
        message = r"--autoencoder is missing: .* was trained on latents with vae='stabilityai/sdxl-vae'"
    with pytest.raises(UserError, match=message):
        read_released(path, None)


@pytest.mark.parametrize("weights_name", [None, "model"])
def test_which_weights_were_taken_is_told(
    registry: Registry, vae: Path, tmp_path: Path, weights_name: str | None
) -> None:
    path = tmp_path / "last.ckpt"
    state = {f"{part}.{key}": v for part in ("net", "ema_net") for key, v in weights("DiT-Tiny/2").items()}
    torch.save({"state_dict": state, "hyper_parameters": {"prediction": "epsilon"}}, path)
    options = [] if weights_name is None else ["--weights", weights_name]
    told = imported(registry, path, vae, "--name", "lightning", *options)
    if weights_name is None:
        assert "note: the averaged (EMA) weights 'state_dict.ema_net' were used, not 'state_dict.net'" in told
        assert ", ema weights of" in told
    else:
        assert "note: the trained weights 'state_dict.net' were used, not 'state_dict.ema_net'" in told
        assert ", model weights of" in told
    assert "assumed" not in told


@pytest.mark.extern
def test_as_a_command_it_prints_nothing_of_libraries(vae: Path, tmp_path: Path) -> None:
    """A new store, whose tables MLflow creates; and the pyfunc model, about which it could warn."""
    arguments = ("--autoencoder", str(vae), "--store", str(tmp_path / "s"))
    done = edt_process("import", str(released(tmp_path, TINY[0])), *arguments)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []


@pytest.mark.parametrize("damage", ["truncated", "of a velocity"])
def test_as_a_command_it_is_one_message_and_exit_code_2(vae: Path, tmp_path: Path, damage: str) -> None:
    path = bad_file(tmp_path, damage)
    done = edt("import", str(path), "--autoencoder", str(vae), "--store", str(tmp_path / "s"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "s").exists()
