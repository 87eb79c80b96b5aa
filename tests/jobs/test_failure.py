"""A failure in a person's words: cause, remedy, exit code, and where the traceback is."""

import errno
import re
from pathlib import Path

import pytest

from edt_core.errors import Stopped, UserError
from jobs.runtime.exit_code import exit_code
from jobs.runtime.failure import explained, kept_traceback, tell_failure


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_user_error_says_its_remedy_itself() -> None:
    failure = explained(UserError("lr is -1; give one above 0"))
    assert (failure.cause, failure.remedy) == ("lr is -1; give one above 0", "")


def errors() -> list[tuple[Exception, str]]:
    import ray.exceptions
    import torch

    return [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "batch size"),
        (ray.exceptions.OutOfMemoryError("the node is low on memory"), "num_workers"),
        (ray.exceptions.WorkerCrashedError(), "a worker process was lost"),
        (OSError(errno.ENOSPC, "No space left on device"), "edt gc"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission to read"),
        (ConnectionRefusedError("refused"), "network"),
        (KeyError("loss"), "the traceback in the log"),
    ]


@pytest.mark.parametrize(("error", "remedy"), errors(), ids=lambda value: type(value).__name__)
def test_a_failure_has_a_cause_of_one_line_and_a_remedy(error: Exception, remedy: str) -> None:
    failure = explained(error)
    assert failure.cause.startswith(type(error).__name__)
    assert "\n" not in failure.cause
    assert remedy in failure.remedy


def test_a_cause_is_short_and_without_credentials() -> None:
    failure = explained(RuntimeError("\n\n  https://me:hunter2@host said\n" + "no " * 1000))
    assert failure.cause == "RuntimeError: https://<redacted>@host said"
    assert len(explained(RuntimeError("x" * 5000)).cause) < 500


def test_a_failure_is_told_with_its_file_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell_failure(raised(KeyError("loss"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: KeyError: 'loss'\n")
    assert "Traceback" not in told
    found = re.search(r"log: (\S+)", told)
    assert found is not None
    log = Path(found[1])
    assert "raise error" in log.read_text()
    log.unlink()


def test_an_mlflow_that_does_not_answer_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.exceptions import MlflowException

    assert tell_failure(raised(MlflowException("API request to http://me:hunter2@nowhere failed"))) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "error: MLflow does not answer, or rejects the request: MlflowException: API request to http://<redacted>"
    )
    assert told.endswith("check MLFLOW_TRACKING_URI and the server at that address\n")


def test_a_traceback_is_kept_without_credentials(tmp_path: Path) -> None:
    path = kept_traceback(raised(ValueError("s3://me:hunter2@bucket")), tmp_path)
    assert path.parent == tmp_path
    assert "hunter2" not in path.read_text()
    assert "ValueError" in path.read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("wrong"), 2), (KeyError("a"), 1), (Stopped("at step 5"), 130), (KeyboardInterrupt(), 130)],
)
def test_exit_codes_of_a_verb(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, exit_code():
        raise error
    assert left.value.code == code
    assert "Traceback" not in capsys.readouterr().err
