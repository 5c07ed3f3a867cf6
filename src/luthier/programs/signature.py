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
    def of(signature: str | Signature, instructions: str = "") -> Signature:
        """Raises RecipeError where the text is no signature."""
        if isinstance(signature, Signature):
            return replace(signature, instructions=instructions or signature.instructions)
        left, arrow, right = signature.partition("->")
        inputs, outputs = field_names(left), field_names(right)
        names = inputs + outputs
        valid = all(map(NAME.match, names)) and len(set(names)) == len(names)
        if not arrow or not inputs or not outputs or not valid:
            raise RecipeError(
                f"'{signature}' is not a signature; write input names, an arrow and output"
                " names, such as 'question -> answer'"
            )
        return Signature(inputs, outputs, instructions)

    def first(self, *outputs: str) -> Signature:
        """With further outputs, before the others."""
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
            raise RecipeError(f"{self}: no value for '{missing[0]}' (values: {', '.join(values) or 'none'})")
        cases = [self._lines(demo, (*self.inputs, *self.outputs)) for demo in demos]
        question = f"{self._lines(values, self.inputs)}\n{label(self.outputs[0])}:"
        parts = [*cases, question]
        if self.instructions:
            parts.insert(0, self.instructions)
        return "\n\n".join(parts)

    def completion(self, values: Mapping[str, Any]) -> str:
        """The text that should follow `prompt`, with the blank in front."""
        return self._lines(values, self.outputs).removeprefix(f"{label(self.outputs[0])}:")

    def read(self, text: str) -> dict[str, str]:
        """A model's text -> the outputs; '' for an output that it does not name. Other text is left out."""
        names = {label(n): n for n in (*self.inputs, *self.outputs)}
        mark = re.compile(rf"^({'|'.join(map(re.escape, names))}):", re.MULTILINE)
        text = text.strip()
        opened = label(self.outputs[0]) + ":"
        if not text.startswith(opened):
            text = f"{opened} {text}"
        outputs = dict.fromkeys(self.outputs, "")
        marks = list(mark.finditer(text))
        ends = [*(m.start() for m in marks[1:]), len(text)]
        read: set[str] = set()
        for here, end in zip(marks, ends, strict=True):
            name = names[here[1]]
            if name in read or name in self.inputs:  # the model goes on with a case of its own
                break
            read.add(name)
            outputs[name] = text[here.end() : end].strip()
        last = self.outputs[-1]
        outputs[last] = outputs[last].split("\n\n")[0].strip()
        return outputs

    def _lines(self, values: Mapping[str, Any], names: Sequence[str]) -> str:
        """A line for each of these fields that has a value."""
        lines = []
        for name in names:
            if name in values:
                lines.append(f"{label(name)}: {values[name]}".rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def field_names(text: str) -> tuple[str, ...]:
    """ "question, context" -> its names."""
    names = []
    for name in text.split(","):
        if name.strip():
            names.append(name.strip())
    return tuple(names)


def label(name: str) -> str:
    """search_query -> Search query."""
    return name.replace("_", " ").capitalize()
