"""A verb run as a step of a workflow or by its command, and the chain of small artifacts that verbs take."""

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

from edt_core.config import (
    AutoencoderConfig,
    ClassifierConfig,
    EncodeConfig,
    PreprocessConfig,
    Section,
    SourceConfig,
    TrainConfig,
)
from edt_core.progress import Progress, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from jobs.commands import stage
from jobs.stages import autoencoder, classifier, encode, evaluate, preprocess, reference, sample, train, validate
from jobs.stages.preprocess import image_source
from jobs.stages.stage import Input, Stage

# The stages of the chain: what makes each, by which configuration, of which others.
STAGES: dict[str, tuple[Stage, Section, tuple[str, ...]]] = {
    "images": (preprocess.STAGE, PreprocessConfig(image_size=32, images_per_shard=12), ("source",)),
    "autoencoder": (
        autoencoder.STAGE,
        AutoencoderConfig(downsample_factor=4, base_channels=8, steps=4, batch_size=8),
        ("images",),
    ),
    "latents": (encode.STAGE, EncodeConfig(batch_size=5, write_webdataset=True), ("images", "autoencoder")),
    "classifier": (classifier.STAGE, ClassifierConfig(steps=8, base_channels=4, feature_dim=8), ("images",)),
}
TRAIN = TrainConfig(
    model="EDT-Tiny/2", global_batch_size=8, max_steps=6, log_every=2, checkpoint_every=3, num_workers=2, lr=1e-3
)
STAGE_OF = {
    v.STAGE.name: v.STAGE
    for v in (preprocess, autoencoder, encode, classifier, reference, train, sample, evaluate, validate)
}
Chain = dict[str, Artifact]  # and "source", which is a Source


def execute(
    verb: Stage, config: Section, folder: Path | str, progress: Progress | None = None, **inputs: Input
) -> Artifact:
    """Run a verb into a folder or at a URI."""
    identity = verb.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return verb.execute(config, inputs, ArtifactWriter(Folder.at(folder), verb.kind, identity), progress or Silent())


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python -m jobs.NAME` does with these arguments, done in this process: no imports to wait for."""
    main = partial(stage.main, STAGE_OF[name]) if name in STAGE_OF else import_module(f"jobs.commands.{name}").main
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def made_stage(kind: str, chain: Chain, folder: Path) -> Artifact:
    """A stage of the chain from those before it."""
    verb, config, roles = STAGES[kind]
    return execute(verb, config, folder, None, **{role: chain[role] for role in roles})


def made_chain(images: Path, folder: Path) -> Chain:
    """All stages, from an image folder."""
    chain: dict[str, Input] = {"source": image_source(SourceConfig(path=str(images)))}
    for kind in STAGES:
        chain[kind] = made_stage(kind, chain, folder / kind)  # type: ignore[arg-type]
    return chain  # type: ignore[return-value]
