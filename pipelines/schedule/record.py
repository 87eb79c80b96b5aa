"""Schedules, one JSON file each in `<store>/.schedules/`: which pipeline runs when, and the results of its ticks."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from edt_core.errors import UserError
from edt_core.files.private_files import make_private, read_own
from edt_core.printing.redaction import redacted_values
from edt_core.store.errors import clear_read_errors
from edt_core.store.folder import Folder
from pipelines.schedule.cron import Cron

OVERLAP = "skipped: a run is in progress"
UNCHANGED = "skipped: data unchanged"
SERVER_LEASE = "schedules"
_RESULT_FILE = "EDT_SCHEDULE_RESULT"  # path of the file to which a run writes its outcome
_NAME = re.compile(r"\w[\w.-]*")

Record = TypeVar("Record", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(_Record):
    """What runs when. The configuration is read at each tick, so later changes of the file take effect."""

    name: Annotated[str, StringConstraints(pattern=f"^{_NAME.pattern}$")]
    config: str
    assignments: tuple[str, ...] = ()
    store: str
    address: str | None = None
    folder: str = Field(
        description="working directory of the run, from which relative paths of the configuration count"
    )
    cron: str
    timezone: str
    when_data_changed: bool = False
    retrain: bool = Field(False, description="`config` is a registered model, which each tick retrains")
    paused: bool = False
    since: AwareDatetime = Field(
        description="when the schedule was created, changed or resumed; earlier ticks are ignored"
    )

    @property
    def times(self) -> Cron:
        return Cron(self.cron, self.timezone)


class Tick(_Record):
    """One tick: its time, its run and its outcome."""

    tick: AwareDatetime
    missed: int = 0
    started: AwareDatetime
    ended: AwareDatetime | None = None
    outcome: str | None = Field(None, description="finished, failed, stopped, lost, OVERLAP or UNCHANGED")
    run: str | None = None
    source: str | None = None
    error: str | None = None
    log: str | None = None
    pid: int | None = None
    reported: bool = Field(False, description="its run reported the outcome itself, and sent notifications")


class State(_Record):
    """What the server remembers of a schedule between ticks and across restarts."""

    handled: AwareDatetime | None = None
    source: str | None = Field(None, description="identity of the images of the last finished tick")
    last: Tick | None = None
    running: Tick | None = None
    lost: int = Field(0, description="number of consecutive runs that were lost together with their server")
    unrecorded: tuple[Tick, ...] = Field((), description="ended while MLflow was unavailable")


class RunResult(_Record):
    """What a run reports to its scheduler. `outcome` is None until it ends: a killed run leaves only its MLflow run."""

    outcome: str | None
    run: str | None = None


@dataclass(frozen=True)
class Schedules:
    """The schedules of one store."""

    store: Folder

    @classmethod
    def at(cls, location: str) -> "Schedules":
        return cls(Folder.at(location))

    @property
    def folder(self) -> Folder:
        return self.store.child(".schedules")

    @property
    def workplace(self) -> Path:
        """A local folder for logs and locks: in the store if that is local, otherwise in this user's cache."""
        from hashlib import sha256

        local = self.folder.local
        cache = Path("~/.cache/edt/schedules").expanduser() / sha256(self.store.uri.encode()).hexdigest()[:16]
        return (cache if local is None else local) / "work"

    def names(self) -> list[str]:
        return [name.removesuffix(".json") for name in self.folder.names() if name.endswith(".json")]

    def read(self, name: str) -> Schedule:
        """The schedule of a name. Raises UserError if it is missing or damaged, or another user may have written it."""
        schedule = _read(self.folder, f"{name}.json", Schedule) if _NAME.fullmatch(name) else None
        if schedule is None:
            raise self._unknown(name)
        self._check_own(name, schedule)
        return schedule

    def write(self, schedule: Schedule) -> None:
        self._write(f"{schedule.name}.json", schedule)

    def put(self, schedule: Schedule) -> str:
        """Record a schedule under its name, and return "new", "changed" or "unchanged".

        A paused schedule stays paused. Ticks that are already due stay due, unless the cron expression or the time
        zone changes.
        """
        if schedule.name not in self.names():
            self.write(schedule)
            return "new"
        old = self.read(schedule.name)
        same_times = (old.cron, old.timezone) == (schedule.cron, schedule.timezone)
        fields = {"paused": old.paused, **({"since": old.since} if same_times else {})}
        schedule = schedule.model_copy(update=fields)
        if schedule == old:
            return "unchanged"
        self.write(schedule)
        return "changed"

    def pause(self, name: str) -> None:
        self.write(self.read(name).model_copy(update={"paused": True}))

    def resume(self, name: str) -> None:
        """Resume a paused schedule at its next tick. Ticks during the pause are skipped."""
        if (schedule := self.read(name)).paused:
            self.write(schedule.model_copy(update={"paused": False, "since": datetime.now(UTC)}))

    def remove(self, name: str) -> None:
        """Remove a schedule, even an invalid one. Raises UserError if there is none of this name."""
        if name not in self.names():
            raise self._unknown(name)
        self.folder.remove(f"{name}.json")
        self.folder.remove(f"state/{name}.json")

    def state(self, name: str) -> State:
        return _read(self.folder, f"state/{name}.json", State) or State()

    def write_state(self, name: str, state: State) -> None:
        self._write(f"state/{name}.json", state)

    def log(self, tick: "Tick") -> Path | None:
        """The log of a tick: always a file of the workplace, whatever folder the record names."""
        return None if tick.log is None else self.workplace / Path(tick.log).name

    def _write(self, name: str, record: BaseModel) -> None:
        """Write a file that only this user can read: a record decides what the server runs, and where."""
        if (root := self.folder.local) is not None:
            for folder in (root, (root / name).parent):
                make_private(folder)
        self.folder.write_bytes(name, _bytes(record), private=True)

    def _check_own(self, name: str, schedule: Schedule) -> None:
        """Raise UserError if a record was copied from another schedule or another store."""
        where = f"{self.folder.uri}/{name}.json"
        if schedule.name != name:
            raise UserError(f"{where} is the record of the schedule {schedule.name!r}; remove or rename the file")
        if _place(schedule.store) != _place(self.store.uri):
            raise UserError(
                f"{where} runs in another store, {schedule.store}; remove the file and run `edt schedule` again "
                f"with --store {self.store.uri}"
            )

    def _unknown(self, name: str) -> UserError:
        return UserError(
            f"no schedule {name!r} in {self.store.uri}; its schedules: {', '.join(self.names()) or 'none'}"
        )


