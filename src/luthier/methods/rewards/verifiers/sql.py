"""1 where a query gives the same rows as the right one on the row's database, else 0.

The database is a script in the column `database` (CREATE TABLE, INSERT), the right query is `answer`. Queries
run in memory by sqlite, may only read, and end after a bounded number of steps.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter

from luthier.errors import RecipeError
from luthier.methods.formats._base import ANSWER
from luthier.methods.rewards._base import Reward
from luthier.registry import Column, reward
from luthier.sandbox.sql import run_query

DATABASE = Column("database", says="rows with a database, as a script of SQL", example=("CREATE TABLE t(a)",))
FENCE = re.compile(r"```(?:sql|sqlite)?\s*\n(.*?)```", re.S | re.I)


@reward(
    requires=[ANSWER, DATABASE],
    use_when="answers are queries and rows have a small database and the right query (text-to-SQL).",
    costs="making the database anew for each different completion; queries run in bounded steps.",
)
class SQL(Reward):
    """The query is the last fenced block, or the whole text. Rows count in any order, unless the right query
    orders them; names of columns do not count.
    """

    runs: float = 0.0  # score of a query that runs and gives other rows

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """1.0, `runs` or 0.0 per text; equal texts are run once."""
        script, answer = str(self.column(row, "database")), str(self.column(row, "answer"))
        try:
            right = run_query(script, answer)
        except sqlite3.Error as error:
            raise RecipeError(
                f"reward 'sql': the database of row {row.get('id')} is wrong: {error}"
            ) from None
        if right is None:
            raise RecipeError(
                f"reward 'sql': the right query of row {row.get('id')} does not run: {answer[:80]!r}"
            )
        ordered = re.search(r"\border\s+by\b", answer, re.I) is not None
        by_text = {}
        for text in dict.fromkeys(texts):
            blocks = FENCE.findall(text)
            rows = run_query(script, blocks[-1] if blocks else text)
            by_text[text] = self.grade(rows, right, ordered)
        return [by_text[text] for text in texts]

    def grade(self, rows: list[tuple] | None, right: list[tuple], ordered: bool) -> float:
        """From rows to a number."""
        if rows is None:
            return 0.0
        same = rows == right if ordered else Counter(rows) == Counter(right)
        return 1.0 if same else self.runs
