"""SSD-LLM: a readable partition of texts, discovered and refined by a language model, into subpopulations.

The writer reads `batches` drawn batches of texts and proposes dimensions with attributes each time; of all
proposals it selects a compact set. Then it assigns each text an attribute of every dimension, or none; where
more than 1 - `coverage` of the texts have none in a dimension, it sees those and adds attributes, `rounds`
times at most. A row's cell is its class and one attribute of each dimension. With a column of errors,
`slices` ranks the cells by their mean (Luo et al., 2024). Departs: texts stand where the paper has captions
of images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, json_in
from luthier.registry import stage

PROPOSE = (
    "Along which dimensions do these texts differ? Reply with a JSON object: each dimension with the list of"
    " its attributes.\n\n{texts}"
)
SELECT = (
    "These dimensions with attributes were proposed for a set of texts. Choose the few that do not overlap,"
    " and join what means the same. Reply with a JSON object of the same form.\n\n{proposals}"
)
ASSIGN = (
    "Which attribute does the text have in each dimension? Reply with a JSON object: each dimension with one"
    " of its attributes, or null where none fits.\n\nDimensions:\n{criteria}\n\nText:\n{text}"
)
EXTEND = (
    "These texts have none of the attributes {attributes} in the dimension {dimension}. Reply with a JSON"
    " list of the attributes that are missing.\n\n{texts}"
)
Criteria = dict[str, list[str]]


@stage(
    example={"batches": 1, "rounds": 0, "max_new_tokens": 4},
    paper="arXiv:2405.02363",
    row="ssd-llm",
    requires=[GENERATE],
    use_when="you ask which kinds of texts a data set has, which are rare, and on which a model fails.",
    costs="`batches` proposals, and a reply for each row in each round.",
    covers="criteria from batches, their selection, assignment, refinement until coverage, cells with"
    " counts, slices by error.",
    omits="images and their captions; prompts that complete rare cells: their counts are in the report.",
    contract={"gives": "a tiny model proposes no dimensions"},
    tests=[
        "methods/stages/curate/test_subpopulations.py::test_planted_cells_are_recovered",
        "methods/stages/curate/test_subpopulations.py::test_an_attribute_that_was_left_out_is_added",
        "methods/stages/curate/test_subpopulations.py::test_the_slice_with_errors_is_first",
    ],
)
class Subpopulations(Synthesis):
    """All rows; column `cell`: {dimension: attribute}."""

    batches: Annotated[int, Field(ge=1)] = 5  # of texts that dimensions are proposed from
    size: Annotated[int, Field(ge=1)] = 16  # texts of a batch
    coverage: Annotated[float, Field(ge=0, le=1)] = 0.95  # share of texts that have an attribute
    rounds: Annotated[int, Field(ge=0)] = 3  # of refinement
    by: str = "label"  # column of the class, which cells are of; where rows lack it they are of one
    error: str | None = None  # column of a number that is high where a model fails

    def __call__(self, rows, roles):
        rows = list(rows)
        author = self.author(roles)
        texts = [question(row) for row in rows]
        criteria = self.criteria(author, texts)
        cells = self.assigned(author, criteria, texts)
        for number in range(self.rounds):
            more = self.extended(author, criteria, texts, cells, number)
            if more == criteria:
                break
            criteria = more
            cells = self.assigned(author, criteria, texts)
        out = [{**row, "cell": cell} for row, cell in zip(rows, cells, strict=True)]
        counts = tally(out, self.by)
        self.measure(roles, cells=float(len(counts)), rarest=float(min(counts.values(), default=0)))
        listed = ", ".join(
            f"{name}: {count}" for name, count in sorted(counts.items(), key=lambda c: c[1])[:8]
        )
        self.warn(
            roles, f"{len(counts)} cells of {', '.join(criteria) or 'no dimension'}; the rarest: {listed}"
        )
        if self.error is not None:
            worst = slices(out, self.by, self.error)[:3]
            self.warn(roles, f"highest {self.error}: " + ", ".join(f"{n}: {v:.3g}" for n, v in worst))
        return out

    def criteria(self, author: Author, texts: list[str]) -> Criteria:
        """Dimensions with their attributes."""
        prompts, keys = [], []
        for number in range(self.batches):
            rng = author.roles.clock.rng(self.name, "batch", number, at=0)
            places = torch.randperm(len(texts), generator=rng)[: self.size].tolist()
            prompts.append(PROPOSE.replace("{texts}", "\n".join(f"- {texts[k]}" for k in places)))
            keys.append(f"batch {number}")
        proposals = [read(reply) for reply in author.ask(prompts, keys)]
        pooled = "\n".join(json.dumps(each) for each in proposals if each)
        (reply,) = author.ask([SELECT.replace("{proposals}", pooled)], ["select"], 0.0)
        return read(reply)

    def assigned(self, author: Author, criteria: Criteria, texts: list[str]) -> list[dict[str, str | None]]:
        """Of each text an attribute of each dimension; None where it has none."""
        prompt = ASSIGN.replace("{criteria}", json.dumps(criteria))
        replies = author.ask([prompt.replace("{text}", text) for text in texts], texts, 0.0)
        cells = []
        for reply in replies:
            named = json_in(reply)
            named = named if isinstance(named, dict) else {}
            cell: dict[str, str | None] = {}
            for dimension, attributes in criteria.items():
                value = named.get(dimension)
                cell[dimension] = value if value in attributes else None
            cells.append(cell)
        return cells

    def extended(
        self, author: Author, criteria: Criteria, texts: list[str], cells: list[dict], number: int
    ) -> Criteria:
        """The criteria with more attributes where too few texts are covered."""
        out = {}
        for dimension, attributes in criteria.items():
            bare = [text for text, cell in zip(texts, cells, strict=True) if cell[dimension] is None]
            out[dimension] = attributes
            if len(bare) <= (1 - self.coverage) * len(texts):
                continue
            listed = "\n".join(f"- {text}" for text in bare[: self.size])
            prompt = EXTEND.replace("{attributes}", ", ".join(attributes)).replace("{dimension}", dimension)
            (reply,) = author.ask([prompt.replace("{texts}", listed)], [f"extend {dimension} {number}"])
            more = json_in(reply)
            if isinstance(more, list):
                new = [each for each in map(str, more) if each not in attributes]
                out[dimension] = [*attributes, *dict.fromkeys(new)]
        return out


def read(text: str) -> Criteria:
    """Dimensions in a reply; those without a list of attributes are left out."""
    parsed = json_in(text)
    out: Criteria = {}
    for dimension, attributes in parsed.items() if isinstance(parsed, dict) else ():
        if isinstance(attributes, list) and attributes:
            out[str(dimension)] = list(dict.fromkeys(map(str, attributes)))
    return out


def name_of(row: dict, by: str) -> str:
    """A cell in words: the class and its attributes."""
    parts = [str(row[by])] if by in row else []
    parts += [f"{dimension}={attribute}" for dimension, attribute in row["cell"].items()]
    return " / ".join(parts)


def tally(rows: list[dict], by: str) -> dict[str, int]:
    """Rows of each cell."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[name_of(row, by)] += 1
    return dict(counts)


def slices(rows: list[dict], by: str, error: str) -> list[tuple[str, float]]:
    """Cells with the mean of a column, the highest first; of equals the larger cell."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if error in row:
            values[name_of(row, by)].append(float(row[error]))
    means = {name: sum(some) / len(some) for name, some in values.items()}
    return sorted(means.items(), key=lambda cell: (-cell[1], -len(values[cell[0]])))
