"""b_coder: values from logits, the conservative operator against a linear solve, and the reward that comes
back.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from helpers.objectives import batch_of, cast, full_logits, make_rows
from luthier.methods.objectives.policy_gradient.b_coder import bellman, implied_rewards
from luthier.registry import build


def test_the_values_are_the_policys():
    """softmax(Q / alpha) is the policy for any critic; advantages are at most 0, and 0 at the likeliest."""
    rows, roles = make_rows(3, k=2), cast()
    logits = full_logits(roles, "policy", rows).double()
    outputs = roles.policy.outputs(batch_of(rows))
    best = outputs.top(1)[0].double()
    for alpha in (0.3, 2.0):
        advantage = alpha * (logits.log_softmax(-1) - best)
        assert float(advantage.max()) <= 1e-5
        torch.testing.assert_close(advantage.amax(1), torch.zeros(len(logits)).double(), atol=1e-5, rtol=0)
        value = torch.randn(len(logits), 1, generator=torch.Generator().manual_seed(0)).double()
        policy = ((advantage + value) / alpha).softmax(-1)
        torch.testing.assert_close(policy, logits.softmax(-1), atol=1e-6, rtol=0)


TOKENS, DEPTH = 3, 3
TEXTS = list(itertools.product(range(TOKENS), repeat=DEPTH))


def tree(seed: int):
    """All texts of three tokens as one batch, their scores, and the reference's likeliest token after each
    prefix.
    """
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(TEXTS), generator=rng, dtype=torch.float64)
    likeliest = {}
    for length in range(DEPTH):
        for prefix in itertools.product(range(TOKENS), repeat=length):
            likeliest[prefix] = int(torch.randint(TOKENS, (), generator=rng))
    row = {"id": "r", "prompt": [3], "completions": [[token + 4 for token in text] for text in TEXTS]}
    return batch_of([{**row, "scores": scores.tolist()}]), scores, likeliest


def greedy_of(table: dict, likeliest: dict) -> torch.Tensor:
    """[T] of every text and place, the value of the reference's token there."""
    values = []
    for text in TEXTS:
        values += [table[(*text[:t], likeliest[text[:t]])] for t in range(DEPTH)]
    return torch.stack(values)


def applied(batch, scores, likeliest, table: dict, gamma: float) -> dict:
    """The operator once, by the objective's own function: prefix -> value."""
    last = batch.place + 1 == batch.lengths[batch.owner]
    rewards = torch.where(last, scores[batch.owner], 0.0)
    target = bellman(batch, rewards, greedy_of(table, likeliest), gamma).view(len(TEXTS), DEPTH)
    return {text[: t + 1]: target[i, t] for i, text in enumerate(TEXTS) for t in range(DEPTH)}


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_operator_converges_to_the_greedy_value(gamma):
    """Against the solution of the linear system, and as a contraction by gamma."""
    batch, scores, likeliest = tree(0)
    prefixes = [p for length in range(1, DEPTH + 1) for p in itertools.product(range(TOKENS), repeat=length)]
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    matrix, reward = torch.eye(len(prefixes)).double(), torch.zeros(len(prefixes)).double()
    for prefix in prefixes:
        if len(prefix) < DEPTH:
            matrix[place[prefix], place[(*prefix, likeliest[prefix])]] -= gamma
        else:
            reward[place[prefix]] = scores[TEXTS.index(prefix)]
    solved = torch.linalg.solve(matrix, reward)
    start = torch.randn(2, len(prefixes), generator=torch.Generator().manual_seed(1)).double()
    one, other = (dict(zip(prefixes, values, strict=True)) for values in start)
    for _ in range(DEPTH + 1):
        apart = max(abs(float(one[p] - other[p])) for p in prefixes)
        one, other = (applied(batch, scores, likeliest, table, gamma) for table in (one, other))
        assert max(abs(float(one[p] - other[p])) for p in prefixes) <= gamma * apart + 1e-12
    found = torch.stack([one[p] for p in prefixes])
    torch.testing.assert_close(found, solved, atol=1e-6, rtol=0)


def test_the_reward_comes_back_and_ranks():
    """At the fixed point the implied rewards are the true ones, so the best of several texts by their sum is
    right more often than the first.
    """
    batch, scores, likeliest = tree(2)
    table = {text[:n]: torch.zeros(()).double() for text in TEXTS for n in range(1, DEPTH + 1)}
    for _ in range(DEPTH + 1):
        table = applied(batch, scores, likeliest, table, 0.9)
    values = torch.stack([table[text[: t + 1]] for text in TEXTS for t in range(DEPTH)])
    implied = implied_rewards(batch, values, greedy_of(table, likeliest), 0.9)
    sums = batch.sums(implied)
    torch.testing.assert_close(sums, scores, atol=1e-6, rtol=0)
    rng, right, first = torch.Generator().manual_seed(0), 0, 0
    passing = scores >= scores.sort().values[-8]
    for _ in range(100):
        some = torch.randperm(len(TEXTS), generator=rng)[:5]
        right += bool(passing[some[sums[some].argmax()]])
        first += bool(passing[some[0]])
    assert right > first + 20


def test_the_loss_is_that_of_its_parts():
    rows, roles = make_rows(3, k=2), cast()
    for row in rows:
        row["scores"] = [1.0, -0.3]
    batch = batch_of(rows)
    plain = {"name": "b_coder", "alpha": 0.5, "gamma": 0.9, "cap": None, "adv_coef": 0.0, "ce_coef": 0.0}
    error = build("objective", plain).loss(roles, batch)
    own, other = (full_logits(roles, name, rows) for name in ("policy", "reference"))
    value = roles.critic.values(roles.policy, batch)
    logp = own.log_softmax(-1)
    table = 0.5 * (logp - logp.amax(1, keepdim=True)) + value[:, None]
    tokens = batch.labels[batch.targets]
    place, want = 0, []
    for n, score in zip(batch.lengths.long().tolist(), batch.column("scores").tolist(), strict=True):
        for t in range(n):
            target = score
            if t + 1 < n:
                target = 0.9 * table[place + t + 1, other[place + t + 1].argmax()]
            want.append((target - table[place + t, tokens[place + t]]) ** 2)
        place += n
    torch.testing.assert_close(error, torch.stack(want), atol=1e-4, rtol=1e-4)
    full = build("objective", {**plain, "adv_coef": 0.1, "ce_coef": 0.5}).loss(roles, batch)
    mine = logp.gather(1, tokens[:, None])[:, 0]
    extra = 0.1 * 0.5 * (mine - logp.amax(1)).abs() - 0.5 * mine
    good = (batch.column("scores") == 1.0)[batch.owner]
    torch.testing.assert_close(full - error, torch.where(good, extra, 0.0), atol=1e-4, rtol=1e-4)
    quiet = SimpleNamespace(**{k: getattr(roles, k) for k in ("policy", "reference", "critic")})
    build("objective", {**plain, "phase": "critic"}).loss(quiet, batch_of(rows)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in roles.policy.model.parameters())
    assert roles.critic.value.weight.grad.abs().sum() > 0
