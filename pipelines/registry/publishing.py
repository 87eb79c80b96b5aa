"""Push the diffusers folder of a registered version to a model hub, by the hub's own client.

Nothing is sent before the token, the repository's name, the hub's answer and every file were checked. The files arrive
in one commit, so a push that was interrupted leaves the repository as it was.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edt_core.errors import UserError
from edt_core.network.answers import answer_seconds, check_connects
from edt_core.printing.redaction import redacted
from jobs.models.registry_files import fetch_version, title
from pipelines.tracking.catalog import Catalog

Result = TypeVar("Result")

_BRANCH = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)*")
# Removed there if the version does not have them.
_OURS = ["transformer/*", "guide/*", "vae/*", "scheduler/*", "denoiser.pt2"]
_COMMIT_S = 60.0  # the hub checks the files of a commit before it answers
_LONGEST = 300  # characters of the hub's own words
_REMEDIES = {
    401: "the token is not valid: set HF_TOKEN to a token with write permission, or run `hf auth login`",
    403: "the token may not write there: use a token with write permission, or a repository of your own",
    404: "there is no such repository, revision, or hub: check the name, --revision and HF_ENDPOINT",
}
_AGAIN = "Rerun the command: what has arrived is not sent again"


@dataclass(frozen=True)
class Target:
    """A repository of a model hub, and the branch to commit to (None: its main branch).

    Raises UserError for a name that no repository, or no branch, can have.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"{self.repo_id!r} is not the name of a repository: {error}") from error
        if "/" not in self.repo_id:
            raise UserError(f"{self.repo_id!r} has no owner; give OWNER/NAME, as in my-name/{self.repo_id}")
        if self.revision is not None and (".." in self.revision or not _BRANCH.fullmatch(self.revision)):
            raise UserError(f"--revision {self.revision!r} is not the name of a branch; give one such as main or v2")


class Hub:
    """The hub of HF_ENDPOINT, with the token of HF_TOKEN or of the client's own login. Never shows the token."""

    def __init__(self) -> None:
        """Raises UserError without a token, without a network, and for a hub that does not answer or refuses it."""
        from huggingface_hub import HfApi, constants, get_token

        self.endpoint = redacted(constants.ENDPOINT)
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
        token = get_token()
        if token is None:
            raise UserError("there is no token of a model hub; set HF_TOKEN, or log in with `hf auth login`")
        self._token = token
        self._api = HfApi(endpoint=constants.ENDPOINT, token=token)
        self._ask("the token", self._api.whoami)

    def push(self, folder: Path, target: Target, message: str) -> str:
        """Commit the files of a folder to a repository, which is created if needed. Returns the commit's URL.

        Raises UserError for every failure, and for a public repository if a private one is required.
        """
        repo = target.repo_id
        visibility = True if target.private else None  # None is the owner's default
        self._ask(repo, lambda: self._api.create_repo(repo, private=visibility, exist_ok=True))
        if target.private and not self._ask(repo, lambda: self._api.repo_info(repo)).private:
            raise UserError(f"{repo} exists and is public; make it private there, or push without --private")
        if (branch := target.revision) and not branch.startswith("refs/"):
            self._ask(repo, lambda: self._api.create_branch(repo, branch=branch, exist_ok=True))
        try:
            with _bounded_answers():
                commit = self._api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    revision=branch,
                    commit_message=message,
                    delete_patterns=list(_OURS),
                )
        except Exception as error:  # of the client, of its HTTP library, or of its storage
            raise self._failure(repo, error) from None
        return str(commit.commit_url)

    def _ask(self, what: str, request: Callable[[], Result]) -> Result:
        """The answer to a short request. Raises UserError for a refusal, and after the time limit."""
        remedy = "check the network and HF_ENDPOINT"
        try:
            return check_connects(request, self.endpoint, "a model hub", remedy)
        except UserError:
            raise
        except Exception as error:
            raise self._failure(what, error) from None

    def _failure(self, what: str, error: Exception) -> UserError:
        # Raised without its cause: the request in it holds the token.
        status = _status(error)
        words = redacted(" ".join(str(error).split()).replace(self._token, "<token>"))[:_LONGEST]
        said = f"{self.endpoint} did not accept {what} ({words})" if status else f"{what} was not pushed ({words})"
        return UserError(f"{said}. {_REMEDIES.get(status or 0, _AGAIN)}")


@contextmanager
def checked_folder(catalog: Catalog, version: Any) -> Iterator[tuple[Path, dict[str, int]]]:
    """The diffusers folder of a version, fetched for the time of the block, with the size of each file in bytes.

    Raises UserError, as `edt models pull` does, for files that are missing, extra, or have another digest.
    """
    with tempfile.TemporaryDirectory(prefix="edt-push-") as temporary:
        folder = Path(temporary) / "model"
        fetch_version(catalog.client, version, folder)
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        yield folder, sizes


def push_version(catalog: Catalog, version: Any, target: Target) -> tuple[str, dict[str, int]]:
    """Push a version. Returns the URL of the commit, and the size of each file in bytes. Raises UserError."""
    hub = Hub()
    with checked_folder(catalog, version) as (folder, sizes):
        return hub.push(folder, target, f"{title(version)}, by edt models push"), sizes


@contextmanager
def _bounded_answers() -> Iterator[None]:
    """Limit the wait for each answer of the client, which waits indefinitely by default."""
    from huggingface_hub import get_session

    session: Any = get_session()
    before, session.timeout = session.timeout, max(_COMMIT_S, answer_seconds())
    try:
        yield
    finally:
        session.timeout = before


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of a failure or of what caused it."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None
