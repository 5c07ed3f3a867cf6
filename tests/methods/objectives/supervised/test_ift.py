"""ift: without its two parts is sft; discounted sums; by hand in two passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.objectives import average, batch_of, cast, gradients, make_rows, same
from luthier.registry import build


def test_ift_without_its_two_parts_is_sft():
    found = []
    for spec in ({"name": "ift", "lam": 0.0, "gamma": 0.0}, "sft"):
        roles = cast()
        average(build("objective", spec), roles, batch_of(make_rows(3, k=1))).backward()
        found.append(gradients(roles.policy.model))
    same(*found)


def test_discounted_sums():
    batch = batch_of(make_rows(3, k=2))
    values = torch.rand(len(batch.owner), generator=torch.Generator().manual_seed(0))
    for gamma in (1.0, 0.9, 0.0):
        want = [
            sum(
                gamma ** int(j - i) * float(values[j])
                for j in range(i, len(values))
                if batch.owner[j] == batch.owner[i]
            )
            for i in range(len(values))
        ]
        torch.testing.assert_close(batch.suffix(values, gamma), torch.tensor(want))


def test_ift_by_hand_in_two_passes():
    rows, roles, passes = make_rows(2, k=1), cast(), []
    net = roles.policy.model
    roles.policy.logprobs(batch_of(rows))  # what the network does to its logits is measured once
    net.register_forward_hook(lambda *_: passes.append(1))
    batch = batch_of(rows)
    got = build("objective", {"name": "ift", "lam": 0.3, "gamma": 0.9}).loss(roles, batch).detach()
    assert len(passes) == 2
    table, want = net.get_input_embeddings(), []
    with torch.no_grad():
        for row in rows:
            ids, n = torch.tensor([row["prompt"] + row["completions"][0]]), len(row["prompt"])
            guess = net(ids).logits[0, n - 1 : -1].argmax(-1)
            embeds = table(ids)
            assert torch.equal(embeds[:, :n], table(ids[:, :n]))
            embeds[0, n:] = 0.7 * embeds[0, n:] + 0.3 * table(guess)
            cost = F.cross_entropy(
                net(inputs_embeds=embeds).logits[0, n - 1 : -1], ids[0, n:], reduction="none"
            )
            weight = torch.stack(
                [sum(0.9 ** (j - i) * cost[j] for j in range(i, len(cost))) for i in range(len(cost))]
            )
            want.append(weight / weight.mean() * cost)
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)
