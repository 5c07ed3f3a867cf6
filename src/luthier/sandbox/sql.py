"""Runs a query that a model wrote on a small database in memory: only reading, in bounded steps and rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from .limits import CODE, SQL_ROWS, SQL_STEPS

# what cannot make much out of little
FUNCTIONS = frozenset(
    "abs avg coalesce count date datetime group_concat ifnull iif instr julianday length like lower ltrim"
    " max min nullif printf replace round rtrim strftime substr substring sum time total trim upper typeof"
    " row_number rank dense_rank lag lead first_value last_value ntile cast".split()
)


def run_query(script: str, query: str) -> list[tuple] | None:
    """The rows of a query on the database that a script makes; None where it is refused, wrong or too long.

    script: SQL that creates and fills the tables; it is trusted. Raises sqlite3.Error where it is wrong.
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        connection.commit()
        connection.set_authorizer(allowed)
        ticks = iter(range(SQL_STEPS // 1000))
        connection.set_progress_handler(lambda: next(ticks, None) is None, 1000)
        try:
            rows = connection.execute(query[:CODE]).fetchmany(SQL_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
            return None
    return rows if len(rows) <= SQL_ROWS else None


def allowed(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    """Reading, and functions that are known."""
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
    computes = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in FUNCTIONS
    return sqlite3.SQLITE_OK if reads or computes else sqlite3.SQLITE_DENY
