"""lists: lambda weights by hand; a list of two is dpo times its weight; the order of a list does not matter
and equals do not count; plackett luce by hand.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import luthier
from helpers.objectives import batch_of, cast, loss_of, make_rows, pair_rows
from luthier.errors import Refused
from luthier.registry import build
from luthier.train import checks


def list_rows(k: int = 5) -> list[dict]:
    rng = torch.Generator().manual_seed(3)
    return [{**r, "scores": torch.rand(k, generator=rng).tolist()} for r in make_rows(3, k=k)]


def implicit(roles, rows, beta=0.1) -> list[torch.Tensor]:
    batch = batch_of(rows)
    s = beta * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach()
    return list(s.split([len(r["completions"]) for r in rows]))


def test_lambda_weights_by_hand():
    roles, rows = cast(), list_rows()
    want = []
    for s, row in zip(implicit(roles, rows), rows, strict=True):
        psi, order = row["scores"], s.argsort(descending=True).tolist()
        rank = {i: order.index(i) + 1 for i in range(len(psi))}
        total = 0.0
        for i in range(len(psi)):
            for j in range(len(psi)):
                if psi[i] > psi[j]:
                    gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
                    discount = abs(
                        1 / torch.log(torch.tensor(1.0 + rank[i]))
                        - 1 / torch.log(torch.tensor(1.0 + rank[j]))
                    )
                    total += float(gain * discount * F.softplus(-(s[i] - s[j])))
        want.append(total)
    torch.testing.assert_close(
        loss_of("lipo_lambda", roles, rows).detach(), torch.tensor(want), atol=1e-5, rtol=1e-5
    )


def test_a_list_of_two_is_dpo_times_its_weight():
    rows = [{**r, "scores": [0.9, 0.2]} for r in pair_rows()]
    delta = (2**0.9 - 2**0.2) * (1 / torch.tensor(2.0).log() - 1 / torch.tensor(3.0).log())
    torch.testing.assert_close(
        loss_of("lipo_lambda", rows=rows), delta * loss_of("dpo", rows=rows), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["lipo_lambda", "dpo_bt", "dpo_pl", "lipo_softmax"])
def test_the_order_of_a_list_does_not_matter_and_equals_do_not_count(name):
    roles, rows = cast(), list_rows()
    turned = [{**r, "completions": r["completions"][::-1], "scores": r["scores"][::-1]} for r in rows]
    torch.testing.assert_close(loss_of(name, roles, rows), loss_of(name, roles, turned), atol=1e-5, rtol=1e-5)
    if name != "lipo_softmax":
        equal = loss_of(name, roles, [{**r, "scores": [0.5] * 5} for r in rows])
        torch.testing.assert_close(equal, torch.zeros(3))


def test_plackett_luce_by_hand():
    roles, rows = cast(), list_rows(4)
    want = []
    for s, row in zip(implicit(roles, rows), rows, strict=True):
        ranked = s[torch.tensor(row["scores"]).argsort(descending=True)]
        want.append(sum(float(ranked[k:].logsumexp(0) - ranked[k]) for k in range(len(ranked))))
    torch.testing.assert_close(
        loss_of("dpo_pl", roles, rows).detach(), torch.tensor(want), atol=1e-5, rtol=1e-5
    )


def test_ranking_lists_beats_random_pairs_of_them():
    """How good the five first answers of the implicit reward's ranking are, at equal updates: lists against
    random pairs of them.
    """
    from luthier.toy import bandit

    def ndcg(objective: str, pairs: bool, seed: int) -> float:
        rng = torch.Generator().manual_seed(seed)
        reward, lists = (
            torch.rand(40, generator=rng),
            torch.stack([torch.randperm(40, generator=rng)[:8] for _ in range(24)]).tolist(),
        )
        policy = bandit.Arms(torch.zeros(40))
        roles, sgd = bandit.roles_of(policy), torch.optim.SGD(policy.parameters(), lr=10.0)
        for _ in range(3):
            rows = (
                [[row[i] for i in torch.randperm(8, generator=rng)[:2]] for row in lists] if pairs else lists
            )
            sgd.zero_grad()
            bandit.average(build("objective", objective), roles, bandit.pulled(rows, reward)).backward()
            sgd.step()
        first, discount, gain = (
            policy.log_policy().detach().argsort(descending=True)[:5],
            1 / torch.arange(2.0, 7).log(),
            2**reward - 1,
        )
        return float(gain[first] @ discount / (gain.sort(descending=True).values[:5] @ discount))

    lists, pairs = (
        [ndcg(*how, seed) for seed in range(3)] for how in (("lipo_lambda", False), ("dpo", True))
    )
    assert sum(lists) > sum(pairs) + 0.1


@pytest.mark.long
@pytest.mark.parametrize("objective", ["lipo_lambda", "dpo_bt", "dpo_pl"])
def test_lists_whose_first_batch_ties_are_trained_on(objective, base, tmp_path):
    """Rows of equal scores teach nothing; rows that rank, behind them, do."""
    answers = [" 1", " 2", " 3"]
    tied = [{"prompt": f"a{i}", "completions": answers, "scores": [1.0, 1.0, 1.0]} for i in range(6)]
    ranked = [{"prompt": f"b{i}", "completions": answers, "scores": [0.0, 1.0, 2.0]} for i in range(6)]
    change = {"data": tied + ranked, "objective": objective, "per_device_train_batch_size": 1, "max_steps": 4}
    change |= {"evaluate": [], "eval_data": 0}
    kinds = set()
    for seed in range(4):
        done = luthier.tune(base | change | {"seed": seed}, folder=tmp_path / str(seed))
        kinds.add(len(done.losses))
    assert kinds == {4}


def test_what_no_gradient_reaches_is_refused_all_the_same():
    p = torch.nn.Parameter(torch.ones(2))
    group = SimpleNamespace(params={"weight": p})
    tuned = SimpleNamespace(param_groups=lambda: [group], settings=SimpleNamespace(name="toy"))
    with pytest.raises(Refused):
        checks.check_gradient(tuned, may_be_zero=True)
    p.grad = torch.zeros(2)
    assert not checks.check_gradient(tuned, may_be_zero=True)
    with pytest.raises(Refused):
        checks.check_gradient(tuned, may_be_zero=False)
    p.grad = torch.ones(2)
    assert checks.check_gradient(tuned, may_be_zero=False)
