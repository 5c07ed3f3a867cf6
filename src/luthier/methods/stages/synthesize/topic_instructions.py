"""Instructions about topics by one model, verified by another: as many for each topic as its budget says.

The instructor writes an instruction about a topic in one of several forms, with its response, as JSON; the
verifier rates the pair from 0 to 100 on each axis, and a pair below `least` on any of them leaves
(HoneyBee, for materials science). Plan `honeybee` moves the budgets to where the tuned model errs."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, json_in
from luthier.registry import stage

FORMS = ("an open question", "information extraction", "classification", "multiple choice", "summarisation")
AXES = ("accuracy", "relevance", "completeness", "reasonableness")
WRITE = (
    "Write one instruction about {topic}, in the form of {form}, and the response to it. Reply with JSON"
    ' alone: {"instruction": "...", "response": "..."}'
)
VERIFY = (
    "Rate this response about {topic} from 0 to 100 for {axes}. Reply with JSON alone, a number for each.\n\n"
    "Instruction:\n{instruction}\n\nResponse:\n{response}"
)


@stage(
    example={"counts": {"numbers": 1}, "max_new_tokens": 4},
    paper="arXiv:2310.08511",
    row="honeybee-matsci",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    contract={"gives": "a tiny model writes no JSON"},
    use_when="a field has topics, a model that can write about them and another one that can check it.",
    costs="a reply of the instructor and one of the verifier for each attempt.",
    covers="instructor and verifier as two models, four axes with a least score on each, a budget by topic.",
    omits="the authors' prompts, and rejection by the mean over the axes.",
    tests=[
        "methods/plans/rounds/test_honeybee.py::test_rows_below_the_threshold_on_any_axis_leave",
        "methods/plans/rounds/test_honeybee.py::test_budgets_follow_errors",
    ],
)
class TopicInstructions(Synthesis):
    """New rows behind those that are there; columns `source` (the topic) and `provenance` (with ratings)."""

    counts: dict[str, Annotated[int, Field(ge=0)]] = field(default_factory=dict)  # topic -> new rows
    forms: tuple[str, ...] = FORMS  # of instructions, in turn
    verifier: Any = None  # who rates, as `writer`; null: `writer`
    axes: tuple[str, ...] = AXES  # what is rated
    least: Annotated[float, Field(ge=0, le=100)] = 95.0  # rating on every axis
    attempts: Annotated[int, Field(ge=1)] = 2  # pairs that are written for each row at most
    draw: int = 0  # number of the draw; another number gives other instructions

    def __call__(self, rows, roles):
        rows = list(rows)
        if not rows:
            return []
        writer, verifier = self.author(roles), self.author(roles, self.verifier)
        out = []
        for topic, count in self.counts.items():
            accepted = 0
            for attempt in range(self.attempts * count):
                if accepted == count:
                    break
                pair = self.pair(writer, topic, attempt)
                ratings = self.ratings(verifier, topic, *pair) if all(pair) else {}
                why = self.fault(pair, ratings)
                if why:
                    writer.reject(topic, "\n".join(pair), why)
                    continue
                key = f"{topic}-{self.draw}-{attempt}"
                row = {**writer.row(rows[0], key, *pair), "source": topic}
                checked = {"verifier": verifier.speaker.name, "ratings": ratings}
                row["provenance"] |= {"sources": [topic], **checked}
                out.append(row)
                accepted += 1
        writer.finish([], out, "")
        return [*rows, *out]

    def pair(self, writer: Author, topic: str, attempt: int) -> tuple[str, str]:
        """(instruction, response); empty where the reply is none."""
        form = self.forms[attempt % len(self.forms)]
        prompt = WRITE.replace("{topic}", topic).replace("{form}", form)
        (reply,) = writer.ask([prompt], [f"{topic} {self.draw} {attempt}"])
        content = json_in(reply)
        if not isinstance(content, dict):
            return "", ""
        return str(content.get("instruction") or "").strip(), str(content.get("response") or "").strip()

    def ratings(self, verifier: Author, topic: str, instruction: str, response: str) -> dict[str, float]:
        """Of each axis that the verifier rated."""
        prompt = VERIFY.replace("{topic}", topic).replace("{axes}", ", ".join(self.axes))
        prompt = prompt.replace("{instruction}", instruction).replace("{response}", response)
        (reply,) = verifier.ask([prompt], ["verify"], 0.0)
        content = json_in(reply)
        out = {}
        for axis in self.axes:
            value = content.get(axis) if isinstance(content, dict) else None
            if isinstance(value, (int, float)):
                out[axis] = float(value)
        return out

    def fault(self, pair: tuple[str, str], ratings: dict[str, float]) -> str:
        """Why a pair leaves; '' where it stays."""
        if not all(pair):
            return "is no instruction with a response"
        if len(ratings) < len(self.axes):
            return "is not rated on every axis"
        low = [axis for axis in self.axes if ratings[axis] < self.least]
        return f"is rated too low in {low[0]}" if low else ""
