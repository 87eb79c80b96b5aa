"""Commands on cost: the cost of models, and the quality that registered models reach for it."""

from typing import Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.printing.table import fitted, screen_width
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
    print_rows,
)

_COLUMNS = ("model", "px", "parameters (M)", "GMACs", "published", "training GFLOPs")
_PART_COLUMNS = ("place", "module", "GMACs", "share")


def cost(
    models: Annotated[list[str] | None, typer.Argument(help="names such as EDT-S/2  \\[default: all]")] = None,
    image_size: Annotated[str, typer.Option(help="image side in pixels; separate several with commas")] = "256",
    by_module: Annotated[bool, typer.Option("--by-module", help="list the MACs of each module of one model")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the cost of models: parameters, MACs (the papers' GFLOPs), training FLOPs.

    \b
    Examples:
      edt cost EDT-S/2 DiT-S/2 MDTv2-S/2
      edt cost EDT-XL/2 --image-size 512 --by-module
    """
    from edt_core.models import MODEL_NAMES, model_config

    names = models or [name for name in MODEL_NAMES if "Tiny" not in name]
    sizes = [int(text) for text in image_size.split(",") if text.strip().isdecimal()]
    if len(sizes) != len(image_size.split(",")):
        raise UserError(f"--image-size is {image_size!r}; use pixels, or several sizes with commas, such as 256,512")
    try:
        configs = [model_config(name, size) for name in names for size in sizes]
    except ValueError as error:
        raise UserError(str(error)) from error
    if by_module:
        if len(configs) != 1:
            raise UserError(
                f"--by-module needs one model and one image size, but there are {len(configs)} pairs; name one of each"
            )
        print_rows(_parts(configs[0], as_json), _PART_COLUMNS, as_json)
        return
    rows = [_row(config) for config in configs]
    print_rows(rows if as_json else [_shown(row) for row in rows], _COLUMNS, as_json)
    if not as_json:
        note = "GMACs of a forward pass are the Gflops of the papers; training GFLOPs: forward and backward, per image"
        say(fitted(note, screen_width(), 0))


def _row(config: Any) -> dict[str, Any]:
    from edt_core.evaluation.published import published_gflops
    from edt_core.models import count_macs, count_parameters, shadow, training_flops

    model = shadow(config)
    return {
        "model": config.name,
        "image_size": config.image_size,
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "published_gflops": published_gflops(config.name, config.image_size),
        "training_flops": training_flops(config, masked=config.is_masked),
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    published = row["published_gflops"]
    return {
        "model": row["model"],
        "px": row["image_size"],
        "parameters (M)": f"{row['parameters'] / 1e6:.1f}",
        "GMACs": f"{row['macs'] / 1e9:.2f}",
        "published": None if published is None else f"{published:.2f}",
        "training GFLOPs": f"{row['training_flops'] / 1e9:.1f}",
    }


def _parts(config: Any, as_json: bool) -> list[dict[str, Any]]:
    from edt_core.models import macs_by_part

    parts = macs_by_part(config)
    total = sum(part.macs for part in parts)
    if as_json:
        return [{"place": part.place, "module": part.kind, "macs": part.macs} for part in parts]
    kinds = {kind: sum(part.macs for part in parts if part.kind == kind) for kind in (p.kind for p in parts)}
    lines = [(part.place, part.kind, part.macs) for part in parts]
    lines += [("all", kind, macs) for kind, macs in sorted(kinds.items(), key=lambda item: -item[1])]
    return [
        {"place": place, "module": kind, "GMACs": f"{macs / 1e9:.4f}", "share": f"{macs / total:.1%}"}
        for place, kind, macs in [*lines, ("all", "all", total)]
    ]


def compare(
    models: Annotated[list[str], typer.Argument(help="versions: NAME@ALIAS, NAME/NUMBER, or NAME for its champion")],
    metric: Annotated[
        str | None, typer.Option(help="metric to compare by  \\[default: that of the first version's gate]")
    ] = None,
    out: Annotated[str | None, typer.Option(help="file for the plot, such as compare.png")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="show published FIDs even next to another metric or image size")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare registered versions by quality and compute.

    \b
    Examples:
      edt compare edt-s-2-256 dit-s-2-256 --metric fid --out compare.png
    """
    from pathlib import Path

    from pipelines.registry.compare import AXES
    from pipelines.registry.compare import compare as compared
    from pipelines.registry.lookup import record_of

    catalog = open_catalog(store, tracking_uri)
    comparison = compared([record_of(catalog, text) for text in models], metric, published)
    if out is not None:
        from pipelines.registry.compare_figure import draw

        target = Path(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(draw(comparison))
    if as_json:
        print_json(comparison.to_dict())
        return
    columns = ("version", "model", "steps", *AXES, comparison.metric)
    print_rows(comparison.rows(), columns, False, extra=("steps", "images_seen", "device_hours"))
    for note in comparison.notes:
        say(fitted(note, screen_width(), 2))
    if out is not None:
        say(out)
