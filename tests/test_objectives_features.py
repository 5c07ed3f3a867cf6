"""Objectives that look at hidden states: LOOK, parts and wholes, generated features; and the roles that go
with them.
"""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.kernels.logprobs import Head
from luthier.methods.objectives.representation._features import classes, features, of_rows
from luthier.methods.objectives.representation.adam_v2 import long_enough, means, regions
from luthier.methods.objectives.representation.look import vote
from luthier.methods.roles.features.generator import Features as Made
from luthier.methods.roles.features.memory import Features
from luthier.methods.roles.networks.part_whole import Heads
from luthier.registry import build
from luthier.storage import checkpoints
from test_objectives import batch_of, cast, make_rows

# ------------------------------------------------------------------------------------------------ roles


def test_a_mean_teacher_is_the_running_average_and_gets_no_gradient(base, tmp_path):
    recipe = {
        **base,
        "tuner": {"name": "lora", "r": 2},
        "objective": "sft + self_distill + look",
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": 9,
        "roles": {
            "teacher": {"name": "mean_teacher", "momentum": 0.7},
            "memory": {"name": "memory", "size": 32},
        },
        "learning_rate": 1e-2,
    }
    report = luthier.tune(recipe, folder=tmp_path / "a")
    steps = [checkpoints.load(p).tensors for p in checkpoints.paths(tmp_path / "a")]
    moving = [k for k in steps[0] if k.endswith(".B")]
    assert len(steps) == 5 and moving
    for k in moving:
        mean = torch.zeros_like(steps[0][k])  # B starts at zero
        for tensors in steps:
            mean = 0.7 * mean + 0.3 * tensors[k]
            torch.testing.assert_close(
                tensors["role:teacher.average." + k.replace(".", "/")], mean, atol=1e-6, rtol=0
            )
    gaps = [
        json.loads(line)["loss/self_distill"]
        for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert gaps[0] == 0 and gaps[-1] > 0
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(recipe, folder=tmp_path / "b", callback=stops(3))
    again = luthier.tune(recipe, folder=tmp_path / "b")
    assert again.losses == report.losses, "what a role brings is kept in checkpoints"
    assert luthier.load(tmp_path / "b").ask("1+1=") is not None
    onward = luthier.tune(
        {**base, "tuner": recipe["tuner"], "start": report.folder, "max_steps": 1}, folder=tmp_path / "c"
    )
    assert onward.losses, "who goes on from such a run takes what the tuner moved"


def stops(step: int):
    from luthier.report.console import Callback

    class Watch(Callback):
        def step(self, log):
            if log["step"] == step:
                raise KeyboardInterrupt

    return Watch()


def test_a_memory_renews_its_rows_and_lets_the_oldest_go():
    memory = Features(3, 2)
    say = lambda rows, x: memory.remember(
        torch.tensor(rows), torch.tensor(rows) + 10, torch.full((len(rows), 2), float(x))
    )
    say([1, 2], 1)
    assert memory.count == 0, "what is said in a step is seen from the next one on"
    say([1, 2], 2)
    memory.after_step(None)
    assert memory.count == 2 and memory.features[:2].eq(2).all() and memory.classes[:2].tolist() == [11, 12]
    say([2, 3, 4], 3)
    memory.after_step(None)
    assert memory.rows.tolist() == [4, 2, 3] and memory.features.eq(3).all()
    with pytest.raises(RecipeError, match="2 wide"):
        memory.remember(torch.tensor([1]), torch.tensor([1]), torch.ones(1, 5))


# ------------------------------------------------------------------------------------------------ LOOK


def test_look_is_the_soft_vote_of_nearest_neighbours_without_oneself():
    near = torch.tensor([[9.0, 2.0, 1.0, 0.5, -1.0]])  # itself, then: other class, own class, other, own
    itself, same = (
        torch.tensor([[True, False, False, False, False]]),
        torch.tensor([[True, False, True, False, True]]),
    )
    e = math.exp
    for k, want in (
        (9, (e(1) + e(-1)) / (e(2) + e(1) + e(0.5) + e(-1))),
        (3, e(1) / (e(2) + e(1) + e(0.5))),
        # none of its class is among the nearest: the nearest of its class is added
        (1, e(1) / (e(2) + e(1))),
    ):
        got, found = vote(near, itself, same, k)
        assert found.tolist() == [True] and float(got.exp()) == pytest.approx(want, abs=1e-6)
    assert not vote(near, itself, itself, 3)[1].any(), "of its class it knows only itself"


def test_look_reads_the_memory_as_it_was_and_not_the_row_itself():
    objective, rows = build("objective", {"name": "look", "k": 4}), make_rows(4, k=1)
    for r in rows[1:]:
        r["completions"] = rows[0]["completions"]  # one class
    batch = batch_of(rows)
    roles = cast(memory=Features(8, 16))
    assert objective.loss(roles, batch).eq(0).all(), "nothing is remembered yet"
    roles.memory.after_step(None)
    assert (
        roles.memory.count == 4
        and len(set(classes(batch).tolist())) == 1
        and len(set(of_rows(batch).tolist())) == 4
    )
    # all neighbours agree
    torch.testing.assert_close(objective.loss(roles, batch_of(rows)), torch.zeros(4), atol=1e-6, rtol=0)
    alone = cast(memory=Features(8, 16))
    alone.memory.remember(
        of_rows(batch)[:1], classes(batch)[:1], features(batch, alone.policy.outputs(batch))[:1]
    )
    alone.memory.after_step(None)
    assert objective.loss(alone, batch_of(rows[:1])).eq(0).all()


def test_look_keeps_what_a_class_is_made_of():
    """Two classes of two kinds of points each, seen through two numbers; then the kinds are told apart by a
    linear probe.
    """
    from torch import nn

    def probe(seed: int, spec: str | dict) -> float:
        rng = torch.Generator().manual_seed(seed)
        middle = 2 * torch.randn(4, 10, generator=rng)
        kind = torch.arange(400) % 4
        x = middle[kind] + torch.randn(400, 10, generator=rng)
        rows = [{"id": i, "prompt": [3], "completions": [[4 + i % 2]]} for i in range(400)]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
        head = nn.Linear(2, 2)
        memory, objective = Features(200, 2), build("objective", "look")
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 1e-2)
        for _ in range(150):
            some = torch.randint(200, (32,), generator=rng).tolist()
            batch, z = batch_of([rows[i] for i in some]), net(x[some])
            said = SimpleNamespace(outputs=lambda _, z=z: SimpleNamespace(hidden=z))
            if spec == "look":
                loss = objective.loss(SimpleNamespace(policy=said, teacher=said, memory=memory), batch).mean()
                memory.after_step(None)
            else:
                loss = nn.functional.cross_entropy(head(z), kind[some] % 2)
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            z = net(x)
        z = nn.functional.normalize(z, dim=1)
        top = nn.Linear(2, 4)
        fit = torch.optim.LBFGS(top.parameters(), max_iter=100)

        def cost():
            fit.zero_grad()
            value = nn.functional.cross_entropy(top(z[:200]), kind[:200])
            value.backward()
            return value

        fit.step(cost)
        return float((top(z[200:]).argmax(1) == kind[200:]).float().mean())

    found = [(probe(seed, "look"), probe(seed, "cross-entropy")) for seed in range(3)]
    assert sum(a > b for a, b in found) >= 2 and sum(a - b for a, b in found) > 0.15


