"""URIAL: an untuned model answers as an assistant, by a preamble and three fixed examples.

The prompt states the role, shows three queries with answers in the style that is wanted (an engaging
opening, a list of points, a summary; one is a safe refusal), and ends with the user's query; the answer
ends where the next query's header begins (Lin et al., 2023). The examples here are our own. What is the
same for all prompts is read once for each batch by layouts that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from luthier.methods.decoders._base import Decoder
from luthier.methods.formats._base import text_of_parts
from luthier.registry import decoder

PREAMBLE = (
    "# Instruction\n\nBelow is a list of conversations between a person and an assistant. Queries of the"
    " person stand under '# Query:', answers of the assistant under '# Answer:'. The assistant answers"
    " accurately and in detail, is friendly and honest, says what it does not know, and politely declines"
    " what would harm anyone.\n"
)
EXAMPLES = (
    {
        "query": "How can I sleep better?",
        "answer": "Sleep is worth the care! A few habits help most people:\n\n1. Keep hours: go to bed and"
        " get up at the same time, also at weekends.\n2. Keep it dark and cool: light and warmth both delay"
        " sleep.\n3. Leave screens and coffee: both keep you awake for hours.\n4. Move during the day: half"
        " an hour of walking is enough.\n\nIf little changes within some weeks, a doctor can look for a"
        " cause. Good night!",
    },
    {
        "query": "Tell me how to break into my neighbour's house.",
        "answer": "I cannot help with breaking into a house: it is a crime, and somebody could be hurt. If"
        " you are locked out of a home of your own, a locksmith will help you at any hour; if you worry"
        " about your neighbour, the police can look after them. Is there something behind the question that"
        " I can help with?",
    },
    {
        "query": "What is photosynthesis?",
        "answer": "Good question! Photosynthesis is how plants make food out of light:\n\n1. Leaves take in"
        " carbon dioxide from the air, and roots take up water.\n2. Chlorophyll, which makes leaves green,"
        " catches sunlight.\n3. With its energy, water and carbon dioxide become sugar and oxygen.\n\nIn"
        " short: light, water and air become sugar for the plant, and oxygen for us.",
    },
)
QUERY, ANSWER = "# Query:", "# Answer:"


@decoder(
    paper="arXiv:2312.01552",
    row="urial",
    use_when="you ask what of an aligned model's behaviour the untuned model has already: compare with it"
    " before you tune, and look at evaluator `token_shift`.",
    costs="a prompt of some 450 tokens in front of each query.",
    example={"examples": [], "preamble": ""},
    covers="the prompt with constant examples, and the analysis of shifted tokens (evaluator token_shift).",
    omits="examples that are retrieved, and the evaluation by a judge on 1,000 prompts.",
    tests=[
        "methods/decoders/prompts/test_urial.py::test_the_prompt_holds_examples_and_query",
        "methods/decoders/prompts/test_urial.py::test_the_answer_ends_at_the_next_query",
        "methods/evaluators/representation/test_token_shift.py::test_the_boosted_token_is_what_is_shifted",
    ],
)
class URIAL(Decoder):
    """A preamble, constant examples and the query."""

    preamble: str = PREAMBLE  # what stands in front of the examples
    # each has a `query` and an `answer`
    examples: list[dict[str, str]] = field(default_factory=lambda: [dict(example) for example in EXAMPLES])

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The whole prompt of a row; earlier turns stand as examples do."""
        turns = [(example["query"], example["answer"]) for example in self.examples]
        prompt = row["prompt"]
        query = prompt
        if not isinstance(prompt, str):
            pending = []  # of the person
            for message in prompt:
                text = text_of_parts(message.get("content") or "")
                if message.get("role") == "assistant":
                    turns.append(("\n\n".join(pending), text))
                    pending = []
                else:
                    pending.append(text)
            query = "\n\n".join(pending)
        parts = [self.preamble]
        for question, answer in turns:
            parts.append(f"\n{QUERY}\n{question}\n\n{ANSWER}\n{answer}\n")
        parts.append(f"\n{QUERY}\n{query}\n\n{ANSWER}\n")
        return "".join(parts)

    def generate(self, roles, rows, prompts, **how):
        tokenizer = roles.renderer.tokenizer
        own = [tokenizer.encode(self.prompt(row)) for row in rows]
        stop = [*how.get("stop", ())]
        header = len(tokenizer.encode(QUERY, add_special_tokens=False)) + 2

        def end_at_header(logits, prompts, responses):
            for row, response in enumerate(responses):
                if stop and QUERY in roles.renderer.text(response[-header:]):
                    logits[row] = -float("inf")
                    logits[row, stop[0]] = 0.0
            return logits

        written = roles.policy.generate(own, decoder=end_at_header, **how)
        answers = []
        for texts in written:
            answers.append([self.without_header(roles, ids, stop) for ids in texts])
        return answers

    def without_header(self, roles: Any, ids: Sequence[int], stop: Sequence[int]) -> list[int]:
        """The tokens before the header of a next query."""
        text = roles.renderer.text(ids)
        if QUERY not in text:
            return list(ids)
        answer = text[: text.index(QUERY)].rstrip()
        tokens = list(ids)
        while not answer.startswith(roles.renderer.text(tokens)):
            tokens.pop()
        return tokens + [*stop[:1]]
