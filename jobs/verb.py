"""A verb: a job with what it takes and makes. A workflow runs it as a step, `python -m jobs.<verb>` by itself."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edt_core.artifact import Artifact, ArtifactWriter, Source, fingerprint
from edt_core.config import Section, result_fields
from edt_core.errors import UserError
from edt_core.progress import Printed, Progress
from edt_core.schema import MANIFEST_NAME
from edt_core.storage import Folder

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

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The verb on its own: inputs, the output folder, `--config FILE` and `--set key=value`. Exits with 0 or 2."""
        parser = argparse.ArgumentParser(
            prog=f"python -m jobs.{self.name}", description=(self.run.__doc__ or "").split("\n")[0]
        )
        for role in self.roles:
            parser.add_argument(role, help="image folder" if role == "source" else f"artifact folder: {role}")
        parser.add_argument("out", help="folder for the artifact: new, empty, or of an unfinished run to go on with")
        parser.add_argument("--config", type=Path, help=f"YAML file with fields of {self.config.__name__}")
        parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set one field")
        options = parser.parse_args(arguments)
        try:
            artifact = self._run_alone(options)
        except Exception as error:
            from jobs.cluster import cause_of

            cause = cause_of(error)
            if not isinstance(cause, UserError):
                raise
            print(f"error: {cause}", file=sys.stderr)
            sys.exit(2)
        print(f"{artifact.folder.uri}  {len(artifact.manifest.files)} files  digest {artifact.manifest.digest[:12]}")

    def _run_alone(self, options: argparse.Namespace) -> Artifact:
        fields: dict[str, Any] = read_yaml(options.config) if options.config else {}
        fields |= dict(parse_assignment(text) for text in options.set)
        config = validated(self.config, fields)
        inputs = {role: open_input(role, getattr(options, role)) for role in self.roles}
        identity = self.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        folder = Folder.at(options.out)
        if folder.exists(MANIFEST_NAME):
            artifact = Artifact.open(folder)
            if artifact.fingerprint != identity:
                raise UserError(
                    f"{folder.uri} already holds an artifact made from another configuration or other inputs; "
                    "give an empty folder"
                )
            print(f"{self.name}: reused, nothing has changed", file=sys.stderr)
            return artifact
        from jobs.cluster import connect

        connect(min_cpus=2)
        return self.execute(config, inputs, ArtifactWriter(folder, self.kind, identity), Printed(self.name))


def open_input(role: str, location: str) -> Input:
    """An input by its role: the source is an image folder, everything else a committed artifact."""
    if role != "source":
        return Artifact.open(location)
    from edt_core.data.images import scan_image_folder, source_digest

    path = Path(location).expanduser().absolute()
    return Source(path, source_digest(scan_image_folder(path)))


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` with the value as YAML. Raises UserError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set takes key=value, as train.max_steps=50; got {text!r}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: {value!r} is not a YAML value; quote it as in --set '{key}=\"text\"'") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UserError."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration: a mapping of fields is expected")
    return values


def validated(schema: type[Section], fields: Mapping[str, Any]) -> Any:
    """Validate fields against a schema. Raises UserError: a line a problem, with the known keys for an unknown one."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise UserError("\n".join(_problem(schema, problem) for problem in error.errors())) from error


def _problem(schema: type[Section], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or schema.__name__
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, problem["loc"][:-1])
        return f"unknown configuration key {where!r}; known keys here: {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"configuration {where!r}: {message} (got {problem['input']!r})" if problem["loc"] else message


def _known_keys(schema: type[Section], path: Sequence[Any]) -> list[str]:
    for part in path:
        field = schema.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            break
        schema = field.annotation
    return sorted(schema.model_fields)
