"""Commands on cost: the cost of models, and the quality that registered models reach for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.printing.table import SHORT, fitted, screen_width
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
    print_rows,
    shipped,
)

if TYPE_CHECKING:
    from edt_core.config import CacheConfig
    from edt_core.models import ModelConfig
    from pipelines.config.schema import PipelineConfig
    from pipelines.setup.acceptance_file import Measurements

_COLUMNS = ("model", "px", "parameters (M)", "GMACs", "published", "training GFLOPs")
_CACHED = "GMACs with cache"
_MEMORY, _BYTES = "memory (MiB)", ("weight_bytes", "activation_bytes")
_PART_COLUMNS = ("place", "module", "GMACs", "share")
_RECIPE = "imagenet256-edt-s"
_IMAGENET = 1_281_167  # training images of ILSVRC2012


def cost(
    models: Annotated[list[str] | None, typer.Argument(help="names such as EDT-S/2  \\[default: all]")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="image side in pixels; separate several with commas  \\[default: 256]")
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option("--override", metavar="FIELD=VALUE", help="a field of train.model_overrides, for all models"),
    ] = [],  # noqa: B006  typer copies it
    memory: Annotated[
        int | None, typer.Option(min=1, metavar="IMAGES", help="also the memory of a forward pass of so many images")
    ] = None,
    by_module: Annotated[bool, typer.Option("--by-module", help="list the MACs of each module of one model")] = False,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="show times instead, at the rates that `edt bench gpu` measured")
    ] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="with --acceptance: GPUs of the kind that was measured")] = 1,
    config: Annotated[
        str,
        typer.Option(help="with --acceptance: the pipeline, by name or as a YAML file", autocompletion=shipped),
    ] = _RECIPE,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    num_images: Annotated[
        int | None,
        typer.Option(min=1, help="with --acceptance: images of the source  \\[default: listed, or ImageNet's]"),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="also count sampling with this cache, such as '{kind: taylor, interval: 3}'")
    ] = None,
    num_sampling_steps: Annotated[int, typer.Option(min=2, help="with --cache: calls of the model in a chain")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the cost of models: parameters, MACs (the papers' GFLOPs), training FLOPs.

    With --acceptance, show the time of each step of a pipeline, for its own models or for the named ones.

    \b
    Examples:
      edt cost EDT-S/2 DiT-S/2 MDTv2-S/2
      edt cost EDT-XL/2 --image-size 512 --by-module
      edt cost EDT-S/2 --override token_enhancement=false
      edt cost EDT-S/2 --cache '{kind: taylor, interval: 3}' --num-sampling-steps 50
      edt cost EDT-S/2 EDT-XL/2 --acceptance acceptance.json --num-gpus 8
    """
    if acceptance is not None:
        if by_module or overrides or memory:
            given = "--by-module" if by_module else "--override" if overrides else "--memory"
            raise UserError(f"{given} is of the table without --acceptance, which estimates times; give one of the two")
        if cache is not None:
            raise UserError(
                "--cache is of the table without --acceptance; for times with a cache, write --set "
                f"'sample.cache={cache}'"
            )
        loaded = _pipeline(config, assignments, image_size)
        _print_times(acceptance, loaded, models or [], num_gpus, num_images, as_json)
    elif num_gpus != 1 or config != _RECIPE or assignments or num_images is not None:
        raise UserError(
            "--num-gpus, --config, --set and --num-images estimate times, which needs --acceptance FILE, a file that "
            "`edt bench gpu --out FILE` wrote on such a GPU; give it, or leave them out"
        )
    else:
        if by_module and (cache is not None or memory is not None):
            raise UserError("--by-module lists the modules of a forward pass; leave --cache and --memory out")
        cached = None if cache is None else (_cache(cache), num_sampling_steps)
        _print_costs(models or [], image_size or "256", overrides, Extras(cached, memory), by_module, as_json)


