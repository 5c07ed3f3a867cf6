"""One declaration per method: the decorator every method file carries, and everything that follows from it.

A method is a file. Its stem is its name in YAML, its docs page and its test id; the folder it lies in is its
kind. `card` reads a declaration without importing it (listings stay fast); `find` imports exactly one file.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import io
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from luthier.errors import RecipeError

T = TypeVar("T", bound=type)
HOME = Path(__file__).parents[1]
FOLDERS = {
    "tuner": "tuners",
    "quantizer": "quantizers",
    "objective": "objectives",
    "estimator": "estimators",
    "transform": "transforms",
    "optimizer": "optimizers",
    "stage": "stages",
    "reward": "rewards",
    "role": "roles",
    "plan": "plans",
    "compiler": "compilers",
    "merger": "mergers",
    "decoder": "decoders",
    "evaluator": "evaluators",
    "architecture": "architectures",
    "format": "formats",
    "searcher": "searchers",
}

GROUPS = {"compiler": "programs"}  # entry-point groups that are not called as their folder


@dataclass(frozen=True)
class Range:
    """Where a setting is worth searching: `r: Annotated[int, Range(4, 64, log=True)] = 8`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, init=False)
class Steps:
    """Values worth searching, ascending: `width: Annotated[int, Steps(0, 1, 2, 4)] = 4`."""

    values: tuple[float, ...]

    def __init__(self, *values: float):
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Card:
    """What a declaration says, read without importing it."""

    kind: str
    name: str
    module: str
    paper: str | None  # "arXiv:2106.09685", or None where no paper introduced it
    rows: tuple[str, ...]  # short names in the catalogue of papers
    wants: frozenset[str]
    gives: frozenset[str]
    drops: frozenset[str]
    summary: str  # first line of the file


@dataclass_transform(frozen_default=True, kw_only_default=True)
def family(cls: T) -> T:
    """Settings and code that several method files share."""
    return dataclass(frozen=True, kw_only=True)(cls)


def declare(kind: str):
    """The decorator of method files of a kind. Its type is inferred: so type checkers see what it makes of a
    class.
    """

    @dataclass_transform(frozen_default=True, kw_only_default=True)
    def mark(
        *,
        paper: str | None = None,
        row: str = "",
        wants: str = "",
        gives: str = "",
        drops: str = "",
        contract: dict[str, str] | None = None,
    ) -> Callable[[T], T]:
        """Make a class a method: frozen, checked settings; words for what it wants, gives and takes away.

        `contract` names contract tests that do not hold for this method, each with the reason.
        """

        def wrap(cls: T) -> T:
            cls = family(cls)
            cls.kind, cls.name = kind, cls.__module__.rsplit(".", 1)[-1]
            cls.paper, cls.rows = paper, tuple(row.split())
            cls.wants, cls.gives, cls.drops = (frozenset(words.split()) for words in (wants, gives, drops))
            cls.contract = contract or {}
            cls.__pydantic_config__ = ConfigDict(
                extra="forbid", validate_default=True, arbitrary_types_allowed=True
            )
            return cls

        return wrap

    return mark


tuner = declare("tuner")
quantizer = declare("quantizer")
objective = declare("objective")
estimator = declare("estimator")
transform = declare("transform")
optimizer = declare("optimizer")
stage = declare("stage")
reward = declare("reward")
role = declare("role")
plan = declare("plan")
compiler = declare("compiler")
merger = declare("merger")
decoder = declare("decoder")
evaluator = declare("evaluator")
architecture = declare("architecture")
row_format = declare("format")
searcher = declare("searcher")


# ---------------------------------------------------------------------------------------------- discovery


@cache
def modules(kind: str) -> dict[str, str]:
    """Name -> dotted module of every method of a kind: our folder, then what other packages announce."""
    if kind not in FOLDERS:
        raise RecipeError(f"there is no kind '{kind}'{meant(kind, FOLDERS)}")
    root = HOME / "methods" / FOLDERS[kind]
    found = {}
    for path in sorted(root.rglob("[!_]*.py")):
        dotted = ".".join(
            ("luthier", "methods", FOLDERS[kind], *path.relative_to(root).with_suffix("").parts)
        )
        if path.stem in found:
            raise RuntimeError(f"two {kind}s are called '{path.stem}': {found[path.stem]} and {dotted}")
        found[path.stem] = dotted
    for point in announced().select(group=f"luthier.{GROUPS.get(kind, FOLDERS[kind])}"):
        found.setdefault(point.name, point.value)
    return found


@cache
def announced() -> Any:
    """By all installed packages: each call reads a file of each of them."""
    return entry_points()


def names(kind: str) -> list[str]:
    """Every method of a kind, in alphabetical order."""
    return sorted(modules(kind))


