"""`edt pareto`: domination, the front, successive halving, and a whole search of a small model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from jobs.commands.front import Measured, best_of, dominates, fastest_within, front, halved, named_points, survivors
from jobs.commands.pareto import GIVEN, _check_unguided, default_axes, settings_of
from jobs.models.open import Loaded
from pipelines.outcome import Outcome
from tests.support.local_ray import local_ray_train
from tests.support.small import MODEL, edt


def point(name: str, value: float, seconds: float, spread: float | None = None) -> Measured:
    return Measured(name, value, spread, seconds, seconds * 1e9)


POINTS = [point("a", 10.0, 1.0), point("b", 5.0, 2.0), point("c", 6.0, 3.0), point("d", 4.0, 9.0), point("e", 4.0, 8.0)]


def test_the_front_has_no_dominated_point() -> None:
    """Checked pair by pair, and for both directions of a metric."""
    assert [p.name for p in front(POINTS, lower=True)] == ["a", "b", "e"]
    assert [p.name for p in front(POINTS, lower=False)] == ["a"]
    for kept in front(POINTS, lower=True):
        assert not any(dominates(other, kept, True) for other in POINTS)
    assert not dominates(POINTS[0], POINTS[0], True)
    broken = [point("nan", math.nan, 0.1), *POINTS]
    assert [p.name for p in front(broken, lower=True)] == ["a", "b", "e"]


def test_survivors_are_whole_fronts() -> None:
    assert survivors(POINTS, 1, True) == ["a", "b", "e"]
    assert survivors(POINTS, 4, True) == ["a", "b", "e", "c", "d"]
    assert survivors([point("nan", math.nan, 1.0)], 1, True) == []


def test_half_of_the_settings_reach_the_next_rung_and_kept_ones_always() -> None:
    """Eight settings on a line, of which none is worth its time but the first: the fronts are single points."""
    costs = {str(number): point(str(number), 1.0 + number, 1.0 + number) for number in range(8)}
    calls: list[tuple[str, int]] = []

    def measure(name: str, rung: int) -> Measured:
        calls.append((name, rung))
        return costs[name]

    results, complete = halved(list(costs), (1, 2, 4), measure, ["7"], True)
    assert complete
    assert [list(rung) for rung in results] == [list("01234567"), list("01237"), list("0127")]
    assert len(calls) == 8 + 5 + 4


def test_a_rung_that_does_not_end_does_not_count() -> None:
    costs = {str(number): point(str(number), 1.0 + number, 1.0) for number in range(4)}
    left = 6

    def measure(name: str, rung: int) -> Measured | None:
        nonlocal left
        left -= 1
        return costs[name] if left >= 0 else None

    results, complete = halved(list(costs), (1, 2, 4), measure, ["3"], True)
    assert not complete
    assert [list(rung) for rung in results] == [list("0123")]
    left = 2
    results, complete = halved(list(costs), (1, 2), measure, [], True)
    assert (len(results), list(results[0]), complete) == (1, ["0", "1"], False)


def test_named_points() -> None:
    points = [point("slow", 4.0, 9.0, 0.3), point("near", 4.07, 3.0, 0.3), point("noisy", 4.5, 1.0, 0.1), *POINTS[:1]]
    named = {name: p.name for name, p in named_points(points, True).items()}
    assert named == {"best": "slow", "within-2%": "near", "within-noise": "noisy", "fastest": "noisy"}
    assert best_of(points, True).name == "slow"
    assert fastest_within(points, True, 0.0).name == "slow"
    assert "within-noise" not in named_points(POINTS, True)


@pytest.mark.parametrize("name", ["EDT-Tiny/2", "UViT-Tiny/2"])
def test_the_default_grid_has_no_two_settings_of_one_effect(name: str) -> None:
    config, base = model_config(name, 32, 10), SampleConfig(num_sampling_steps=25, num_samples=8)
    settings = settings_of(base, default_axes(base, config), config)
    assert settings[GIVEN] == base
    assert len(settings) == 1 + 3 * 5 * 3  # ddim, dpmsolver++, unipc; 2 to 25 steps; three caches
    texts = [setting.model_dump_json() for setting in settings.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("axis", ["ema=off,0.05", "num_samples=20,40", "seed=0,1", "label_policy=uniform"])
def test_only_settings_of_a_chain_make_a_grid(axis: str) -> None:
    """All points have the same weights and samples: a point with another name than what was measured is wrong."""
    config, base = model_config("EDT-Tiny/2", 32, 10), SampleConfig(num_sampling_steps=4, num_samples=8)
    with pytest.raises(UserError, match="is no setting of a chain"):
        settings_of(base, [axis, "steps=2,3"], config)


def test_a_guide_is_not_left_out_without_a_word() -> None:
    guide: Any = object()
    loaded = Loaded(guide, 1000, None, guide=guide)
    given = SampleConfig(cfg_scale=2.0)
    with pytest.raises(UserError, match=r"m/1 carries a guide, from which cfg_scale 2 guides away; .* --guide"):
        _check_unguided("m/1", loaded, given, "pass the guide with --guide")
    _check_unguided("m/1", loaded, given.model_copy(update={"cfg_scale": 1.0}), "")


def test_damaged_times_are_one_message(tmp_path: Path) -> None:
    from edt_core.models import build_model
    from edt_core.store.folder import Folder
    from jobs.commands.clock import Clock

    (tmp_path / "seconds.json").write_text('{"0a1b')
    clock = Clock(build_model(model_config("EDT-Tiny/2", 32, 10)), 1000, Folder.at(str(tmp_path)))
    with pytest.raises(UserError, match=r"seconds\.json is damaged: it is no JSON\. Delete it"):
        clock.seconds(SampleConfig(num_sampling_steps=2, num_samples=2))


def test_a_chain_away_from_the_confused_class_is_timed_with_its_classifier(tmp_path: Path) -> None:
    import torch

    from edt_core.models import build_model
    from edt_core.store.folder import Folder
    from jobs.commands.clock import Clock

    model, classified = build_model(model_config("EDT-Tiny/2", 32, 10)), []

    def classify(latents: torch.Tensor) -> torch.Tensor:
        classified.append(latents.shape)
        return torch.zeros(len(latents), 10)

    chain = SampleConfig(num_sampling_steps=2, unit_size=2, cfg_scale=1.5, guidance_reference="confused")
    assert Clock(model, 1000, Folder.at(str(tmp_path)), classify=classify).seconds(chain) > 0
    assert classified


def test_times_are_of_one_model_and_operations_follow_the_chain(tmp_path: Path) -> None:
    import torch

    from edt_core.config import CacheConfig
    from edt_core.models import build_model, count_macs
    from edt_core.sampling.cache import call_macs
    from edt_core.store.folder import Folder
    from jobs.commands.clock import Clock

    out, chain = Folder.at(str(tmp_path)), SampleConfig(num_sampling_steps=4, unit_size=2, num_samples=2)
    small, large = (build_model(model_config(name, 32, 10)) for name in ("EDT-Tiny/2", "MDTv2-Tiny/2"))
    clocks = [Clock(model, 1000, out) for model in (small, large)]
    with torch.no_grad():
        times = [clock.seconds(chain) for clock in clocks]
    assert len(json.loads((tmp_path / "seconds.json").read_text())) == 2
    assert Clock(small, 1000, out).seconds(chain) == times[0]  # not measured again
    macs = count_macs(small)
    assert clocks[0].flops(chain) == 2 * 4 * macs
    guided = chain.model_copy(update={"num_sampling_steps": 10, "cfg_scale": 1.5, "guidance_interval": (0.0, 500.0)})
    assert clocks[0].flops(guided) == 2 * (10 + 5) * macs
    assert Clock(small, 1000, out, large).flops(guided) == 2 * (10 * macs + 5 * count_macs(large))
    full, predicting = call_macs(small.config, CacheConfig(kind="taylor", interval=3))
    cached = guided.model_copy(update={"cache": CacheConfig(kind="taylor", interval=3)})
    of_half = 3 * full + 2 * predicting  # of 5 calls after a flush: 0, 1 and 4
    assert clocks[0].flops(cached) == pytest.approx(2 * (of_half + 2 * of_half))


def test_a_model_without_a_finite_value_is_one_message() -> None:
    with pytest.raises(UserError, match="no setting has a finite value"):
        named_points([point("a", math.nan, 1.0)], True)


# --- a whole search


@pytest.fixture(scope="module")
def searched(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A search of the registered model of the session: two samplers, two numbers of steps, in three rungs."""
    out = tmp_path_factory.mktemp("pareto") / "out"
    kinds = {path.parent.name: path for path in store.glob("*/*") if path.parent.name in ("classifier", "reference")}
    networks = ["--classifier", str(kinds["classifier"]), "--reference", str(kinds["reference"])]
    sizes = ["--num-samples", "80", "--repeats", "2", "--unit-size", "20", "--num-workers", "1"]
    grid = ["--sweep", "sampler=ddim,unipc", "steps=2,3"]
    arguments = [f"{MODEL}/1", str(out), "--store", str(store), *networks, *sizes, *grid]
    return arguments, out


