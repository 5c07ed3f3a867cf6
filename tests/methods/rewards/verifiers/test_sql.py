"""sql: rows are compared; queries only read, and end."""

from __future__ import annotations

import pytest

from luthier.errors import RecipeError
from luthier.registry import build

TABLE = "CREATE TABLE t(a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'z');"


def scores(answer: str, *texts: str, **settings) -> list[float]:
    judge = build("reward", {"name": "sql", **settings})
    return judge.scores({"id": "r", "database": TABLE, "answer": answer}, list(texts))


def test_rows_count_and_not_the_words():
    right = "SELECT b FROM t WHERE a = 2"
    assert scores(
        right, "select b from t where a > 1 order by b desc", "```sql\nSELECT b FROM t WHERE a=2\n```"
    ) == [1, 1]
    assert scores(right, "SELECT b FROM t", "SELECT c FROM t", "hello", runs=0.5) == [0.5, 0.0, 0.0]
    ordered = "SELECT b FROM t ORDER BY b"
    assert scores(ordered, "SELECT b FROM t ORDER BY b DESC", "SELECT b FROM t ORDER BY 1") == [0.0, 1.0]
    assert scores("SELECT a FROM t", "SELECT DISTINCT a FROM t") == [0.0], "how often a row comes counts"


def test_queries_only_read_and_end():
    forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    large = (
        "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n, t o, t p"
    )
    for query in (
        "DROP TABLE t",
        "ATTACH 'x.db' AS x",
        "SELECT load_extension('x')",
        "PRAGMA user_version",
        forever,
        large,
    ):
        assert scores("SELECT a FROM t", query, runs=0.5) == [0.0], query
    assert scores("SELECT a FROM t", "SELECT a FROM t") == [1.0]


def test_a_wrong_row_is_refused():
    with pytest.raises(RecipeError, match="does not run"):
        scores("SELECT nothing FROM nowhere", "SELECT 1")
