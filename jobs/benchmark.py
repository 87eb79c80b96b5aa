"""benchmark: how fast the data plane is, each figure beside a plain baseline measured in the same run.

edt bench data [--images FOLDER]     latents read, preprocess, memory, planning
edt bench encode                     the encoder beside its autoencoder alone
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.artifact import Artifact, ArtifactWriter, Source
from edt_core.config import EncodeConfig, PreprocessConfig, SourceConfig
from edt_core.environment import code_version, environment
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.schema import IMAGE_SHARD, MANIFEST_NAME
from edt_core.storage import Folder
from jobs.verb import exit_code


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is `figure` against what `against` names."""

    what: str
    figure: str
    against: str = ""
    ratio: float | None = None
    target: str = ""


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


# --- latents read for training


def bench_latents(work: Path, rows: int, batch_size: int = 256, seconds: float = 4.0) -> list[Row]:
    """Rows a second, shuffled, one process, warm cache: our loader, a DataLoader over .npy files, and bare numpy.

    A row is what a training step takes of an image: posterior mean and std, float32 [2, 4, 32, 32], 32 KB.
    """
    import torch

    from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
    from edt_core.data.loader import LatentLoader

    values = np.random.default_rng(0).standard_normal((rows, 2, 4, 32, 32), dtype=np.float32)
    paths = []
    for k, part in enumerate(np.array_split(np.arange(rows), 8)):
        info = LatentInfo("benchmark", 1.0, 256, (4, 32, 32), f"images-{k:05d}.tar")
        paths.append(work / f"latents-{k:05d}.arrow")
        with LatentShardWriter(paths[-1], info) as writer:
            for cut in np.array_split(part, max(1, len(part) // 256)):
                both = np.repeat(values[cut][:, None], 2, axis=1)
                writer.write([f"{i:08d}" for i in cut], np.zeros(len(cut), np.int64), both)
    for i in range(rows):
        np.save(work / f"{i}.npy", values[i])

    class NpyFiles(torch.utils.data.Dataset[tuple[Any, int]]):
        def __len__(self) -> int:
            return rows

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.from_numpy(np.load(work / f"{index}.npy")), 0

    loader = LatentLoader(LatentDataset(paths), seed=0, global_batch_size=batch_size, mirror_prob=0.5)
    ours = _rate((batch.posterior for batch in loader), batch_size, seconds)
    npy = torch.utils.data.DataLoader(NpyFiles(), batch_size=batch_size, shuffle=True, drop_last=True)
    plain = _rate((batch for _ in cycle([0]) for batch, _ in npy), batch_size, seconds)
    memory = values.reshape(rows, -1)
    orders = (np.random.default_rng(i).permutation(rows)[:batch_size] for i in cycle(range(100)))
    bare = _rate((memory[order] for order in orders), batch_size, seconds)
    return [
        Row("latents read", f"{ours:,.0f}/s", f".npy DataLoader {plain:,.0f}/s", ours / plain, "at least 40"),
        Row("latents read", f"{ours:,.0f}/s", f"numpy gather from memory {bare:,.0f}/s", ours / bare, "at least 0.5"),
    ]


def _rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Rows a second: the best of three stretches, after a warm-up that reads everything into the cache."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        next(batches)
    best = 0.0
    for _ in range(3):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / 3:
            next(batches)
            count += 1
        best = max(best, count * batch_size / (time.perf_counter() - started))
    return best


# --- preprocess


def linked_folder(photos: list[Path], root: Path, number: int, classes: int = 10) -> Source:
    """An image folder of `number` links to the photos, `classes` classes."""
    from jobs.verb import image_source

    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
    for i, photo in enumerate(islice(cycle(photos), number)):
        (root / f"class{i % classes}" / f"{i:07d}{photo.suffix}").symlink_to(photo.resolve())
    return image_source(SourceConfig(kind="image_folder", path=str(root)))


def made_photos(folder: Path, number: int = 64) -> list[Path]:
    """JPEG files of 500 x 375 with the spectrum of photos, where no real ones are given."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        layers = [Image.fromarray(rng.integers(0, 256, (375 // s, 500 // s, 3), dtype=np.uint8)) for s in (5, 25, 75)]
        sizes = [np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC), np.float32) for layer in layers]
        Image.fromarray(np.mean(sizes, axis=0).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
    return sorted(folder.iterdir())


def pillow_loop(paths: list[Path], out: Path, size: int, **save: Any) -> float:
    """Images a second of the plain way: open, ADM crop, save, one after the other in one process."""
    from PIL import Image

    out.mkdir()
    started = time.perf_counter()
    for i, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image.crop((left, top, left + size, top + size)).save(out / f"{i}.img", **save)
    return len(paths) / (time.perf_counter() - started)


def bench_preprocess(work: Path, photos: list[Path], number: int) -> list[Row]:
    """Images a second of two Ray workers at 256 px, beside the plain loop in the same format and in Pillow's PNG."""
    from edt_core.data.images import SAVE_OPTIONS

    source = linked_folder(photos, work / "source", number)
    config = PreprocessConfig(image_size=256, images_per_shard=max(1, number // 24))
    _run_preprocess(PreprocessConfig(image_size=32, images_per_shard=max(1, number // 8)), source, work / "warm")
    paths = [
        Path(source.location) / f"class{i % 10}" / f"{i:07d}{photos[i % len(photos)].suffix}" for i in range(number)
    ]
    part = paths[: max(1, number // 3)]
    same = pillow_loop(part, work / "loop-same", 256, format="WEBP", **SAVE_OPTIONS["webp"])
    seconds: list[float] = []
    with timed(seconds):
        _run_preprocess(config, source, work / "ours")
    ours = number / seconds[0]
    again = pillow_loop(part, work / "loop-again", 256, format="WEBP", **SAVE_OPTIONS["webp"])
    default = pillow_loop(part[: len(part) // 3], work / "loop-png", 256, format="PNG")
    loop = (same + again) / 2  # before and after: the machine's speed drifts
    return [
        Row(
            "preprocess, 2 workers",
            f"{ours:.0f}/s",
            f"Pillow loop, same format {loop:.0f}/s",
            ours / loop,
            "at least 1.9",
        ),
        Row("preprocess, 2 workers", f"{ours:.0f}/s", f"Pillow loop, its default PNG {default:.0f}/s", ours / default),
    ]


def _run_preprocess(config: PreprocessConfig, source: Source, out: Path) -> Artifact:
    from jobs.preprocess import VERB

    return _execute(VERB, config, out, source=source)


def _execute(verb: Any, config: Any, out: Path, **inputs: Any) -> Artifact:
    identity = verb.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    artifact: Artifact = verb.execute(config, inputs, ArtifactWriter(Folder.at(out), verb.kind, identity), Silent())
    return artifact


# --- memory


def bench_memory(work: Path, photos: list[Path], number: int) -> list[Row]:
    """Highest resident memory of any Ray worker over a folder of `number` images, and over a tenth of it."""
    rows = []
    for count in (number // 10, number):
        source = linked_folder(photos, work / f"source-{count}", count)
        with peak_of_workers() as peak:
            images = _run_preprocess(PreprocessConfig(image_size=64), source, work / f"images-{count}")
        rows.append(Row(f"memory of a preprocess worker, {count:,} images", _mib(peak), "", None, "under 1,536 MiB"))
        vae = _small_autoencoder(work / "autoencoder", 64)
        with peak_of_workers() as peak:
            _execute(_encode_verb(), EncodeConfig(), work / f"latents-{count}", images=images, autoencoder=vae)
        rows.append(Row(f"memory of an encode worker, {count:,} images", _mib(peak), "", None, "under 1,536 MiB"))
    return rows


@contextmanager
def peak_of_workers(interval_s: float = 0.2) -> Iterator[list[int]]:
    """A list that ends with the highest resident bytes (VmHWM) that any Ray worker of this machine had by then."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            peak[0] = max([peak[0], *_worker_peaks()])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _worker_peaks() -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it ended
            continue
        if fields["Name"].strip().startswith("ray::") and "VmHWM" in fields:
            yield int(fields["VmHWM"].split()[0]) << 10


def _mib(peak: list[int]) -> str:
    return f"{peak[0] / (1 << 20):,.0f} MiB"


def _encode_verb() -> Any:
    from jobs.encode import VERB

    return VERB


def _small_autoencoder(folder: Path, size: int) -> Artifact:
    """An unfitted small autoencoder: what it makes of images does not matter here."""
    from edt_core.autoencoder import build_autoencoder
    from edt_core.config import AutoencoderConfig

    return _stored_autoencoder(folder, lambda: build_autoencoder(AutoencoderConfig(base_channels=8), size))


def _stored_autoencoder(folder: Path, build: Callable[[], Any]) -> Artifact:
    from edt_core.autoencoder import autoencoder_facts
    from jobs.autoencoder import FOLDER

    if (folder / MANIFEST_NAME).exists():
        return Artifact.open(str(folder))
    model = build()
    out = ArtifactWriter(Folder.at(folder), "autoencoder", "0" * 64)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        out.add_tree(Path(saved), FOLDER)
    return out.commit({}, {}, {**autoencoder_facts(model), "source": "unfitted"})


# --- planning


_PLAN = """
import resource, sys, time
from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.sources import list_source
from jobs.preprocess import plan_shards
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
plans = plan_shards(list_source(SourceConfig(kind="image_folder", path=sys.argv[1])), PreprocessConfig())
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, len(plans))
"""


def bench_planning(work: Path, number: int, classes: int = 1000) -> list[Row]:
    """Seconds and highest memory of listing `number` files in class folders and planning their shards."""
    for k in range(classes):
        folder = work / "paths" / f"n{k:08d}"
        folder.mkdir(parents=True)
        for i in range(number // classes):
            os.close(os.open(folder / f"n{k:08d}_{i}.JPEG", os.O_CREAT))
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(work / "paths")], check=True, capture_output=True, text=True
    )
    seconds, peak, shards = (float(value) for value in done.stdout.split())
    what = f"planning {number:,} paths into {shards:.0f} shards"
    return [
        Row(what, f"{seconds:.1f} s", "", None, "under 60 s"),
        Row(f"{what}, memory", _mib([int(peak)]), "", None, "under 2,048 MiB"),
    ]


# --- encode


def bench_encode(work: Path, photos: list[Path], number: int, batch_size: int, precision: str = "fp32") -> list[Row]:
    """Images a second of the encoder, shard to shard, beside its autoencoder alone on tensors that are ready.

    The architecture is that of stabilityai/sd-vae-ft-ema with random weights, at 256 px; both encode image and mirror.
    """
    import torch

    from edt_core.autoencoder import encode_posterior
    from jobs.encode import IMAGE_SHARDS, Encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = _image_shards(work / "images", photos, number)
    vae = _stored_autoencoder(work / "sd-vae", _sd_vae)
    config = EncodeConfig(batch_size=batch_size, num_decode_threads=os.cpu_count() or 1, precision=precision)
    out = ArtifactWriter(Folder.at(work / "latents"), "latents", "0" * 64)
    encoder = Encoder(config, {"images": images, "autoencoder": vae}, out, Silent(), device)
    ready = torch.zeros((batch_size, 256, 256, 3), dtype=torch.uint8, device=device)

    def alone(batches: int) -> float:
        started = time.perf_counter()
        for _ in range(batches):
            for view in (ready, ready.flip(2)):
                encode_posterior(encoder.model, view)
        if device == "cuda":
            torch.cuda.synchronize()
        return batches * batch_size / (time.perf_counter() - started)

    alone(2)
    batches = max(1, number // batch_size)
    before, seconds = alone(batches), list[float]()
    with timed(seconds):
        for shard in range(len(images.entries(IMAGE_SHARDS))):
            encoder.work(shard)
    plain, ours = (before + alone(batches)) / 2, number / seconds[0]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    what = f"encode, {precision}, {name}"
    return [Row(what, f"{ours:.1f} images/s", f"autoencoder alone {plain:.1f}/s", ours / plain, "at least 0.9")]


def _sd_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=256,
    )


def _image_shards(folder: Path, photos: list[Path], number: int) -> Artifact:
    """Image shards of 256 px written here, without Ray."""
    from edt_core.data.prefetch import in_batches
    from edt_core.data.shards import ImageSample, write_image_shard
    from jobs.preprocess import prepare

    out = ArtifactWriter(Folder.at(folder), "images", "0" * 64)
    data = [prepare(photo.read_bytes(), PreprocessConfig()) for photo in photos[:256]]
    samples = (ImageSample(f"{i:08d}", d, 0, "", "") for i, d in enumerate(islice(cycle(data), number)))
    for k, part in enumerate(in_batches(samples, 1024)):
        out.write(IMAGE_SHARD.format(k), partial(write_image_shard, samples=part, image_format="webp"))
    return out.commit({}, {}, {"images": number, "image_size": 256, "classes": 1})


# --- the command


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | measured | against | ratio | target |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.what} | {row.figure} | {row.against} | {ratio} | {row.target} |")
    return "\n".join(lines)


def hardware() -> str:
    """What the figures were measured on, and by which code."""
    import torch

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": CPU")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no accelerator"
    versions = {name: number for name, number in environment().items() if name in ("python", "torch", "ray", "pillow")}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{os.cpu_count()} cores ({cpu.split(':')[1].strip()}){gpu}; {listed}; commit {code_version()[:12]}"


def bench(part: str, images: str | None, scale: float, work_in: str | None = None) -> list[Row]:
    """Measure one part, "data" or "encode"; `scale` below 1 makes it smaller and less exact, for a try."""
    with tempfile.TemporaryDirectory(prefix="edt-bench-", dir=work_in) as folder:
        work = Path(folder)
        photos = photos_in(Path(images)) if images else made_photos(work / "photos")
        if part == "encode":
            return bench_encode(work, photos, max(4, int(8192 * scale)), batch_size=max(2, int(64 * min(scale, 1))))
        from jobs.cluster import connect

        rows = bench_latents(_made(work / "latents"), int(20_000 * scale))
        rows += bench_planning(work, int(1_300_000 * scale))
        connect(min_cpus=2)
        rows += bench_preprocess(_made(work / "preprocess"), photos, int(6_000 * scale))
        return rows + bench_memory(_made(work / "memory"), photos, int(50_000 * scale))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def photos_in(folder: Path) -> list[Path]:
    """The JPEG files below a folder. Raises UserError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise UserError(
            f"no JPEG files below {folder}; give a folder of photos, or leave --images out to have some made"
        )
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.benchmark") -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=["data", "encode"], help="data: latents, planning, preprocess, memory")
    parser.add_argument("--images", help="folder of JPEG photos to measure with  [default: made ones]")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, as 0.02 for a try")
    parser.add_argument("--work-in", help="folder for some GB of scratch files  [default: the system's]")
    options = parser.parse_args(arguments)
    with exit_code():
        rows = bench(options.part, options.images, options.scale, options.work_in)
        print(f"{hardware()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
