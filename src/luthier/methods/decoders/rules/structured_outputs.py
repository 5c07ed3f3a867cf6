"""Answers of a required form: JSON of a schema, a text that matches a regular expression, one of several
texts, or a sentence of a grammar.

Before each token, those after which the answer could no longer have the form are forbidden, and the end is
allowed only where the form is complete; among the others the model decides (its distribution, renormalised:
not the model's distribution given that the whole answer fits). An answer that is cut at `max_new_tokens` may
be incomplete. Settings are named as vLLM names its structured outputs. The automata are llguidance's.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.decoders._base import Decoder
from luthier.registry import decoder
from luthier.text.structured_outputs import Follower, Vocabulary, forbid, structure


@decoder(
    paper="arXiv:2307.09702",
    example={"choice": ["yes", "no"]},
    use_when="answers are read by a program: JSON of a schema, one of a list of labels, a date.",
    costs="a mask for each token, and seconds at the beginning for a large tokenizer.",
    tests=[
        "methods/decoders/rules/test_structured_outputs.py::test_what_fits_is_as_likely_as_before",
        "methods/decoders/rules/test_structured_outputs.py::test_whatever_a_model_writes_fits",
    ],
)
class StructuredOutputs(Decoder):
    """Only tokens with which the answer can still have the form. One of the settings is to be said."""

    json: Any = None  # a JSON schema; {type: object} is any JSON object
    regex: str | None = None  # the whole answer matches
    choice: list[str] | None = None  # the answer is one of these
    grammar: str | None = None  # in Lark's syntax, with a rule `start`

    def begin(self, renderer):
        form = structure(self.json, self.regex, self.choice, self.grammar)
        beginning: Follower | None = None
        followers: dict[tuple[int, ...], Follower] = {}  # what was written so far -> its place in the form

        def adjust(logits, prompts, responses):
            nonlocal beginning, followers
            if beginning is None:
                vocabulary = Vocabulary(renderer.tokenizer, renderer.stop_ids, logits.shape[1])
                beginning = vocabulary.begin(form)
            places: dict[tuple[int, ...], Follower] = {}
            for row, response in enumerate(responses):
                written = tuple(response)
                if written not in places:
                    places[written] = after(written, followers, beginning)
                forbid(logits[row], places[written].allowed(logits.shape[1]))
            followers = places
            return logits

        return adjust


def after(
    written: tuple[int, ...], followers: dict[tuple[int, ...], Follower], beginning: Follower
) -> Follower:
    """The place of a sequence, from that of one token before where it is there."""
    if written and written[:-1] in followers:
        place = followers[written[:-1]].copy()
        place.add(written[-1])
        return place
    place = beginning.copy()
    for token in written:
        place.add(token)
    return place
