"""Commands on the artifacts of a store: verify."""

from typing import Annotated

import typer


def verify(
    artifact: Annotated[str, typer.Argument(help="artifact folder or URI: the one that holds manifest.json")],
    deep: Annotated[bool, typer.Option(help="digest every file, not only its size")] = False,
) -> None:
    """Check an artifact against its manifest."""
    from edt_core.progress import Printed
    from jobs.verify import verify as verified

    typer.echo(verified(artifact, deep, Printed("verify")))
