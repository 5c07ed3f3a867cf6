"""knowledge_verifier: probabilities of three letters, averaged over wordings."""

from __future__ import annotations

import pytest

from helpers.models import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.rewards.judges import knowledge_verifier
from luthier.methods.rewards.judges.knowledge_verifier import verifier_prompt
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer

ROW = {"id": "r", "prompt": "who?", "knowledge": "it was Ann"}


def test_the_ensemble_is_the_mean(monkeypatch):
    net = make_llama(0)
    roles = Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))
    monkeypatch.setattr(knowledge_verifier, "loaded", lambda model, dtype: roles)
    judge = build("reward", "knowledge_verifier")
    texts = ["Ann", "Bob"]
    every = judge.options(ROW, texts)
    for place, text in enumerate(texts):
        single = [judge.ask([verifier_prompt(w, ROW, text)])[0] for w in range(5)]
        assert all(sum(each) == pytest.approx(1.0) for each in single)
        for letter in range(3):
            mean = sum(each[letter] for each in single) / 5
            assert every[place][letter] == pytest.approx(mean, abs=1e-5)
    assert judge.scores(ROW, texts) == [each[2] for each in every]
    with pytest.raises(RecipeError, match="knowledge"):
        judge.scores({"prompt": "q"}, ["x"])
