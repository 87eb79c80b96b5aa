"""`edt bench`: measure and print a table in Markdown."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from edt_core.errors import UserError
from edt_core.printing.console import say
from jobs.benchmark.encode import bench_encode
from jobs.benchmark.images import bench_preprocess, made_photos, photos_in
from jobs.benchmark.latents import bench_latents
from jobs.benchmark.memory import bench_memory
from jobs.benchmark.planning import bench_planning
from jobs.benchmark.table import Row, hardware, table
from jobs.commands.options import add_json, parser_of
from jobs.runtime.exit_code import exit_code


def bench_of_models(options: argparse.Namespace) -> Iterator[Row]:
    """Measure passes of diffusion models: the named ones, or all."""
    import torch

    from edt_core.models import DIFFUSION_NAMES
    from jobs.benchmark.model import ModelBench, bench_models
    from jobs.benchmark.train import PRECISIONS

    names = options.models or DIFFUSION_NAMES
    if unknown := [name for name in names if name not in DIFFUSION_NAMES]:
        raise UserError(f"--models: unknown {', '.join(unknown)}; known models: {', '.join(DIFFUSION_NAMES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.processor_time:
        if device.type == "cuda":
            raise UserError("--processor-time does not count the time of a GPU; leave it out")
        torch.set_num_threads(1)
    settings = ModelBench(
        models=names,
        image_sizes=options.image_size or (256, 512),
        precisions=options.precision or PRECISIONS[device.type],
        device=device,
        batch_size=options.batch_size,
        compile=options.compile,
        turns=options.turns,
        limit_s=options.limit_s,
        processor_time=options.processor_time,
    )
    for rows in bench_models(settings):
        say(table(rows).partition("\n")[2], err=True)  # an interrupt must not lose an hour of rows
        yield from rows


def bench_of_training(options: argparse.Namespace) -> Iterator[Row]:
    """Measure training; a `scale` below 1 means fewer turns and a smaller batch."""
    from jobs.benchmark.train import PRECISIONS, Subject, bench_train

    subject = Subject(
        model=options.model,
        image_size=_one_size(options),
        batch_size=max(2, int(options.batch_size * min(options.scale, 1))),
        compile=options.compile,
    )
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = options.precision or PRECISIONS[device]
    with tempfile.TemporaryDirectory(prefix="edt-bench-", dir=options.work_in) as folder:
        for rows in bench_train(Path(folder), subject, precisions, turns=max(1, int(10 * options.scale))):
            say(f"bench: measured {rows[0].what}", err=True)
            yield from rows


def bench_of_evaluation(options: argparse.Namespace) -> Iterator[Row]:
    """Measure sampling, whole evaluations and metrics; a `scale` below 1 means fewer images, steps and turns."""
    import torch

    from jobs.benchmark.evaluate import EvalSubject, bench_eval
    from jobs.benchmark.metrics import bench_metrics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = EvalSubject.on(device, options.model, _one_size(options), options.num_images, options.scale)
    with tempfile.TemporaryDirectory(prefix="edt-bench-", dir=options.work_in) as folder:
        for rows in bench_eval(Path(folder), subject, turns=max(1, int(10 * options.scale))):
            say(f"bench: measured {rows[0].what}", err=True)
            yield from rows
    say("bench: the metrics", err=True)
    yield from bench_metrics(options.scale)


def bench_of_scale(options: argparse.Namespace) -> Iterator[Row]:
    """Plan and stream synthetic images; a `scale` below 1 means fewer of them."""
    from jobs.benchmark.scale import bench_scale

    with tempfile.TemporaryDirectory(prefix="edt-bench-", dir=options.work_in) as folder:
        for rows in bench_scale(Path(folder), options.scale):
            say(table(rows).partition("\n")[2].partition("\n")[2], err=True)
            yield from rows


def _one_size(options: argparse.Namespace) -> int:
    sizes: tuple[int, ...] = options.image_size or (256,)
    if len(sizes) > 1:
        raise UserError(
            f"--image-size has several sizes {sizes}, but `edt bench {options.part}` measures one; name one"
        )
    return sizes[0]


def bench(part: str, images: str | None, scale: float, work_in: str | None = None) -> list[Row]:
    """Measure one part, "data" or "encode"; a `scale` below 1 makes it smaller and less exact."""
    with tempfile.TemporaryDirectory(prefix="edt-bench-", dir=work_in) as folder:
        work = Path(folder)
        photos = photos_in(Path(images)) if images else made_photos(work / "photos")
        if part == "encode":
            return bench_encode(work, photos, max(4, int(8192 * scale)), batch_size=max(2, int(64 * min(scale, 1))))
        return [row for rows in _data(work, photos, scale) for row in rows]


def _data(work: Path, photos: list[Path], scale: float) -> Iterator[list[Row]]:
    """The rows of the data plane, part by part; prints which part is being measured."""
    from jobs.runtime.cluster import connect
    from jobs.runtime.cluster_address import check_named

    check_named()
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "latents": lambda folder: bench_latents(folder, int(20_000 * scale)),
        "planning": lambda folder: bench_planning(folder, int(1_300_000 * scale)),
        "preprocess": lambda folder: bench_preprocess(folder, photos, int(12_000 * scale)),
        "memory": lambda folder: bench_memory(folder, photos, int(50_000 * scale)),
    }
    for number, (name, measure) in enumerate(parts.items(), 1):
        say(f"bench: {name}, part {number} of {len(parts)}; all parts take about 6 minutes on 2 cores", err=True)
        if name == "preprocess":
            connect(min_cpus=2)
        (work / name).mkdir()
        yield measure(work / name)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _listed(text))


def _precisions(text: str) -> tuple[str, ...]:
    if unknown := set(_listed(text)) - {"fp32", "tf32", "bf16"}:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; known: fp32, tf32, bf16")
    return _listed(text)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = parser_of(
        prog,
        (__doc__ or "").split("\n")[0],
        ["data --scale 0.02", "model --models EDT-S/2,MDTv2-S/2", "eval --image-size 64"],
    )
    parser.add_argument(
        "part",
        choices=["data", "scale", "encode", "model", "train", "eval", "gpu"],
        help="data: latents, planning, preprocess, memory; scale: plans and streams of up to 100 million synthetic "
        "images on up to 1,024 workers, played by one process; model: forward and backward passes of each model; "
        "eval: sampling, whole evaluations, metrics; gpu: prove the code on a GPU in nine minutes, with options of its "
        "own (gpu --help)",
    )
    add_json(parser)
    parser.add_argument("--images", help="folder of JPEG photos to measure with  [default: synthetic ones]")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the full size, such as 0.02 for a short test"
    )
    parser.add_argument("--work-in", help="folder for some GB of scratch files  [default: the system's]")
    models = parser.add_argument_group("model, train and eval")
    models.add_argument("--model", default="EDT-S/2", help="name of the model, for train and eval  [default: EDT-S/2]")
    models.add_argument("--image-size", type=_sizes, help="side of the images  [default: 256; for model 256,512]")
    training = parser.add_argument_group("model and train")
    training.add_argument("--batch-size", type=int, default=8, help="images per step  [default: 8]")
    training.add_argument(
        "--precision",
        type=_precisions,
        help="fp32, tf32, bf16, separated by commas  [default: two that are usual for the device]",
    )
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    alone = parser.add_argument_group("model")
    alone.add_argument("--models", type=_listed, help="names of models, separated by commas  [default: all]")
    alone.add_argument("--turns", type=int, default=5, help="number of measurements of each pass  [default: 5]")
    alone.add_argument(
        "--limit-s", type=float, default=120, help="leave out rows that take more seconds  [default: 120]"
    )
    alone.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time of one thread, not wall time, for a shared machine",
    )
    evaluation = parser.add_argument_group("eval")
    evaluation.add_argument("--num-images", type=int, help="images of a whole evaluation  [default: 8; on a GPU 256]")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.benchmark") -> None:
    """Measure and print a table in Markdown; "gpu" is a command of its own, see `edt_core.acceptance.command`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["gpu"]:
        from edt_core.acceptance.command import main as accept

        accept(given[1:], f"{prog} gpu")
        return
    options = make_parser(prog).parse_args(given)
    with exit_code():
        if options.part == "gpu":
            raise UserError(f"the options of `{prog} gpu` are its own; write gpu first, see `{prog} gpu --help`")
        if options.scale < 0.001:
            raise UserError(f"--scale is {options.scale:g}; use 0.001 or more")
        if options.part == "model":
            rows = list(bench_of_models(options))
        elif options.part == "train":
            rows = list(bench_of_training(options))
        elif options.part == "eval":
            rows = list(bench_of_evaluation(options))
        elif options.part == "scale":
            rows = list(bench_of_scale(options))
        else:
            rows = bench(options.part, options.images, options.scale, options.work_in)
        if options.as_json:
            say(json.dumps({"hardware": hardware(), "rows": [asdict(row) for row in rows]}, indent=1))
        else:
            say(f"{hardware()}\n\n{table(rows)}")
