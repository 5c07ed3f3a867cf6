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
    """A program's answer: outputs by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"the prediction has no output '{name}' (it has: {', '.join(self)})"
            ) from None


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

    compiled: dict[str, Any] = {}  # a compiler's notes
    _inputs: Sequence[str] | None = None  # what `forward` reads of a row; None: its parameters

    def forward(self, **inputs: Any) -> Prediction:
        """Inputs -> outputs. Its parameters are the columns that it reads of a row."""
        raise NotImplementedError

    def __call__(self, **inputs: Any) -> Prediction:
        return self.forward(**inputs)

    def predictors(self) -> dict[str, Predict]:
        """Every predictor by its dotted name, in the order in which they were set; a shared one once."""
        predictors: dict[str, Predict] = {}
        ids: set[int] = set()
        for name, value in _parts(self):
            inner = value.predictors()
            if isinstance(value, Predict):
                inner = {"": value}
            for end, predictor in inner.items():
                if id(predictor) not in ids:
                    ids.add(id(predictor))
                    predictors[f"{name}.{end}".rstrip(".")] = predictor
        return predictors

    def copy(self) -> Self:
        """Predictors of its own; models are shared."""
        shared: dict[int, Any] = {}
        for predictor in self.predictors().values():
            if predictor.lm is not None:
                shared[id(predictor.lm)] = predictor.lm
        return copy.deepcopy(self, shared)

    def using(self, who: Any) -> Self:
        """A copy all of whose predictors ask this model."""
        program = self.copy()
        lm = speaker(who)
        for predictor in program.predictors().values():
            predictor.lm = lm
        return program

    def state(self) -> dict[str, Any]:
        """Instructions and demonstrations of each predictor, as plain data."""
        state = {}
        for name, predictor in self.predictors().items():
            state[name] = {
                "instructions": predictor.signature.instructions,
                "demos": list(predictor.demos),
            }
        return state

    def load(self, state: Mapping[str, Any]) -> Self:
        """A copy with `state()` put back. Raises RecipeError where the predictors differ."""
        program = self.copy()
        own = program.predictors()
        if own.keys() != state.keys():
            raise RecipeError(
                f"the saved state belongs to another program: it has {', '.join(state)}, this"
                f" program {', '.join(own)}"
            )
        for name, predictor in own.items():
            instructions = state[name]["instructions"]
            predictor.signature = replace(predictor.signature, instructions=instructions)
            predictor.demos = list(state[name]["demos"])
        return program

    def run(
        self, row: Mapping[str, Any], temperature: float = 0.0, seed: int = 0
    ) -> tuple[Prediction, list[Asking]]:
        """The prediction for a row, and every call of a predictor on the way."""
        trace: list[Asking] = []
        names = {id(p): name for name, p in self.predictors().items()}
        inputs = {k: row[k] for k in self.reads(row)}
        with _sampling(How(temperature, seed, names, trace)):
            prediction = self(**inputs)
        return prediction, trace

    def reads(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of a row that `forward` takes."""
        if self._inputs is not None:
            return list(self._inputs)
        columns = []
        for parameter in inspect.signature(self.forward).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                continue
            if parameter.name in row:
                columns.append(parameter.name)
            elif parameter.default is parameter.empty:
                raise RecipeError(
                    f"{type(self).__name__} needs the column '{parameter.name}', but a row does"
                    f" not have it (it has: {', '.join(row)})"
                )
        return columns


class Predict(Program):
    """One question: a signature, with demonstrations in front."""

    def __init__(self, signature: str | Signature, instructions: str = "", max_new_tokens: int = 256):
        self.signature = Signature.of(signature, instructions)
        self.demos: list[dict[str, Any]] = []  # earlier cases, put before the question
        self.lm: Speaker | None = None
        self.max_new_tokens = max_new_tokens

    def predictors(self):
        return {"self": self}

    def reads(self, row):
        return list(self.signature.inputs)

    def forward(self, **inputs):
        if self.lm is None:
            raise RecipeError("the program has no model; set one: `program = program.using('toy:lm')`")
        how = _HOW.get() or How()
        question = {n: inputs.get(n) for n in self.signature.inputs}
        demos = []
        for demo in self.demos:
            if {n: demo.get(n) for n in question} != question:  # never its own answer
                demos.append(demo)
        text = self.lm.ask(
            self.signature.prompt(inputs, demos),
            temperature=how.temperature,
            seed=how.seed,
            max_new_tokens=self.max_new_tokens,
        )
        outputs = self.signature.read(text)
        if how.trace is not None:
            how.trace.append(Asking(how.names.get(id(self), "self"), question, outputs))
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
        self.n = n
        self.temperature = temperature
        self.think = ChainOfThought(signature)
        self._inputs = self.think.signature.inputs
        attempts = [f"attempt_{i + 1}" for i in range(n)]
        comparison = Signature.of(signature).more(*attempts).first("comparison")
        self.judge = Predict(comparison, max_new_tokens=512)

    def forward(self, **inputs):
        how = _HOW.get() or How()
        attempts = {}
        for i in range(self.n):
            with _sampling(replace(how, temperature=self.temperature, seed=how.seed * self.n + i)):
                prediction = self.think(**inputs)
            attempts[f"attempt_{i + 1}"] = " ".join(prediction.values())
        return self.judge(**inputs, **attempts)


