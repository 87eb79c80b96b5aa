"""`edt paper`: the tables of the paper as configurations, their results from a store, and how both are shown."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.evaluation.config import AlongConfig
from edt_core.models import model_config
from pipelines.outcome import Outcome
from pipelines.studies.paper.counted import counted_rows
from pipelines.studies.paper.picture import scaled
from pipelines.studies.paper.pipelines import MOST_TRAININGS, pipelines_of, registered_name
from pipelines.studies.paper.price import price_of
from pipelines.studies.paper.render import as_csv, as_markdown, chances
from pipelines.studies.paper.results import Results, RowResult
from pipelines.studies.paper.table import COUNTED, SCALES, Scale, Table, load, names
from tests.support.local_ray import local_ray_train
from tests.support.small import SMALL, copy_store, edt

EVERY = [(name, scale) for name in names() for scale in SCALES]


# --- the tables as configurations


def test_there_is_every_table_and_figure_with_results() -> None:
    assert names() == [*map(str, range(1, 15)), "figure-6", "figure-9", "figure-10"]
    with pytest.raises(UserError, match="did you mean 4"):
        load("44")


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_in_one_valid_pipeline(scale: Scale) -> None:
    """Also: a name that several tables have is one model, trained and sampled in one way."""
    meaning: dict[str, Any] = {}
    for name in names():
        table = load(name)
        if table.kind in COUNTED:
            continue
        configs = pipelines_of(table, name, scale)
        models = [model for config in configs for model in config.models]
        assert sorted(models) == sorted(registered_name(row, scale) for row in table.rows_at(scale))
        for config in configs:
            assert sum(len(config.trainings_of(model)) for model in config.models) <= MOST_TRAININGS or (
                len(config.models) == 1
            )
            for model in config.models:
                facts = (config.train_of(model), config.sample, config.preprocess, config.autoencoder)
                assert meaning.setdefault(model, facts) == facts, f"{model} means something else in table {name}"


def test_mini_trains_the_tiny_model_of_each_family() -> None:
    for name in ("1", "3", "13"):
        for config in pipelines_of(load(name), name, "mini"):
            assert all(config.train_of(model).model.endswith("-Tiny/2") for model in config.models)
            assert config.trainings_of(next(iter(config.models)))[-1].seed == 2


def test_rows_that_are_sampled_alike_share_a_pipeline_and_trainings_are_shared_by_all() -> None:
    configs = pipelines_of(load("9"), "9", "mini")
    assert [len(config.models) for config in configs] == [1, 1, 1, 1]
    trainings = {config.train_of(next(iter(config.models))).model_dump_json() for config in configs}
    assert len(trainings) == 1
    assert len({config.sample.model_dump_json() for config in configs}) == 4


def test_assignments_are_on_top_of_every_row(tmp_path: Path) -> None:
    given = ["train.seeds=[5]", "train.max_steps=7", "source.limit=300"]
    for config in pipelines_of(load("1"), "1", "mini", given, str(tmp_path)):
        assert config.store == str(tmp_path)
        assert config.source.limit == 300
        assert {(train.seed, train.max_steps) for m in config.models for train in config.trainings_of(m)} == {(5, 7)}


@pytest.mark.parametrize(
    ("name", "assignment"),
    [
        ("3", "sample.amm_blocks=[4]"),
        ("4", "train.masked_loss=false"),
        ("4", "train.model_overrides.token_enhancement=false"),
        ("13", "sample.cfg_scale=1.0"),
        ("1", "train.model=DiT-Tiny/2"),
        ("1", "models.a.model=EDT-Tiny/2"),
        ("1", "train={}"),
    ],
)
def test_what_the_rows_are_about_cannot_be_set(name: str, assignment: str) -> None:
    with pytest.raises(UserError, match=f"the rows of table {name} are about this field"):
        pipelines_of(load(name), name, "mini", [assignment])


def test_a_folder_that_cannot_be_written_is_refused_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "table-4.png").mkdir(parents=True)
    for folder, message in (("file", "is no folder"), ("out", "table-4.png is a folder")):
        done = edt("paper", "4", "--out", str(tmp_path / folder), "--store", str(tmp_path / "store"))
        assert (done.returncode, message in done.stderr) == (2, True)
    assert not (tmp_path / "store").exists()


def test_a_table_whose_base_is_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="base is 'c', which is none of the rows a"):
        Table.model_validate({"title": "t", "published": "p", "base": "c", "rows": {"a": {"label": "A"}}})


# --- what is counted, and what a table costs


def test_the_formulas_of_a_block_are_what_is_counted() -> None:
    """Table 6 of the paper: 2 n^2 d + 12 n d^2 + 6 d^2 in all."""
    rows = counted_rows("block", pipelines_of(load("6"), "6", "full"), 100.0)
    assert len(rows) == 3
    for cells in rows.values():
        cell = dict(cells)
        for kind in ("adaLN", "attention", "feed-forward"):
            assert cell[f"{kind}, formula"] == cell[f"{kind}, counted"]
        n, d = int(cell["n"]), int(cell["d"])
        total = sum(int(text.replace(",", "")) for heading, text in cells if heading.endswith("counted"))
        assert total == 2 * n * n * d + 12 * n * d * d + 6 * d * d


def test_the_parts_of_a_size_are_the_whole(tmp_path: Path) -> None:
    done = edt("paper", "5", "--out", str(tmp_path))
    assert done.returncode == 0
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table-5.csv").read_text())))
    cells = {line["name"]: line["value"] for line in lines if line["label"] == "EDT-S/2"}
    parts = sum(float(cells[name].split()[0]) for name in ("blocks", "sampling and skips", "ends"))
    assert parts == pytest.approx(float(cells["parameters"].split()[0]), abs=0.2)
    assert cells["heads"] == "6, 8, 10, 8, 6"
    assert "| EDT-S/2 |" in done.stdout


def test_a_price_counts_each_training_once() -> None:
    one = price_of(pipelines_of(load("9"), "9", "full"))
    assert one.trainings == 1
    steps, batch = 400_000, 256
    model = model_config("EDT-S/2", 256, 1000)
    from edt_core.models import count_macs, shadow

    macs = count_macs(shadow(model))
    assert one.training == pytest.approx(steps * batch * 6 * macs, rel=0.01)  # forward and backward
    untrained = 4  # the same model, once for each way of sampling
    assert one.sampling == pytest.approx((4 + untrained) * 2 * macs * 250 * 50_000)
    curve = pipelines_of(load("14"), "14", "full")
    without = [config.model_copy(update={"along": AlongConfig()}) for config in curve]
    assert price_of(curve).sampling > price_of(without).sampling  # points along the training
    text = "\n".join(one.lines(100.0))
    assert f"{one.training / 1e14 / 86400:,.3g} GPU-days at 100 TFLOP/s" in text


def test_full_scale_shows_its_price_and_starts_only_with_yes(tmp_path: Path) -> None:
    done = edt("paper", "9", "--scale", "full", "--store", str(tmp_path / "store"), "--tflops", "300")
    assert done.returncode == 2
    assert "1 training at full scale" in done.stdout
    assert "GPU-days at 300 TFLOP/s" in done.stdout
    assert "nothing was started; add --yes" in done.stderr
    assert not (tmp_path / "store").exists()


# --- how results are shown


def results(**values: tuple[float, ...]) -> Results:
    """Results of three rows, of which the second is published."""
    rows = [
        RowResult(
            name,
            label=f"row | {name}",
            macs=2_000_000,
            training_flops=3e12,
            blocks=7,
            amm_blocks=(4,),
            published={"fid": 34.27} if name == "b" else {},
            trainings={seed: {"fd_classifier": value} for seed, value in enumerate(found)},
            seeds=3,
        )
        for name, found in values.items()
    ]
    table = Table.model_validate(
        {"title": "T", "published": "FID-50k", "base": "a", "rows": {row.name: {"label": row.label} for row in rows}}
    )
    return Results(table, "4", "mini", rows, {"steps": 9}, "fd_classifier", True)


def test_measured_and_published_values_are_never_in_one_table() -> None:
    shown = results(a=(5.0, 5.2, 5.1), b=(9.0, 9.3, 9.1), c=(5.1, 5.0, 5.3))
    measured, published = as_markdown(shown).split("## Published")
    assert "34.27" not in measured
    assert "34.27" in published
    assert "FID-50k These values are not comparable" in published
    assert "| row \\| b | 9.133 ± 0.15 | 0.002 | 3e+12 | 3 | **" in measured
    assert "differs significantly from 'row | a' in 1 of 2 rows" in measured
    lines = list(csv.DictReader(io.StringIO(as_csv(shown))))
    assert [(line["origin"], line["scale"]) for line in lines if line["value"] == "34.27"] == [("published", "full")]
    assert sum(line["name"] == "fd_classifier" for line in lines) == 9


def test_what_is_missing_is_said() -> None:
    shown = results(a=(5.0, 5.2, 5.1), b=(9.0,), c=())
    text = as_markdown(shown)
    assert "5 of 9 trainings are missing" in text
    assert "| 1 of 3 |" in text
    assert "| 0 of 3 |" in text
    assert all(chance != chance for chance in chances(shown).values())  # one value has no spread
    assert "says nothing about chance" not in text  # there will be more trainings
    assert "says nothing about chance" in as_markdown(replace(shown, rows=[replace(shown.rows[1], seeds=1)]))


@pytest.mark.parametrize("kind", ["metrics", "placement", "curve", "losses", "pictures"])
def test_every_kind_has_a_picture_also_of_nothing(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    from pipelines.studies.paper.picture import draw

    for number, shown in enumerate((results(a=(1.0, 2.0), b=(3.0,), c=()), results(a=()))):
        shown = replace(shown, table=shown.table.model_copy(update={"kind": kind}), setting={"classes": 3})
        draw(shown, tmp_path / f"{number}.png")
        assert min(Image.open(tmp_path / f"{number}.png").size) > 200


def test_rows_of_one_training_are_compared_training_by_training() -> None:
    """A small shift of each training is significant then, where their spread would hide it."""
    from types import SimpleNamespace

    shown = results(a=(5.0, 9.0, 13.0), b=(5.2, 9.19, 13.21), c=(5.2, 9.19, 13.21))
    one: Any = {"checkpoint": SimpleNamespace(fingerprint="1")}
    rows = [replace(row, artifacts=one) if row.name != "c" else row for row in shown.rows]
    tested = chances(replace(shown, rows=rows))
    assert tested["b"] < 0.01
    assert tested["c"] > 0.5


def test_losses_are_scaled() -> None:
    assert scaled([2.0, 4.0, 3.0]) == [0.0, 1.0, 0.5]
    assert scaled([2.0, 2.0]) == [0.0, 0.0]


# --- what a run makes


@pytest.fixture(scope="module")
def ran(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Table 9 on the finished store of the session: one training of two seeds, sampled in four ways."""
    assert not first.failures
    copy = tmp_path_factory.mktemp("paper") / "edt-store"
    copy_store(store, copy)
    small = [*SMALL, "train.seeds=[0, 7]", "train.lr_final=0.0", "preprocess.images_per_shard=300"]
    options = [part for text in small for part in ("--set", text)]
    with local_ray_train():
        done = edt("paper", "9", "--store", str(copy), "--out", str(copy.parent / "out"), *options)
    return copy, done


