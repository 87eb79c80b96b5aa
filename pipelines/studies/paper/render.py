"""A table as Markdown and as CSV: what was measured here, and apart from it the numbers that are published."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from edt_core.evaluation.metrics import in_order
from edt_core.evaluation.trainings import SIGNIFICANT, mean_and_std, names_of, p_values
from pipelines.studies.paper.results import Results, RowResult, losses_correlation
from pipelines.studies.paper.table import PAPER, Table

NOTHING = "\N{EN DASH}"


def title_of(table: Table, name: str) -> str:
    """As "Table 4 of arXiv 2410.23788: ..."."""
    place = f"Table {name}" if name.isdigit() else name.replace("-", " ").capitalize()
    return f"{place} of {PAPER}: {table.title}"


def counted_markdown(table: Table, name: str, rows: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """A table that is counted from the models. `rows`: label -> heading and text of each cell."""
    header = ["row", *(heading for heading, _ in next(iter(rows.values())))]
    lines = _table(header, [[label, *(text for _, text in cells)] for label, cells in rows.items()])
    parts = [f"# {title_of(table, name)}", table.note.strip(), "## Counted here", lines]
    published = {row.label: row.published for row in table.rows.values()}
    return "\n\n".join([*filter(None, parts), *_published(table, published)]) + "\n"


def counted_csv(name: str, rows: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """A line for each cell of a table that is counted from the models."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", "label", "name", "value"))
    writer.writerows((name, label, heading, text) for label, cells in rows.items() for heading, text in cells)
    return out.getvalue()


def metrics_of(results: Results) -> list[str]:
    """The metrics that some row has, in the usual order."""
    return in_order(
        dict.fromkeys((name for row in results.rows if row.trainings for name in names_of(row.trainings)), 0.0)
    )


def chances(results: Results) -> dict[str, float]:
    """For each row but the base, the p-value of its difference in the metric that decides; NaN where it is unknown."""
    values = {
        row.name: [metrics[results.metric] for metrics in row.trainings.values() if results.metric in metrics]
        for row in results.rows
    }
    return p_values(values, results.base, results.of_one_training()) if results.base in values else {}


def as_markdown(results: Results) -> str:
    """The table, with what is measured and what is published under headings of their own."""
    parts = [f"# {title_of(results.table, results.name)}", results.table.note.strip(), "## Measured here"]
    parts += [_setting(results), _measured(results), *_remarks(results)]
    published = {row.label: row.published for row in results.rows}
    return "\n\n".join([*filter(None, parts), *_published(results.table, published)]) + "\n"


def _setting(results: Results) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results.setting.items())
    return f"Scale {results.scale}: {facts}."


def _measured(results: Results) -> str:
    metrics, tested = metrics_of(results), chances(results)
    header = ["row", *metrics, "GMACs", "training FLOPs", "trainings", f"p-value ({results.metric})"]
    rows = [
        [
            row.label,
            *(_value(row, metric) for metric in metrics),
            f"{row.macs / 1e9:.4g}",
            f"{row.training_flops:.3g}",
            f"{len(row.trainings)}" + (f" of {row.seeds}" if row.missing() else ""),
            _chance(tested.get(row.name, float("nan")), row.name == results.base),
        ]
        for row in results.rows
    ]
    return _table(header, rows)


def _value(row: RowResult, metric: str) -> str:
    values = [metrics[metric] for metrics in row.trainings.values() if metric in metrics]
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else NOTHING
    mean, std = mean_and_std(values)
    return f"{mean:.4g} ± {std:.2g}"


def _chance(chance: float, is_base: bool) -> str:
    if is_base:
        return "compared with"
    if chance != chance:
        return NOTHING
    return f"**{chance:.2g}**" if chance < SIGNIFICANT else f"{chance:.2g}"


def _remarks(results: Results) -> Iterator[str]:
    if missing := results.missing():
        total = sum(row.seeds for row in results.rows)
        yield f"**{missing} of {total} trainings are missing**: the table is not complete."
    if results.table.kind == "losses":
        for row in results.rows:
            if (correlation := losses_correlation(row)) is not None:
                yield f"{row.label}: the changes of both losses correlate with r = {correlation:.2f}."
    tested = [chance for chance in chances(results).values() if chance == chance]
    if not tested:
        if not results.missing():
            yield "One training a row says nothing about chance; for more use `--set train.seeds=[0,1,2]`."
        return
    base = next(row.label for row in results.rows if row.name == results.base)
    found = sum(chance < SIGNIFICANT for chance in tested)
    better = "lower" if results.lower_is_better else "higher"
    yield (
        f"± is the standard deviation over trainings. {results.metric} ({better} is better) differs significantly from "
        f"{base!r} in {found} of {len(tested)} rows (p-value below {SIGNIFICANT:g} in Welch's t-test, corrected by "
        "Holm's method). Rows that are the same trainings, sampled in another way, are compared training by training."
    )


def _published(table: Table, rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The section of published values, by label; the protocol alone if there are none."""
    yield "## Published"
    yield f"{table.published.strip()} These values are not comparable with the ones above."
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    if names:
        cells = [[label, *(f"{v[name]:g}" if name in v else NOTHING for name in names)] for label, v in rows.items()]
        yield _table(["row", *names], cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def as_csv(results: Results) -> str:
    """A line for each value. `origin` is measured or published; `seed` is empty for published values and costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", "scale", "row", "label", "origin", "name", "seed", "value"))
    for row in results.rows:
        for origin, name, seed, value in _values(row):
            scale = results.scale if origin == "measured" else "full"
            writer.writerow((results.name, scale, row.name, row.label, origin, name, seed, repr(value)))
    return out.getvalue()


def _values(row: RowResult) -> Iterator[tuple[str, str, str, float]]:
    yield "measured", "macs", "", float(row.macs)
    yield "measured", "training_flops", "", row.training_flops
    for seed, metrics in row.trainings.items():
        for name in in_order(metrics):
            yield "measured", name, str(seed), float(metrics[name])
    for name, value in row.published.items():
        yield "published", name, "", value