class ReAct(Program):
    """Thoughts and calls of tools in turn, until the answer is given: `finish`, or after max_steps a last
    question.
    """

    def __init__(self, signature: str | Signature, tools: Sequence[Callable[[str], Any]], max_steps: int = 5):
        self.tools = {t.__name__: t for t in tools}
        self.max_steps = max_steps
        own = Signature.of(signature)
        self._inputs = own.inputs
        descriptions = []
        for name, tool in self.tools.items():
            description = inspect.getdoc(tool) or "no description"
            descriptions.append(f"{name}: {description.splitlines()[0]}")
        more = (
            f"Tools: {'; '.join(descriptions)}; finish: the answer is known."
            " Name one as tool, and what it is given as argument."
        )
        instructions = f"{own.instructions} {more}".strip()
        act = replace(own, outputs=("thought", "tool", "argument"), instructions=instructions)
        self.act = Predict(act.more("history"))
        self.answer = Predict(own.more("history"))

    def forward(self, **inputs):
        history, observations = "nothing yet", []
        for _ in range(self.max_steps):
            step = self.act(**inputs, history=history)
            name = step.tool.strip()
            if name == "finish":
                break
            if name in self.tools:
                try:
                    result = " ".join(str(self.tools[name](step.argument)).split())
                except Exception as error:  # what a tool objects to is news for the model
                    result = f"{type(error).__name__}: {error}"
            else:
                result = f"there is no tool {name}"
            observations.append(f"{step.tool}({step.argument}) says: {result}")
            history = "; ".join(observations)
        return Prediction(self.answer(**inputs, history=history), history=history)


class ProgramOfThought(Program):
    """The model writes Python that prints the answer; it runs in the sandbox. An error is shown, and it may
    write again.
    """

    def __init__(self, signature: str | Signature, tries: int = 2, timeout: float = 5.0):
        own = Signature.of(signature)
        if len(own.outputs) != 1:
            raise RecipeError(f"{own}: ProgramOfThought needs a signature with exactly one output")
        self.tries, self.timeout, self.output = tries, timeout, own.outputs[0]
        self._inputs = own.inputs
        instructions = f"{own.instructions} Write Python that prints the {self.output}.".strip()
        write = replace(own, outputs=("code",), instructions=instructions)
        self.write = Predict(write.more("earlier_error"))

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


class Majority(Program):
    """Several programs on the same inputs; of each output the most frequent value, of equals the first."""

    def __init__(self, programs: Sequence[Program]):
        if not programs:
            raise RecipeError("Majority needs at least one program")
        self.programs = list(programs)

    def forward(self, **inputs):
        predictions = [program(**inputs) for program in self.programs]
        majority = Prediction()
        for name in predictions[0]:
            votes: Counter[str] = Counter()
            for prediction in predictions:
                votes[prediction.get(name, "")] += 1
            majority[name] = votes.most_common(1)[0][0]
        return majority

    def reads(self, row):
        return self.programs[0].reads(row)


def evaluate(program: Program, rows: Sequence[Mapping[str, Any]], metric: Metric) -> float:
    """The mean of the metric over rows."""
    if not rows:
        raise RecipeError("evaluating a program needs at least one row")
    total = 0.0
    for row in rows:
        prediction, _ = program.run(row)
        total += float(metric(row, prediction))
    return total / len(rows)


def rewarded(reward: Any, output: str | None = None) -> Metric:
    """Any reward as a metric: of one output, the last unless it is named."""
    judge = build("reward", reward)

    def metric(row: Mapping[str, Any], prediction: Prediction) -> float:
        name = output or list(prediction)[-1]
        return judge.scores(dict(row), [str(prediction[name])])[0]

    return metric


@contextmanager
def _sampling(how: How) -> Iterator[None]:
    """Every predictor asks like this, for a while."""
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


def _parts(program: Program) -> Iterator[tuple[str, Program]]:
    """The programs and predictors among the attributes, also those in lists: ("name" or "name.0", part)."""
    for name, value in vars(program).items():
        if isinstance(value, Program):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                if isinstance(part, Program):
                    yield f"{name}.{i}", part