# ------------------------------------------------------------------------------------------------ parts and wholes


class Reads:
    """A role whose states are a function of the tokens it reads."""

    def __init__(self, f):
        self.f = f

    def outputs(self, batch):
        return SimpleNamespace(hidden=self.f(batch.ids[batch.supervised]))


def whole_texts(n: int, length: int, seed: int = 0) -> list[dict]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {"id": i, "prompt": [3, 4], "completions": [torch.randint(3, 40, (length,), generator=rng).tolist()]}
        for i in range(n)
    ]


def test_regions_are_wholes_and_their_parts_read_alone():
    rows = whole_texts(3, 8) + [
        {"id": "short", "prompt": [], "completions": [[5, 6, 7]]},
        {"id": "bare", "prompt": [], "completions": [[*range(8, 16)]]},
    ]
    batch = batch_of(rows)
    assert long_enough(batch, 2) == [0, 1, 2, 4]
    cut = regions(batch, 2, 0, Clock())
    said = [cut.labels[p].tolist() for p in cut.segments()]
    parents = cut.parent.tolist()
    for n, row in enumerate(rows[:3] + rows[4:]):
        whole, *parts = (int(s) for s in cut.completion[3 * n : 3 * n + 3])
        assert said[whole] == row["completions"][0] == said[parts[0]] + said[parts[1]]
        assert all(said[parents[s]] == row["prompt"] for s in (whole, *parts)), (
            "each continues what the text continues, and not its neighbours"
        )
    assert cut.lengths.tolist() == [8, 4, 4] * 3 + [7, 3, 3], "a token that nothing precedes is not asked"
    halves = regions(batch, 2, 1, Clock())
    assert [len(halves.labels[halves.segments()[int(s)]]) for s in halves.completion[:3]] == [4, 2, 2]
    assert regions(batch_of([rows[3]]), 2, 0, Clock()) is None


