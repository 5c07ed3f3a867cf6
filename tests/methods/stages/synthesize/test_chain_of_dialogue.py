"""chain_of_dialogue: every phrase is of the document, turns as planned, the structure is read back."""

from __future__ import annotations

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.chain_of_dialogue import parsed
from luthier.registry import build

FACTS = ["the mill has nine wheels", "its river is the Tarn", "it burned in 1820"]
ROWS = [{"id": str(k), "prompt": "", "completions": [f"Of {k}: " + ". ".join(FACTS)]} for k in range(30)]


def script(prompt: str, seed: int) -> str:
    if prompt.startswith("Plan"):
        return "1. overview\n2. detail\n3. reason\n4. more"
    number = prompt.count("Person: ")
    phrase = FACTS[number] if seed % 10 >= 3 else "it was made of gold"  # 30% are made up
    asks = f"[Question]What of {number}?[/Question]\n[Answer]Well, {phrase}.[/Answer]"
    return f"[Phrases]\n- {phrase}\n[/Phrases]\n{asks}"


def stage(**settings):
    return build("stage", {"name": "chain_of_dialogue", "turns": 3, "writer": Scripted(script), **settings})


def test_every_phrase_is_of_the_document():
    roles = nobody()
    out = list(stage()(ROWS, roles))
    assert 3 <= len(out) <= 20 and len(out) + len(roles.dropped) == len(ROWS)
    assert "has a phrase that is not in the document" in roles.sentences[-1]
    for row in out:
        document = ROWS[int(row["id"].split("/")[0])]["completions"][0]
        assert row["logic"] == ["overview", "detail", "reason"] and len(row["phrases"]) == 3
        assert all(phrase in document for phrases in row["phrases"] for phrase in phrases)
        turns = row["prompt"] + row["completions"][0]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    mended = list(stage(mend=True)(ROWS, nobody()))
    assert len(mended) > len(out) and {len(row["logic"]) for row in mended} == {1, 2, 3}


def test_the_structure_is_read_back():
    for row in stage(give="structure")(ROWS, nobody()):
        logic, turns = parsed(row["completions"][0])
        assert logic == row["logic"] and len(turns) == len(logic)
        assert [phrases for phrases, _, _ in turns] == row["phrases"]
        assert row["prompt"] == ROWS[int(row["id"].split("/")[0])]["completions"][0]


def test_what_is_rejected():
    bad = stage().bad
    assert (
        bad("a b c", ["a b"], "q", "a b!", []) == ""
        and bad("a b c", [], "q", "a", []) == "is not of the form"
    )
    assert bad("a b c", ["a b"], "q", "c", []) == "has an answer without its phrases"
    assert bad("a b c", ["a b"], "Q", "a b", [(["a"], "q", "a")]) == "repeats a question"
