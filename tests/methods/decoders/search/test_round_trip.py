"""round_trip: an identity translator repairs nothing; one that forgets rare tokens repairs most."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest

from luthier.methods.decoders.search.round_trip import RoundTrip
from luthier.registry import build

CLEAN = ["x + 1", "x * 2", "x - 3", "x // 2", "x + x", "x * x", "x - 1", "x + 2"]
BUGS = {"+": "^", "*": "**", "-": "|", "//": "%"}
CODES = {value: key for key, value in BUGS.items()}


def rows():
    out = []
    for k, body in enumerate(CLEAN):
        operator = body.split()[1]
        buggy = f"def f{k}(x):\n    return {body.replace(operator, BUGS[operator])}"
        tests = [f"assert f{k}({v}) == {eval(body, {'x': v})}" for v in (5, 8, 11)]
        out.append({"id": str(k), "prompt": buggy, "tests": tests})
    return out


def roles(translate):
    """A policy that is a function of the prompt and the seed; token k is the k-th character."""
    read = lambda ids: "".join(map(chr, ids))
    renderer = SimpleNamespace(answer=read, text=read, prompt=lambda row: [ord(c) for c in row["prompt"]])

    def generate(ids, *, seeds, n=1, temperature=1.0, **how):
        texts = [translate(read(ids[0]), random.Random(f"{seeds[0]} {k} {temperature}")) for k in range(n)]
        return [[[ord(c) for c in text] for text in texts]]

    return SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer)


def identity(prompt: str, chance: random.Random) -> str:
    return prompt.split("\n\n", 1)[1].strip()


def forgetful(prompt: str, chance: random.Random) -> str:
    """Rare operators are not in its vocabulary: a description names one of the frequent ones, most often
    right.
    """
    text = prompt.split("\n\n", 1)[1].strip()
    if prompt.startswith("Write"):
        return text  # what is copied keeps its bug
    for rare in ("**", "^", "|", "%"):
        if rare in text and prompt.startswith("Translate this code"):
            return text.replace(rare, CODES[rare] if chance.random() < 0.6 else chance.choice("+-*"))
    return text


def repaired(translate, **settings) -> int:
    decoder = RoundTrip(reward=build("reward", {"name": "python_tests", "timeout": 3.0}), **settings)
    who, count = roles(translate), 0
    for row in rows():
        ((ids,),) = decoder.generate(who, [row], [[]], seeds=[3], max_new_tokens=99, stop=[0])
        if settings.get("by") == "resample" or translate is identity:
            assert who.renderer.text(ids) == row["prompt"]
        count += decoder.scores(who, row, [ids]) == [1.0]
    return count


@pytest.mark.long
def test_an_identity_translator_repairs_nothing():
    assert repaired(identity, forward=2, backward=2) == 0


@pytest.mark.long
def test_what_forgets_rare_tokens_repairs():
    assert repaired(forgetful, forward=3, backward=1) >= 6
    assert repaired(forgetful, forward=3, backward=1, by="resample") == 0


def test_the_signature_is_in_the_backward_prompt():
    prompts = []

    def note(prompt, chance):
        prompts.append(prompt)
        return identity(prompt, chance)

    decoder = RoundTrip(reward=build("reward", "length"), forward=1, backward=2, language="C#")
    decoder.generate(roles(note), rows()[:1], [[]], seeds=[0], max_new_tokens=9)
    assert "to C#." in prompts[0] and all("`def f0(x):`" in prompt for prompt in prompts[1:])
    assert len(prompts) == 3 and re.search(r"x \^ 1", prompts[2])