def test_parts_of_a_linear_reader_compose_exactly():
    """Embeddings that are linear in tokens, a composer that is the mean: what the parts make is the whole."""
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    roles = SimpleNamespace(
        policy=Reads(lambda ids: table[ids]),
        teacher=Reads(lambda ids: table[ids]),
        part_heads=Heads(6, 2, trained=False),
        clock=Clock(),
        renderer=SimpleNamespace(tokenizer=range(40)),
    )
    batch = batch_of(whole_texts(5, 8))
    only = lambda **weights: build(
        "objective",
        {
            "name": "adam_v2",
            "noise": 0.0,
            "localizability": 0,
            "composability": 0,
            "decomposability": 0,
            **weights,
        },
    )
    torch.testing.assert_close(only(composability=1).loss(roles, batch), torch.zeros(5), atol=1e-6, rtol=0)
    assert (only(decomposability=1).loss(roles, batch) > 0.01).all()
    whole = build("objective", {"name": "adam_v2", "noise": 0.0}).loss(roles, batch)
    apart = [
        only(**{k: 1}).loss(roles, batch) for k in ("localizability", "composability", "decomposability")
    ]
    torch.testing.assert_close(whole, sum(apart))
    alike = SimpleNamespace(
        **{
            **vars(roles),
            "policy": Reads(lambda ids: torch.ones(len(ids), 6)),
            "teacher": Reads(lambda ids: torch.ones(len(ids), 6)),
        }
    )
    assert only(localizability=1).loss(alike, batch).abs().max() < 1e-6, "near-duplicates are no contrast"
    with pytest.raises(RecipeError, match="alike in both"):
        build("objective", {"name": "adam_v2", "parts_of_whole": 3}).loss(roles, batch)


