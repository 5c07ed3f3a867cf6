"""response_ranking: response ranking."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.models import make_llama
from helpers.objectives import average
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.recipe.recipe import terms


@pytest.mark.long
def test_response_ranking(roles, tmp_path):
    from luthier.methods.evaluators.quality.response_ranking import ResponseRanking

    rows = [{"id": str(i), "prompt": f"say {w} ", "completions": [w * 3]} for i, w in enumerate("abcdef")]
    tuned = copy.copy(roles)
    net = make_llama(seed=1)
    tuned.policy = Policy(Causal(), net, Untuned(net))
    with torch.no_grad():
        before = ResponseRanking().run(tuned, rows, tmp_path, "before")["response_ranking"]
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        adam.zero_grad()
        average(terms("sft"), tuned, tuned.batch(rows)).backward()
        adam.step()
    with torch.no_grad():
        assert ResponseRanking().run(tuned, rows, tmp_path, "after")["response_ranking"] == 1.0 >= before
    assert ResponseRanking().run(tuned, rows[:1], tmp_path, "after") == {}


def test_sums_and_several_others(roles, tmp_path):
    """Answers of unlike length: by their sums the shorter one is likelier, by their means it need not be."""
    from luthier.registry import build

    rows = [{"id": str(i), "prompt": "say ", "completions": ["ab" * (i + 1)]} for i in range(4)]

    def ranking(**settings):
        with torch.no_grad():
            made = build("evaluator", {"name": "response_ranking", **settings})
            return made.run(roles, rows, tmp_path, "before")["response_ranking"]

    # all ordered pairs of four: the shorter one wins each, so half of the rows' own do
    assert ranking(others=3, likelihood="sum") == 0.5
    # the next one is longer, but for the last row
    assert ranking(likelihood="sum") == 0.75
