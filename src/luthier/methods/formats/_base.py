"""What the row formats share: how a file's columns are recognised, and how text, turns and tools are read.

A format converts one raw row (a dict as in the file) into luthier's row shape:

    {"id", "prompt": str | [message], "completions": [str | [message]], "scores": [float], "tools", "label",
    ...}

Preference pairs have scores [1.0, 0.0], unpaired rows [1.0] or [-1.0], ranked lists the given ones. Columns
that the format does not read are kept under their own names. A row that cannot be read raises BadRow with the
reason.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from luthier.registry import Capability, Column, family

COMPLETIONS = Column("completions", per="completion", says="rows with completions")
PAIRS = Capability(
    "pairs",
    says="rows with at least two completions of different score (prompt/chosen/rejected)",
    advice="use prompt/chosen/rejected rows, or create pairs with the stages rollout, score, pairs",
    of_rows=True,
)
SCORES = Column(
    "scores",
    per="completion",
    says="a score for each completion",
    advice="e.g. the stage `{name: score, reward: exact_match}`",
)
ANSWER = Column("answer", says="rows with a reference `answer`", example=("0", "1", "2"))
TESTS = Column("tests", says="rows with `tests`", example=("assert True",))
TOOLS = Column("tools", says="rows with `tools`", example=([],))
SOURCE = Column("source", says="rows with a `source`", example=("train", "validation"))
RATIONALE = Column("rationale", says="rows with a `rationale`", example=("because",))
PROMPTS = Capability("prompts", says="rows with only a prompt", of_rows=True)
RANKED = Capability("ranked", says="rows with ranked completions", of_rows=True)
UNPAIRED = Capability("unpaired", says="rows with one completion labelled good or bad", of_rows=True)
LABELLED = Capability("labelled", says="rows with a class name", of_rows=True)

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # what model families call a turn's reasoning
# keys of a message that are read here; every other one is handed to the chat template as it is
READ_KEYS = {
    *("role", "from", "content", "value", "tool_calls", "function_call"),
    *("loss", "train", "loss_scale", "weight"),
}
MEANT_NULLS = ("default", "const")  # keys of a tool's schema whose null means something
TRUTH = {
    "true": True,
    "yes": True,
    "1": True,
    "good": True,
    "false": False,
    "no": False,
    "0": False,
    "bad": False,
    "-1": False,
}


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason, in a short sentence."""


@family
class Format:
    """One public row shape. `columns` lists the sets of columns by which it is recognised, each as words."""

    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[str] = ""  # columns read where they are there
    # its columns also occur in richer shapes: yields to another format that fits
    generic: ClassVar[bool] = False
    reading: ClassVar[str] = "a prompt and what answers it"  # what its columns say, for people
    objective: ClassVar[str] = "sft"  # the one to begin with
    advice: ClassVar[str] = ""  # what else that takes in a recipe

    chat: bool = False  # a plain-text prompt becomes a user turn, so that the chat template is used

    @classmethod
    def fit(cls, columns: Iterable[str]) -> int:
        """How many columns of the largest of its shapes that is there; 0 where none is."""
        columns = set(columns)
        sizes = [0]
        for shape in cls.columns:
            names = shape.split()
            if columns.issuperset(names):
                sizes.append(len(names))
        return max(sizes)

    @classmethod
    def matches(cls, columns: Iterable[str]) -> bool:
        """Whether rows with these columns can be read."""
        return cls.fit(columns) > 0

    @property
    def prompt_end(self) -> str:
        """What ends a prompt of plain text, so that the completion begins on its own line."""
        if self.chat:
            return ""
        return "\n"

    def reads(self, raw: dict) -> bool:
        """Whether a row is a good one of this format."""
        try:
            return bool(self.row(raw))
        except Exception:  # whatever is in a row: it is none of this format
            return False

    def row(self, raw: dict) -> dict:
        """The canonical row: what `read` makes of it, and every column that was not read. Raises BadRow."""
        used = self.used(raw)
        read = {k: v for k, v in self.read(raw).items() if v is not None}
        if read.get("tools"):
            drop_undeclared_nulls(read)
        if is_continued(read["prompt"]):  # the reply has begun: all completions go on from there
            *turns, begun = read["prompt"]
            read |= {"prompt": turns, "prefix": text_of_parts(begun["content"]) + read.get("prefix", "")}
        if self.chat and isinstance(read["prompt"], str) and read["prompt"]:
            read["prompt"] = [{"role": "user", "content": read["prompt"]}]
            if "completions" in read:
                read["completions"] = [as_turns(completion) for completion in read["completions"]]
        # A column that has another meaning in canonical rows must not pass for one of theirs.
        unread = {}
        for name, value in raw.items():
            if name in used:
                continue
            if name in ("completions", "scores"):
                name = f"raw_{name}"
            unread[name] = value
        return {**unread, **read}

    def used(self, raw: dict) -> set[str]:
        """The columns of a row that are read: those of the shapes that it has, and the optional ones."""
        used = set(self.optional.split())
        for shape in self.columns:
            if set(shape.split()) <= raw.keys():
                used.update(shape.split())
        return used

    def read(self, raw: dict) -> dict:
        """prompt, completions, ... from the format's own columns. Raises BadRow."""
        raise NotImplementedError


