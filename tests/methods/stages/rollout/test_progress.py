"""progress: it adds up, it is GRPO without alpha, and it unlearns episodes that add nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.objectives import batch_of, cast
from helpers.stages import rollout, rows_with
from luthier.methods.stages.rollout.progress import episode_advantages, progress, regret
from luthier.registry import build

SETTINGS = {"name": "progress", "reward": {"name": "length", "of": "characters"}, "max_new_tokens": 4, "n": 2}


def scored(roles) -> list[dict]:
    rows = rollout(n=3)(rows_with(set(), 3), roles)
    return [{**row, "scores": [float(k) for k in range(3)]} for row in rows]


def test_progress_adds_up(roles):
    rng = np.random.default_rng(0)
    for size in (2, 5, 9):
        values = rng.random(size).tolist()
        assert sum(progress(values)) == pytest.approx(values[-1] - values[0], abs=1e-6)
    rows, stage = scored(roles), build("stage", {**SETTINGS, "pattern": "[a-m0-4]"})
    cut = [[stage.episodes(roles, c) for c in row["completions"]] for row in rows]
    assert any(len(parts) > 2 for completions in cut for parts in completions)
    values = stage.values(rows, cut, roles)
    for row, completions, each, out in zip(rows, cut, values, stage(rows, roles), strict=True):
        for k, parts in enumerate(completions):
            assert sum(parts, []) == list(row["completions"][k]) and len(each[k]) == len(parts) + 1
            assert len(out["token_advantages"][k]) == len(row["completions"][k])
            assert out["rewards"]["progress"][k] == pytest.approx(each[k][-1] - each[k][0], abs=1e-6)
        assert out["rewards"]["outcome"] == row["scores"]


def test_without_alpha_it_is_grpo(roles):
    rows = scored(roles)
    out = build("stage", {**SETTINGS, "alpha": 0.0})(rows, roles)
    players = cast()
    rows = [{**row, "prompt": [3], "completions": [[4, 5], [6], [7, 8]]} for row in rows]
    wanted = build("objective", {"name": "grpo", "beta": 0.0}).advantages(players, batch_of(rows))
    first = [column[0] for row in out for column in row["token_advantages"]]
    batch = batch_of(rows)
    starts = batch.place == 0
    torch.testing.assert_close(torch.tensor(first), wanted[starts], atol=1e-5, rtol=1e-5)


def test_regret_is_the_area():
    values = [0.0, 0.25, 0.5, 1.0, 1.0]
    assert regret(values) == pytest.approx(float(np.sum(1 - np.array(values))))
    assert regret([1.0, 1.0]) == 0.0


class Thinker(torch.nn.Module):
    """Token 1 goes on thinking and token 0 stops; a logit of each place."""

    def __init__(self, places: int):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.ones(places))

    def logprobs(self, batch):
        go = batch.labels[batch.targets].bool()
        logits = self.logits[batch.place]
        return torch.nn.functional.logsigmoid(torch.where(go, logits, -logits))


def trained(alpha: float) -> tuple[float, float]:
    """Expected episodes and accuracy after 60 steps, where the first two episodes solve the task and later
    ones do nothing.
    """
    places, rng = 8, torch.Generator().manual_seed(0)
    policy = Thinker(places)
    adam = torch.optim.Adam(policy.parameters(), lr=0.1)
    objective = build("objective", "reinforce_pp")
    value = [0.0, 0.5] + [1.0] * places
    for _ in range(60):
        rows = []
        for place in range(8):
            completions, scores, gains = [], [], []
            for _ in range(8):
                go = torch.rand(places, generator=rng) < policy.logits.detach().sigmoid()
                stops = (~go).nonzero()
                count = int(stops[0]) if len(stops) else places
                completions.append([1] * count + [0] * (count < places))
                scores.append(value[count])
                # the token that stops is the answer
                gains.append(progress(value[: count + 1]) + [0.0] * (count < places))
            each = episode_advantages(scores, gains, alpha, scale=True)
            columns = {"completions": completions, "scores": scores, "token_advantages": each}
            rows.append({"id": str(place), "prompt": [0], **columns})
        adam.zero_grad()
        batch = batch_of(rows)
        loss = objective.loss(SimpleNamespace(policy=policy), batch)
        (loss.sum() / objective.divisor(batch)).backward()
        adam.step()
    go = policy.logits.detach().sigmoid()
    reach = torch.cumprod(go, 0)
    right = 0.5 * float(reach[0]) + 0.5 * float(reach[1])
    return float(reach.sum()), right


def test_useless_episodes_are_unlearned():
    (long, right), (short, still) = trained(0.0), trained(1.0)
    assert short < long - 0.5
    assert still > right - 0.05
