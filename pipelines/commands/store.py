"""Commands on the artifacts of a store: artifacts, verify."""

from typing import Annotated

import typer

from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, print_rows


def verify(
    artifact: Annotated[str, typer.Argument(help="artifact folder or URI: the one that holds manifest.json")],
    deep: Annotated[bool, typer.Option(help="digest every file, not only its size")] = False,
) -> None:
    """Check an artifact against its manifest.

    \b
    Examples:
      edt verify ./edt-store/latents/3f2a
      edt verify ./edt-store/latents/3f2a --deep
    """
    from edt_core.progress import Printed
    from jobs.commands.verify import verify as verified

    say(verified(artifact, deep, Printed("verify")))


def artifacts(
    store: StoreOption = DEFAULT_STORE,
    kind: Annotated[str | None, typer.Option(help="of this kind only, as latents or checkpoint")] = None,
    as_json: AsJson = False,
) -> None:
    """List the artifacts of a store: size, when and by which run each was made.

    \b
    Examples:
      edt artifacts
      edt artifacts --kind checkpoint --json
    """
    from edt_core.errors import UserError
    from edt_core.store.folder import Folder
    from edt_core.store.layout import KINDS
    from edt_core.store.store import Store
    from pipelines.plan import in_order

    if kind not in (None, *KINDS):
        raise UserError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    place = Store(Folder.at(store))
    rows = [
        {
            "kind": made.kind,
            "fingerprint": made.fingerprint,
            "files": len(made.files),
            "MB": round(sum(entry.bytes for entry in made.files) / 1e6, 3),
            "made": made.created_at,
            "seconds": made.duration_s,
            "run": made.mlflow_run_id,
            "digest": made.digest,
            "uri": place.folder(made.kind, made.fingerprint).uri,
        }
        for each in ([kind] if kind else KINDS)
        for made in in_order(place.manifests(each))
    ]
    columns = ("kind", "fingerprint", "files", "MB", "made", "seconds", "run")
    print_rows(rows, columns, as_json, none=f"no artifacts in {place.root.uri}")