def search(arguments: list[str], *more: str) -> Any:
    with local_ray_train():
        return edt("pareto", *arguments, *more)


def test_a_search_writes_its_front_and_resumes(searched: tuple[list[str], Path]) -> None:
    arguments, out = searched
    done = search(arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["complete"]
    assert found["samples"] == 80
    assert found["metric"] == "fd_classifier"
    names = [p["name"] for p in found["points"]]
    assert GIVEN in names
    assert set(found["front"]) <= set(names)
    assert 2 <= len(names) <= 5  # of five settings, three and then two, or more on one front
    by_name = {p["name"]: p for p in found["points"]}
    assert by_name[GIVEN]["settings"]["num_sampling_steps"] == 3  # of the version's protocol
    assert all(p["seconds"] > 0 and p["flops"] > 0 and p["spread"] is not None for p in found["points"])
    assert set(found["named"]) == {"best", "within-2%", "within-noise", "fastest"}
    assert "| setting | fd_classifier | s/image |" in done.stdout
    assert (out / "results.png").stat().st_size > 10_000
    manifests = {path: path.stat().st_mtime_ns for path in out.glob("features/*/manifest.json")}
    assert len(manifests) >= 5
    again = search(arguments)
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("features/*/manifest.json")} == manifests


def test_a_search_without_time_is_one_message(searched: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, _ = searched
    arguments = [arguments[0], str(tmp_path / "other"), *arguments[2:]]
    done = search(arguments, "--budget-s", "0.000001")
    assert done.returncode == 2
    assert "the time was over before anything was measured" in done.stderr
    assert search(arguments, "--budget-s", "-1").returncode == 2
    assert "--budget-s is nan; use seconds above 0" in search(arguments, "--budget-s", "nan").stderr
    unknown = search(arguments, "--metric", "fidd")
    assert unknown.returncode == 2
    assert "--metric fidd was not measured" in unknown.stderr


def test_a_search_that_cannot_end_does_not_begin(searched: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, _ = searched
    arguments = [arguments[0], str(tmp_path / "other"), *arguments[2:]]
    few = search(arguments, "--num-samples", "24")
    assert few.returncode == 2
    assert "there are only 6. Set --num-samples 68 (the first rung of a search has 25% of them)" in few.stderr
    done = search([*arguments[: arguments.index("--sweep")], "--sweep", "sampler=ddim,euler"])
    assert done.returncode == 2
    assert f"{MODEL}/1 cannot be measured with the setting 'sampler=euler': sampler is 'euler'" in done.stderr
    assert not (tmp_path / "other" / "features").exists()


def test_other_models_take_part_and_keep_their_points_to_themselves(
    searched: tuple[list[str], Path], tmp_path: Path, store: Path
) -> None:
    """A version with fewer steps by default beside its parent, both compared with the same images."""
    from tests.support.small import copy_store

    arguments, out = searched
    search(arguments)
    copy = tmp_path / "edt-store"
    copy_store(store, copy)
    alone = json.loads((out / "results.json").read_text())
    fastest = next(p for p in alone["points"] if p["name"] == alone["named"]["fastest"])
    chain = ("--point", "fastest", "--store", str(copy), "--json")
    made = edt("models", "set-chain", f"{MODEL}/1", str(out / "results.json"), *chain)
    other = json.loads(made.stdout)["version"]
    inputs = arguments[4 : arguments.index("--sweep")]
    both = [arguments[0], str(tmp_path / "both"), "--store", str(copy), *inputs, "--sweep", "steps=3", "--also", other]
    done = search(both)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "both" / "results.json").read_text())
    of = {p["name"]: (p["version"], p["value"]) for p in found["points"]}
    assert of[GIVEN][0] == f"{MODEL}/1"
    assert of[other] == (other, fastest["value"])  # its own record's settings; equal weights give an equal value
    assert {version for version, _ in of.values()} == {f"{MODEL}/1", other}
    refused = edt(
        "models",
        "set-chain",
        f"{MODEL}/1",
        str(tmp_path / "both" / "results.json"),
        "--point",
        other,
        "--store",
        str(copy),
    )
    assert refused.returncode == 2
    assert f"is of {other}, not of {MODEL}/1; give that version, or another point" in refused.stderr
    twice = search([*both, f"{MODEL}@champion"])
    assert (twice.returncode, f"is {MODEL}/1, which is in the search already" in twice.stderr) == (2, True)


