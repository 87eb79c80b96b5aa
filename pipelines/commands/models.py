"""Commands on the model registry: models list, show, compare, promote, rollback, pull, push; import and lineage."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.printing.console import say
from edt_core.printing.table import fitted, screen_width, short
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
    print_rows,
)

app = typer.Typer(
    help="Registered models: list, show, compare, promote, roll back, pull, push.", invoke_without_command=True
)

Version = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/NUMBER, or NAME for its champion")]


class Weights(StrEnum):
    """The sets of weights in a checkpoint of the authors' training."""

    ema = "ema"
    model = "model"


_NONE = {
    True: "no versions match",
    False: "no models are registered; `edt run` registers those that it trains, `edt import` a released checkpoint",
}
# Why a version may have no metrics: the section of its record that says how it was made, the last way first.
_UNMEASURED = {
    "chain": "with other sampling settings",
    "quantization": "quantised",
    "average": "averaged from snapshots",
    "origin": "imported",
}
_COLUMNS = ("model", "version", "aliases", "metric", "data", "code", "created")


@app.callback()
def models(
    context: typer.Context,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Without a command: list all versions."""
    if context.invoked_subcommand is None:
        list_versions(store=store, tracking_uri=tracking_uri, as_json=as_json)
    elif (store, tracking_uri, as_json) != (DEFAULT_STORE, None, False):
        raise UserError(f"put options after the command, as in edt models {context.invoked_subcommand} --store ...")


@app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Option(help="list only this model")] = None,
    data: Annotated[
        str | None, typer.Option(help="trained on these images: start of their digest or fingerprint")
    ] = None,
    config: Annotated[
        list[str], typer.Option(metavar="FIELD=VALUE", help="with this setting, such as train.lr=0.004; repeatable")
    ] = [],  # noqa: B006  typer copies it
    metric: Annotated[
        list[str], typer.Option(metavar="CONDITION", help="with this metric, such as 'fd_classifier<5'; repeatable")
    ] = [],  # noqa: B006
    commit: Annotated[str | None, typer.Option(help="trained with this code: start of the commit")] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """List versions, newest first. Options select versions that match all of them.

    \b
    Examples:
      edt models list --name edt-s-2-256 --metric 'fid<20'
      edt models list --data 3f2a9b --json
    """
    from pipelines.registry.lookup import name_alone, select

    name = None if name is None else name_alone(name, "edt models list --name")
    records = select(open_catalog(store, tracking_uri), name, data, config, metric, commit, as_json)
    if as_json:
        print_json([record.to_dict() for record in records])
    else:
        is_filtered = bool(name or data or config or metric or commit)
        rows = [record.row() for record in records]
        print_rows(rows, _COLUMNS, False, none=_NONE[is_filtered], extra=("code", "data"))


@app.command()
def show(
    version: Version, store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingUri = None, as_json: AsJson = False
) -> None:
    """Show everything that is recorded of a version.

    \b
    Examples:
      edt models show edt-s-2-256@champion
      edt models show edt-s-2-256/3 --json
    """
    from pipelines.registry.lookup import record_of

    facts = record_of(open_catalog(store, tracking_uri), version).to_dict()
    if as_json:
        print_json(facts)
        return
    say(f"{facts['name']} version {facts['version']}  {', '.join(facts['aliases'])}".rstrip())
    how = next((text for name, text in _UNMEASURED.items() if facts[name]), None)
    undecided = f"{how}, not measured here" if how else "registered, promotion not yet decided"
    say(f"  {facts['decision_text'] or undecided}")
    for name in ("created", "run", "code_version", "uri", "champion_before", "promoted", "rolled_back"):
        if facts[name]:
            say(f"  {name:<16} {short(str(facts[name]))}")
    made = ("origin", "average", "quantization", "chain", "metrics", "teacher", "pruned")
    for section in (*made, "trainings", "protocol", "data", "parents", "config"):
        _echo_section(section, facts[section])


@app.command()
def compare(
    first: Version,
    second: Version,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: metrics, protocol, configuration, data, code.

    \b
    Examples:
      edt models compare edt-s-2-256@champion edt-s-2-256@candidate
    """
    from pipelines.registry.lookup import compare as compared
    from pipelines.registry.lookup import record_of

    catalog = open_catalog(store, tracking_uri)
    comparison = compared(record_of(catalog, first), record_of(catalog, second))
    if as_json:
        print_json(comparison)
        return
    names = comparison["versions"]
    rows = [{"metric": r["metric"], names[0]: r["first"], names[1]: r["second"], **r} for r in comparison["metrics"]]
    print_rows(rows, ("metric", *dict.fromkeys(names), "difference"), False, none="no metrics")
    if comparison["same_protocol"]:
        say("measured with the same protocol")
    else:
        say("NOT comparable, measured with different protocols:")
        for line in comparison["protocol"] or ["(details are not recorded)"]:
            say(f"  {line}")
    _echo_section("config", {name: " / ".join(map(str, pair)) for name, pair in comparison["config"].items()})
    _echo_section("recorded", {name: " / ".join(map(str, pair)) for name, pair in comparison["recorded"].items()})


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="NAME@ALIAS or NAME/NUMBER; NAME for its candidate")],
    force: Annotated[bool, typer.Option("--force", help="make it champion even if the gate rejects it")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Promote a version to champion if it passes the gate; exit code 1 if it fails.

    \b
    Examples:
      edt models promote edt-s-2-256@candidate
    """
    from pipelines.registry.aliases import CANDIDATE, alone, promote_version
    from pipelines.registry.lookup import find, parts_of

    catalog = open_catalog(store, tracking_uri)
    name, alias, number = parts_of(version)
    candidate = find(catalog, version if alias or number else f"{name}@{CANDIDATE}")
    with alone(store, candidate.name):
        decision = promote_version(catalog, candidate, force)
    say(f"{decision.name} version {decision.version}  {decision}")
    if not decision.became_champion:
        raise typer.Exit(1)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="registered model")],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Make the previous champion of a model champion again.

    \b
    Examples:
      edt models rollback edt-s-2-256
    """
    from pipelines.registry.aliases import alone
    from pipelines.registry.aliases import rollback as rolled_back
    from pipelines.registry.lookup import all_aliases, check_registered, name_alone

    name = name_alone(name, "edt models rollback")
    catalog = open_catalog(store, tracking_uri)
    check_registered(name, all_aliases(catalog))
    with alone(store, name):
        former, champion = rolled_back(catalog, name)
    say(f"{name}: champion is version {champion.version} again, no longer version {former.version}")


@app.command()
def pull(
    version: Version,
    folder: Annotated[str, typer.Argument(help="new folder for the diffusers pipeline")],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Download a version's diffusers folder and check the digest of every file.

    \b
    Examples:
      edt models pull edt-s-2-256@champion ./model
    """
    from pathlib import Path

    from jobs.models.registry_files import pull as pulled
    from jobs.models.registry_files import title
    from pipelines.registry.lookup import find

    catalog = open_catalog(store, tracking_uri)
    source = find(catalog, version)
    new = pulled(catalog.client, source, Path(folder))
    say(f"{title(source)} is {'' if new else 'already '}at {folder}, every file checked")


@app.command()
def push(
    version: Version,
    repo_id: Annotated[str, typer.Argument(help="repository of the hub, OWNER/NAME; created if it does not exist")],
    private: Annotated[bool, typer.Option("--private", help="only into a private repository")] = False,
    revision: Annotated[
        str | None, typer.Option(help="branch to commit to, created if needed  \\[default: main]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list the files, send nothing")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Push a version's diffusers folder, with its model card, to a model hub.

    \b
    Examples:
      edt models push edt-s-2-256@champion my-name/edt-s-2-256 --dry-run
      edt models push edt-s-2-256/3 my-name/edt-s-2-256 --private
    """
    from jobs.models.registry_files import title
    from pipelines.registry.lookup import find
    from pipelines.registry.publishing import Target, checked_folder, push_version
    from pipelines.setup.disk import size_text

    target = Target(repo_id, private, revision)
    catalog = open_catalog(store, tracking_uri)
    source = find(catalog, version)
    if dry_run:
        with checked_folder(catalog, source) as (_, sizes):
            print_rows(
                [{"file": name, "size": size_text(size)} for name, size in sizes.items()], ("file", "size"), False
            )
        outcome = f"would be pushed to {repo_id}: nothing was sent"
    else:
        url, sizes = push_version(catalog, source, target)
        outcome = f"is in {repo_id}: {url}"
    say(f"{title(source)}, {len(sizes)} files of {size_text(sum(sizes.values()))}, {outcome}")


def import_model(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint of a model family of docs/models.md (.pt, .pth, .ckpt, .safetensors)")
    ],
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="autoencoder: hub id, folder, artifact or MLflow URI  \\[default: stabilityai/sd-vae-ft-ema]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="expected model, such as DiT-XL/2  \\[default: that of the checkpoint]")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="expected image size in pixels  \\[default: that of the checkpoint]")
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(help="weights to import if the file has both  \\[default: ema (the average) if present]"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="what the weights predict, if the file does not say it, such as flow for a SiT"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the registered model  \\[default: like edt-xl-2-256]")
    ] = None,
    source: Annotated[str | None, typer.Option(help="origin of the file, for the record")] = None,
    license: Annotated[str | None, typer.Option(help="license of the weights, for the model card")] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Register a checkpoint that the authors released, as a candidate.

    \b
    Examples:
      edt import EDT-S-2-256x256.pt
      edt import DiT-XL-2-256x256.pt --model DiT-XL/2 --autoencoder ./vae
      edt import SiT-XL-2-256.pt --objective flow
    """

    from edt_core.store.folder import Folder
    from jobs.models.registry_files import title
    from pipelines.registry.aliases import alone
    from pipelines.registry.importing import import_released, read_released
    from pipelines.tracking.catalog import Catalog

    released = read_released(
        typed_path(checkpoint), None if weights is None else weights.value, autoencoder, model, image_size, objective
    )
    for note in released.read.notes:
        say(f"note: {note}", err=True)
    if released.is_default_autoencoder:
        say(
            f"note: no --autoencoder, so {released.autoencoder_location} decodes the latents: the default",
            err=True,
        )
    place = Folder.at(store)
    place.check_writable()
    with alone(store, name or released.default_name):
        version, is_new = import_released(Catalog.open(place, "imports", tracking_uri), released, name, source, license)
    config = released.model.config
    say(
        f"{title(version)} is {config.name} at {config.image_size} px with {config.num_classes} classes, "
        f"{released.weights_label} of {checkpoint}{'' if is_new else ' (imported before)'}"
    )


def lineage(
    version: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/NUMBER, NAME, fingerprint, or a step's run")],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model was made from, back to the raw images.

    \b
    Examples:
      edt lineage edt-s-2-256@champion
      edt lineage edt-s-2-256/3 --json
    """
    from edt_core.store.folder import Folder
    from pipelines.registry.lineage import lineage as traced

    tree = traced(open_catalog(store, tracking_uri), version, Folder.at(store))
    if as_json:
        print_json(tree.to_dict())
    else:
        for line in tree.lines():
            say(fitted(short(line), screen_width(), len(line) - len(line.lstrip()) + 4))


def _echo_section(name: str, values: dict[str, Any]) -> None:
    if values:
        say(f"{name}:")
        width = max(map(len, values))
        for key, value in values.items():
            text = f"{value:.4g}" if isinstance(value, float) else short(str(value))
            say(fitted(f"  {key:<{width}}  {text}", screen_width(), width + 4))
