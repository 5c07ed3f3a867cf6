"""Preference pairs: a chosen and a rejected completion of one prompt, which may be implied by their common
beginning.
"""

from luthier.methods.formats._base import (
    PAIRS,
    BadRow,
    Format,
    alike,
    as_turns,
    first_of,
    instruction,
    last_reply,
    messages,
    opened,
    side,
    tools,
)
from luthier.registry import row_format

# what the better and the worse side are called: TRL, ms-swift, OpenAI, StackExchange
SIDES = {
    "chosen": "rejected",
    "response": "rejected_response",
    "preferred_output": "non_preferred_output",
    "response_j": "response_k",
}
MARK = "\n\nAssistant:"  # where a reply begins in transcripts such as HH-RLHF


@row_format(
    provides=[PAIRS],
    use_when="rows have `chosen` and `rejected`, as text or messages, for `dpo` and similar objectives.",
)
class Preference(Format):
    """{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}, as text or as messages.

    Without a prompt column, the prompt is the turns that both begin with; of two texts, their common
    beginning up to the last reply mark or word. Texts that both repeat their prompt (three words or more) are
    read without it. Also ms-swift's rejected_response beside query and response
    or beside messages (whose last turn it replaces), OpenAI's input, preferred_output and
    non_preferred_output, and StackExchange's response_j and response_k.
    """

    reading = "`chosen` is preferred to `rejected`"
    objective = "dpo"
    columns = (
        "chosen rejected",
        "prompt chosen rejected",
        "question chosen rejected",
        "messages chosen rejected",
        "conversations chosen rejected",
        "instruction chosen rejected",
        "query response rejected_response",
        "prompt response rejected_response",
        "messages rejected_response",
        "input preferred_output non_preferred_output",
        "question response_j response_k",
        "prompt response_j response_k",
    )
    optional = "tools input system history"

    def read(self, raw):
        better = first_of({name: raw.get(worse) for name, worse in SIDES.items()}, SIDES, "chosen")
        if better == "response" and raw.get("messages") is not None:
            return self.read(with_last_turn(raw))
        if better == "preferred_output":
            raw = openai_row(raw)
        worse = SIDES[better]
        chosen, rejected = side(raw.get(better), better), side(raw.get(worse), worse)
        if chosen == rejected:
            raise BadRow(f"{better} and {worse} are the same")
        readers = {
            "prompt": side,
            "question": side,
            "query": side,
            "messages": messages,
            "conversations": messages,
            "instruction": lambda value, name: instruction(raw),
        }
        prompts = [read(raw[name], name) for name, read in readers.items() if raw.get(name) is not None]
        whole = (
            isinstance(chosen, list)
            and isinstance(rejected, list)
            and chosen[0] == rejected[0]
            and len(chosen) > 1
        )
        if whole or not prompts:
            prompt, pair = shared(chosen, rejected)
        else:
            prompt, pair = alike(prompts[0], chosen, rejected)
            pair = without_prompt(prompt, pair)
        if raw.get("system") and "instruction" not in raw:
            prompt, pair = alike(as_turns(prompt, "user"), *pair)
            prompt = [{"role": "system", "content": side(raw["system"], "system")}, *prompt]
        return {"prompt": prompt, "completions": pair, "scores": [1.0, 0.0], "tools": tools(raw)}


def with_last_turn(raw: dict) -> dict:
    """ms-swift's messages and rejected_response as a prompt with a response and a rejected one."""
    prompt, reply = last_reply(messages(raw["messages"], "messages"), "messages")
    rest = {name: value for name, value in raw.items() if name not in ("messages", "rejected_response")}
    return {**rest, "prompt": prompt, "chosen": reply, "rejected": raw["rejected_response"]}


def openai_row(raw: dict) -> dict:
    """OpenAI's row with the messages and tools of its `input` as the prompt and the tools."""
    request = opened(raw.get("input"), "input")
    if isinstance(request, dict) and "messages" in request:
        return {**raw, "prompt": request["messages"], "tools": request.get("tools"), "input": None}
    return {**raw, "prompt": request, "input": None}


def without_prompt(prompt, pair: list) -> list:
    """Texts that both begin with their prompt, of three words or more, without it."""
    if not isinstance(prompt, str) or len(prompt.split()) < 3:
        return pair
    if all(len(text) > len(prompt) and text.startswith(prompt) for text in pair):
        return [text[len(prompt) :] for text in pair]
    return pair


def shared(chosen, rejected):
    """The prompt that two completions imply, and what is left of them."""
    if type(chosen) is not type(rejected):
        raise BadRow("chosen and rejected have different types, and there is no prompt")
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, str):
        head = chosen[:n]
        mark = head.rfind(MARK)
        if mark >= 0:
            n = mark + len(MARK)
        else:
            n = max(head.rfind(" "), head.rfind("\n"), 0)
    if n == 0:
        raise BadRow("there is no prompt, and chosen and rejected do not start with the same text")
    if not chosen[n:] or not rejected[n:]:
        raise BadRow("there is no prompt, and one of chosen and rejected is the beginning of the other")
    return alike(chosen[:n], chosen[n:], rejected[n:])
