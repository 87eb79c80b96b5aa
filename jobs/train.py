"""train: a Ray Train DDP job that fits an EDT to latent shards and leaves its checkpoints.

The loop is `edt_core.training.loop.train`; this file gives it ranks, a gradient exchange, and a place for checkpoints.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edt_core.artifact import Artifact, ArtifactWriter, FileEntry
from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.integrity import damaged
from edt_core.progress import Progress
from edt_core.schema import HISTORY_NAME, LATENT_SHARD, LATENT_TAR_SHARD, STEP_PREFIX, TRAIN_STATE
from edt_core.storage import Folder
from jobs.cluster import require, use_threads
from jobs.verb import Verb

CHECKPOINTS = "checkpoints"  # folder of the artifact: one sub-folder a kept checkpoint, named by its step
LATENT_SHARDS = LATENT_SHARD.replace("{:05d}", "*")
LATENT_TARS = LATENT_TAR_SHARD.replace("{:05d}", "*")
_RAY_RUN = "ray-train"  # Ray Train's own folder, inside the attempt; gone when the artifact is committed


class RayContext:
    """A `TrainContext` in a Ray Train worker."""

    def __init__(self, progress: Progress, max_steps: int) -> None:
        import ray.train
        import ray.train.torch

        worker = ray.train.get_context()
        self.rank, self.world_size = worker.get_world_rank(), worker.get_world_size()
        self.device = ray.train.torch.get_device()
        self.progress, self.max_steps = progress, max_steps

    def wrap(self, model: Any) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        if self.world_size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def gather(self, values: Any) -> Any:
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return values.cpu()
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim=1).cpu()

    def report(self, metrics: Mapping[str, float], checkpoint: Any) -> None:
        """A barrier: every rank reports, rank 0 with the checkpoint, under one name that the step gives."""
        import ray.train

        from edt_core.training.checkpoint import checkpoint_name, save_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if checkpoint is not None:
                save_checkpoint(Path(folder), checkpoint)
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(dict(metrics), saved, checkpoint_dir_name=checkpoint_name(int(metrics["step"])))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.progress.update(step, self.max_steps, f"loss {metrics['loss']:.3f}")
        self.progress.metrics({name: value for name, value in metrics.items() if name != "step"}, step)


def edt_config(name: str, latents: Mapping[str, Any]) -> Any:
    """The ModelConfig of a named EDT that fits the counts of a latents artifact. Raises UserError."""
    from edt_core.models import model_config

    channels, side, _ = latents["latent_shape"]
    try:
        return model_config(
            name,
            latents["image_size"],
            latents["classes"],
            autoencoder_factor=latents["image_size"] // side,
            latent_channels=channels,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def train(
    config: TrainConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Train on `inputs["latents"]`. With max_steps 0 the artifact is the untrained model of this seed.

    Goes on from the newest whole checkpoint that an earlier attempt at the same fingerprint left.
    """
    from edt_core.diffusion import linear_schedule
    from edt_core.models import count_macs, count_parameters
    from edt_core.training.checkpoint import checkpoint_name
    from edt_core.training.loop import initial_model

    latents = inputs["latents"]
    model_config = edt_config(config.model, latents.counts)
    _check_reader(config, latents)
    linear_schedule(config.num_timesteps)  # what the workers would refuse is refused before any is started
    if config.max_steps == 0:
        _store_untrained(config, model_config, out)
    else:
        _fit(config, model_config, latents, out, progress)
    model = initial_model(model_config, config.seed)
    kept = sorted({entry.path.split("/")[1] for entry in out.written() if entry.path.startswith(f"{CHECKPOINTS}/")})
    return {
        "model": config.model,
        "steps": config.max_steps,
        "autoencoder_digest": latents.counts["autoencoder_digest"],
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "checkpoints": kept,
        "final": f"{CHECKPOINTS}/{checkpoint_name(config.max_steps)}",
    }


def _store_untrained(config: TrainConfig, model_config: Any, out: ArtifactWriter) -> None:
    from edt_core.training.checkpoint import checkpoint_name, save_checkpoint
    from edt_core.training.loop import initial_state, to_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), to_checkpoint(initial_state(config, model_config)))
        out.add_tree(Path(folder), f"{CHECKPOINTS}/{checkpoint_name(0)}")
    out.write_bytes(HISTORY_NAME, b"", 0)


def _fit(config: TrainConfig, model_config: Any, latents: Artifact, out: ArtifactWriter, progress: Progress) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    workers, gpus = config.num_workers, float(config.use_gpu)
    require("train", CPU=workers * config.num_cpus_per_worker, GPU=workers * gpus)
    job = {"config": config, "model_config": model_config, "latents": latents, "out": out, "progress": progress}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={
                "CPU": config.num_cpus_per_worker,
                **({"GPU": 1} if config.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=_RAY_RUN,
            storage_path=out.data.uri,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.num_to_keep),
        ),
    )
    trainer.fit()
    _adopt_checkpoints(config, out)