def known(kind: str, name: str) -> str:
    """The module of a method; a sentence with the nearest name where there is none."""
    if not isinstance(name, str) or name not in modules(kind):
        raise RecipeError(f"there is no {kind} '{name}'{meant(name, names(kind))}")
    return modules(kind)[name]


@cache
def find(kind: str, name: str) -> type:
    """The class of a method. Imports the one file that the name points at."""
    module = known(kind, name)
    for member in vars(importlib.import_module(module)).values():
        if isinstance(member, type) and member.__module__ == module and getattr(member, "kind", None) == kind:
            return member
    raise RuntimeError(f"{module} declares no {kind}")


@cache
def card(kind: str, name: str) -> Card:
    """What a method's file declares, from its source alone."""
    module = known(kind, name)
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    said = {}
    for node in tree.body:
        for mark in getattr(node, "decorator_list", []):
            if (
                isinstance(mark, ast.Call)
                and isinstance(mark.func, ast.Name)
                and mark.func.id in (kind, f"row_{kind}")
            ):
                said = {k.arg: ast.literal_eval(k.value) for k in mark.keywords if k.arg != "contract"}
    summary = " ".join((ast.get_docstring(tree) or "").split("\n\n", 1)[0].split())
    words = {k: frozenset(said.get(k, "").split()) for k in ("wants", "gives", "drops")}
    return Card(
        kind, name, module, said.get("paper"), tuple(said.get("row", "").split()), summary=summary, **words
    )


def source_of(module: str) -> Path:
    """The file of a module; of ours without importing the packages above it."""
    package, *inner = module.split(".")
    if package == "luthier":
        return HOME.joinpath(*inner).with_suffix(".py")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise RuntimeError(f"{module}, which an installed package announces, has no file")
    return Path(found.origin)


def cards(kind: str | None = None) -> list[Card]:
    """All declarations, of one kind or of every kind."""
    return [card(k, n) for k in ([kind] if kind else FOLDERS) for n in names(k)]


def meant(word: object, choices: Iterable[object]) -> str:
    """'; did you mean ...?' where something near exists, else what exists if that is short."""
    there = [str(c) for c in choices]
    near = difflib.get_close_matches(str(word), there, 1, cutoff=0.55)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f" (there is: {', '.join(sorted(there))})" if 0 < len(there) <= 24 else ""


# ---------------------------------------------------------------------------------------------- building


def build(kind: str, spec: Any) -> Any:
    """'lora' or {name: lora, r: 16} -> the method with its settings, checked.

    Raises RecipeError for an unknown name or setting, a value of the wrong type, or one out of range.
    """
    if getattr(spec, "kind", None) == kind:
        return spec
    if spec is False:
        spec = "off"  # as YAML reads it where it is not in quotes
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or "name" not in spec:
        raise RecipeError(f"{kind}: give a name or {{name: ..., setting: ...}}, not {spec!r}")
    settings = {k: v for k, v in spec.items() if k != "name"}
    cls = find(kind, spec["name"])
    allowed = [f.name for f in fields(cls)]
    for key in settings:
        if key not in allowed:
            raise RecipeError(f"{kind} '{cls.name}' has no setting '{key}'{meant(key, allowed)}")
    try:
        return _reader(cls).validate_python(settings)
    except ValidationError as error:
        raise RecipeError(f"{kind} '{cls.name}': {complaints(error)}") from None


@cache
def _reader(cls: type) -> TypeAdapter:
    """What checks a class's settings: made once, as making it takes longer than all it is asked."""
    return TypeAdapter(cls)


def complaints(error: ValidationError) -> str:
    """Pydantic's errors as one line: which setting, what is wrong, what was given."""
    said = []
    for e in error.errors():
        inner = (e.get("ctx") or {}).get("error")
        reason = str(inner) if isinstance(inner, ValueError) else e["msg"][:1].lower() + e["msg"][1:]
        where = ".".join(
            str(p)
            for p in e["loc"]
            if not str(p).startswith(("function-", "is-instance", "union", "constrained"))
        )
        said.append(f"{where}: {reason}" + ("" if isinstance(inner, ValueError) else f", not {e['input']!r}"))
    return "; ".join(dict.fromkeys(said))


def one(kind: str) -> BeforeValidator:
    """For a field that holds another method: `reward: Annotated[Any, one("reward")] = "exact_match"`."""
    return BeforeValidator(partial(build, kind))


def many(kind: str) -> BeforeValidator:
    """For a field that holds several: `inner: Annotated[tuple, many("transform")] = ("adam",)`."""
    return BeforeValidator(
        lambda v: tuple(build(kind, x) for x in (v if isinstance(v, (list, tuple)) else [v]))
    )


