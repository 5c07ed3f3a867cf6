"""OmniSQL: rows of text-to-SQL for databases that are at hand or invented, each verified by execution.

A seed is a database as a script (column `database`), or a text from which the writer invents one. The writer
composes queries of a drawn complexity; those that fail, give nothing or repeat an earlier one up to its
values are rejected. To each it writes several questions in a drawn style, of which the one most like the
others stays (mean similarity of embeddings). Then several solutions with their reasoning are sampled,
executed, and their results vote: the first of the largest group is the row's answer, its query replaces the
one that was composed (Li et al., 2025). Departs: databases are SQLite scripts in memory, values are in the
script, dialect functions and external knowledge are left to the writer.
"""

from __future__ import annotations

import re
import sqlite3
from collections import defaultdict
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.verifiers.sql import FENCE
from luthier.methods.stages.select._embedding import embed, question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, section
from luthier.registry import stage
from luthier.sandbox.sql import run_query

COMPLEXITIES = ("simple", "moderate", "complex", "highly complex")
STYLES = (
    "formal",
    "colloquial",
    "imperative",
    "interrogative",
    "descriptive",
    "concise",
    "vague",
    "metaphorical",
    "conversational",
)
SCHEMA = (
    "Invent a business that works with tables like these, and its relational database for SQLite: tables with"
    " keys and a few rows each. Write CREATE TABLE and INSERT statements alone, between [SQL] and [/SQL]."
    "\n\n{text}"
)
QUERY = (
    "Write one {complexity} SQL query for this SQLite database that answers something people would ask. Put"
    " it between [SQL] and [/SQL].\n\n{database}"
)
QUESTION = (
    "Which question does this query answer? Ask it in a {style} style, in one sentence, without naming"
    " tables.\n\nDatabase:\n{database}\n\nQuery:\n{query}"
)
SOLUTION = (
    "{database}\n\nQuestion: {question}\n\nThink step by step, then write the SQLite query in a block that"
    " begins with ```sql."
)
LITERAL = re.compile(r"'(?:[^']|'')*'|\b\d+(?:\.\d+)?\b")


