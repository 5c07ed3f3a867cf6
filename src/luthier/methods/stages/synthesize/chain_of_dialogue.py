"""Chain of Dialogue: conversations of several turns from raw documents, each answer grounded in phrases of
its document.

The writer first plans the logic of a dialogue, a list of kinds of turns. For each it then copies key phrases
from the document, asks the user's question, and answers with these phrases, with the earlier turns in view. A
turn is rejected where a phrase is not in the document, none of them is in the answer, or the question was
asked before; a dialogue with a rejected turn leaves, or with `mend` ends before it. With `give: structure` a
row has the document as prompt and the whole structure as completion, for a small model that is to do this
alone (Hou et al., 2024).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis, items, section
from luthier.registry import stage

PLAN = (
    "Plan a conversation of {turns} turns in which a person learns what this document says. List the kinds"
    " of the turns (overview, detail, reason, comparison, follow-up, ...), one a line,"
    " numbered.\n\n{document}"
)
TURN = (
    "Document:\n{document}\n\nConversation so far:\n{history}\n\nThe next turn is: {kind}. Copy the phrases"
    " of the document that its answer rests on, one a line, between [Phrases] and [/Phrases]; write the"
    " person's question between [Question] and [/Question], and the answer, which has these phrases in it,"
    " between [Answer] and [/Answer]."
)


@stage(
    example={"turns": 1, "max_new_tokens": 4},
    paper="arXiv:2407.03040",
    row="r2s-chain-of-dialogue",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="documents of a domain are at hand, and a chat model is to talk about what they say.",
    costs="for each document a plan, and a reply for each turn.",
    covers="logic, phrases, questions and answers turn by turn with the history, verification of phrases,"
    " answers and repetitions, and the whole structure as a row for a generator of one's own.",
    omits="K-BENCH; the comparison with continued pretraining; that a model gains by its rows.",
    contract={"gives": "a tiny model plans no dialogue"},
    tests=[
        "methods/stages/synthesize/test_chain_of_dialogue.py::test_every_phrase_is_of_the_document",
        "methods/stages/synthesize/test_chain_of_dialogue.py::test_the_structure_is_read_back",
    ],
)
class ChainOfDialogue(Synthesis):
    """A conversation for each document; columns `logic`, `phrases`, `provenance`."""

    turns: Annotated[int, Field(ge=1)] = 4  # of a conversation
    mend: bool = False  # a dialogue ends before its first rejected turn, instead of leaving
    give: Literal["dialogue", "structure"] = "dialogue"  # what a row teaches

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        author = self.author(roles)
        for row in rows:
            document = self.document(roles, row)
            prompt = PLAN.replace("{turns}", str(self.turns)).replace("{document}", document)
            (plan,) = author.ask([prompt], [f"{row['id']} plan"])
            logic = items(plan)[: self.turns]
            turns = self.written(author, row, document, logic)
            if not turns or (len(turns) < len(logic) and not self.mend):
                continue
            logic = logic[: len(turns)]
            source = {**row, "prompt": ""}
            new = author.row(source, "dialogue", document, structure(logic, turns))
            if self.give == "dialogue":
                messages = []
                for _, ask, answer in turns:
                    messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
                new |= {"prompt": messages[:-1], "completions": [messages[-1:]]}
            new |= {"logic": logic, "phrases": [phrases for phrases, _, _ in turns]}
            out.append(new)
        return author.finish(rows, out, "its dialogue was not grounded")

    def document(self, roles, row: dict) -> str:
        """The text of a row: its completion where it has no prompt, else its prompt."""
        if row.get("completions") and not row["prompt"]:
            return text_of(roles, row["completions"][0]).strip()
        return question(row).strip()

    def written(
        self, author: Author, row: dict, document: str, logic: list[str]
    ) -> list[tuple[list[str], str, str]]:
        """(phrases, question, answer) of each turn, up to the first that is rejected."""
        turns: list[tuple[list[str], str, str]] = []
        for number, kind in enumerate(logic):
            history = "\n".join(f"Person: {ask}\nAnswer: {answer}" for _, ask, answer in turns) or "(none)"
            prompt = (
                TURN.replace("{document}", document).replace("{history}", history).replace("{kind}", kind)
            )
            (reply,) = author.ask([prompt], [f"{row['id']} turn {number}"])
            phrases = items(section(reply, "Phrases") or "")
            ask, answer = section(reply, "Question") or "", section(reply, "Answer") or ""
            why = self.bad(document, phrases, ask, answer, turns)
            if why:
                author.reject(row["id"], reply, why)
                break
            turns.append((phrases, ask, answer))
        return turns

    def bad(self, document: str, phrases: list[str], ask: str, answer: str, turns: list) -> str:
        """Why a turn is rejected; '' where it stays."""
        if not phrases or not ask or not answer:
            return "is not of the form"
        if any(phrase not in document for phrase in phrases):
            return "has a phrase that is not in the document"
        if not any(phrase in answer for phrase in phrases):
            return "has an answer without its phrases"
        if any(ask.lower() == earlier.lower() for _, earlier, _ in turns):
            return "repeats a question"
        return ""


def structure(logic: list[str], turns: list[tuple[list[str], str, str]]) -> str:
    """A whole dialogue as text: each turn's kind, phrases, question and answer."""
    parts = []
    for kind, (phrases, ask, answer) in zip(logic, turns, strict=True):
        listed = "\n".join(f"- {phrase}" for phrase in phrases)
        parts.append(
            f"[Turn]\n[Logic]{kind}[/Logic]\n[Phrases]\n{listed}\n[/Phrases]\n[Question]{ask}[/Question]\n"
            f"[Answer]{answer}[/Answer]\n[/Turn]"
        )
    return "\n".join(parts)


def parsed(text: str) -> tuple[list[str], list[tuple[list[str], str, str]]]:
    """(logic, turns) of a structure; turns that lack a part are left out."""
    logic, turns = [], []
    for part in text.split("[Turn]")[1:]:
        kind, phrases = section(part, "Logic"), items(section(part, "Phrases") or "")
        ask, answer = section(part, "Question"), section(part, "Answer")
        if kind and phrases and ask and answer:
            logic.append(kind)
            turns.append((phrases, ask, answer))
    return logic, turns
