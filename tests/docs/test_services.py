"""Units and jobs that the pages have a reader write: they are whole, and their numbers fit each other."""

import configparser
import json
import re
import shlex

from pipelines.cluster import submission
from tests.docs.test_commands import check_edt
from tests.support.pages import ROOT, Command, blocks, commands

CLUSTER = ROOT / "docs" / "cluster.md"
SUBMITTED = next(command for command in commands(CLUSTER) if command.text.startswith("ray job submit"))


def unit() -> configparser.ConfigParser:
    (block,) = (block for block in blocks(CLUSTER) if block.language == "ini")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string("\n".join(block.lines))
    return parser


def variables(command: Command) -> dict[str, str]:
    words = command.words
    found: dict[str, str] = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    return found


def test_the_systemd_unit_waits_for_the_network_and_starts_at_boot() -> None:
    file = unit()
    assert set(file.sections()) == {"Unit", "Service", "Install"}
    assert file["Unit"]["Wants"] == file["Unit"]["After"] == "network-online.target"
    assert file["Install"]["WantedBy"] == "multi-user.target"
    assert "systemctl enable --now edt-schedule" in CLUSTER.read_text()


def test_the_systemd_unit_runs_a_command_that_exists_and_lets_a_training_end() -> None:
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/edt")
    check_edt(["edt", *words])
    assert service["SuccessExitStatus"] == "143"  # 128 + SIGTERM
    assert service["KillMode"] == "mixed"
    minutes = re.fullmatch(r"(\d+)min", service["TimeoutStopSec"])
    assert minutes is not None
    assert int(minutes[1]) * 60 >= int(variables(SUBMITTED)["RAY_JOB_STOP_WAIT_TIME_S"])


def test_the_job_of_ray_gives_a_training_time_to_write_its_checkpoint() -> None:
    job = {submission._JOB_OF_RAY: "raysubmit_1"}
    assert submission.stopped_too_soon(job) is not None
    assert submission.stopped_too_soon({**job, **variables(SUBMITTED)}) is None
    assert variables(SUBMITTED)["RAY_JOB_STOP_SIGNAL"] == submission._STOPPING["RAY_JOB_STOP_SIGNAL"]
    words = SUBMITTED.words
    name = words[words.index("--submission-id") + 1]
    check_edt(words[words.index("--") + 1 :])
    others = [command.words for command in commands(CLUSTER) if re.match("ray job (logs|stop)", command.text)]
    assert {other[2] for other in others} == {"logs", "stop"}
    assert all(other[3] == name for other in others)
