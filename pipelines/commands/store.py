"""Commands on the artifacts of a store: artifacts, verify."""

from typing import Annotated

import typer

from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, print_rows


def verify(
    artifact: Annotated[str, typer.Argument(help="folder or URI of the artifact, or its fingerprint in the store")],
    deep: Annotated[bool, typer.Option("--deep", help="compare the digest of every file, not only its size")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Check an artifact against its manifest.

    The beginning of a fingerprint is enough, by itself or as the last part of a path.

    \b
    Examples:
      edt verify 3f2a9c41d0e8
      edt verify ./edt-store/latents/3f2a
      edt verify ./edt-store/latents/3f2a --deep
    """
    from edt_core.progress import Printed
    from jobs.commands.verify import verify as verified

    say(verified(artifact, deep, Printed("verify"), store))


def artifacts(
    store: StoreOption = DEFAULT_STORE,
    kind: Annotated[str | None, typer.Option(help="list only this kind, such as latents or checkpoint")] = None,
    as_json: AsJson = False,
) -> None:
    """List the artifacts of a store with size, date and run.

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
        raise UserError(f"unknown kind {kind!r} of artifact; the kinds are {', '.join(KINDS)}")
    place = Store(Folder.at(store))
    rows = [
        {
            "kind": manifest.kind,
            "fingerprint": manifest.fingerprint,
            "files": len(manifest.files),
            "MB": round(sum(entry.bytes for entry in manifest.files) / 1e6, 3),
            "made": manifest.created_at,
            "seconds": manifest.duration_s,
            "run": manifest.mlflow_run_id,
            "digest": manifest.digest,
            "uri": place.folder(manifest.kind, manifest.fingerprint).uri,
        }
        for each in ([kind] if kind else KINDS)
        for manifest in in_order(place.manifests(each))
    ]
    columns = ("kind", "fingerprint", "files", "MB", "made", "seconds", "run")
    print_rows(rows, columns, as_json, none=f"no artifacts in {place.root.uri}", extra=("run", "files", "seconds"))
