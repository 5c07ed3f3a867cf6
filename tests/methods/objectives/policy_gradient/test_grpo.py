"""grpo: equal rewards teach nothing; no reference is wanted where nobody asks it; clipping stops the
gradient where the ratio has gone far enough; the estimated kl has the gradient of the exact one.
"""

from __future__ import annotations

import pytest

from helpers.objectives import V, batch_of, cast, gradients, loss_of, make_rows, same, tokenizer
from luthier.clock import Clock
from luthier.model.policy import Roles
from luthier.registry import build, requires_of
from luthier.text.encode import Renderer


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(name, scale):
    rows, roles = make_rows(2, k=3), cast()
    for row in rows:
        row["scores"] = [1.0, 1.0, 1.0]
    values = loss_of({"name": name, "beta": 0.0, "scale_rewards": scale}, roles, rows)
    values.sum().backward()
    assert not values.any() and all(not g.any() for g in gradients(roles.policy.model).values())


def test_no_reference_is_wanted_where_nobody_asks_it():
    for name in ("grpo", "dapo", "dr_grpo"):
        without, with_ = (build("objective", {"name": name, "beta": b}) for b in (0.0, 0.1))
        assert "reference" not in requires_of(without) and "reference" in requires_of(with_)
        without.loss(Roles(cast().policy, Clock(), Renderer(tokenizer())), batch_of(make_rows(2, k=3)))


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    rows, roles = make_rows(1, k=2), cast()
    rows[0]["scores"] = [1.0, 0.0]
    logp = roles.policy.logprobs(batch_of(rows)).detach().split([len(c) for c in rows[0]["completions"]])
    # better ones grew, worse ones shrank: beyond both bounds
    rows[0]["old_logprobs"] = [(logp[0] - 1).tolist(), (logp[1] + 1).tolist()]
    batch = batch_of(rows)
    build("objective", "dapo").loss(roles, batch).sum().backward()
    assert all(not g.any() for g in gradients(roles.policy.model).values())
    assert batch.metrics["clip_ratio"][0] == batch.metrics["clip_ratio"][1] > 0


def test_the_estimated_kl_has_the_gradient_of_the_exact_one():
    """Over every next token, weighed by the policy's own probability, as samples would be."""
    prompt, roles, found = [5, 9, 11], cast(), []
    every = [{"id": "r", "prompt": prompt, "completions": [[t] for t in range(V)], "scores": [0.0] * V}]
    likely = roles.policy.logprobs(batch_of(every)).detach().exp()
    one = [{"id": "r", "prompt": prompt, "completions": [[3]], "scores": [0.0]}]
    for term in (
        (build("objective", {"name": "dapo", "beta": 1.0}).loss(roles, batch_of(every)) * likely).sum(),
        build("objective", "kl").loss(roles, batch_of(one)).sum(),
    ):
        roles.policy.zero_grad()
        term.backward()
        found.append((float(term.detach()), gradients(roles.policy.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    same(found[0][1], found[1][1], atol=1e-5)