def kind_of(value: Any) -> str:
    """A value's type, in words."""
    kinds = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    if value is None:
        return "missing"
    return kinds.get(type(value), type(value).__name__)


def unusable(value: Any, name: str, problem: str) -> BadRow:
    """Why a column cannot be used: it is missing, or has this problem."""
    if value is None:
        problem = "is missing"
    return BadRow(f"{name} {problem}")


def blank(value: str) -> str:
    """What a text without a word is."""
    if value:
        return "is only white space"
    return "is empty"


def first_of(raw: dict, names: Iterable[str], default: str = "") -> str:
    """The first of these columns that is there."""
    for name in names:
        if raw.get(name) is not None:
            return name
    return default


def as_list(value: Any) -> list:
    """A list as it is, and anything else as the only one of its kind."""
    if isinstance(value, list):
        return value
    return [value]


def text(raw: dict, name: str, empty: bool = False) -> str:
    """The text in a column; a number as text. Raises BadRow where it is missing, of another type, or blank
    (`empty`: "" is allowed).
    """
    value = raw.get(name)
    if value is None and empty:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return plain(value, name)
    if not isinstance(value, str):
        raise unusable(value, name, f"is {kind_of(value)}, not text")
    if not value.strip() and not (empty and not value):
        raise BadRow(f"{name} {blank(value)}")
    return value


