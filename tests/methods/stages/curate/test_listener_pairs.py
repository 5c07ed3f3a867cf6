"""listener_pairs: the table of preferences, what the listener hears, and what DPO makes of the pairs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import roc_auc_score

from luthier.clock import Clock
from luthier.methods.stages.curate.listener_pairs import preferred, utilities
from luthier.registry import build
from luthier.toy import bandit

# right and believed, right and not, wrong and believed, wrong and not
KINDS = [(True, 0.9), (True, 0.1), (False, 0.9), (False, 0.1)]
TEXTS = [f"{word}: the answer is {number}." for number in (7, 8) for word in ("sure", "maybe")]


def test_the_table_of_preferences():
    """By hand: which of two kinds is chosen; None where they are worth the same or sound the same."""
    table = [
        [None, 0, 0, None],
        [0, None, 1, 3],
        [0, 1, None, 3],
        [None, 3, 3, None],
    ]
    for i, j in itertools.product(range(4), repeat=2):
        right, accepted = [KINDS[i][0], KINDS[j][0]], [KINDS[i][1], KINDS[j][1]]
        pairs = preferred(utilities(right, accepted, 0.5), accepted, least_gap=0.0)
        chosen = [(i, j)[pair[0]] for pair in pairs]
        assert chosen == ([] if table[i][j] is None else [table[i][j]])
    # as the stage has it, both must sound different
    same = utilities([True, False], [0.9, 0.9], 0.5)
    assert same == [1.0, -1.0] and preferred(same, [0.9, 0.9], 0.1) == []


def made(**settings):
    listener = {"name": "regex", "pattern": "sure"}
    correct = {"name": "regex", "pattern": r"is 7\b"}
    return build("stage", {"name": "listener_pairs", "listener": listener, "correct": correct, **settings})


def test_the_answer_is_hidden():
    stage = made()
    removed = "It is [ANSWER REMOVED]. The answer is [ANSWER REMOVED]."
    assert stage.hidden("It is Rome. The answer is Rome.") == removed
    assert stage.hidden("No idea.") == "No idea."
    with pytest.raises(Exception, match="no group"):
        made(answer="answer is .*")


def pairs_of(stage) -> list[dict]:
    roles = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
    rng, rows = torch.Generator().manual_seed(0), []
    for place in range(100):
        texts = [TEXTS[k] for k in torch.randint(4, (6,), generator=rng).tolist()]
        rows.append({"id": str(place), "prompt": "q", "completions": texts})
    return list(stage(rows, roles))


def area(pairs: list[dict]) -> float:
    """AUROC of the listener's acceptance against what is right, after DPO on the pairs."""
    rows = []
    for row in pairs:
        rows.append({**row, "prompt": [0], "completions": [[TEXTS.index(c)] for c in row["completions"]]})
    policy = bandit.Arms(torch.zeros(4))
    roles, adam = bandit.roles_of(policy), torch.optim.Adam(policy.parameters(), lr=0.05)
    objective = build("objective", {"name": "dpo", "beta": 0.1})
    for _ in range(60):
        adam.zero_grad()
        bandit.average(objective, roles, rows).backward()
        adam.step()
    likely = policy.log_policy().detach().exp()
    return float(roc_auc_score([1, 1, 0, 0], [0.9, 0.1, 0.9, 0.1], sample_weight=likely.numpy()))


@pytest.mark.long
def test_the_listener_learns_what_is_right():
    """From 0.5; pairs by correctness alone leave it there."""
    pairs = pairs_of(made(most=15))
    assert pairs and all(row["scores"][0] > row["scores"][1] for row in pairs)
    assert area(pairs) > 0.7
    rng, rows = torch.Generator().manual_seed(1), []
    for place in range(600):
        good, bad = torch.randint(2, (2,), generator=rng).tolist()
        completions = [TEXTS[good], TEXTS[2 + bad]]
        rows.append({"id": str(place), "prompt": "q", "completions": completions, "scores": [1.0, 0.0]})
    assert abs(area(rows) - 0.5) < 0.05
