"""verified_retrieval: the loop ends, leaves right answers alone, and makes answers right more often."""

from __future__ import annotations

import itertools
import random

from helpers.models import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.decoders.search.verified_retrieval import rectify
from luthier.methods.rewards.judges.knowledge_verifier import KnowledgeVerifier
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer


def test_the_loop_ends_and_accepts():
    for verdicts in itertools.product("ABC", repeat=4):
        feed, written = iter(verdicts), []

        def write(passage, draw, written=written):
            written.append((passage, draw))
            return len(written)

        answer, accepted = rectify(["p", "q"], 4, write, lambda passage, answer, feed=feed: next(feed))
        until = verdicts.index("C") + 1 if "C" in verdicts else 4
        assert answer == len(written) == until and accepted == ("C" in verdicts)
        moved = "A" in verdicts[: until - 1]
        assert (written[-1][0] == "q") == moved and [draw for _, draw in written] == list(range(until))


def test_verified_answers_are_right_more_often():
    """Of three passages one helps; with it the generator is right half of the time, else never."""
    chance, plain, verified = random.Random(0), 0, 0
    for _ in range(200):
        useful = chance.randrange(3)
        passages = ["useful" if k == useful else "useless" for k in range(3)]

        def write(passage, draw):
            return passage == "useful" and chance.random() < 0.5

        def verify(passage, right):
            letter = "C" if right else "B" if passage == "useful" else "A"
            return letter if chance.random() < 0.9 else chance.choice("ABC")

        plain += write(passages[0], 0)
        verified += rectify(passages, 5, write, verify)[0]
    assert verified > plain + 60


def test_a_model_answers_from_the_passage_that_helps(monkeypatch):
    net = make_llama(0)
    roles = Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))

    def options(self, row, texts):
        return [[0.0, 0.1, 0.9] if row["knowledge"] == "good" else [0.9, 0.1, 0.0] for _ in texts]

    monkeypatch.setattr(KnowledgeVerifier, "options", options)
    how = {"seeds": [1, 2], "max_new_tokens": 4, "temperature": 0.0, "stop": [1]}
    rows = [{"id": "a", "prompt": "q", "passages": ["bad", "good"]}, {"id": "b", "prompt": "q"}]
    prompts = [roles.renderer.prompt(row) for row in rows]
    decoder = build("decoder", {"name": "verified_retrieval", "template": "{knowledge} {prompt}"})
    first, second = decoder.generate(roles, rows, prompts, **how)
    wanted = roles.policy.generate(
        [roles.renderer.prompt({"id": "a", "prompt": "good q"})], **{**how, "seeds": [1]}
    )
    # greedy answers become sampled ones where they are written again; the second row is answered as ever
    assert len(first[0]) <= 4 and second == roles.policy.generate(prompts[1:], **{**how, "seeds": [2]})[0]
    alone = [{"id": "a", "prompt": "q", "passages": ["good"]}]
    assert decoder.generate(roles, alone, prompts[:1], **{**how, "seeds": [1]}) == wanted
    none = build("decoder", {"name": "verified_retrieval", "abstain": True, "turns": 2})
    bad = [{"id": "a", "prompt": "q", "passages": ["bad"]}]
    assert none.generate(roles, bad, prompts[:1], **{**how, "seeds": [1]}) == [[[1]]]