def opened(value: Any, name: str) -> Any:
    """A list or object that a csv or parquet cell holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            parsed = json.loads(value)
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRow(f"{name} contains a lone surrogate, which is not a character") from None
        except (ValueError, RecursionError):
            raise BadRow(f"{name} looks like JSON but cannot be parsed") from None
        if "\\u0000" in value:
            raise BadRow(f"{name} contains a NUL byte")
        return parsed
    return value


def truth(raw: dict, name: str) -> bool:
    """A good/bad mark: true/false, 1/0, or those as text."""
    value = raw.get(name)
    word = str(value).lower().removesuffix(".0")
    if value is None or word not in TRUTH:
        raise unusable(value, name, f"is {value!r}, not true or false")
    return TRUTH[word]


def plain(value: Any, name: str, words: tuple[str, str] = ("true", "false")) -> str:
    """A label or short answer as text: 51.0 -> '51', true -> words[0]."""
    if isinstance(value, bool):
        true, false = words
        if value:
            return true
        return false
    if isinstance(value, (int, float)):
        if value != value or value in (float("inf"), float("-inf")):
            raise BadRow(f"{name} is not a finite number")
        if value == int(value):
            value = int(value)
        return str(value)
    return text({name: value}, name)


def numbers(value: Any, name: str) -> list[float]:
    """A list of finite numbers."""
    value = opened(value, name)
    if not isinstance(value, list) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
    ):
        raise BadRow(f"{name} is not a list of numbers")
    if not all(abs(v) <= sys.float_info.max for v in value):
        raise BadRow(f"{name} contains a number that is not finite")
    return [float(v) for v in value]


# ------------------------------------------------------------------------------------------ turns and tools


def calls(value: Any, name: str) -> list[dict]:
    """Tool calls as chat templates take them: [{"type": "function", "function": {"name", "arguments":
    {...}}}].
    """
    value = opened(value, name)
    read = []
    for call in as_list(value):
        call = opened(call, name)
        inner = None
        if isinstance(call, dict):
            inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"{name} contains a tool call without a name")
        arguments = opened(inner.get("arguments", {}), name)
        identity = {k: call[k] for k in ("id",) if call.get(k) is not None}
        function = {"name": inner["name"], "arguments": arguments}
        read.append({"type": "function", **identity, "function": function})
    return read


def tools(raw: dict) -> list[dict] | None:
    """The `tools` column as chat templates take it; bare declarations are wrapped as functions."""
    value = opened(raw.get("tools"), "tools")
    if value in (None, "", []):
        return None
    declarations = []
    for item in as_list(value):
        declaration = opened(item, "tools")
        if not isinstance(declaration, dict):
            raise BadRow("tools is not a list of tool declarations")
        if "function" not in declaration:
            declaration = {"type": "function", "function": declaration}
        declarations.append(without_nulls(declaration, MEANT_NULLS))
    return declarations


def without_nulls(value: Any, meant: Collection[str] = ()) -> Any:
    """A value without the keys that are null in its objects, at any depth, except keys that are `meant` so.

    Tables give every object every key: what one tool's arguments lack is null there because another tool
    has it.
    """
    if isinstance(value, list):
        return [without_nulls(inner, meant) for inner in value]
    if not isinstance(value, dict):
        return value
    full = {}
    for key, inner in value.items():
        if inner is not None or key in meant:
            full[key] = without_nulls(inner, meant)
    return full


def drop_undeclared_nulls(row: dict) -> None:
    """Take arguments that are null, and that their tool does not declare, out of a row's tool calls."""
    declared: dict[str, set[str]] = {}
    for declaration in row["tools"]:
        function = declaration["function"]
        if isinstance(function, dict):
            parameters = function.get("parameters") or {}
            declared[str(function.get("name"))] = set(parameters.get("properties") or ())
    turns = list(row["prompt"])
    for completion in row.get("completions", ()):
        turns += completion
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            arguments, names = function["arguments"], declared.get(function["name"])
            if names is None or not isinstance(arguments, dict):
                continue
            for name in [name for name, value in arguments.items() if value is None]:
                if name not in names:
                    del arguments[name]


def messages(value: Any, name: str) -> list[dict]:
    """Turns as [{"role", "content", ...}], from role/content or from/value; a system turn without text is
    left out. Raises BadRow naming the turn.
    """
    value = opened(value, name)
    if isinstance(value, dict):
        value = turns_of_columns(value) or [value]
    if not isinstance(value, list) or not value:
        raise unusable(value, name, "is not a list with at least one message")
    value = [turn for each in value for turn in exchange(each) or [each]]
    turns = []
    for i, turn in enumerate(value, 1):
        if not is_empty_system(turn):
            turns.append(message(turn, f"turn {i} of {name}"))
    if not turns:
        raise BadRow(f"{name} has no turn but an empty system turn")
    return turns


def turns_of_columns(value: dict) -> list[dict]:
    """Turns of {"role": [...], "content": [...]}, as datasets stores lists of objects; none where it is not
    that.
    """
    lists = {key: cells for key, cells in value.items() if isinstance(cells, list)}
    if not {"role", "from"} & lists.keys() or len({len(cells) for cells in lists.values()}) != 1:
        return []
    return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]


def exchange(turn: Any) -> list[dict]:
    """The two turns of {"human": "...", "assistant": "..."}; none where it is not that."""
    if not isinstance(turn, dict) or len(turn) < 2 or not turn.keys() <= ROLES.keys():
        return []
    return [{"role": name, "content": content} for name, content in turn.items() if content is not None]


