"""Narrative-of-Thought: a temporal graph of events, by a story that the model first tells of them.

Events stand as the methods of a Python class, the goal in its docstring. The model writes the body of
`get_narrative`, a short story with every event in the order of time, and then, with the story before it, that
of `get_relations`, lines `eventA -> eventB`. Edges between events that were not declared leave (Zhang et al.,
2024). Rows bring `events`, a list of sentences; their prompt is the goal. `mode` has the baselines: `code`
asks for relations at once, `steps` for a chain of thought in place of the story, `plain` without a class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from luthier.methods.decoders._base import Decoder
from luthier.methods.stages.select._embedding import question
from luthier.registry import decoder

EDGE = re.compile(r"(\w+)\s*->\s*(\w+)")
Edge = tuple[str, str]


@decoder(
    paper="arXiv:2410.05558",
    row="narrative-of-thought",
    use_when="events are to be put in their order in time, as a graph, by a model that was not tuned for it.",
    costs="two texts a row: the story and the relations; `code` and `plain` one.",
    covers="the class of events, the story and the relations in two calls, examples, the parser, F1, edit"
    " distance and consistency of graphs, three baselines.",
    omits="the authors' examples with stories by a stronger model: name your own under `examples`.",
    tests=[
        "methods/decoders/prompts/test_narrative_of_thought.py::test_a_gold_graph_is_read_back",
        "methods/decoders/prompts/test_narrative_of_thought.py::test_only_edges_between_declared_events_stay",
    ],
)
class NarrativeOfThought(Decoder):
    """The answer is the edges, one a line."""

    mode: Literal["narrative", "steps", "code", "plain"] = "narrative"  # what comes before the relations
    # each has `goal`, `events` (a list), `narrative` and `edges` (a list of pairs of numbers of events)
    examples: list[dict[str, Any]] = field(default_factory=list)
    column: str = "events"  # column of the rows with the events

    def header(self, goal: str, events: Sequence[str]) -> str:
        """The events as methods of a class; in `plain` mode a list."""
        if self.mode == "plain":
            listed = "\n".join(f"{name_of(k)}: {event}" for k, event in enumerate(events))
            return f"Goal: {goal}\nEvents:\n{listed}\n"
        lines = ["class Scenario:", f'    """{goal}"""', ""]
        for k, event in enumerate(events):
            lines += [f"    def {name_of(k)}(self):", f"        # {event}", "        pass", ""]
        return "\n".join(lines)

    def story(self, text: str | None = None) -> str:
        """What asks for the story; with a text, the story itself."""
        what = "get_narrative" if self.mode == "narrative" else "get_steps"
        begin = f"    def {what}(self):\n        # "
        return begin if text is None else f"{begin}{' '.join(text.split())}\n\n"

    def relations(self, edges: Sequence[Edge] | None = None) -> str:
        """What asks for the edges; with edges, these."""
        indent = "" if self.mode == "plain" else "        "
        begin = "Relations:\n" if self.mode == "plain" else "    def get_relations(self):\n"
        if edges is None:
            return begin
        return begin + "".join(f"{indent}{a} -> {b}\n" for a, b in edges) + "\n"

    def opening(self) -> str:
        """The examples."""
        parts = []
        for example in self.examples:
            edges = [(name_of(a), name_of(b)) for a, b in example["edges"]]
            story = self.story(example["narrative"]) if self.mode in ("narrative", "steps") else ""
            parts.append(self.header(example["goal"], example["events"]) + story + self.relations(edges))
        return "\n".join(parts) + ("\n" if parts else "")

    def generate(self, roles, rows, prompts, **how):
        tokenizer, stop = roles.renderer.tokenizer, [*how.get("stop", ())]
        starts = []
        for row in rows:
            goal = question(dict(row))
            starts.append(self.opening() + self.header(goal, self.events(row)))
        if self.mode in ("narrative", "steps"):
            openings = [start + self.story() for start in starts]
            texts = self.written(roles, openings, {**how, "n": 1})
            starts = [s + self.story(text.split("\n\n")[0]) for s, (text,) in zip(starts, texts, strict=True)]
        texts = self.written(roles, [start + self.relations() for start in starts], how)
        answers = []
        for row, some in zip(rows, texts, strict=True):
            names = [name_of(k) for k in range(len(self.events(row)))]
            lines = ["\n".join(f"{a} -> {b}" for a, b in edges_in(text, names)) for text in some]
            answers.append([tokenizer.encode(line, add_special_tokens=False) + stop[:1] for line in lines])
        return answers

    def events(self, row: Mapping[str, Any]) -> list[str]:
        """The row's events; without any, the lines of its prompt."""
        events = row.get(self.column)
        return list(events) if events else question(dict(row)).splitlines()

    def written(self, roles: Any, starts: Sequence[str], how: Mapping[str, Any]) -> list[list[str]]:
        """Texts that go on from these beginnings."""
        ids = [roles.renderer.tokenizer.encode(start) for start in starts]
        out = roles.policy.generate(ids, **how)
        return [[roles.renderer.answer(sample) for sample in samples] for samples in out]


def name_of(number: int) -> str:
    """The method of an event."""
    return f"event{number}"


def edges_in(text: str, names: Sequence[str]) -> list[Edge]:
    """Edges between declared events, each once, none to itself, in their order. Ends at another method."""
    declared, out = {*names}, []
    for a, b in EDGE.findall(re.split(r"\n\s*(?:def|class) ", text)[0]):
        if a != b and {a, b} <= declared and (a, b) not in out:
            out.append((a, b))
    return out


def f1(edges: Sequence[Edge], gold: Sequence[Edge]) -> float:
    """Of the edges of a graph; 1 where both are empty."""
    common = len({*edges} & {*gold})
    return 2 * common / (len({*edges}) + len({*gold})) if edges or gold else 1.0


def edit_distance(edges: Sequence[Edge], gold: Sequence[Edge]) -> int:
    """Edges to delete or insert: the edit distance of graphs on the same named events."""
    return len({*edges} ^ {*gold})


def consistency(samples: Sequence[Sequence[Edge]]) -> float:
    """The mean F1 of pairs of graphs of the same events, drawn several times."""
    values = [f1(a, b) for k, a in enumerate(samples) for b in samples[:k]]
    return sum(values) / len(values) if values else 1.0
