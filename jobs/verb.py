"""A verb: a job with what it takes and makes. A workflow runs it as a step, `python -m jobs.<verb>` by itself."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edt_core.artifact import Artifact, ArtifactWriter, Source, fingerprint
from edt_core.config import Section, SourceConfig, result_fields
from edt_core.errors import UserError
from edt_core.progress import Progress, Silent
from edt_core.schema import MANIFEST_NAME
from edt_core.storage import Folder
from jobs.options import add_fields, given_fields, parse_assignment, read_yaml, validated
from jobs.progress import Bar, relayed

Input = Artifact | Source
Job = Callable[[Any, Mapping[str, Any], ArtifactWriter, Progress], dict[str, Any]]


@dataclass(frozen=True)
class Verb:
    """`run(config, inputs, out, progress)` makes an artifact of `kind` from inputs of the named roles.

    `version` goes up when the same configuration and inputs give another result: old artifacts are then not reused.
    """

    name: str
    kind: str
    version: int
    config: type[Section]
    run: Job
    roles: tuple[str, ...]

    def fingerprint(self, config: Section, inputs: Mapping[str, str]) -> str:
        """Identity of what this verb makes of a configuration and its inputs' fingerprints."""
        return fingerprint(self.kind, self.version, result_fields(config), inputs)

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
        fingerprints = {role: item.fingerprint for role, item in inputs.items()}
        return out.commit(
            result_fields(config), fingerprints, counts, step_version=self.version, started=started, **commit
        )

    def main(self, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
        """The verb on its own: `INPUT OUT` and an option for each further input and field. Exits with 0 or 2."""
        parser = self._parser(prog or f"python -m jobs.{self.name}")
        options = parser.parse_args(arguments)
        # What lives in `__main__` is pickled by value, and an actor of it cannot be restarted: run the module's own.
        verb: Verb = import_module(f"jobs.{self.name}").VERB
        with exit_code():
            artifact = verb._run_alone(options)
            digest = artifact.manifest.digest[:12]
            print(f"{artifact.folder.uri}  {len(artifact.manifest.files)} files  digest {digest}")

    def _parser(self, prog: str) -> argparse.ArgumentParser:
        first, *others = self.roles
        parser = argparse.ArgumentParser(prog=prog, description=(self.run.__doc__ or "").split("\n")[0])
        parser.add_argument(first, help=_ROLE_HELP.get(first, f"{first} artifact: a folder or URI"))
        parser.add_argument("out", help=_OUT_HELP)
        for role in others:
            text = _ROLE_HELP.get(role, f"{role} artifact: a folder or URI")
            parser.add_argument(f"--{role}", required=True, help=text)
        if first == "source":
            add_fields(parser.add_argument_group("source"), SourceConfig, leave_out=("path",))
        add_fields(parser.add_argument_group("fields"), self.config)
        parser.add_argument("--config", type=Path, help=f"YAML file with fields of {self.config.__name__}")
        parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set one field")
        return parser

    def _run_alone(self, options: argparse.Namespace) -> Artifact:
        fields: dict[str, Any] = read_yaml(options.config) if options.config else {}
        fields |= given_fields(options, self.config) | dict(parse_assignment(text) for text in options.set)
        config = validated(self.config, fields)
        folder = Folder.at(options.out)
        with Bar(self.name) as bar:
            inputs = {role: open_input(role, getattr(options, role), folder, options, bar) for role in self.roles}
            identity = self.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
            with _alone_in(folder):
                if (made := _made_before(folder, identity)) is not None:
                    print(f"{self.name}: reused, nothing has changed", file=sys.stderr)
                    return made
                from jobs.cluster import connect

                connect(min_cpus=2)
                out = ArtifactWriter(folder, self.kind, identity)
                out.check_own()
                with relayed(self.name, bar) as progress:
                    return self.execute(config, inputs, out, progress)


_OUT_HELP = "folder or URI for the artifact: new, empty, or of an unfinished run to go on with"
_ROLE_HELP = {
    "source": "labelled images: a folder, file or URI (s3://...)",
    "autoencoder": "autoencoder artifact, local diffusers folder, hub id, or MLflow URI (models:/NAME@ALIAS)",
}


@contextmanager
def exit_code() -> Iterator[None]:
    """A user's mistake becomes one message and exit code 2, an interrupt 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from jobs.cluster import cause_of

        cause = cause_of(error)
        if not isinstance(cause, UserError):
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(2)


def _alone_in(folder: Folder) -> AbstractContextManager[object]:
    """Held while a verb works on a local folder: started twice, one makes the artifact and the other waits for it."""
    from filelock import FileLock

    folder.check_writable()
    if (root := folder.local) is None:
        return nullcontext()
    return FileLock(root / ".lock")


def _made_before(folder: Folder, identity: str) -> Artifact | None:
    if not folder.exists(MANIFEST_NAME):
        return None
    artifact = Artifact.open(folder)
    if artifact.fingerprint != identity:
        raise UserError(
            f"{folder.uri} already holds an artifact made from another configuration or other inputs; "
            "give an empty folder"
        )
    return artifact


def open_input(role: str, location: str, out: Folder, options: argparse.Namespace, progress: Progress) -> Input:
    """An input by its role: images, an autoencoder from anywhere, else a committed artifact. Raises UserError."""
    if role == "source":
        fields = given_fields(options, SourceConfig) | {"path": location}
        return image_source(validated(SourceConfig, fields), progress)
    if role == "autoencoder" and not Folder.at(location).exists(MANIFEST_NAME):
        from jobs.autoencoder import published_artifact

        return published_artifact(location, out.child(".autoencoder"))
    return Artifact.open(location)


def image_source(config: SourceConfig, progress: Progress | None = None) -> Source:
    """The images of a configuration and the identity of what they are. Raises UserError where there are none."""
    from edt_core.data.sources import list_source, source_identity

    told = progress or Silent()
    if config.path is None or config.kind == "digits":
        raise UserError("the digits come with the pipeline (edt run quickstart); here, give images of your own")
    return Source(config.path, source_identity(list_source(config, told), told), config)
