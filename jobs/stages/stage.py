"""A verb: a job with what it takes and makes. A workflow runs it as a step, `python -m jobs.<verb>` by itself."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edt_core.config import PUBLISHED_SPACES, Section, SourceConfig, result_fields
from edt_core.errors import Stopped, UserError
from edt_core.printing.console import say
from edt_core.progress import Progress, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError, Source, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from jobs.commands.options import add_fields, given_fields, parse_assignment, parser_of, read_yaml, validated
from jobs.runtime.cluster_address import check_named
from jobs.runtime.failure import tell_failure
from jobs.runtime.progress import Bar, relayed
from jobs.runtime.termination import term_interrupts

Input = Artifact | Source
Job = Callable[[Any, Mapping[str, Any], ArtifactWriter, Progress], dict[str, Any]]


@dataclass(frozen=True)
class Verb:
    """`run(config, inputs, out, progress)` makes an artifact of `kind` from inputs of the named roles.

    `accept(config, counts)` raises UserError for an artifact, made before, that the configuration does not let pass.
    `version` goes up when the same configuration and inputs give another result: old artifacts are then not reused.
    Inputs of the roles in `optional` may be left out, and count where they are given. So may those in `extras`: they
    show more of the work, and do not change what it makes.
    `plan(config, inputs)` tells what the job would do, for `--dry-run`. `examples` are arguments that its help shows.
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
    examples: tuple[str, ...] = ()

    def fingerprint(self, config: Section, inputs: Mapping[str, str]) -> str:
        """Identity of what this verb makes of a configuration and its inputs' fingerprints."""
        return fingerprint(self.kind, self.version, result_fields(config), self._counted(inputs))

    def _counted(self, inputs: Mapping[str, str]) -> dict[str, str]:
        return {role: identity for role, identity in inputs.items() if role not in self.extras}

    def execute(
        self,
        config: Section,
        inputs: Mapping[str, Input],
        out: ArtifactWriter,
        progress: Progress,
        **commit: Any,
    ) -> Artifact:
        """Run the job and commit what it wrote."""
        started = time.time()
        counts = self.run(config, inputs, out, progress)
        fingerprints = self._counted({role: item.fingerprint for role, item in inputs.items()})
        return out.commit(
            result_fields(config), fingerprints, counts, step_version=self.version, started=started, **commit
        )

    def main(self, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
        """The verb alone: `INPUT OUT` and an option for each further input and field. Exits with 0, 1, 2 or 130."""
        parser = self.make_parser(prog or f"python -m jobs.{self.name}")
        options = parser.parse_args(arguments)
        with exit_code():
            if getattr(options, "dry_run", False):
                say(self._planned(options))
                return
            artifact = self._run_alone(options)
            digest = artifact.manifest.digest[:12]
            say(f"{artifact.folder.uri}  {len(artifact.manifest.files)} files  digest {digest}")

    def make_parser(self, prog: str) -> argparse.ArgumentParser:
        """Reads what `main` is given."""
        first, *others = self.roles
        parser = parser_of(prog, (self.run.__doc__ or "").split("\n")[0], self.examples)
        parser.add_argument(first, help=_ROLE_HELP.get(first, f"{first} artifact: a folder or URI"))
        parser.add_argument("out", help=_OUT_HELP)
        for role in others:
            text = _ROLE_HELP.get(role, f"{role} artifact: a folder or URI")
            parser.add_argument(f"--{role}", required=True, help=text)
        for role in self.optional:
            add_role(parser, role)
        for role in self.extras:
            parser.add_argument(f"--{role}", help=f"{_ROLE_HELP[role]}; for sample grids")
        if self.plan is not None:
            parser.add_argument(
                "--dry-run", action="store_true", help="tell what this would do and take, and do nothing"
            )
        if first == "source":
            add_fields(parser.add_argument_group("source"), SourceConfig, leave_out=("path",))
        add_fields(parser.add_argument_group("fields"), self.config)
        parser.add_argument("--config", type=Path, help=f"YAML file with fields of {self.config.__name__}")
        parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set one field")
        return parser

    def _given_config(self, options: argparse.Namespace) -> Any:
        fields: dict[str, Any] = read_yaml(options.config) if options.config else {}
        fields |= given_fields(options, self.config) | dict(parse_assignment(text) for text in options.set)
        return validated(self.config, fields)

    def _inputs(self, options: argparse.Namespace, roles: Sequence[str], progress: Progress) -> dict[str, Input]:
        out = Folder.at(options.out)
        return {role: open_input(role, getattr(options, role), out, options, progress) for role in roles}

    def _planned(self, options: argparse.Namespace) -> str:
        assert self.plan is not None
        return self.plan(self._given_config(options), self._inputs(options, self.roles, Silent()))

    def _run_alone(self, options: argparse.Namespace) -> Artifact:
        config, folder = self._given_config(options), Folder.at(options.out)
        check_place(folder, [getattr(options, role) for role in self.roles])
        check_named()
        given = [*self.roles, *(role for role in (*self.optional, *self.extras) if getattr(options, role))]
        with Bar(self.name) as bar:
            return self.make(config, self._inputs(options, given, bar), folder, bar)

    def make(self, config: Section, inputs: Mapping[str, Input], folder: Folder, bar: Progress) -> Artifact:
        """The artifact in a folder of its own: found there, or made now by a Ray session. Raises UserError."""
        identity = self.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        with alone_in(folder):
            if (made := made_before(folder, identity)) is not None:
                self.accept(config, made.counts)
                say(f"{self.name}: reused, nothing has changed", err=True)
                return made
            from jobs.runtime.cluster import connect

            connect(min_cpus=2)
            out = ArtifactWriter(folder, self.kind, identity)
            out.check_own()
            with relayed(self.name, bar) as progress:
                return self.execute(config, inputs, out, progress)


_ANOTHER = "already holds an artifact made from another configuration or other inputs; give an empty folder"
_OUT_HELP = "folder or URI for the artifact: new, empty, or of an unfinished run to go on with"
_ROLE_HELP = {
    "source": "labelled images: a folder, file or URI (s3://...)",
    "autoencoder": "autoencoder artifact, local diffusers folder, hub id, or MLflow URI (models:/NAME@ALIAS)",
    "images": "images artifact: a folder or URI; for a reference also ADM's .npz of statistics",
    "statistics": "ADM's .npz of reference statistics, as VIRTUAL_imagenet256_labeled.npz",
    "classifier": "classifier artifact, for fd_classifier",
    "inception": "Inception's published weights, for fid and its kin: file, URL#sha256=..., or MLflow URI",
    "dinov2": "DINOv2 for fd_dinov2: a transformers folder or hub id, or MLflow URI",
    "guide": "a weaker model to guide away from (autoguidance): a checkpoint artifact",
}
_ROLE_OPTIONS = {"inception": "--inception-weights", "dinov2": "--dinov2-weights"}  # named as in a configuration


def add_role(parser: Any, role: str) -> None:
    """The option of an input that may be left out."""
    parser.add_argument(_ROLE_OPTIONS.get(role, f"--{role}"), dest=role, metavar="INPUT", help=_ROLE_HELP[role])


@contextmanager
def exit_code() -> Iterator[None]:
    """A user's mistake becomes one message and exit code 2; an interrupt, or a job that was asked to stop, 130.

    SIGTERM is an interrupt too.

    Anything else is a failure, exit code 1: the cause, the remedy, and the file that the traceback is in.
    """
    try:
        with term_interrupts():
            yield
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, run the same command again to go on", err=True)
        sys.exit(130)
    except Exception as error:
        cause: BaseException = error
        if "ray" in sys.modules:  # else nothing can have wrapped it, and Ray takes a second to import
            from jobs.runtime.cluster import cause_of

            cause = cause_of(error)
        if isinstance(cause, Stopped):
            say(f"{cause}; run the same command again to go on", err=True)
            sys.exit(130)
        sys.exit(tell_failure(cause, raised=error))


def check_place(folder: Folder, inputs: Sequence[str]) -> None:
    """Raise UserError where files written to a local folder would land among an input's or another artifact's."""
    if (root := folder.local) is None:
        return
    out = root.resolve()
    for location in inputs:
        path = Folder.at(location).local
        if path is None or not path.exists():
            continue
        path = path.resolve()
        if out == path or out in path.parents or path in out.parents:
            raise UserError(f"the output folder {out} and the input {path} lie in one another; give a folder beside it")
    if above := next((parent for parent in out.parents if (parent / MANIFEST_NAME).exists()), None):
        raise UserError(f"the output folder {out} lies inside the artifact {above}; give a folder beside it")


@contextmanager
def alone_in(folder: Folder) -> Iterator[None]:
    """Held while a verb works on a local folder: started twice, one makes the artifact and the other waits for it."""
    from filelock import FileLock, Timeout

    folder.check_writable()
    if (root := folder.local) is None:
        yield
        return
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is at work in {folder.uri}; waiting for it", err=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def made_before(folder: Folder, identity: str, refusal: str = _ANOTHER) -> Artifact | None:
    """The artifact of this identity that is in the folder already. Raises UserError for a damaged or another one."""
    if not folder.exists(MANIFEST_NAME):
        return None
    try:
        artifact = Artifact.open(folder)
    except ManifestError as error:
        raise UserError(f"{error}; or give another output folder, or remove this one") from error
    if artifact.fingerprint != identity:
        raise UserError(f"{folder.uri} {refusal}")
    return artifact


def open_input(role: str, location: str, out: Folder, options: argparse.Namespace, progress: Progress) -> Input:
    """An input by its role: images, an autoencoder from anywhere, else a committed artifact. Raises UserError."""
    if role == "source":
        fields = given_fields(options, SourceConfig) | {"path": location}
        return image_source(validated(SourceConfig, fields), progress)
    if role == "autoencoder" and not Folder.at(location).exists(MANIFEST_NAME):
        from jobs.stages.autoencoder import published_artifact

        return published_artifact(location, out.child(".autoencoder"))
    if role in PUBLISHED_SPACES:
        from jobs.stages.extractors import extractor_source

        return extractor_source(role, *split_digest(location))
    if role == "statistics" or (role == "images" and location.endswith(".npz")):
        from jobs.stages.reference import statistics_source

        return statistics_source(location)
    artifact = Artifact.open(location)
    kind = "checkpoint" if role == "guide" else role  # else a role is named after the kind of artifact that fills it
    if artifact.manifest.kind != kind:
        raise UserError(f"{location} holds {artifact.manifest.kind}, and {kind} is what is needed here")
    return artifact


def split_digest(location: str) -> tuple[str, str | None]:
    """`LOCATION#sha256=HEX` in its two parts; None where no digest is stated."""
    place, separator, digest = location.rpartition("#sha256=")
    return (place, digest) if separator and "/" not in digest else (location, None)  # else it is a folder's name


def image_source(config: SourceConfig, progress: Progress | None = None) -> Source:
    """The images of a configuration and the identity of what they are. Raises UserError where there are none."""
    from edt_core.data.sources import list_source, remarks, source_identity

    told = progress or Silent()
    if config.path is None or config.kind == "digits":
        raise UserError("the digits come with the pipeline (edt run quickstart); here, give images of your own")
    listing = list_source(config, told)
    for remark in remarks(listing):
        told.warn(remark)
    return Source(config.path, source_identity(listing, told), config, len(listing))