def _cache(text: str) -> "CacheConfig":
    """The cache of an option. Raises UserError."""
    from edt_core.config import CacheConfig
    from jobs.commands.options import parse_assignment, validated

    fields = parse_assignment(f"cache={text}", "--cache")[1]
    if not isinstance(fields, dict):
        raise UserError(f"--cache is {text!r}; give its fields, such as '{{kind: taylor, interval: 3}}'")
    config: CacheConfig = validated(CacheConfig, fields)
    return config


def _print_costs(
    models: Sequence[str],
    image_size: str,
    overrides: Sequence[str],
    extras: "Extras",
    by_module: bool,
    as_json: bool,
) -> None:
    """The table of parameters and operations of models, or of the modules of one."""
    from edt_core.models import MODEL_NAMES, model_config
    from jobs.commands.options import parse_assignment

    names = models or [name for name in MODEL_NAMES if "Tiny" not in name]
    example = "token_enhancement=false"
    fields = dict(parse_assignment(text, "--override", example) for text in overrides)
    sizes = _sizes(image_size)
    try:
        configs = [model_config(name, size, overrides=fields) for name in names for size in sizes]
    except ValueError as error:
        raise UserError(str(error)) from error
    if by_module:
        if len(configs) != 1:
            raise UserError(
                f"--by-module needs one model and one image size, but there are {len(configs)} pairs; name one of each"
            )
        print_rows(_parts(configs[0], as_json), _PART_COLUMNS, as_json)
        return
    rows = [{**_row(config), **extras.row(config)} for config in configs]
    print_rows(rows if as_json else [_shown(row) for row in rows], (*_COLUMNS, *extras.columns), as_json)
    if as_json:
        return
    note = "GMACs of a forward pass are the Gflops of the papers; training GFLOPs: forward and backward, per image"
    if extras.memory is not None:
        note += f"; memory: float32 weights + the other tensors of a forward pass of {extras.memory} images at its peak"
    say(fitted(note, screen_width(), 0))


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(sizes) != len(text.split(",")):
        raise UserError(f"--image-size is {text!r}; use pixels, or several sizes with commas, such as 256,512")
    return sizes


def _pipeline(config: str, assignments: Sequence[str], image_size: str | None) -> "PipelineConfig":
    """The configuration whose steps are timed, with another image size if one is given."""
    from pipelines.config.schema import load_config

    if image_size is None:
        return load_config(config, assignments)
    if len(sizes := _sizes(image_size)) != 1:
        raise UserError(f"--image-size is {image_size!r}, but times are estimated for one size; give one")
    return load_config(config, [*assignments, f"preprocess.image_size={sizes[0]}"])


def _print_times(
    path: Path, config: "PipelineConfig", models: Sequence[str], num_gpus: int, num_images: int | None, as_json: bool
) -> None:
    """The table of hours of each step, under a line with the card."""
    from dataclasses import asdict

    from pipelines.setup.acceptance_file import read_measurements
    from pipelines.setup.measured_time import Setting, step_times, trainings_of

    measured = read_measurements(path)
    images = num_images or _number_of_images(config)
    setting = Setting(measured, config, config.preprocess.image_size, images, num_gpus, _guide(config))
    times = step_times(setting, trainings_of(config, models))
    factors = {"device_hours": num_gpus, "device_days": num_gpus / 24}
    rows = [{**asdict(time), **{name: _of_devices(time.hours, by) for name, by in factors.items()}} for time in times]
    if as_json:
        head = {name: getattr(measured, name) for name in ("card", "on_gpu", "started", "code", "torch", "is_checked")}
        print_json({"acceptance": head, "devices": num_gpus, "images": images, "steps": rows})
        return
    device = "GPU" if measured.on_gpu else "machine"
    for line in (*_origin(measured), f"{num_gpus} such {device}{'s' * (num_gpus > 1)}, {config.name}:"):
        say(fitted(line, screen_width(), 2))
    columns = {
        "step": "step", "work": "work", "precision": "precision", "FLOPs": "flops",
        "hours": "hours", f"{device}-hours": "device_hours", f"{device}-days": "device_days", "rate": "source",
    }  # fmt: skip
    shown = [{title: _time_cell(row[name]) for title, name in columns.items()} for row in rows]
    print_rows(shown, tuple(columns), False, extra=("FLOPs", "work"))
    note = (
        "hours = FLOPs / (FLOP/s of the row under `rate` x devices). Not included: preprocessing, feature networks and "
        "evaluation, and what devices exchange"
    )
    say(fitted(note, screen_width(), 0))


