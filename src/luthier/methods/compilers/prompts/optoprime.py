"""OptoPrime: a model proposes better values for the trainable nodes of a workflow, from its trace and
feedback on the outcome.

The trace of the outcome (its ancestors and nothing else) is written as lines `y = f(a, b)` with what each
function does and all values, then the feedback; the model answers in JSON. Proposals for unknown nodes, or of
another type, are ignored. As a compiler it tunes the instructions of a program's predictors; `optimizer(...)`
works on any graph of nodes:

    optimizer = compiler("optoprime").optimizer([x], "toy:lm")
    optimizer.zero_feedback(); optimizer.backward(output, "too high"); optimizer.step()
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.compilers._base import Compiler, drawn, ready
from luthier.programs.graph import Node, ancestors, names_of
from luthier.programs.models import Speaker, speaker
from luthier.programs.program import Asking, evaluate
from luthier.registry import compiler

TASK = "\n".join(
    (
        "A computation is listed under Code, a line for each call. Values under Variables may be changed,"
        " those under Inputs may not.",
        "Outputs says what the computation came to, Others what its steps did, Feedback what is thought of"
        " the outcome.",
        "Propose values of variables that make the feedback better. Keep to the constraints and to the type"
        " of each value.",
        'Answer with JSON only: {"reasoning": why, "answer": the answer itself, if one is asked for,'
        ' "suggestion": {name of a variable: its new value}}.',
        "Leave out variables that should stay; an empty suggestion changes nothing.",
    )
)


@compiler(
    paper="arXiv:2406.16218",
    row="trace-optoprime",
    use_when="instructions or other values of a workflow are to be improved from feedback in words,"
    " where no gradient exists.",
    costs="`steps` proposals of a model, and `batch_size` runs of the program for each.",
    covers="the trace of a program as a graph, feedback of any kind, and an optimizer that rewrites"
    " trainable nodes, also after an error.",
    omits="the paper's applications (robots, traffic).",
    tests=[
        "programs/test_programs.py::test_bisection_through_the_prompt_finds_the_minimum",
        "programs/test_programs.py::test_the_graph_of_an_outcome_is_its_ancestors",
        "programs/test_programs.py::test_an_error_is_feedback_and_the_next_step_runs",
    ],
)
class OptoPrime(Compiler):
    """Optimization with trace oracles: workflow, feedback, proposal."""

    objective: str = "Make the feedback as good as possible."  # the goal, in words
    memory_size: Annotated[int, Field(ge=0)] = 0  # earlier values and their feedback that the prompt includes
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024  # maximum tokens of an answer
    steps: Annotated[int, Field(ge=1)] = 8  # proposals, when a program is compiled
    batch_size: Annotated[int, Field(ge=1)] = 4  # rows whose outcomes a proposal is made from
    # model that proposes when a program is compiled, as for `using`; else the program's own model
    model: Any = None
    seed: int = 0  # random seed of the choice of rows

    def optimizer(self, parameters: Sequence[Node], model: Any) -> Optimizer:
        """An optimizer of trainable nodes, as one of tensors is used."""
        return Optimizer(self, list(parameters), speaker(model))

    def compile(self, program, rows, metric, teacher=None):
        ready(program, rows)
        tuned, clock = program.copy(), Clock(self.seed)
        predictors = tuned.predictors()
        texts = {
            name: Node(
                p.signature.instructions,
                f"{name}_instructions",
                True,
                f"a text for a model that is asked {p.signature}",
            )
            for name, p in predictors.items()
        }
        optimizer = self.optimizer(list(texts.values()), self.model or next(iter(predictors.values())).lm)
        best, best_score = tuned.copy(), evaluate(tuned, rows, metric)
        scores = [best_score]
        for step in range(self.steps):
            optimizer.zero_feedback()
            for i in drawn(len(rows), clock, "rows", step)[: self.batch_size]:
                prediction, trace = tuned.run(rows[i])
                labels = {k: v for k, v in rows[i].items() if k not in tuned.reads(rows[i])}
                optimizer.backward(
                    as_graph(trace, texts),
                    f"score {float(metric(rows[i], prediction)):g}; the row also has"
                    f" {json.dumps(labels, default=str)}",
                )
            if not optimizer.step():
                continue
            for name, p in predictors.items():
                p.signature = replace(p.signature, instructions=texts[name].data)
            scores.append(evaluate(tuned, rows, metric))
            if scores[-1] > best_score:
                best, best_score = tuned.copy(), scores[-1]
        best.compiled = {"score": best_score, "scores": scores}
        return best


def as_graph(trace: Sequence[Asking], texts: dict[str, Node]) -> Node:
    """The last answer as a node. An input that an earlier answer said word for word came from it."""
    sources: dict[str, Node] = {}
    last: Node | None = None
    for asking in trace:
        parents = [texts[asking.predictor], *(sources.get(str(v)) or Node(v) for v in asking.inputs.values())]
        description = f"A model is asked for {', '.join(asking.outputs)}, with these instructions."
        name = asking.predictor.replace(".", "_")
        last = Node(
            asking.outputs,
            function=name,
            description=description,
            parents=tuple(parents),
            arguments=("instructions", *asking.inputs),
        )
        sources |= {v: last for v in asking.outputs.values() if v}
    if last is None:
        raise RecipeError("the program called no predictor for a row, so it has nothing to tune")
    return last


class Optimizer:
    """zero_feedback(), backward(output, feedback), step()."""

    def __init__(self, settings: OptoPrime, parameters: list[Node], model: Speaker):
        if not parameters or not all(p.trainable for p in parameters):
            raise RecipeError("an optimizer needs trainable nodes: node(value, name='...', trainable=True)")
        names_of(parameters)
        self.settings, self.parameters, self.model = settings, parameters, model
        self.outcomes: list[tuple[Node, str]] = []
        self.memory: list[dict[str, Any]] = []
        self.ignored: list[str] = []  # what of the last answer was not taken, and why

    def zero_feedback(self) -> None:
        """Forget what was said of outcomes."""
        self.outcomes = []

    def backward(self, output: Node, feedback: Any) -> None:
        """What is thought of an outcome. An error's text is part of it."""
        text = str(feedback)
        self.outcomes.append(
            (
                output,
                f"{output.data}\n{text}".strip() if output.failed and str(output.data) not in text else text,
            )
        )

    def step(self) -> dict[str, Any]:
        """Ask, and take what is proposed: name -> new value."""
        if not self.outcomes:
            raise RecipeError("there is no feedback yet; call optimizer.backward(output, feedback) first")
        live = self.live()
        answer = self.model.ask(self.prompt(), max_new_tokens=self.settings.max_new_tokens)
        self.memory = [
            *self.memory,
            {"variables": {n: p.data for n, p in live.items()}, "feedback": self.feedback()},
        ][-32:]
        taken: dict[str, Any] = {}
        self.ignored = []
        proposed = suggestion(answer)
        if proposed is None:
            self.ignored.append("the answer has no JSON with a suggestion")
        for name, value in (proposed or {}).items():
            if name not in live:
                self.ignored.append(f"there is no variable '{name}'")
            elif (fitted := alike(value, live[name].data)) is None:
                self.ignored.append(f"{name} is {type(live[name].data).__name__}, not {value!r}")
            else:
                taken[name] = live[name].data = fitted
        return taken

    def live(self) -> dict[str, Node]:
        """The parameters that the outcomes came from, by name."""
        path = {id(n) for n in ancestors(*(n for n, _ in self.outcomes))}
        return {p.name: p for p in self.parameters if id(p) in path}

    def feedback(self) -> str:
        return "\n".join(
            f"{i + 1}. {text}" if len(self.outcomes) > 1 else text
            for i, (_, text) in enumerate(self.outcomes)
        )

    def prompt(self) -> str:
        """Everything that the model is shown."""
        outputs = [n for n, _ in self.outcomes]
        nodes = ancestors(*outputs)
        names, ends, live = names_of(nodes), {id(n) for n in outputs}, self.live()
        calls = [n for n in nodes if n.function]
        documentation = dict.fromkeys(f"{n.function}: {n.description}" for n in calls if n.description)
        inputs = [n for n in nodes if not n.function and n.name not in live]
        earlier = self.memory[-self.settings.memory_size :] if self.settings.memory_size else []
        sections = {
            "Task": f"{TASK}\n{self.settings.objective}",
            "Code": "\n".join(line(n, names) for n in calls),
            "Documentation": "\n".join(documentation),
            "Variables": dump({name: p.data for name, p in live.items()}),
            "Constraints": dump({name: p.constraint for name, p in live.items() if p.constraint}),
            "Inputs": dump({names[id(n)]: n.data for n in inputs}),
            "Others": dump({names[id(n)]: n.data for n in calls if id(n) not in ends}),
            "Outputs": dump({names[id(n)]: n.data for n in outputs}),
            "Earlier": "\n".join(map(dump, earlier)),
            "Feedback": self.feedback(),
        }
        return "\n\n".join(f"# {title}\n{text}" for title, text in sections.items() if text and text != "{}")


def line(n: Node, names: dict[int, str]) -> str:
    """y = f(a, b=c)"""
    arguments = [
        f"{a}={names[id(p)]}" if a else names[id(p)] for a, p in zip(n.arguments, n.parents, strict=True)
    ]
    return f"{names[id(n)]} = {n.function}({', '.join(arguments)})"


def dump(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, default=str)


def suggestion(answer: str) -> dict[str, Any] | None:
    """The suggestion of the first JSON object in an answer that has one; None where none has."""
    decoder = json.JSONDecoder()
    for at, letter in enumerate(answer):
        if letter == "{":
            try:
                parsed, _ = decoder.raw_decode(answer, at)
            except ValueError:
                continue
            if isinstance(parsed, dict) and isinstance(parsed.get("suggestion"), dict):
                return parsed["suggestion"]
    return None


def alike(value: Any, was: Any) -> Any:
    """A value as the type of what was there; None where it is of another."""
    if isinstance(was, bool) or isinstance(value, bool):
        return value if isinstance(was, bool) and isinstance(value, bool) else None
    if isinstance(was, float) and isinstance(value, int):
        return float(value)
    if isinstance(was, int) and isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is type(was) else None
