"""What a prompt is for: the names of what goes in and what comes out, and how both are written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import RecipeError

NAME = re.compile(r"[a-z][a-z0-9_]*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Signature:
    """Inputs -> outputs. `Signature.of("question, context -> answer")` is how one is made.

    Its text is plain: `Question: ...` and so on, a line for each field; a model goes on behind the name of
    the first output.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    instructions: str = ""

    @staticmethod
    def of(said: str | Signature, instructions: str = "") -> Signature:
        """Raises RecipeError where the text is no signature."""
        if isinstance(said, Signature):
            return replace(said, instructions=instructions or said.instructions)
        left, arrow, right = said.partition("->")
        inputs, outputs = (tuple(n.strip() for n in side.split(",") if n.strip()) for side in (left, right))
        names = [*inputs, *outputs]
        if (
            not arrow
            or not inputs
            or not outputs
            or not all(map(NAME.match, names))
            or len(set(names)) < len(names)
        ):
            raise RecipeError(
                f"'{said}' is no signature: write names of inputs, an arrow, names of outputs, such as"
                " 'question -> answer'"
            )
        return Signature(inputs, outputs, instructions)

    def first(self, *outputs: str) -> Signature:
        """With further outputs, said before the others."""
        return replace(self, outputs=(*outputs, *self.outputs))

    def more(self, *inputs: str) -> Signature:
        """With further inputs, behind the others."""
        return replace(self, inputs=(*self.inputs, *inputs))

    def prompt(self, values: Mapping[str, Any], demos: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that a model continues. demos: earlier cases with inputs and outputs; fields that a demo
        lacks are left out.
        """
        missing = [n for n in self.inputs if n not in values]
        if missing:
            raise RecipeError(
                f"{self}: no value for '{missing[0]}' (given: {', '.join(values) or 'nothing'})"
            )
        cases = [self._lines(demo, (*self.inputs, *self.outputs)) for demo in demos]
        asked = f"{self._lines(values, self.inputs)}\n{label(self.outputs[0])}:"
        return "\n\n".join([*([self.instructions] if self.instructions else []), *cases, asked])

    def completion(self, values: Mapping[str, Any]) -> str:
        """What a model should say behind `prompt`, with the blank in front."""
        return self._lines(values, self.outputs).removeprefix(f"{label(self.outputs[0])}:")

    def read(self, text: str) -> dict[str, str]:
        """What a model said -> its outputs; an output that it does not name is ''. What it says beyond them
        is left out.
        """
        names = {label(n): n for n in (*self.inputs, *self.outputs)}
        mark = re.compile(rf"^({'|'.join(map(re.escape, names))}):", re.MULTILINE)
        text = text.strip()
        opened = label(self.outputs[0]) + ":"
        text = text if text.startswith(opened) else f"{opened} {text}"
        found, marks = dict.fromkeys(self.outputs, ""), list(mark.finditer(text))
        seen: set[str] = set()
        for here, there in zip(marks, [*marks[1:], None], strict=True):
            name = names[here[1]]
            if name in seen or name in self.inputs:  # the model goes on with a case of its own
                break
            seen.add(name)
            found[name] = text[here.end() : there.start() if there else None].strip()
        last = self.outputs[-1]
        return {**found, last: found[last].split("\n\n")[0].strip()}

    def _lines(self, values: Mapping[str, Any], names: Sequence[str]) -> str:
        return "\n".join(f"{label(n)}: {values[n]}".rstrip() for n in names if n in values)

    def __str__(self) -> str:
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def label(name: str) -> str:
    """search_query -> Search query."""
    return name.replace("_", " ").capitalize()