def _guide(config: "PipelineConfig") -> "ModelConfig | None":
    """The model of another training that samples are guided away from. Raises UserError if there is none."""
    from edt_core.models import ModelConfig
    from jobs.models.initial import named_model
    from jobs.models.open import use_mlflow

    if (place := config.sample.guide_model) is None:
        return None
    use_mlflow(place, None, config.store)
    known = named_model(place, "sample.guide").model_config
    return None if known is None else ModelConfig.from_dict(known)


def _of_devices(hours: float | None, factor: float) -> float | None:
    return None if hours is None else hours * factor


def _origin(measured: "Measurements") -> list[str]:
    """What was measured, where and when, and what has to be known of it."""
    kind = "" if measured.on_gpu else ", a CPU: these are not times of a GPU"
    commit = measured.code[:SHORT] + ("+dirty" if measured.code.endswith("+dirty") else "")
    lines = [f"{measured.card}{kind}", f"measured {measured.started}, code {commit}, torch {measured.torch}"]
    return lines if measured.is_checked else [*lines, "correctness was not checked: the file has no such rows"]


def _number_of_images(config: "PipelineConfig") -> int:
    """The images of the source, which is listed; those of ImageNet where its configurations do not find it here."""
    from pipelines.setup.dry_run import source_counts

    source = config.source
    if config.name.startswith("imagenet") and source.path and not Path(source.path).exists():
        return source.limit or _IMAGENET
    return source_counts(source).images


def _time_cell(value: Any) -> Any:
    """Hours and operations with few digits; texts as they are."""
    if isinstance(value, int):
        return f"{value:.1e}".replace("e+", "e")
    if isinstance(value, float):
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return value


def _row(config: Any) -> dict[str, Any]:
    from edt_core.evaluation.published import published_gflops
    from edt_core.models import count_macs, count_parameters, overrides_record, shadow, training_flops

    model = shadow(config)
    return {
        "model": config.name,
        "image_size": config.image_size,
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "published_gflops": None if overrides_record(config) else published_gflops(config.name, config.image_size),
        "training_flops": training_flops(config, masked=config.is_masked),
    }


@dataclass(frozen=True)
class Extras:
    """Further columns of a table of costs: sampling with a cache in so many calls, and the memory of so many images."""

    cached: "tuple[CacheConfig, int] | None"
    memory: int | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings of the further columns."""
        return (*(() if self.cached is None else (_CACHED,)), *(() if self.memory is None else (_MEMORY,)))

    def row(self, config: Any) -> dict[str, Any]:
        """Mean multiply-accumulates of a call, and bytes of the weights and of the other tensors of a forward pass."""
        row: dict[str, Any] = {}
        if self.cached is not None:
            from edt_core.diffusion import objective_of_model
            from edt_core.sampling.cache import mean_macs

            if objective_of_model(config).of_tokens:
                raise UserError(f"{config.name} draws codes, and takes no cache; leave --cache or the model out")

            row["cached_macs"] = mean_macs(config, *self.cached)
        if self.memory is not None:
            from edt_core.sampling.memory import forward_memory

            memory = forward_memory(config, self.memory)
            row |= zip(_BYTES, (memory.weights, memory.activations), strict=True)
        return row


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    published = row["published_gflops"]
    return {
        "model": row["model"],
        "px": row["image_size"],
        "parameters (M)": f"{row['parameters'] / 1e6:.1f}",
        "GMACs": f"{row['macs'] / 1e9:.2f}",
        "published": None if published is None else f"{published:.2f}",
        "training GFLOPs": f"{row['training_flops'] / 1e9:.1f}",
        **({_CACHED: f"{row['cached_macs'] / 1e9:.2f}"} if "cached_macs" in row else {}),
        _MEMORY: " + ".join(f"{row[name] / (1 << 20):,.1f}" for name in _BYTES if name in row),
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