def test_a_point_becomes_the_default_of_a_version(
    searched: tuple[list[str], Path], tmp_path: Path, store: Path
) -> None:
    """In a copy of the store: the new version has the weights, the settings of the point, and no alias."""
    from jobs.models.open import load_model, use_mlflow
    from tests.support.small import copy_store

    arguments, out = searched
    search(arguments)
    copy = tmp_path / "edt-store"
    copy_store(store, copy)
    results = out / "results.json"
    done = edt("models", "set-chain", f"{MODEL}/1", str(results), "--point", "fastest", "--store", str(copy), "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    name, number = made["version"].split("/")
    assert (name, made["new"]) == (MODEL, True)
    found = json.loads(results.read_text())
    settings = next(p["settings"] for p in found["points"] if p["name"] == found["named"]["fastest"])
    use_mlflow(made["version"], None, str(copy))
    before, after = (load_model(f"models:/{MODEL}/{each}") for each in (1, number))
    assert after.protocol["num_sampling_steps"] == settings["num_sampling_steps"]
    assert after.protocol["sampler"] == settings["sampler"]
    weights = after.model.state_dict()
    assert all((value == weights[name]).all() for name, value in before.model.state_dict().items())
    shown = json.loads(edt("models", "show", made["version"], "--store", str(copy), "--json").stdout)
    assert shown["aliases"] == []
    again = edt("models", "set-chain", f"{MODEL}/1", str(results), "--point", "fastest", "--store", str(copy), "--json")
    assert json.loads(again.stdout)["version"] == made["version"]
    for point_name, message in (("other", "has no point 'other'"),):
        wrong = edt("models", "set-chain", f"{MODEL}/1", str(results), "--point", point_name, "--store", str(copy))
        assert (wrong.returncode, message in wrong.stderr) == (2, True)
    other = edt("models", "set-chain", made["version"], str(results), "--store", str(copy))
    assert (other.returncode, f"is of {MODEL}/1, not of {made['version']}" in other.stderr) == (2, True)
    rubbish = tmp_path / "rubbish.json"
    rubbish.write_text("[1]")
    assert "is no results.json" in edt("models", "set-chain", f"{MODEL}/1", str(rubbish), "--store", str(copy)).stderr
