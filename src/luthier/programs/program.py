"""Programs: Python code that asks models through predictors. A predictor's instructions, demonstrations and
model can be tuned.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import Self

from luthier.errors import RecipeError
from luthier.programs.models import Speaker, speaker
from luthier.programs.signature import Signature
from luthier.registry import build

Metric = Callable[[Mapping[str, Any], "Prediction"], float]


class Prediction(dict):
    """What a program says: outputs by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this prediction has no '{name}' (it has: {', '.join(self)})") from None


@dataclass(frozen=True)
class Asking:
    """One question of a predictor, and what came back."""

    predictor: str  # its name in the program
    inputs: dict[str, Any]
    outputs: dict[str, str]


@dataclass(frozen=True)
class How:
    """How models are asked for a while."""

    temperature: float = 0.0
    seed: int = 0
    names: Mapping[int, str] = field(default_factory=dict)  # id of a predictor -> its name
    trace: list[Asking] | None = None


_HOW: ContextVar[How | None] = ContextVar("how", default=None)


class Program:
    """Subclass it: predictors and programs as attributes, `forward` in Python."""

    compiled: dict[str, Any] = {}  # what a compiler noted

    def forward(self, **inputs: Any) -> Prediction:
        """Inputs -> outputs. Its parameters are the columns that it reads of a row."""
        raise NotImplementedError

    def __call__(self, **inputs: Any) -> Prediction:
        return self.forward(**inputs)

    def predictors(self) -> dict[str, Predict]:
        """Every predictor by its dotted name, in the order in which they were made; a shared one once."""
        found: dict[str, Predict] = {}
        for name, value in _parts(self):
            inner = {"": value} if isinstance(value, Predict) else value.predictors()
            for end, predictor in inner.items():
                if all(p is not predictor for p in found.values()):
                    found[f"{name}.{end}".rstrip(".")] = predictor
        return found

    def copy(self) -> Self:
        """Predictors of its own; models are shared."""
        kept = {id(p.lm): p.lm for p in self.predictors().values() if p.lm is not None}
        return copy.deepcopy(self, dict(kept))

    def using(self, who: Any) -> Self:
        """A copy all of whose predictors ask this model."""
        made, lm = self.copy(), speaker(who)
        for predictor in made.predictors().values():
            predictor.lm = lm
        return made

    def state(self) -> dict[str, Any]:
        """Instructions and demonstrations of each predictor, as plain data."""
        return {
            name: {"instructions": p.signature.instructions, "demos": list(p.demos)}
            for name, p in self.predictors().items()
        }

    def load(self, state: Mapping[str, Any]) -> Self:
        """A copy with `state()` put back. Raises RecipeError where the predictors differ."""
        made = self.copy()
        own = made.predictors()
        if own.keys() != state.keys():
            raise RecipeError(
                f"this state is of another program: it has {', '.join(state)}, and the program"
                f" {', '.join(own)}"
            )
        for name, p in own.items():
            p.signature, p.demos = (
                replace(p.signature, instructions=state[name]["instructions"]),
                list(state[name]["demos"]),
            )
        return made

    def run(
        self, row: Mapping[str, Any], temperature: float = 0.0, seed: int = 0
    ) -> tuple[Prediction, list[Asking]]:
        """What it says of a row, and every question that was asked on the way."""
        trace: list[Asking] = []
        names = {id(p): name for name, p in self.predictors().items()}
        with _asked(How(temperature, seed, names, trace)):
            said = self(**{k: row[k] for k in self.reads(row)})
        return said, trace

    def reads(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of a row that `forward` takes."""
        took = inspect.signature(self.forward).parameters.values()
        named = [p.name for p in took if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in took if p.name in named and p.default is p.empty and p.name not in row]
        if missing:
            raise RecipeError(
                f"{type(self).__name__} reads '{missing[0]}', and a row has no such column (it has:"
                f" {', '.join(row)})"
            )
        return [n for n in named if n in row]


class Predict(Program):
    """One question: a signature, with demonstrations in front."""

    def __init__(self, signature: str | Signature, instructions: str = "", max_new_tokens: int = 256):
        self.signature = Signature.of(signature, instructions)
        self.demos: list[dict[str, Any]] = []  # earlier cases, shown before the question
        self.lm: Speaker | None = None
        self.max_new_tokens = max_new_tokens

    def predictors(self):
        return {"self": self}

    def reads(self, row):
        return list(self.signature.inputs)

    def forward(self, **inputs):
        if self.lm is None:
            raise RecipeError("this program has no model yet: `program = program.using('toy:lm')`")
        how = _HOW.get() or How()
        # never its own answer
        shown = [d for d in self.demos if any(d.get(n) != inputs.get(n) for n in self.signature.inputs)]
        text = self.lm.ask(
            self.signature.prompt(inputs, shown),
            temperature=how.temperature,
            seed=how.seed,
            max_new_tokens=self.max_new_tokens,
        )
        outputs = self.signature.read(text)
        if how.trace is not None:
            asked = {n: inputs[n] for n in self.signature.inputs}
            how.trace.append(Asking(how.names.get(id(self), "self"), asked, outputs))
        return Prediction(outputs)


class ChainOfThought(Predict):
    """A predictor that gives its reasons first, as an output `reasoning`."""

    def __init__(self, signature: str | Signature, instructions: str = "", max_new_tokens: int = 512):
        super().__init__(
            Signature.of(signature, instructions).first("reasoning"), max_new_tokens=max_new_tokens
        )


class MultiChainComparison(Program):
    """Several chains of thought, drawn at a temperature, and a last question that compares them."""

    def __init__(self, signature: str | Signature, n: int = 3, temperature: float = 0.7):
        self.n, self.temperature = n, temperature
        self.think = ChainOfThought(signature)
        own = Signature.of(signature)
        self.judge = Predict(
            own.more(*(f"attempt_{i + 1}" for i in range(n))).first("comparison"), max_new_tokens=512
        )

    def forward(self, **inputs):
        how = _HOW.get() or How()
        tried = {}
        for i in range(self.n):
            with _asked(replace(how, temperature=self.temperature, seed=how.seed * self.n + i)):
                said = self.think(**inputs)
            tried[f"attempt_{i + 1}"] = " ".join(said.values())
        return self.judge(**inputs, **tried)

    def reads(self, row):
        return self.think.reads(row)


class ReAct(Program):
    """Thoughts and calls of tools in turn, until the answer is given: `finish`, or after max_steps a last
    question.
    """

    def __init__(self, signature: str | Signature, tools: Sequence[Callable[[str], Any]], max_steps: int = 5):
        self.tools, self.max_steps = {t.__name__: t for t in tools}, max_steps
        own = Signature.of(signature)
        told = "; ".join(
            f"{n}: {(inspect.getdoc(t) or 'no description').splitlines()[0]}" for n, t in self.tools.items()
        )
        more = (
            f"Tools: {told}; finish: the answer is known. Name one as tool, and what it is given as argument."
        )
        act = replace(
            own, outputs=("thought", "tool", "argument"), instructions=f"{own.instructions} {more}".strip()
        )
        self.act, self.answer = Predict(act.more("history")), Predict(own.more("history"))

    def forward(self, **inputs):
        history = "nothing yet"
        for _ in range(self.max_steps):
            step = self.act(**inputs, history=history)
            if step.tool.strip() == "finish":
                break
            seen = f"{step.tool}({step.argument}) says: {self._call(step.tool.strip(), step.argument)}"
            history = seen if history == "nothing yet" else f"{history}; {seen}"
        return Prediction(self.answer(**inputs, history=history), history=history)

    def _call(self, name: str, argument: str) -> str:
        if name not in self.tools:
            return f"there is no tool {name}"
        try:
            return " ".join(str(self.tools[name](argument)).split())
        except Exception as error:  # what a tool objects to is news for the model
            return f"{type(error).__name__}: {error}"

    def reads(self, row):
        return [n for n in self.act.signature.inputs if n != "history"]


class ProgramOfThought(Program):
    """The model writes Python that prints the answer; it runs in the sandbox. An error is shown, and it may
    write again.
    """

    def __init__(self, signature: str | Signature, tries: int = 2, timeout: float = 5.0):
        own = Signature.of(signature)
        if len(own.outputs) != 1:
            raise RecipeError(f"{own}: a program of thought prints one output")
        self.tries, self.timeout, self.output = tries, timeout, own.outputs[0]
        told = f"Write Python that prints the {self.output}."
        self.write = Predict(
            replace(own, outputs=("code",), instructions=f"{own.instructions} {told}".strip()).more(
                "earlier_error"
            )
        )

    def forward(self, **inputs):
        from luthier.sandbox.code import extract_code
        from luthier.sandbox.sandbox import run

        error = "none"
        for _ in range(self.tries):
            code = extract_code(self.write(**inputs, earlier_error=error).code)
            done = run(code, timeout=self.timeout, memory_mb=512)
            if done.ok:
                return Prediction({self.output: done.stdout.strip(), "code": code})
            error = done.reason
        return Prediction({self.output: "", "code": code})

    def reads(self, row):
        return [n for n in self.write.signature.inputs if n != "earlier_error"]


class Majority(Program):
    """Several programs asked alike; of each output what most of them say, the earlier where as many do."""

    def __init__(self, programs: Sequence[Program]):
        if not programs:
            raise RecipeError("a majority wants at least one program")
        self.programs = list(programs)

    def forward(self, **inputs):
        said = [p(**inputs) for p in self.programs]
        return Prediction({k: Counter(s.get(k, "") for s in said).most_common(1)[0][0] for k in said[0]})

    def reads(self, row):
        return self.programs[0].reads(row)


def evaluate(program: Program, rows: Sequence[Mapping[str, Any]], metric: Metric) -> float:
    """The mean of the metric over rows."""
    if not rows:
        raise RecipeError("there are no rows to judge a program by")
    return sum(float(metric(row, program.run(row)[0])) for row in rows) / len(rows)


def rewarded(reward: Any, output: str | None = None) -> Metric:
    """Any reward as a metric: of one output, the last unless it is named."""
    judge = build("reward", reward)

    def metric(row: Mapping[str, Any], said: Prediction) -> float:
        return judge.scores(dict(row), [str(said[output] if output else list(said.values())[-1])])[0]

    return metric


@contextmanager
def _asked(how: How) -> Iterator[None]:
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


def _parts(program: Program) -> Iterator[tuple[str, Program]]:
    for name, value in vars(program).items():
        for i, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(part, Program):
                yield (f"{name}.{i}" if isinstance(value, (list, tuple)) else name), part