def _worker(job: Mapping[str, Any]) -> None:
    """The training function of each Ray Train worker."""
    from edt_core.training.checkpoint import newest_checkpoint
    from edt_core.training.loop import train as train_loop

    config, progress = job["config"], job["progress"]
    use_threads(config.num_cpus_per_worker)
    context = RayContext(progress, config.max_steps)
    resume_from, passed_over = newest_checkpoint(folder.local_directory() for folder in _ray_checkpoints(job["out"]))
    for reason in passed_over if context.rank == 0 else ():
        progress.warn(f"not resuming from this checkpoint: {reason}; using {resume_from or 'the start'} instead")
    latents = open_latents(config, job["latents"], progress)
    train_loop(config, job["model_config"], latents, context, resume_from)


def open_latents(config: TrainConfig, latents: Artifact, progress: Progress) -> Any:
    """The latents behind `config.reader`, mapped or as a stream.

    What is mapped is compared with the manifest's digests first, once on each node; what is streamed is digested as it
    comes. Raises UserError for a shard that is missing, extra or resized, or, if mapped, swapped, doubled or changed,
    and where there is none for the reader.
    """
    from edt_core.data.latents import LatentDataset
    from edt_core.data.streaming import LatentStream, TarShard

    if config.reader == "arrow":
        latents.verify_once(LATENT_SHARDS, progress)
        return LatentDataset(latents.paths(LATENT_SHARDS))
    if problems := latents.problems():
        raise damaged(latents.folder, problems)
    shards = tuple(TarShard(latents.data, e.path, e.rows or 0, e.sha256) for e in _tars(latents))
    shape, factor = tuple(latents.counts["latent_shape"]), latents.counts["scaling_factor"]
    return LatentStream(shards, shape, factor, config.shuffle_buffer)


def _tars(latents: Artifact) -> list[FileEntry]:
    """The WebDataset shards of a latents artifact. Raises UserError where it has none."""
    entries = latents.entries(LATENT_TARS)
    if not entries:
        raise UserError(
            f"train.reader is webdataset, but {latents.folder.uri} has no {LATENT_TARS}: encode again with "
            "encode.write_webdataset=true, or train with train.reader=arrow"
        )
    return entries


def _check_reader(config: TrainConfig, latents: Artifact) -> None:
    """Refuse, before any worker is started, what the streaming reader would refuse in each of them."""
    from edt_core.data.streaming import check_shards

    if config.reader == "webdataset":
        check_shards(len(_tars(latents)), config.num_workers)


def _ray_checkpoints(out: ArtifactWriter) -> list[Folder]:
    """Folders of the checkpoints that Ray Train has of this attempt and of earlier ones, this attempt's last.

    Its own record of them is not written atomically; ours are known by their names and trusted by their digests.
    """
    runs = [out.folder.child(attempt).child(_RAY_RUN) for attempt in (*reversed(out.previous), out.attempt)]
    return [run.child(name) for run in runs for name in run.names() if name.startswith(STEP_PREFIX)]


def _adopt_checkpoints(config: TrainConfig, out: ArtifactWriter) -> None:
    """Take the newest checkpoints into the artifact under their steps' names, with the history beside them."""
    import json

    by_name = {folder.name: folder for folder in _ray_checkpoints(out) if _whole(folder)}
    kept = sorted(by_name)[-config.num_to_keep :]
    for name in kept:
        out.add_tree(by_name[name].local_directory(), f"{CHECKPOINTS}/{name}")
    history = json.loads(by_name[kept[-1]].read_bytes(TRAIN_STATE))["history"]
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in history)
    out.write_bytes(HISTORY_NAME, lines.encode(), len(history))
    out.data.remove(_RAY_RUN)


def _whole(folder: Folder) -> bool:
    from edt_core.training.checkpoint import CheckpointError, check_checkpoint

    try:
        return check_checkpoint(folder.local_directory()) >= 0
    except CheckpointError:
        return False


def history(checkpoint: Artifact) -> list[dict[str, float]]:
    """Rows of a checkpoint artifact's loss history, one every `log_every` steps; empty for an untrained model."""
    import json

    return [json.loads(line) for line in checkpoint.path(HISTORY_NAME).read_text().splitlines()]


VERB = Verb("train", "checkpoint", 1, TrainConfig, train, roles=("latents",))

if __name__ == "__main__":
    VERB.main()
