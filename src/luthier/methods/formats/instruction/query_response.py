"""A request and its response under the names that public sets give them: Dolly, OpenOrca, P3, XSum."""

import re

from luthier.methods.formats._base import (
    COMPLETIONS,
    BadRow,
    Format,
    alike,
    as_turns,
    first_of,
    instruction,
    side,
    text,
    tools,
    with_system,
)
from luthier.registry import row_format

# of a row that holds several of these the first is read
PAIRS = (
    *("instruction response", "instruction completion", "instruction answer"),
    *("query response", "query output", "query answer"),
    *("question response", "question output", "question solution", "question completion"),
    *("prompt response", "prompt output"),
    *("problem solution", "problem response", "problem answer"),
    *("input output", "input response", "input target", "inputs targets"),
    *("human assistant", "user assistant", "user bot"),
    *("document summary", "dialogue summary", "article highlights", "article summary", "text summary"),
    *("source target", "context response"),
)
BOXED = re.compile(r".*\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL)


@row_format(
    provides=[COMPLETIONS],
    use_when="rows have a request and a response under other usual names, such as `query` and `response`.",
)
class QueryResponse(Format):
    r"""{"query": "Hi", "response": "Hello!", "system": "...", "history": [["...", "..."]]}; also instruction,
    question, prompt, problem, input, document, source with response, output, solution, target, summary.

    Always read as a conversation, so that training and inference use the chat template. An `input` or a
    `context` beside the request follows it. Where there is no `answer` and the response holds a \boxed{...},
    its content becomes `answer`, which rewards compare with.
    """

    reading = "a request and the response that is learned"
    columns = PAIRS
    optional = "system system_prompt history tools input context"
    generic = True

    def used(self, raw):
        names = names_of(raw)
        if isinstance(side(raw[names[0]], names[0]), list):  # a history of its own; nothing is put into it
            return {*names, "system", "system_prompt", "tools"}
        return {*names, *self.optional.split()}

    def read(self, raw):
        request, reply = names_of(raw)
        prompt = self.prompt(raw, request, reply)
        prompt, completions = alike(prompt, side(raw[reply], reply))
        return {
            "prompt": prompt,
            "completions": completions,
            "answer": raw.get("answer") or last_boxed(completions[0]),
            "tools": tools(raw),
        }

    def prompt(self, raw: dict, request: str, reply: str) -> list[dict]:
        """The system text, the history and the request as turns."""
        content = side(raw[request], request)
        system = raw.get(first_of(raw, ("system", "system_prompt")))
        if isinstance(content, list):
            return with_system(content, {"system": system})
        for name in ("input", "context"):
            if name not in (request, reply) and raw.get(name) not in (None, ""):
                content += "\n\n" + text(raw, name)
        return instruction({"instruction": content, "system": system, "history": raw.get("history")})


def names_of(raw: dict) -> list[str]:
    """The columns of a row's request and response."""
    for pair in PAIRS:
        names = pair.split()
        if all(raw.get(name) is not None for name in names):
            return names
    present = next((pair.split() for pair in PAIRS if set(pair.split()) <= raw.keys()), ["query", "response"])
    empty = [name for name in present if raw.get(name) is None]
    raise BadRow(f"{' and '.join(empty)} is missing")


def last_boxed(completion: str | list[dict]) -> str | None:
    r"""What the last \boxed{...} of a completion holds; None where there is none."""
    written = as_turns(completion)[-1]["content"]
    match = BOXED.match(written) if isinstance(written, str) else None
    return match.group(1) if match else None
