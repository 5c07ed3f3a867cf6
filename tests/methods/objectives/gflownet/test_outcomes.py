"""outcome_balance, outcome_goals, outcome_mixture: texts of six bits, all of which can be enumerated."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Encoded

LENGTH = 6
TEXTS = torch.tensor(list(itertools.product(range(2), repeat=LENGTH)))  # [64, 6]
LEAST = 1e-4


class Bits(nn.Module):
    """p(bit | bits so far, outcome) and log F of the same; the outcome is all six bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4 * LENGTH, 64), nn.SiLU(), nn.Linear(64, 3))

    def forward(self, texts: torch.Tensor, goals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 6] twice -> [N, 6] log-probabilities of the bits, [N, 6] log F of the states before them."""
        signs = 2.0 * texts - 1
        before = torch.tril(torch.ones(LENGTH, LENGTH), -1)  # [place, what it has read]
        seen = signs[:, None] * before
        here = torch.eye(LENGTH).expand(len(texts), -1, -1)
        goal = (2.0 * goals - 1)[:, None].expand(-1, LENGTH, -1)
        out = self.net(torch.cat([seen, here, here * goal, seen * goal], -1))
        logs = out[..., :2].log_softmax(-1).gather(-1, texts[..., None]).squeeze(-1)
        return logs, 5 * out[..., 2]


class Asked:
    """Policy and critic for the goals of a batch."""

    def __init__(self, net: Bits, goals: torch.Tensor):
        self.net, self.goals = net, goals

    def both(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        logs, flows = self.net(batch.labels[batch.targets].view(-1, LENGTH), self.goals)
        return logs.flatten(), flows.flatten()

    def logprobs(self, batch):
        return self.both(batch)[0]

    def values(self, policy, batch):
        return self.both(batch)[1]


def batch_of(texts: torch.Tensor, scores: torch.Tensor):
    rows = []
    for place, (text, score) in enumerate(zip(texts.tolist(), scores.tolist(), strict=True)):
        rows.append({"id": str(place), "prompt": [0], "completions": [text], "scores": [score]})
    return collate(rows, lambda row: Encoded(row["prompt"], row["completions"], [[True] * LENGTH]))


@pytest.fixture(scope="module")
def trained() -> Bits:
    net, rng = Bits(), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(net.parameters(), 2.5e-2)
    objective = build("objective", {"name": "outcome_balance", "least": LEAST})
    steps = 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    texts = TEXTS.repeat(2, 1)
    scores = torch.cat([torch.ones(64), torch.zeros(64)])
    batch = batch_of(texts, scores)
    for _ in range(steps):
        shift = int(torch.randint(1, 64, (), generator=rng))
        other = TEXTS[(torch.arange(64) + shift) % 64]
        asked = Asked(net, torch.cat([TEXTS, other]))
        adam.zero_grad()
        objective.loss(SimpleNamespace(policy=asked, critic=asked), batch).mean().backward()
        adam.step()
        schedule.step()
    return net


def table(net: Bits) -> torch.Tensor:
    """[64 outcomes, 64 texts] probabilities."""
    with torch.no_grad():
        logs, _ = net(TEXTS.repeat(64, 1), TEXTS.repeat_interleave(64, 0))
    return logs.sum(-1).view(64, 64).exp()


@pytest.mark.long
def test_outcomes_are_reached_and_rewards_followed(trained):
    likely = table(trained)
    assert float(likely.diagonal().mean()) > 0.9
    reward = torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 3
    with torch.no_grad():
        flow = trained(TEXTS, TEXTS)[1][:, 0].exp()  # of the empty text, of each outcome
    weights = reward * flow
    mixture = weights / weights.sum() @ likely
    assert float((mixture - reward / reward.sum()).abs().sum() / 2) < 0.1


@pytest.mark.long
def test_the_sum_over_outcomes_is_the_mixture(trained):
    """Token by token by r(y) F(s|y) p(token|s, y), with F(s|y) = F(start|y) p(s|y); one outcome is itself."""
    with torch.no_grad():
        logs, flows = trained(TEXTS.repeat(64, 1), TEXTS.repeat_interleave(64, 0))
    logs, start = logs.view(64, 64, LENGTH), flows.view(64, 64, LENGTH)[:, :, :1]
    reward = torch.rand(64, generator=torch.Generator().manual_seed(3))
    along = reward.log()[:, None, None] + start + torch.cat([torch.zeros(64, 64, 1), logs.cumsum(-1)], -1)
    whole = along.logsumexp(0)  # [64, 7] log of sum_y r(y) F(s|y) along each text
    by_token = (whole[:, 1:] - whole[:, :-1]).sum(-1).exp()
    weights = reward * start[:, 0, 0].exp()
    torch.testing.assert_close(by_token, weights / weights.sum() @ table(trained), atol=1e-5, rtol=1e-3)
    alone = torch.zeros(64).index_fill(0, torch.tensor([5]), 1.0) * start[:, 0, 0].exp()
    torch.testing.assert_close(alone / alone.sum() @ table(trained), table(trained)[5])


def test_the_balanced_flow_costs_nothing():
    """Texts that all have the outcome: an even policy, and the number of ways from each state as its flow."""

    class Even:
        def logprobs(self, batch):
            return torch.full((len(batch.owner),), 0.5).log()

        def values(self, policy, batch):
            left = LENGTH - batch.place % LENGTH
            return left * torch.tensor(2.0).log()

    objective, even = build("objective", "outcome_balance"), Even()
    roles = SimpleNamespace(policy=even, critic=even)
    assert float(objective.loss(roles, batch_of(TEXTS, torch.ones(64))).max()) < 1e-9
    missed = objective.loss(roles, batch_of(TEXTS, torch.zeros(64)))
    torch.testing.assert_close(missed, torch.full_like(missed, float(torch.tensor(1e-3).log()) ** 2))


def test_samples_are_asked_for_their_own_outcome():
    stage = build("stage", {"name": "outcome_goals", "outcome": r"is (\w+)"})
    rows = [
        {"id": "a", "prompt": "sky?", "completions": ["it is blue", "it is grey", "who knows"]},
        {"id": "b", "prompt": [{"role": "user", "content": "sea?"}], "completions": ["it is green"]},
    ]
    heard: list[str] = []
    out = list(stage(rows, SimpleNamespace(clock=Clock(), warn=heard.append)))
    assert len(out) == 6 and len({row["id"] for row in out}) == 6 and "nothing matches" in heard[0]
    for own, other in zip(out[::2], out[1::2], strict=True):
        assert own["completions"] == other["completions"]
        assert own["scores"] == [1.0] and other["scores"] == [0.0]
        assert own["outcome"] in own["completions"][0] and other["outcome"] not in own["completions"][0]
    assert out[0]["prompt"] == "sky?\noutcome: blue\n"
    assert out[4]["prompt"][0]["content"] == "sea?\noutcome: green"
    with pytest.raises(RecipeError, match="two or more outcomes"):
        stage([{"id": "c", "prompt": "", "completions": ["is x"]}], SimpleNamespace(clock=Clock()))


def test_outcomes_are_drawn_in_proportion():
    read: list[str] = []

    def generate(prompts, n, seeds, **how):
        read.extend(prompts)
        return [[[seed]] for seed in seeds]

    renderer = SimpleNamespace(prompt=lambda row: row["prompt"])
    roles = SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer)
    decoder = build("decoder", {"name": "outcome_mixture", "rewards": {"a": 1.0, "b": 3.0, "c": 0.0}})
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    answers = decoder.generate(roles, rows, [[], []], n=400, seeds=[1, 2])
    assert [len(own) for own in answers] == [400, 400]
    share = sum("outcome: b" in prompt for prompt in read) / 800
    assert share == pytest.approx(0.75, abs=0.06) and not any("outcome: c" in prompt for prompt in read)
    with pytest.raises(Exception, match="positive"):
        build("decoder", {"name": "outcome_mixture", "rewards": {"a": 0.0}})