def test_a_table_is_trained_registered_and_written(ran: tuple[Path, Any]) -> None:
    store, done = ran
    assert done.returncode == 0, done.stdout + done.stderr
    text = (store.parent / "out" / "table-9.md").read_text()
    assert "missing" not in text
    assert "objective epsilon, optimizer adan" in text
    assert text.count(" | 2 | ") == 4  # trainings of each row
    assert (store.parent / "out" / "table-9.png").stat().st_size > 10_000
    values = {
        (line["row"], line["seed"]): line["value"]
        for line in csv.DictReader(io.StringIO((store.parent / "out" / "table-9.csv").read_text()))
        if line["name"] == "fd_classifier"
    }
    assert len(values) == 8
    assert len(set(values.values())) > 4  # the blocks that are modulated make a difference
    listed = edt("models", "list", "--store", str(store)).stdout
    assert "paper-mini-edt-s-star-global" in listed
    assert "paper-mini-edt-s-star-amm-consecutive" in listed


def test_it_can_be_shown_again_without_training(ran: tuple[Path, Any], tmp_path: Path) -> None:
    store, _ = ran
    small = [*SMALL, "train.seeds=[0, 7]", "train.lr_final=0.0", "preprocess.images_per_shard=300"]
    options = [part for text in small for part in ("--set", text)]
    done = edt("paper", "9", "--render", "--store", str(store), "--out", str(tmp_path), *options)
    assert done.returncode == 0
    for name in ("table-9.md", "table-9.csv"):
        assert (tmp_path / name).read_text() == (store.parent / "out" / name).read_text()