def test_wholes_find_their_parts():
    """Texts of two of twelve kinds of parts: the whole tells which part stands first in it, and which
    second.
    """
    from torch import nn

    def found(seed: int, **weights) -> float:
        rng = torch.Generator().manual_seed(seed)
        kinds = torch.randint(3, 40, (12, 4), generator=rng)
        pick = torch.stack([torch.randperm(12, generator=rng)[:2] for _ in range(60)])
        rows = [
            {"id": i, "prompt": [3], "completions": [kinds[p].flatten().tolist()]} for i, p in enumerate(pick)
        ]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        teacher, heads = copy.deepcopy(net), Heads(16, 2)
        roles = SimpleNamespace(
            policy=Reads(net),
            teacher=Reads(lambda ids: teacher(ids).detach()),
            part_heads=heads,
            clock=Clock(total=80),
            renderer=SimpleNamespace(tokenizer=range(40)),
        )
        objective = build("objective", {"name": "adam_v2", "levels": 1, **weights})
        optimizer = torch.optim.Adam([*net.parameters(), *heads.parameters()], 3e-3)
        for roles.clock.step in range(80):
            loss = objective.loss(
                roles, batch_of([rows[i] for i in torch.randint(60, (24,), generator=rng).tolist()])
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for a, b in zip(teacher.parameters(), net.parameters(), strict=True):
                    a.lerp_(b, 0.05)
        with torch.no_grad():
            cut = regions(batch_of(rows), 2, 0, roles.clock)
            z = means(cut, roles.policy.outputs(cut), 2)
            told = nn.functional.normalize(heads.decompose(z[:, 0]), dim=-1)  # [texts, 2, d]
        places = [[int((pick == kind).nonzero()[0, i]) for i in (0, 1)] for kind in range(12)]
        # one of each kind
        parts = nn.functional.normalize(torch.stack([z[text, 1 + place] for text, place in places]), dim=-1)
        return float(((told @ parts.T).argmax(-1) == pick).float().mean())

    scores = [(found(seed), found(seed, composability=0, decomposability=0)) for seed in range(3)]
    assert sum(a > b + 0.1 for a, b in scores) >= 2


# ------------------------------------------------------------------------------------------------ generated features


def test_a_recent_mean_is_of_a_window_that_grows(tiny):
    role = build("role", {"name": "recent", "most": 4, "least": 1, "every": 2})
    assert [role.window(share) for share in (0.0, 0.5, 1.0)] == [1, 2, 4]
    from transformers import AutoModelForCausalLM

    attached = build("tuner", {"name": "prompt", "num_virtual_tokens": 2}).attach(
        AutoModelForCausalLM.from_pretrained(tiny)
    )
    policy = SimpleNamespace(attached=attached)
    kept, clock, values = role.parts(policy)["snapshots"], Clock(total=12), [attached.prompt.detach().clone()]
    kept.ready([], None)
    for clock.step in range(12):
        with torch.no_grad():
            attached.prompt += 1.0 + clock.step
        kept.after_step(clock)
        if clock.step % 2:
            values.append(attached.prompt.detach().clone())
            n = min(len(values), role.window((clock.step + 1) / 12))
            torch.testing.assert_close(kept.tensors()["prompt.embeddings"], torch.stack(values[-n:]).mean(0))
    with pytest.raises(RecipeError, match="not above most"):
        build("role", {"name": "recent", "most": 1, "least": 2})


def test_a_generator_says_what_all_neighbours_share_and_neighbours_are_others():
    made = Made(8, ["a", "b", "c", "d"], ["x"], 2, 4)
    q, k, v = (
        torch.randn(3, 1, 8),
        torch.randn(3, 2, 8),
        torch.nn.functional.normalize(torch.randn(3, 1, 8), dim=-1),
    )
    torch.testing.assert_close(
        made(q, k, v.expand(-1, 2, -1)).norm(dim=-1), torch.ones(3, 1), atol=1e-6, rtol=0
    )
    with torch.no_grad():
        made.attention.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        made.attention.out_proj.weight.copy_(torch.eye(8))
        for p in made.ffn.parameters():
            p.zero_()
    torch.testing.assert_close(made(q, k, v.expand(-1, 2, -1)), v, atol=1e-6, rtol=0)
    made.mean.copy_(torch.randn(4, 8))
    assert all(
        i not in row for i, row in enumerate(made.neighbours().tolist())
    ) and made.neighbours().shape == (4, 2)


def test_statistics_follow_states_and_a_row_counts_once():
    made = Made(4, ["a", "b"], ["x"], 1, 2, momentum=0.5)
    z = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    made.remember(torch.tensor([1, 2]), torch.tensor([0, 0]), z)
    made.after_step(None, momentum=0.0)
    assert (
        made.mean[0].tolist() == [0.5, 0.5, 0, 0]
        and made.spread()[0].tolist() == [0.5, 0.5, 0, 0]
        and float(made.size) == 2
    )
    for _ in range(2):
        made.remember(torch.tensor([1]), torch.tensor([0]), z[:1])
    made.after_step(None)
    assert made.mean[0].tolist() == [0.75, 0.25, 0, 0] and made.mean[1].eq(0).all()


class Answers:
    """A role that answers with classes: states of points, and an output layer."""

    def __init__(self, net, head, x):
        self.net, self.head, self.x = net, head, x
        self.model = SimpleNamespace(get_output_embeddings=lambda: head)

    def outputs(self, batch):
        from luthier.model.outputs import Outputs

        hidden = self.net(self.x[[row["id"] for row in batch.rows]])
        return Outputs(hidden, Head(self.head), batch.labels[batch.supervised])


def tuned_on_known(seed: int, **weights) -> tuple[float, torch.Tensor]:
    """Twelve classes whose points lie near a rotation of their features; six are learned. Accuracy on the
    other six.
    """
    from torch import nn

    rng = torch.Generator().manual_seed(seed)
    W = nn.functional.normalize(torch.randn(12, 16, generator=rng), dim=1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=rng)).Q
    y = torch.arange(360) % 12
    x = 4 * W[y] @ turn + 0.8 * torch.randn(360, 16, generator=rng)
    torch.manual_seed(seed)
    net, head = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)), nn.Linear(16, 12, bias=False)
    head.weight.data = 4 * W
    known = (y < 6).nonzero()[:, 0]
    with torch.no_grad():  # a start that knows all classes a little, as a pretrained network does
        net[2].weight.zero_()
    skip = turn.T + 0.5 * torch.randn(16, 16, generator=rng)
    f = lambda x: x @ skip + net(x)
    late, make = copy.deepcopy(net), Made(16, [*"abcdef"], [*"ghijkl"], 3, 4)
    make.tokens.copy_(torch.arange(12))
    roles = SimpleNamespace(
        policy=Answers(f, head, x),
        teacher=Answers(lambda x: x @ skip + late(x).detach(), head, x),
        generator=make,
        clock=Clock(total=120),
    )
    rows = [{"id": i, "prompt": [3], "completions": [[int(c)]]} for i, c in enumerate(y)]
    make.remember(known, y[known], f(x[known]).detach())
    make.after_step(None, momentum=0.0)
    objective = build("objective", {"name": "ogen", **weights})
    optimizer = torch.optim.Adam([*net.parameters(), *make.parameters()], 2e-2)
    for roles.clock.step in range(120):
        batch = batch_of([rows[i] for i in known[torch.randint(len(known), (32,), generator=rng)].tolist()])
        loss = -roles.policy.outputs(batch).logprobs.mean() + objective.loss(roles, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        make.after_step(None)
        with torch.no_grad():
            for a, b in zip(late.parameters(), net.parameters(), strict=True):
                a.lerp_(b, 0.05)
    new = y >= 6
    with torch.no_grad():
        said = f(x[new]) @ head.weight[6:].T
    return float((said.argmax(1) == y[new] - 6).float().mean()), net[0].weight.detach()


OFF = {"reconstruction": 0, "base_classes": 0, "new_classes": 0, "distillation": 0}


def test_ogen_keeps_classes_that_are_not_tuned_on():
    scores = [
        (tuned_on_known(seed, distillation=5.0)[0], tuned_on_known(seed, **OFF)[0]) for seed in range(3)
    ]

    assert sum(a for a, _ in scores) >= sum(b for _, b in scores) and sum(a >= b for a, b in scores) >= 2


def test_ogen_without_weights_is_nothing_and_warms_up():
    rows = [{"id": i, "prompt": [3], "completions": [[3 + i % 3]]} for i in range(6)]
    roles = cast()
    batch = batch_of(rows)
    assert build("objective", {"name": "ogen", **OFF}).loss(roles, batch).eq(0).all()
    build("objective", "ogen").loss(roles, batch)
    assert "ogen_unknown" not in batch.metrics and "ogen_reconstruction" in batch.metrics
    roles.clock.total, roles.clock.step = 10, 2
    build("objective", "ogen").loss(roles, batch)
    assert batch.metrics["ogen_unknown"][1] == 6
    strange = batch_of([{"id": 0, "prompt": [3], "completions": [[39]]}])
    assert build("objective", "ogen").loss(roles, strange).tolist() == [0.0], (
        "an answer of no known class is left to the other terms"
    )
