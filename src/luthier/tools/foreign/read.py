"""The files that other tools are started with: YAML, JSON, and shell scripts with a command line."""

from __future__ import annotations

import json
import operator
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import Damaged, RecipeError
from luthier.storage import files
from luthier.storage.bounded_yaml import MAX_CHARACTERS, load_yaml

# the word of a command line -> tool
COMMANDS = {
    "swift": "ms_swift",
    "megatron": "ms_swift",
    "llamafactory-cli": "llama_factory",
    "axolotl": "axolotl",
}
# keys of accelerate's own files, which say how processes are started
OF_ACCELERATE = ("compute_environment", "distributed_type")
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"$]*\"|'[^']*'|[^\s\"'$()]+)")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
ARITHMETIC = re.compile(r"\$\(expr\s([-+*/\d\s\\]+)\)|\$\(\(([-+*/\d\s]+)\)\)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
# words after a tool's name that do not train
INFERENCE = ("export", "infer", "eval", "sample", "deploy", "rollout", "app", "chat", "api", "webui")
# TRL's own scripts
SCRIPTS = ("sft.py", "dpo.py", "kto.py", "orpo.py", "grpo.py", "reward_modeling.py", "cpo.py", "rloo.py")


@dataclass(frozen=True)
class Written:
    """What a file says, before it is known what its keys mean."""

    values: dict[str, Any]
    tool: str | None = None  # where the command tells
    command: str = ""  # what is run: sft, rlhf, dpo.py, ...
    devices: int = 1


def read_configuration(path: Path) -> Written:
    """The keys and values of a file. Raises RecipeError where it cannot be read, or holds none."""
    try:
        text = files.read_text(path, 4 * MAX_CHARACTERS)
    except Damaged as why:
        raise RecipeError(f"{path} cannot be read: {why}") from None
    if path.suffix == ".sh":
        return read_shell(text, path)
    try:
        values = json.loads(text) if path.suffix == ".json" else load_yaml(text, path.name)
    except (ValueError, RecursionError) as why:
        reason = " ".join(str(why).split())
        raise RecipeError(f"{path} is neither valid YAML nor JSON: {reason}") from None
    if not isinstance(values, dict) or not values:
        raise RecipeError(f"{path} holds no `key: value` of a configuration")
    if any(key in values for key in OF_ACCELERATE):
        raise RecipeError(
            f"{path} is a configuration of accelerate, which says how processes are started: import the file"
            " that says what is trained"
        )
    return Written({str(key): value for key, value in values.items()})


def read_shell(text: str, path: Path) -> Written:
    """The command line of a script that starts one of the tools."""
    text = expand(re.sub(r"\\\s*\n", " ", text))
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        for i, word in enumerate(words):
            name = Path(word).name
            following = words[i + 1 : i + 2]
            if "swift/cli/" in word:
                return command_line(words[i + 1 :], "ms_swift", Path(word).stem, text, path)
            if name in COMMANDS and following and not following[0].startswith("-"):
                if following[0] in INFERENCE:
                    raise RecipeError(f"{path} runs `{name} {following[0]}`, which trains nothing")
                return command_line(words[i + 2 :], COMMANDS[name], following[0], text, path)
            if name == "trl" and following:
                return command_line(words[i + 2 :], "trl", following[0], text, path)
            if name in SCRIPTS:
                return command_line(words[i + 1 :], "trl", name.removesuffix(".py"), text, path)
    raise RecipeError(f"{path} starts none of LLaMA-Factory, axolotl, ms-swift and TRL")


def command_line(words: list[str], tool: str, command: str, text: str, path: Path) -> Written:
    """The options of a command as keys: `--key value`, `--key=value`, `--key` alone is true, several values
    are a list. A YAML file that it names is read first.
    """
    values: dict[str, Any] = {}
    files = [word for word in words[:1] if word.endswith((".yaml", ".yml", ".json"))]
    if "--config" in words:
        files += words[words.index("--config") + 1 :][:1]
    for file in files:
        if (path.parent / file).is_file():
            values.update(read_configuration(path.parent / file).values)
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = load_yaml(value, word) if equals else True
        elif key:
            value = word if word.startswith(("{", "[")) else plain_value(word)
            earlier = values[key]
            if earlier is True:
                values[key] = value
            else:
                values[key] = [*(earlier if isinstance(earlier, list) else [earlier]), value]
    return Written(values, tool, command, devices_of(text))


def plain_value(word: str) -> Any:
    """A word of a command line as YAML would read it; text where it is none."""
    try:
        return load_yaml(word)
    except RecipeError:
        return word


def expand(text: str) -> str:
    """A script with the variables that it sets itself, and with the arithmetic of whole numbers done."""
    variables: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        line = VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), line)
        names = re.sub(r"(?<=\$\(\()[^()]*", lambda match: replace_names(match[0], variables), line)
        line = ARITHMETIC.sub(compute, names)
        for name, value in ASSIGNMENT.findall(line.split(" --")[0]):
            variables[name] = value.strip("\"'")
        lines.append(line)
    return "\n".join(lines)


def replace_names(expression: str, variables: dict[str, str]) -> str:
    """An arithmetic expression with the values of its variables."""
    return re.sub(r"[A-Za-z_]\w*", lambda match: variables.get(match[0], match[0]), expression)


def compute(match: re.Match[str]) -> str:
    """The value of `$(expr 16 / 8)` or `$((16 / 8))`, from left to right, rounded down; as it stands where it
    has none.
    """
    first, *rest = re.findall(r"\d+|[-+*/]", match[1] or match[2]) or ["-"]
    if not first.isdigit() or len(rest) % 2:
        return match[0]
    value = int(first)
    for sign, word in zip(rest[::2], rest[1::2], strict=True):
        if not word.isdigit() or sign + word == "/0":
            return match[0]
        value = OPERATORS[sign](value, int(word))
    return str(value)


def devices_of(text: str) -> int:
    """The processes that a script starts."""
    counts = re.findall(r"(?:NPROC_PER_NODE=|--num_processes[ =]|--nproc_per_node[ =])(\d+)", text)
    return int(counts[-1]) if counts else 1
