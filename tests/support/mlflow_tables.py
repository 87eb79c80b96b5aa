"""SQLite databases of MLflow in a process of tests: its migrations of a second run once, and no disk is waited for."""

import sqlite3
import threading
from typing import Any


def make_tables_once() -> None:
    """From now on a new database in this process gets a copy of the tables of the first one."""
    from mlflow.store.db import utils

    make, turn, pattern = utils._initialize_tables, threading.Lock(), list[sqlite3.Connection]()

    def copied(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not utils._is_empty_database(engine):
            make(engine)
            return
        with turn:
            if not pattern:
                make(engine)
                pattern.append(sqlite3.connect(":memory:", check_same_thread=False))
                _copy(engine, pattern[0], out=True)
            else:
                _copy(engine, pattern[0], out=False)

    utils._initialize_tables = copied


def do_not_wait_for_disks() -> None:
    """From now on SQLite, where this process uses it through SQLAlchemy, does not wait until the disk has its data."""
    from sqlalchemy import Engine, event

    event.listen(Engine, "connect", _unsynced)


def _unsynced(connection: Any, _record: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def _copy(engine: Any, pattern: sqlite3.Connection, *, out: bool) -> None:
    connection = engine.raw_connection()
    try:
        database = connection.driver_connection
        database.backup(pattern) if out else pattern.backup(database)
    finally:
        connection.close()
