"""Many processes at one registry: in a PostgreSQL server of the test's own, and in SQLite."""

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import wait_for
from tests.support.races import at_once, check_registry, register
from tests.support.servers import free_port

PROCESSES = 8


def _binary(name: str) -> str | None:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else shutil.which(name)


@pytest.fixture
def postgres() -> Iterator[str]:
    """URI of an empty database. The server runs as `postgres` where we are root, which it refuses to be."""
    initdb, server = _binary("initdb"), _binary("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed: no initdb and postgres in /usr/lib/postgresql/*/bin or PATH")
    pytest.importorskip("psycopg2")
    user: str | None = None
    if os.getuid() == 0:
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL refuses root, and there is no user postgres to run it")
    home = Path(tempfile.mkdtemp(prefix="edt-postgres-"))  # pytest's own folders are closed to other users
    if user:
        shutil.chown(home, user)
    data = home / "data"
    own = {"user": user, "group": user, "extra_groups": []} if user else {}
    subprocess.run(
        [initdb, "-D", data, "-U", "edt", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
        check=True,
        capture_output=True,
        cwd=home,
        **own,
    )
    port = free_port()
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    given = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    with (home / "log").open("wb") as log:
        running = subprocess.Popen([server, "-D", data, *given], stdout=log, stderr=log, cwd=home, **own)
    try:
        uri = f"postgresql+psycopg2://edt@127.0.0.1:{port}/postgres"
        _wait_for(uri, running, home / "log")
        yield uri
    finally:
        running.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown: it does not wait for its clients
        running.wait()
        shutil.rmtree(home, ignore_errors=True)


def _wait_for(uri: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            engine.connect().close()
        except sqlalchemy.exc.OperationalError:
            return False
        return True

    wait_for(answers, pause=0.1)
    engine.dispose()


@pytest.mark.extern
@pytest.mark.parametrize(("own", "shared"), [(2, 4), pytest.param(24, 8, marks=pytest.mark.slow)])
def test_eight_processes_at_postgresql(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, shared: int
) -> None:
    """They make the tables of an empty database at once, then register versions and move aliases at once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    answers = at_once(register, PROCESSES, tmp_path, postgres, own, shared)
    opening, slowest = (max(answer[key] for answer in answers) for key in ("opening", "seconds"))
    retries = sum(answer["retries"] for answer in answers)
    first = min(answer["opening"] for answer in answers)
    wanted = PROCESSES * own + shared
    print(f"set up {first:.1f} s, all open after {opening:.1f} s; {wanted} versions {slowest:.1f} s, {retries} retries")
    assert len({answer["experiment"] for answer in answers}) == 1
    assert len({number for answer in answers for number in answer["made"].values()}) == wanted
    check_registry(tmp_path, answers)


def test_a_database_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edt_core.errors import UserError
    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog

    pytest.importorskip("psycopg2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://edt:canary-9d2@127.0.0.1:1/nothing")
    with pytest.raises(UserError, match="does not answer") as told:
        Catalog.open(Folder.at(tmp_path), "race")
    assert "canary" not in str(told.value)


@pytest.mark.extern
@pytest.mark.parametrize(("own", "shared"), [(2, 4), pytest.param(8, 4, marks=pytest.mark.slow)])
def test_four_processes_at_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, shared: int) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    answers = at_once(register, 4, tmp_path, None, own, shared)
    wanted = 4 * own + shared
    print(f"{wanted} versions, {sum(answer['retries'] for answer in answers)} retries")
    assert len({number for answer in answers for number in answer["made"].values()}) == wanted
    check_registry(tmp_path, answers)