def is_empty_system(turn: Any) -> bool:
    """Whether a turn is a system prompt that says nothing, as some tools write one into every row."""
    if not isinstance(turn, dict) or turn.get("role", turn.get("from")) not in ("system", "developer"):
        return False
    content = turn.get("content", turn.get("value"))
    return content is None or (isinstance(content, str) and not content.strip())


def message(turn: Any, where: str) -> dict:
    """One turn, checked. Keys that are not read here go to the chat template."""
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {kind_of(turn)}, not a message")
    role, content = role_of(turn, where), turn.get("content", turn.get("value"))
    read = {k: v for k, v in turn.items() if k not in READ_KEYS and v is not None} | learning(turn, where)
    tool_calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "function_call":  # ShareGPT's turn that is nothing but a call
        tool_calls = tool_calls or content
        content = ""
    parts = parts_of(content)
    if parts:
        content = without_reasoning(parts, read)
    # a turn may consist of a call, of reasoning, or of a refusal alone
    speaks = tool_calls or read.get("refusal") or any(map(read.get, REASONING))
    if content is None and speaks:
        content = ""
    if tool_calls:
        read["tool_calls"] = calls(tool_calls, where)
    if isinstance(content, (dict, list)) and role == "tool" and not parts:
        content = json.dumps(content, ensure_ascii=False)
    elif not isinstance(content, str) and not parts:
        if content is None:
            raise BadRow(f"{where} has no content")
        raise BadRow(f"{where} is {kind_of(content)}, not text")
    elif isinstance(content, str) and not content.strip() and role != "tool" and not speaks:
        raise BadRow(f"{where} ({role}) {blank(content)}")
    if role == "function_call":
        role = "assistant"
    return {"role": role, "content": content, **read}


def parts_of(content: Any) -> list[dict]:
    """Content that is a list of parts (text, image, audio), each with its type; empty where it is none."""
    if not isinstance(content, list):
        return []
    parts = []
    for part in content:
        if not isinstance(part, dict) or not ("type" in part or isinstance(part.get("text"), str)):
            return []
        parts.append({"type": "text", **without_nulls(part)})
    return parts


def without_reasoning(parts: list[dict], turn: dict) -> list[dict] | str:
    """The parts that are not reasoning; reasoning becomes the turn's own. "" where no other part is left."""
    left = []
    for part in parts:
        if part["type"] in ("thinking", "reasoning"):
            texts = [part.get(name) for name in ("thinking", "reasoning", "text")]
            written = next((text for text in texts if isinstance(text, str)), "")
            turn["reasoning_content"] = turn.get("reasoning_content", "") + written
        else:
            left.append(part)
    return left or ""


def text_of_parts(content: str | list[dict]) -> str:
    """Content as text: that of its text parts, one after the other."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def is_continued(prompt: str | list[dict]) -> bool:
    """Whether a prompt ends in the beginning of the assistant's own text, which the reply goes on with."""
    if isinstance(prompt, str) or len(prompt) < 2:
        return False
    last = prompt[-1]
    return last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def role_of(turn: dict, where: str) -> str:
    """Whose turn it is, in the canonical words (system, user, assistant, tool)."""
    name = turn.get("role", turn.get("from"))
    if name is None:
        raise BadRow(f"{where} has no role")
    if not isinstance(name, str) or name not in ROLES:
        raise BadRow(f"{where} has the unknown role {name!r}")
    return ROLES[name]


def with_system(turns: list[dict], raw: dict) -> list[dict]:
    """Turns after the system prompt of the column `system`. Raises BadRow where they have one too."""
    if not raw.get("system"):
        return turns
    if turns[0]["role"] == "system":
        raise BadRow("there are two system prompts: the system column and the first turn")
    return [{"role": "system", "content": text(raw, "system")}, *turns]


def learning(turn: dict, where: str) -> dict:
    """Whether a turn is learned (`loss`, axolotl's `train`) and how much it counts (`loss_scale`, OpenAI's
    `weight`).
    """
    weights: dict[str, Any] = {}
    for name in ("loss", "train"):
        if turn.get(name) is not None:
            weights["loss"] = truth(turn, name)
    for name in ("loss_scale", "weight"):
        if turn.get(name) is not None:
            weights["loss_scale"] = numbers([turn[name]], f"{name} of {where}")[0]
            if weights["loss_scale"] < 0:
                raise BadRow(f"{name} of {where} is negative")
    return weights


