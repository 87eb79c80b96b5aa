"""A stage: a job with its inputs and output. A workflow runs it as a step, `python -m jobs.<stage>` runs it alone."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edt_core.config import Section, result_fields
from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError, Source, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from jobs.runtime.progress import relayed

Input = Artifact | Source
DEVICE = "device"  # what a job returns beside its counts: "cpu" or "gpu", for the environment in the manifest
REUSED = "reused"  # what a job returns beside its counts: the rows it took from earlier artifacts, for the manifest
Continues = Callable[[Folder, Any, Mapping[str, str], Mapping[str, Artifact]], str]
Job = Callable[[Any, Mapping[str, Any], ArtifactWriter, Progress], dict[str, Any]]


def device_kind(num_gpus: float) -> str:
    """The kind of device of a worker with so many GPUs."""
    return "gpu" if num_gpus else "cpu"


@dataclass(frozen=True)
class Stage:
    """`run(config, inputs, out, progress)` makes an artifact of `kind` from inputs of the named roles.

    `accept(config, counts)` raises UserError if the configuration does not accept an existing artifact.
    `version` goes up when the same configuration and inputs give another result: old artifacts are then not reused.
    Inputs of the roles in `optional` may be left out, and change the fingerprint if given. Those in `extras` may be
    left out too: they add to what is shown of the work, and change neither the artifact nor its fingerprint.
    `continues(folder, config, inputs, artifacts)` says from which committed artifact beside `folder` the job would
    continue, "" for none; `inputs` are fingerprints, `artifacts` the inputs that exist.
    `plan(config, inputs)` describes what the job would do, for `--dry-run`. `examples` are arguments for the help.
    """

    name: str
    kind: str
    version: int
    config: type[Section]
    run: Job
    roles: tuple[str, ...]
    accept: Callable[[Any, Mapping[str, Any]], None] = lambda config, counts: None
    optional: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    plan: Callable[[Any, Mapping[str, Any]], str] | None = None
    continues: Continues = lambda folder, config, inputs, artifacts: ""
    examples: tuple[str, ...] = ()

    def fingerprint(self, config: Section, inputs: Mapping[str, str]) -> str:
        """Identity of the artifact that this stage makes from a configuration and its inputs' fingerprints."""
        return fingerprint(self.kind, self.version, result_fields(config), self._without_extras(inputs))

    def continued(
        self, folder: Folder, config: Section, inputs: Mapping[str, str], artifacts: Mapping[str, Artifact]
    ) -> str:
        """From which committed artifact the job would continue, as text; "" for none."""
        return self.continues(folder, config, self._without_extras(inputs), artifacts)

    def _without_extras(self, inputs: Mapping[str, str]) -> dict[str, str]:
        return {role: identity for role, identity in inputs.items() if role not in self.extras}

    def execute(
        self,
        config: Section,
        inputs: Mapping[str, Input],
        out: ArtifactWriter,
        progress: Progress,
        **commit: Any,
    ) -> Artifact:
        """Run the job and commit the files it wrote."""
        started = time.time()
        counts = dict(self.run(config, inputs, out, progress))
        reused, device = counts.pop(REUSED, None), counts.pop(DEVICE, None)
        fingerprints = self._without_extras({role: item.fingerprint for role, item in inputs.items()})
        return out.commit(
            result_fields(config),
            fingerprints,
            counts,
            step_version=self.version,
            started=started,
            reused=reused,
            device=device,
            **commit,
        )

    def make(self, config: Section, inputs: Mapping[str, Input], folder: Folder, bar: Progress) -> Artifact:
        """The artifact in `folder`: reused if it exists, else made by a Ray session. Raises UserError."""
        identity = self.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        with alone_in(folder):
            if (existing := existing_artifact(folder, identity)) is not None:
                self.accept(config, existing.counts)
                say(f"{self.name}: reused, nothing has changed", err=True)
                return existing
            from jobs.runtime.cluster import connect

            connect(min_cpus=2)
            out = ArtifactWriter(folder, self.kind, identity)
            out.check_own()
            with relayed(self.name, bar) as progress:
                return self.execute(config, inputs, out, progress)


_MISMATCH = "already contains an artifact of another configuration or other inputs; use an empty folder"


@contextmanager
def alone_in(folder: Folder) -> Iterator[None]:
    """Lock a local folder while a stage works in it: of two processes, one makes the artifact and the other waits."""
    from filelock import FileLock, Timeout

    folder.check_writable()
    if (root := folder.local) is None:
        yield
        return
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is working in {folder.uri}; waiting for it", err=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def existing_artifact(folder: Folder, identity: str, refusal: str = _MISMATCH) -> Artifact | None:
    """The artifact of this identity in a folder, or None. Raises UserError for a damaged or a different artifact."""
    if not folder.exists(MANIFEST_NAME):
        return None
    try:
        artifact = Artifact.open(folder)
    except ManifestError as error:
        raise UserError(f"{error}; or use another output folder, or remove this one") from error
    if artifact.fingerprint != identity:
        raise UserError(f"{folder.uri} {refusal}")
    return artifact
