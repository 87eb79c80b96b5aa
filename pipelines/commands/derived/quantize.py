"""`edt quantize`: a registered model with quantised weights, as a candidate version."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.printing.console import say
from pipelines.commands.models import Version
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, TrackingUri, print_json, print_rows

if TYPE_CHECKING:
    from pipelines.registry.derived.quantized import Quantized


class Scheme(StrEnum):
    """The schemes of `edt_core.models.quantized.record`."""

    int8 = "int8"
    int8_weights = "int8-weights"
    int4_weights = "int4-weights"
    fp8 = "fp8"


_SHOWN = 12  # layers of the table that are printed, the largest errors first


def quantize(
    version: Version,
    to: Annotated[Scheme, typer.Option(help="int8 and fp8: weights and activations; fp8 needs a GPU that has it")],
    keep_error: Annotated[
        float | None,
        typer.Option(min=0, help="layers above this error stay in float  \\[default: 3 x the median of all layers]"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=1, help="int4: weights that share a scale  \\[default: as fits each layer, up to 64]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="samples of the model that errors are measured on")] = 16,
    calls: Annotated[int, typer.Option(min=1, help="calls of their chain, evenly spaced")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="of the samples")] = 0,
    no_metric: Annotated[
        bool, typer.Option("--no-metric", help="do not repeat its evaluation: no alias moves")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="measure the layers, and write nothing")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a registered model, and register that as a candidate.

    \b
    Examples:
      edt quantize edt-s-2-256@champion --to int8 --dry-run
      edt quantize edt-s-2-256@champion --to int8
      edt quantize edt-s-2-256/3 --to int4-weights --keep-error 0.1
    """
    from edt_core.store.folder import Folder
    from jobs.models.open import load_model, use_mlflow
    from jobs.models.quantize import QUANTIZATION, Settings, calibrated
    from jobs.runtime.cluster_address import check_named
    from jobs.runtime.progress import Bar
    from pipelines.registry.aliases import alone
    from pipelines.registry.derived.quantized import quantized, register_quantized
    from pipelines.registry.lookup import find, quantization_of
    from pipelines.tracking.catalog import Catalog

    check_named()
    place = Folder.at(store)
    catalog = Catalog.existing(place, tracking_uri)
    parent = find(catalog, version)
    location = f"models:/{parent.name}/{parent.version}"
    use_mlflow(location, tracking_uri, store)
    settings = Settings(to.value, group_size, keep_error, samples, calls, seed)
    loaded = load_model(location)
    if dry_run:
        _print_layers(calibrated(loaded, settings).rows(), as_json)
        return
    with Bar("quantize") as bar:
        made = quantized(catalog, parent, loaded, settings, place, not no_metric, bar)
    with alone(store, str(parent.name)):
        catalog = Catalog.open(place, "quantizations", tracking_uri)
        candidate, decision, is_new = register_quantized(catalog, made)
    facts = quantization_of(candidate)  # as recorded: the times of a version that was registered before are not these
    rows = made.artifact.counts[QUANTIZATION]["layers"]
    if as_json:
        registered = {"version": f"{candidate.name}/{candidate.version}", "new": is_new}
        decided = None if decision is None else str(decision)
        print_json({**registered, **facts, **made.shift, "decision": decided, "table": rows})
        return
    _print_layers(rows, as_json)
    _print_version(candidate, decision, is_new, facts, made)


def _print_layers(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """The table of errors: the largest, and how many layers follow."""
    shown = rows if as_json else [{**row, "mean": f"{row['mean']:.2%}", "worst": f"{row['worst']:.2%}"} for row in rows]
    print_rows(shown if as_json else shown[:_SHOWN], ("layer", "kind", "weights", "mean", "worst", "stored"), as_json)
    if not as_json and len(rows) > _SHOWN:
        kept = sum(row["stored"] == "float" for row in rows)
        say(f"and {len(rows) - _SHOWN} layers with smaller errors; {kept} of {len(rows)} stay in float")


def _print_version(version: Any, decision: Any, is_new: bool, facts: Mapping[str, str], made: "Quantized") -> None:
    from jobs.models.registry_files import title

    say(f"{title(version)} is made from version {made.parent.version}{'' if is_new else ' (registered before)'}")
    say(f"  size of the weights  {facts['mib']} MiB, before {facts['mib_before']} MiB")
    say(f"  seconds an image     {facts['seconds']}, before {facts['seconds_before']}, on {facts['timed_on']}")
    for metric, text in made.shift.items():
        say(f"  {metric:<20} {text}")
    say(f"  {'it has no metrics, so no alias moved' if decision is None else decision}")
