"""`edt models set-chain`: a version again, with other default sampling settings."""

from pathlib import Path
from typing import Annotated

import typer

from edt_core.printing.console import say
from pipelines.commands.models import Version
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, TrackingUri, print_json


def set_chain(
    version: Version,
    results: Annotated[Path, typer.Argument(help="results.json of `edt pareto` for this version")],
    point: Annotated[
        str, typer.Option(help="a named point (best, fastest, within-2%, within-noise), or a setting by its name")
    ] = "within-2%",
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Register a version again, with sampling settings of `edt pareto`.

    No alias moves, and the new version has no metrics until `edt evaluate` measures it.

    \b
    Examples:
      edt models set-chain edt-s-2-256/3 ./pareto/results.json --point within-2%
    """
    from edt_core.store.folder import Folder
    from jobs.models.open import use_mlflow
    from jobs.models.registry_files import title
    from pipelines.registry.aliases import alone
    from pipelines.registry.derived.chain import chosen_settings, register_chain
    from pipelines.registry.lookup import find
    from pipelines.tracking.catalog import Catalog

    catalog = Catalog.existing(Folder.at(store), tracking_uri)
    parent = find(catalog, version)
    settings = chosen_settings(results, point, parent)
    use_mlflow(f"{parent.name}/{parent.version}", tracking_uri, store)
    with alone(store, str(parent.name)):
        catalog = Catalog.open(Folder.at(store), "chains", tracking_uri)
        made, is_new = register_chain(catalog, parent, settings)
    if as_json:
        print_json({"version": f"{made.name}/{made.version}", "new": is_new, "settings": settings})
        return
    known = "" if is_new else " (registered before)"
    say(f"{title(made)} has the weights of version {parent.version} and the settings of {point!r}{known}")