def new_schedule(
    name: str | None,
    config: str,
    assignments: Sequence[str],
    store: str | None,
    cron: str,
    timezone: str | None,
    when_data_changed: bool = False,
    address: str | None = None,
    retrain: bool = False,
) -> Schedule:
    """A schedule from command-line values. With `retrain`, `config` is a registered model.

    Raises UserError if the configuration, the times or the name are invalid.
    """
    place, default = _retrained(config, store, when_data_changed) if retrain else _loaded(config, assignments, store)
    name = default if name is None else name
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no valid schedule name; use letters, digits, '.', '_' and '-', as in --name weekly"
        )
    times = Cron(cron, timezone or _local_timezone())
    path = Path(config)
    schedule = Schedule(
        name=name,
        config=str(path.absolute()) if path.is_file() and not retrain else config,
        assignments=tuple(assignments),
        store=Folder.at(place).uri,
        address=address,
        folder=str(Path.cwd()),
        cron=times.expression,
        timezone=times.timezone,
        when_data_changed=when_data_changed,
        retrain=retrain,
        since=datetime.now(UTC),
    )
    _check_no_secret(schedule)
    return schedule


def _loaded(config: str, assignments: Sequence[str], store: str | None) -> tuple[str, str]:
    """The store and the name of a configuration. Raises UserError if it is invalid."""
    from pipelines.config.schema import load_config

    loaded = load_config(config, assignments, store)
    return loaded.store, loaded.name


def _retrained(model: str, store: str | None, when_data_changed: bool) -> tuple[str, str]:
    """The store and the name of a schedule that retrains a model. Which version is champion is looked up at each tick.

    Raises UserError for a name that no model can have.
    """
    if not _NAME.fullmatch(model):
        raise UserError(
            f"--retrain takes the name of a registered model, and got {model!r}; `edt models list` has them"
        )
    if when_data_changed:
        raise UserError(
            "--retrain starts no training if the images are those of the champion; leave out --when-data-changed"
        )
    return store or "./edt-store", f"retrain-{model}"


def _check_no_secret(schedule: Schedule) -> None:
    """Raise UserError if the record would contain a credential."""
    values = [("--set", text) for text in schedule.assignments]
    values += [("--store", schedule.store), ("--address", schedule.address or ""), ("CONFIG", schedule.config)]
    for option, text in values:
        if redacted_values(text) != text:
            origin = f"--set {text.partition('=')[0]}" if option == "--set" else option
            raise UserError(
                f"{origin} contains a credential, and the record of a schedule would store it: {text}. Leave it out, "
                "and set it in the environment of `edt schedule serve` (S3: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY; MLflow: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )


def run_lease(pipeline: str) -> str:
    """The name of the lease for runs of a pipeline."""
    return f"run-{pipeline}"


def report_to_scheduler(outcome: str | None, run: str | None = None) -> None:
    """Report a run's MLflow id, and its outcome once it has one, to the scheduler that started this process, if any."""
    if path := os.environ.get(_RESULT_FILE):
        target = Path(path)
        if run is None and (started := read_result(target)) is not None:
            run = started.run  # a failure that has no outcome does not know it
        result = _bytes(RunResult(outcome=outcome, run=run))
        Folder.at(target.parent).write_bytes(target.name, result, private=True)


def result_environment(path: Path) -> dict[str, str]:
    """Environment variables that make a run report its outcome to this file."""
    return {_RESULT_FILE: str(path)}


def read_result(path: Path) -> RunResult | None:
    """What a run reported, or None if it did not get that far."""
    return _read(Folder.at(path.parent), path.name, RunResult)


def _local_timezone() -> str:
    from tzlocal import get_localzone_name

    name = get_localzone_name()
    return str(name) if name else "UTC"


def _place(store: str) -> str:
    """A store's URI, or the real path of a local store, which is the same for every link to it."""
    local = Folder.at(store).local
    return store if local is None else os.path.realpath(local)


def _bytes(record: BaseModel) -> bytes:
    return (json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def _read(folder: Folder, name: str, kind: type[Record]) -> Record | None:
    """A record, or None if there is none. Raises UserError if it is damaged, or another user may have written it.

    Only a local folder shows who can write a file; in a bucket its policy decides that.
    """
    try:
        if (root := folder.local) is None:
            data = folder.read_bytes(name)
        else:
            with clear_read_errors(folder.uri):
                data = read_own(root / name)
        return kind.model_validate_json(data)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise UserError(f"{folder.uri}/{name} is invalid: {problem}; correct or remove the file") from error
