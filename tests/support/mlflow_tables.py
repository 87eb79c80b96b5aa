"""The tables of new SQLite databases of MLflow, made by its migrations once in a process, which takes a second."""

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


def _copy(engine: Any, pattern: sqlite3.Connection, *, out: bool) -> None:
    connection = engine.raw_connection()
    try:
        database = connection.driver_connection
        database.backup(pattern) if out else pattern.backup(database)
    finally:
        connection.close()