@stage(
    example={"queries": 1, "questions": 1, "solutions": 1, "max_new_tokens": 4},
    paper="arXiv:2503.02240",
    row="omnisql",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="questions about databases are to become queries, and databases (or tables that suggest some)"
    " are at hand, questions are not.",
    costs="for each query one reply, `questions` and `solutions` more, and their execution in memory.",
    covers="databases from tables, queries by complexity, questions by style and the most central one,"
    " reasoning by the vote of results; reward `sql` measures execution accuracy.",
    omits="that a model gains by its rows; a second pass that enriches columns; test suites of several"
    " databases.",
    contract={"gives": "a tiny model writes no query"},
    tests=[
        "methods/stages/synthesize/test_omnisql.py::test_failing_queries_leave_and_the_vote_decides",
        "methods/stages/synthesize/test_omnisql.py::test_stored_queries_give_the_stored_results",
        "methods/stages/synthesize/test_omnisql.py::test_accuracy_ignores_order_unless_it_is_wanted",
    ],
)
class OmniSQL(Synthesis):
    """New rows: schema and question, reasoning with the query. Columns `database`, `answer`, `result`,
    `complexity`, `style`, `votes`, `provenance`.
    """

    queries: Annotated[int, Field(ge=1)] = 4  # for each database
    questions: Annotated[int, Field(ge=1)] = 5  # to each query, of which one stays
    solutions: Annotated[int, Field(ge=1)] = 8  # whose results vote
    temperature: Annotated[float, Field(ge=0)] = 0.8  # of queries, questions and solutions
    encoder: str | None = None  # folder or hub name of what embeds questions; null: the policy
    batch_size: Annotated[int, Field(ge=1)] = 32  # questions embedded at once

    def __call__(self, rows, roles):
        rows = list(rows)
        author = self.author(roles)
        out, templates = [], set()
        for row in rows:
            database = self.database(author, row)
            if database is None:
                continue
            for number, (query, complexity) in enumerate(self.composed(author, row, database, templates)):
                text, style = self.central_question(author, row, number, database, query)
                solved = self.solved(author, row, number, database, text)
                if solved is None:
                    continue
                prompt = f"{database}\n\nQuestion: {text}\n"
                columns = {"database": database, "complexity": complexity, "style": style}
                new = author.row(row, number, prompt, solved.pop("reasoning"), **columns)
                out.append({**new, **solved})
        return author.finish(rows, out, "no query of its database was right")

    def database(self, author: Author, row: dict) -> str | None:
        """The row's own, or one that is invented from its text; None where it does not run."""
        script = row.get("database")
        if not isinstance(script, str):
            (reply,) = author.ask([SCHEMA.replace("{text}", question(row))], [f"{row['id']} schema"])
            script = section(reply, "SQL") or ""
        try:
            runs = run_query(script, "select count(*) from sqlite_master where type = 'table'")
        except sqlite3.Error:
            runs = None
        if not runs or not runs[0][0]:
            author.reject(row["id"], script, "is no database")
            return None
        return script

    def composed(self, author: Author, row: dict, database: str, templates: set) -> list[tuple[str, str]]:
        """Queries that run, with their complexity."""
        prompts, keys, levels = [], [], []
        for number in range(self.queries):
            rng = author.roles.clock.rng(self.name, row["id"], "complexity", number, at=0)
            level = COMPLEXITIES[int(torch.randint(len(COMPLEXITIES), (1,), generator=rng))]
            prompts.append(QUERY.replace("{complexity}", level).replace("{database}", database))
            keys.append(f"{row['id']} query {number}")
            levels.append(level)
        out = []
        for reply, level in zip(author.ask(prompts, keys), levels, strict=True):
            query = section(reply, "SQL") or ""
            template = " ".join(LITERAL.sub("?", query).lower().split())
            if not query or not run_query(database, query):
                author.reject(row["id"], query or reply, "is no query that gives rows")
            elif (database, template) in templates:
                author.reject(row["id"], query, "repeats another query")
            else:
                templates.add((database, template))
                out.append((query, level))
        return out

    def central_question(
        self, author: Author, row: dict, number: int, database: str, query: str
    ) -> tuple[str, str]:
        """The most central of several questions, and their style."""
        rng = author.roles.clock.rng(self.name, row["id"], "style", number, at=0)
        style = STYLES[int(torch.randint(len(STYLES), (1,), generator=rng))]
        prompt = QUESTION.replace("{style}", style).replace("{database}", database).replace("{query}", query)
        keys = [f"{row['id']} {number} question {k}" for k in range(self.questions)]
        texts = [reply.strip() for reply in author.ask([prompt] * self.questions, keys)]
        return texts[central(self.vectors(author.roles, texts))], style

    def solved(self, author: Author, row: dict, number: int, database: str, text: str) -> dict | None:
        """The reasoning that the vote of results chose, with its query and result; None where none runs."""
        prompt = SOLUTION.replace("{database}", database).replace("{question}", text)
        keys = [f"{row['id']} {number} solution {k}" for k in range(self.solutions)]
        groups: dict[str, list[tuple[str, str, list]]] = defaultdict(list)
        for reply in author.ask([prompt] * self.solutions, keys):
            blocks = FENCE.findall(reply)
            result = run_query(database, blocks[-1]) if blocks else None
            if result is None:
                author.reject(row["id"], reply, "has no query that runs")
            else:
                groups[identity(blocks[-1], result)].append((reply.strip(), blocks[-1].strip(), result))
        if not groups:
            return None
        best = max(groups.values(), key=len)  # of equals the first that was written
        reasoning, query, result = best[0]
        stored: list[list[Any]] = [list(line) for line in result]
        return {"reasoning": reasoning, "answer": query, "result": stored, "votes": len(best)}

    def vectors(self, roles: Any, texts: list[str]) -> Tensor:
        """[texts, d] of length one."""
        return embed(roles, texts, self.encoder, self.batch_size)


def central(vectors: Tensor) -> int:
    """The place of the vector with the highest mean similarity to the others; of equals the first."""
    similarity = vectors @ vectors.T
    mean = similarity.sum(1) - similarity.diagonal()
    return int((mean > mean.max() - 1e-6).nonzero()[0])


def identity(query: str, result: list[tuple]) -> str:
    """What results are equal by: their rows, in any order unless the query orders them."""
    ordered = re.search(r"\border\s+by\b", query, re.I) is not None
    return repr(result if ordered else sorted(result, key=repr))