def spec(method: Any) -> Any:
    """The way back: a built method as plain data, every setting written out."""
    if isinstance(method, dict):
        return {k: spec(v) for k, v in method.items()}
    if isinstance(method, (list, tuple)):
        return [spec(m) for m in method]
    if is_dataclass(method) and hasattr(method, "kind"):
        return {"name": method.name, **{f.name: spec(getattr(method, f.name)) for f in fields(method)}}
    return method


def inside(method: Any) -> Iterator[Any]:
    """The methods held in a method's fields."""
    for f in fields(method):
        value = getattr(method, f.name)
        yield from (v for v in (value if isinstance(value, tuple) else (value,)) if hasattr(v, "kind"))


def wants_of(method: Any) -> frozenset[str]:
    """What a method wants under its settings (`needs` where they change it), and what the methods in it want."""
    own = frozenset(getattr(method, "needs", method.wants))
    return own.union(*(wants_of(m) for m in inside(method)))


def gives_of(method: Any) -> frozenset[str]:
    """What a method provides under its settings (`provides` where they change it)."""
    return frozenset(getattr(method, "provides", method.gives))


# ---------------------------------------------------------------------------------------------- documentation


@cache
def helps(cls: type) -> dict[str, str]:
    """Setting -> the comment beside it, or on the lines above it; a family's settings are explained there."""
    out = {}
    for base in reversed([c for c in cls.__mro__ if is_dataclass(c) and "__annotations__" in vars(c)]):
        source = inspect.cleandoc(inspect.getsource(base))
        beside, alone = comments(source)
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                out[node.target.id] = beside.get(node.end_lineno or 0) or comment_above(node.lineno, alone)
    return out


def comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Line -> comment: of those that stand behind code, and of those that have the line to themselves."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = alone if token.line.lstrip().startswith("#") else beside
            lines[token.start[0]] = token.string.lstrip("# ").strip()
    return beside, alone


def comment_above(line: int, alone: dict[int, str]) -> str:
    """The block of comment lines that ends just above a line, as one text."""
    words: list[str] = []
    while line - 1 in alone:
        line -= 1
        words.insert(0, alone[line])
    return " ".join(words)


def page(cls: type) -> str:
    """The docs page of a method: what its file says, its paper, its settings, what it wants and gives."""
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    lines = [f"# {cls.name}", "", module, "", inspect.getdoc(cls) or "", ""]
    if cls.paper:
        lines += [
            (
                f"Paper: [{cls.paper}](https://arxiv.org/abs/{cls.paper.removeprefix('arXiv:')})"
                if cls.paper.startswith("arXiv:")
                else f"Paper: {cls.paper}"
            ),
            "",
        ]
    for label, words in (("Wants", cls.wants), ("Gives", cls.gives), ("Takes away", cls.drops)):
        if words:
            lines += [f"{label}: {', '.join(f'`{w}`' for w in sorted(words))}.", ""]
    if fields(cls):
        lines += ["| setting | default | meaning |", "| - | - | - |"]
        bar = lambda text: str(text).replace("|", r"\|")  # Markdown ends a cell at a bar, even within code
        lines += [
            f"| `{f.name}` | `{bar(default_of(f))}` | {bar(helps(cls).get(f.name, ''))} |"
            for f in fields(cls)
        ]
        lines += [""]
    language = "python" if cls.kind == "compiler" else "yaml"
    lines += [f"```{language}", WRITTEN.get(cls.kind, f"{cls.kind}: {{}}").format(cls.name), "```", ""]
    return "\n".join(lines)


WRITTEN = {  # how a recipe names a method of a kind, where it is not `kind: name`
    "quantizer": "quantization: {}",
    "optimizer": "optim: {}",
    "transform": "transforms: [{}]",
    "stage": "stages: [{}]",
    "evaluator": "evaluate: [{}]",
    "role": "roles: {{reference: {}}}",
    "reward": "live: [{{name: score, reward: {}}}]",
    "merger": "start: {{merge: {}, of: [runs/a, runs/b]}}",
    "format": "data: {{path: rows.jsonl, format: {}}}",
    "searcher": "# luthier search recipe.yaml --sampler {}",
    "compiler": "tuned = compiler({!r}).compile(program, rows, metric)",  # Python: programs are no recipes
}


def default_of(f: Any) -> str:
    """The default of a setting; `required` where there is none."""
    if f.default_factory is not MISSING:
        return shown(f.default_factory())
    return "required" if f.default is MISSING else shown(spec(f.default))


def shown(value: Any) -> str:
    """A default as YAML users write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(shown, value)) + "]" if isinstance(value, (list, tuple)) else str(value)
