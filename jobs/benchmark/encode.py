"""Images a second of the encoder, beside its autoencoder alone."""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from edt_core.config import EncodeConfig, PreprocessConfig
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import IMAGE_SHARD, MANIFEST_NAME
from jobs.benchmark.table import Row, timed


def bench_encode(work: Path, photos: list[Path], number: int, batch_size: int, precision: str = "fp32") -> list[Row]:
    """Images a second of the encoder, shard to shard, beside its autoencoder alone on tensors that are ready.

    The architecture is that of stabilityai/sd-vae-ft-ema with random weights, at 256 px; both encode image and mirror.
    """
    import torch

    from edt_core.autoencoders.autoencoder import encode_posterior
    from jobs.stages.encode import IMAGE_SHARDS, Encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = _image_shards(work / "images", photos, number)
    vae = stored_autoencoder(work / "sd-vae", _sd_vae)
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
    from jobs.stages.reuse.image_shard import prepare

    out = ArtifactWriter(Folder.at(folder), "images", "0" * 64)
    data = [prepare(photo.read_bytes(), PreprocessConfig()) for photo in photos[:256]]
    samples = (ImageSample(f"{i:08d}", d, 0, "", "") for i, d in enumerate(islice(cycle(data), number)))
    for k, part in enumerate(in_batches(samples, 1024)):
        out.write(IMAGE_SHARD.format(k), partial(write_image_shard, samples=part, image_format="webp"))
    return out.commit({}, {}, {"images": number, "image_size": 256, "classes": 1})


def stored_autoencoder(folder: Path, build: Callable[[], Any]) -> Artifact:
    """The artifact of the autoencoder from `build` in a folder; an existing one is reused."""
    from edt_core.autoencoders.autoencoder import autoencoder_facts
    from jobs.stages.autoencoder import FOLDER

    if (folder / MANIFEST_NAME).exists():
        return Artifact.open(str(folder))
    model = build()
    out = ArtifactWriter(Folder.at(folder), "autoencoder", "0" * 64)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        out.add_tree(Path(saved), FOLDER)
    return out.commit({}, {}, {**autoencoder_facts(model), "source": "unfitted"})