def conversation(turns: list[dict], name: str, assistant_only: bool) -> tuple[list[dict], list[dict]]:
    """Turns -> prompt and rest. Where a turn before the first reply is to be learned too, there is no prompt
    but the empty one.
    """
    if not assistant_only:
        turns = [{**t, "loss": t.get("loss", True)} for t in turns]
    prompt, rest = first_reply(turns, name)
    if not any(turn.get("loss") for turn in prompt):
        return prompt, rest
    if assistant_only:
        turns = prompt + rest
    return [], turns


def first_reply(turns: list[dict], name: str) -> tuple[list[dict], list[dict]]:
    """Turns -> what comes before the first assistant turn, and the rest up to the last one. A greeting with
    which the assistant begins answers nobody: it is read, and the next turn is the first that is learned.
    """
    places = replies(turns, name)
    return cut(turns, next(filter(None, places), 0), name)


def last_reply(turns: list[dict], name: str) -> tuple[list[dict], list[dict]]:
    """Turns -> what comes before the last assistant turn, and that turn."""
    return cut(turns, max(replies(turns, name)), name)


def replies(turns: list[dict], name: str) -> list[int]:
    """Where the assistant speaks."""
    places = [i for i, t in enumerate(turns) if t["role"] == "assistant"]
    if not places:
        raise BadRow(
            f"{name} has no assistant turn to train on (for prompts to sample answers to, name the"
            " column prompt)"
        )
    return places


def cut(turns: list[dict], place: int, name: str) -> tuple[list[dict], list[dict]]:
    """Turns cut at a place; what follows the last assistant turn teaches nothing and is dropped."""
    if place == 0:
        raise BadRow(f"{name} begins with an assistant turn, without a prompt before it")
    return turns[:place], turns[place : max(replies(turns, name)) + 1]


def side(value: Any, name: str) -> str | list[dict]:
    """A prompt or a completion: text, or turns where the column holds a list or an object."""
    if isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"(role|from|content|value)"', value):
        value = opened(value, name)
    if isinstance(value, (list, dict)):
        return messages(value, name)
    return text({name: value}, name)


def prompt_of(raw: dict) -> str | list[dict]:
    """The `prompt` column, which may be empty."""
    if raw.get("prompt") == "":
        return ""
    return side(raw.get("prompt"), "prompt")


def as_turns(value: str | list[dict], role: str = "assistant") -> list[dict]:
    """A prompt or a completion as turns: text is what `role` says."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value


def alike(prompt: str | list[dict], *completions: str | list[dict]) -> tuple[Any, list]:
    """Prompt and completions all as text, or all as turns; a completion that repeats the prompt's turns loses
    them.
    """
    if isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
        return prompt, list(completions)
    prompt = as_turns(prompt, "user")
    replies = []
    for completion in completions:
        turns = as_turns(completion)
        if turns[: len(prompt)] == prompt:
            turns = turns[len(prompt) :]
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRow("a completion has no assistant turn to train on")
        replies.append(turns)
    return prompt, replies


def instruction(raw: dict) -> list[dict]:
    """Alpaca's instruction and input as one user turn, after the system text and the history."""
    content = text(raw, "instruction")
    more = raw.get("input") or ""
    if not isinstance(more, str) or more.strip():
        content = f"{content}\n\n{text(raw, 'input')}"
    system, history = raw.get("system") or "", opened(raw.get("history"), "history") or []
    if not isinstance(history, list) or not all(
        isinstance(h, (list, tuple)) and len(h) == 2 for h in history
    ):
        raise BadRow("history is not a list of [question, answer] pairs")
    turns = []
    if system:
        turns.append({"role": "system", "content": text(raw, "system")})
    for question, answer in history:
        turns += [{"role": "user", "content": text({"history": question}, "history")}]
        turns += [{"role": "assistant", "content": text({"history": answer}, "history")}]
    return [*turns, {"role": "user", "content": content}]
