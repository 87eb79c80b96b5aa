"""`edt ema`: the model of a training with averaged weights of another width, without training."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, TrackingUri, print_json, print_rows

if TYPE_CHECKING:
    from edt_core.store.artifact import Artifact
    from jobs.models.posthoc import Training

_LISTED = (0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)


def ema(
    model: Annotated[
        str, typer.Argument(help="NAME@ALIAS, NAME/NUMBER, NAME, the run of a training, or a checkpoint artifact")
    ],
    out: Annotated[
        str | None, typer.Argument(help="new folder for the model  \\[default: like edt-s-2-256-ema-0.08]")
    ] = None,
    std: Annotated[
        float | None, typer.Option(help="width of the average, as a share of the training; without it, list errors")
    ] = None,
    register: Annotated[bool, typer.Option("--register", help="also register it as a version of the model")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Average the weights of a training with another width, without training.

    \b
    Examples:
      edt ema edt-s-2-256@champion
      edt ema edt-s-2-256@champion ./edt-s-wide --std 0.08
      edt ema edt-s-2-256/3 --std 0.15 --register
    """
    from jobs.models.open import use_mlflow
    from jobs.models.posthoc import training_of
    from jobs.models.registry_files import title
    from pipelines.registry.derived.measuring import measuring_command

    use_mlflow(model, tracking_uri, store)
    training = training_of(model, store)
    if std is None:
        if out is not None or register:
            raise UserError("--std is missing: the width of the average, such as --std 0.08")
        _list(training, as_json)
        return
    if register and training.version is None:
        raise UserError(f"--register needs a registered model, such as NAME@champion; {model} is not one")
    artifact = _make(training, std, out or _default_folder(model, std))
    summary = _summary(training, std)
    version, is_new = _register(training, artifact, store, tracking_uri) if register else (None, False)
    if as_json:
        facts = {"folder": artifact.folder.uri, "std": std, "error": artifact.counts["ema_error"]}
        print_json({**facts, "version": None if version is None else f"{version.name}/{version.version}"})
        return
    say(f"{artifact.folder.uri}  {summary}")
    if version is not None and training.version is not None:
        known = "" if is_new else " (registered before)"
        say(f"{title(version)} is made from version {training.version.version}{known}")
        say("It has no metrics, so it is no candidate and no alias moved. To compare the two by one protocol:")
        say(f"  {measuring_command(training.version, std)}")


def _list(training: "Training", as_json: bool) -> None:
    """Print what the snapshots give for common widths, and those that were tracked."""
    from jobs.models.posthoc import MAX_ERROR

    rows: list[dict[str, Any]] = []
    for width in sorted({*_LISTED, *training.widths}):
        parts = training.mixture(width)
        facts = {"std": width, "error": parts.error, "rounding": training.rounding(parts)}
        refused = parts.error > MAX_ERROR
        shown = {"error": f"{parts.error:.2%}{' (refused)' * refused}", "rounding": f"x {facts['rounding']:.2g}"}
        rows.append({**facts, "refused": refused} if as_json else {**facts, **shown})
    print_rows(rows, ("std", "error", "rounding"), as_json)


def _make(training: "Training", std: float, out: str) -> "Artifact":
    from edt_core.store.folder import Folder
    from jobs.models.posthoc import make_average
    from jobs.runtime.progress import Bar

    folder = Folder.at(out)
    if folder.local is None:
        raise UserError(f"{out} is remote; use a local folder")
    with Bar("ema") as bar:
        return make_average(training, std, lambda _: folder, bar)


def _summary(training: "Training", std: float) -> str:
    from jobs.models.posthoc import DOUBTFUL_ERROR

    parts = training.checked_mixture(std)
    if parts.error > DOUBTFUL_ERROR:
        nearer = ", ".join(f"{width:g}" for width in training.widths)
        say(f"warning: {std:g} is far from the widths of the snapshots ({nearer}); compare its samples", err=True)
    return (
        f"width {std:g} from {len(training.files)} snapshots, error of the profile {parts.error:.2%}, rounding of the "
        f"snapshots x {training.rounding(parts):.2g}"
    )


def _default_folder(model: str, std: float) -> str:
    from edt_core.store.prefixes import PREFIX
    from jobs.models.names import RUN, split_name

    parts = None if RUN.fullmatch(model) else split_name(model)
    name = parts[0] if parts else model.rstrip("/").rpartition("/")[2]
    return f"./{name[:12] if PREFIX.fullmatch(name) else name}-ema-{std:g}"


def _register(training: "Training", artifact: "Artifact", store: str, tracking_uri: str | None) -> tuple[Any, bool]:
    from edt_core.store.folder import Folder
    from pipelines.registry.aliases import alone
    from pipelines.registry.derived.average import register_average
    from pipelines.tracking.catalog import Catalog

    parent = training.version
    assert parent is not None
    with alone(store, parent.name):
        catalog = Catalog.open(Folder.at(store), "averages", tracking_uri)
        return register_average(catalog, parent, artifact)
