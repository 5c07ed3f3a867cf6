"""Stages that choose rows: brute force, closed forms and planted rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.stages.curate.likert import Likert
from luthier.methods.stages.curate.perplexity import Perplexity
from luthier.methods.stages.select.diverse import far_apart
from luthier.methods.stages.select.got_d import calibrated_gradient
from luthier.methods.stages.select.k_center import farthest
from luthier.methods.stages.select.kmq import budgets, k_means
from luthier.methods.stages.select.random_rows import RandomRows
from luthier.registry import build
from luthier.storage import files


def unit(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def nobody() -> SimpleNamespace:
    """Roles of stages that ask no model."""
    return SimpleNamespace(clock=Clock(), warn=lambda sentence: None, dropped={})


def rows_of(texts) -> list[dict]:
    return [{"id": str(i), "prompt": text, "completions": ["yes"]} for i, text in enumerate(texts)]


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


# ------------------------------------------------------------------------------------------------- deita


def test_diverse_is_the_brute_force_filter():
    vectors = unit(200, 3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    expected: list[int] = []
    for place in order:
        if all(float(vectors[place] @ vectors[other]) < 0.9 for other in expected) and len(expected) < 40:
            expected.append(place)
    chosen = far_apart(vectors, order, 40, 0.9)
    assert chosen == expected
    likeness = vectors[chosen] @ vectors[chosen].T - 2 * torch.eye(len(chosen))
    assert float(likeness.max()) < 0.9
    assert far_apart(vectors, order, 25, 1.01) == order[:25]


def test_a_certain_digit_is_the_score():
    """Logits all on one digit give it; equal logits the middle."""
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [int(text)])
    roles = SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer))
    for digit in (1, 4, 6):

        def generate(prompts, decoder, digit=digit, **how):
            logits = torch.full((len(prompts), 10), -1e4)
            logits[:, digit] = 0.0
            decoder(logits, prompts, [[] for _ in prompts])

        who = SimpleNamespace(generate=generate)
        assert Likert().expected(roles, who, [[7], [8]]) == pytest.approx([digit, digit])
    flat = SimpleNamespace(
        generate=lambda prompts, decoder, **how: decoder(torch.zeros(len(prompts), 10), prompts, [])
    )
    assert Likert().expected(roles, flat, [[7]]) == pytest.approx([3.5])


def test_likert_and_diverse_choose_rows(tiny_roles):
    rows = rows_of([f"what is {a}?" for a in range(5)])
    scored = list(build("stage", {"name": "likert"})(rows, tiny_roles))
    assert all(1 <= row["quality"] <= 6 for row in scored)
    tiny_roles.dropped.clear()
    chosen = build("stage", {"name": "diverse", "n": 2, "threshold": 1.01})(scored, tiny_roles)
    best = sorted(scored, key=lambda row: -row["quality"])[:2]
    assert {*ids(chosen)} == {*ids(best)} and len(tiny_roles.dropped) == 3
    with pytest.raises(RecipeError, match="column 'quality'"):
        build("stage", "diverse")(rows, tiny_roles)


# ------------------------------------------------------------------------------------------------- grape


def answers(tiny_roles) -> tuple[list[dict], list[list[float]]]:
    """Rows with three answers each, and the mean log-probability of each by transformers alone."""
    rows, means = [], []
    tokenizer, model = tiny_roles.renderer.tokenizer, tiny_roles.policy.model
    for i in range(4):
        row = {"id": str(i), "prompt": f"say {i}: ", "completions": ["ab", "xyz w", f"{i}{i}"]}
        rows.append(row)
        own = []
        for completion in row["completions"]:
            encoded = tiny_roles.policy.architecture.encode(
                {**row, "completions": [completion]}, tiny_roles.renderer
            )
            read = torch.tensor([encoded.prompt + encoded.completions[0]])
            labels = read.clone()
            labels[:, : len(encoded.prompt)] = -100
            with torch.no_grad():
                own.append(-float(model(input_ids=read, labels=labels).loss))
        means.append(own)
    assert tokenizer is not None
    return rows, means


def test_grape_takes_the_likeliest_answer(tiny_roles):
    rows, means = answers(tiny_roles)
    for reverse, best in ((False, max), (True, min)):
        for size in (1, 3):
            stage = build("stage", {"name": "grape", "reverse": reverse, "batch_size": size})
            chosen = list(stage(rows, tiny_roles))
            for row, out, own in zip(rows, chosen, means, strict=True):
                assert out["completions"] == [row["completions"][own.index(best(own))]]


def test_one_answer_stays(tiny_roles):
    rows = rows_of(["a", "b"])
    assert [row["completions"] for row in build("stage", "grape")(rows, tiny_roles)] == [["yes"], ["yes"]]


def test_perplexity_is_transformers(tiny_roles):
    rows, means = answers(tiny_roles)
    for row, own in zip(build("stage", "perplexity")(rows, tiny_roles), means, strict=True):
        assert row["perplexity"] == pytest.approx(math.exp(-own[0]), rel=1e-4)


# ------------------------------------------------------------------------------------------------- got-d


def transport(p: torch.Tensor, cost: torch.Tensor) -> float:
    """The exact distance between weights p and equal weights of the columns."""
    from scipy.optimize import linprog

    n, m = cost.shape
    rows = torch.kron(torch.eye(n), torch.ones(1, m))
    columns = torch.kron(torch.ones(1, n), torch.eye(m))
    sides = torch.cat([p, torch.full((m,), 1 / m)]).double().numpy()
    both = torch.cat([rows, columns]).numpy()
    return linprog(cost.flatten().double().numpy(), A_eq=both, b_eq=sides, method="highs").fun


def test_the_calibrated_gradient_is_that_of_optimal_transport():
    """Against differences of the exact cost when mass moves to a row."""
    rng = torch.Generator().manual_seed(0)
    cost = torch.cdist(torch.randn(9, 2, generator=rng), torch.randn(7, 2, generator=rng) + 1.0)
    gradient = calibrated_gradient(cost, 0.01, 2000)
    even, step = torch.full((9,), 1 / 9), 1e-3
    exact = []
    for i in range(9):
        moved = even * (1 - step)
        moved[i] += step
        exact.append((transport(moved, cost) - transport(even, cost)) / step)
    exact = torch.tensor(exact)
    ranks = torch.stack([gradient.argsort().argsort(), exact.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
    agree = (gradient.sign() == exact.sign()).double().mean()
    assert float(agree) > 0.8


def test_chosen_rows_pull_the_pool_to_the_target():
    """Pool and chosen rows together are nearer to the target than with random or nearest rows."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(60, 2, generator=rng)
    pool = torch.cat([torch.randn(60, 2, generator=rng), torch.randn(30, 2, generator=rng) + 3.0])
    target = torch.randn(40, 2, generator=rng) + 1.5
    n = 20
    chosen = {
        "got_d": calibrated_gradient(torch.cdist(pool, target), 0.02, 500).argsort()[:n],
        "nearest": torch.cdist(pool, target).mean(1).argsort()[:n],
        "random": torch.randperm(len(pool), generator=rng)[:n],
    }
    distance = {}
    for name, places in chosen.items():
        together = torch.cat([base, pool[places]])
        even = torch.full((len(together),), 1 / len(together))
        distance[name] = transport(even, torch.cdist(together, target))
    assert distance["got_d"] < min(distance["nearest"], distance["random"])


# --------------------------------------------------------------------------------------------------- kmq


@pytest.mark.parametrize("n", [1, 7, 20, 33])
def test_budgets_add_up_and_no_cluster_gives_more_than_it_has(n):
    sizes = torch.tensor([3.0, 10.0, 1.0, 19.0]).double()
    for parts in (sizes, torch.ones(4).double(), torch.tensor([0.0, 1.0, 5.0, 0.0]).double()):
        counts = budgets(parts, sizes, n)
        assert sum(counts) == min(n, 33)
        assert all(count <= size for count, size in zip(counts, sizes.tolist(), strict=True))


def test_kmq_covers_more_clusters_than_chance():
    """Twelve clusters of unequal size: with equal budgets all of them are among twelve rows."""
    rng = torch.Generator().manual_seed(0)
    centres = 5 * unit(12, 6)
    sizes = [40] * 3 + [4] * 9
    vectors = torch.cat(
        [c + 0.05 * torch.randn(s, 6, generator=rng) for c, s in zip(centres, sizes, strict=True)]
    )
    labels = k_means(vectors, 12, rng)
    counts = torch.bincount(labels)
    assert sorted(counts.tolist()) == sorted(sizes)
    assert budgets(torch.ones(12).double(), counts.double(), 12) == [1] * 12


def test_weights_move_the_budget(tiny_roles):
    rows = rows_of(["1 + 1", "2 + 2", "3 + 3", "tell me a story", "tell me a tale", "tell me a joke"])
    kmq = {"name": "kmq", "n": 2, "clusters": 2, "budget": "equal"}
    free = list(build("stage", kmq)(rows, tiny_roles))
    assert sorted(row["cluster"] for row in free) == [0, 1]
    for cluster in (0, 1):
        (only,) = build("stage", {**kmq, "n": 1, "weights": {cluster: 0.0}})(rows, tiny_roles)
        assert only["cluster"] == 1 - cluster


# ------------------------------------------------------------------------------- copies, tests, chance, top


COPY = "the quick brown fox jumps over the lazy dog and runs far away from the old house near the river"


def test_copies_leave():
    texts = [COPY, "another text", COPY.upper() + "!", "a third one", COPY]
    exact = build("stage", {"name": "deduplicate", "near": False})
    roles = nobody()
    assert ids(exact(rows_of(texts), roles)) == ["0", "1", "3"]
    assert {*roles.dropped} == {"2", "4"}


@pytest.mark.parametrize("near", [False, True])
def test_a_question_about_another_image_is_no_copy(near):
    rows = [{**row, "images": [image]} for row, image in zip(rows_of([COPY] * 3), "aba", strict=True)]
    stage = build("stage", {"name": "deduplicate", "near": near})
    assert ids(stage(rows, nobody())) == ["0", "1"]


def test_near_copies_are_found():
    """All planted near copies are found, and none of the other texts."""
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(400)]
    texts = []
    for k in range(30):
        start = words[(13 * k) % 300 :][:60]
        texts.append(" ".join(f"{w}{k}" for w in start))
    copies = [text.replace(text.split()[30], "changed", 1) for text in texts[:10]]
    near = build("stage", {"name": "deduplicate", "threshold": 0.7, "words": 3})
    assert ids(near(rows_of(texts + copies), nobody())) == [str(i) for i in range(30)]


def test_contaminated_rows_leave():
    tests = [{"prompt": COPY, "completion": "x"}, {"prompt": "who is there", "completion": "y"}]
    rows = rows_of(["fresh", f"Please note: {COPY}.", "Who is there?", "who is there in the garden"])
    stage = build("stage", {"name": "decontaminate", "against": tests, "words": 8})
    assert ids(stage(rows, nobody())) == ["0", "3"]


def test_chance_is_nested_and_repeatable():
    rows = rows_of([str(i) for i in range(40)])
    small, large, again = (
        {*ids(build("stage", {"name": "random_rows", "n": n})(rows, nobody()))} for n in (5, 12, 5)
    )
    assert small == again and small < large and len(large) == 12


def test_top_and_bounds():
    rows = [{**row, "quality": float(i)} for i, row in enumerate(rows_of("abcdef"))]
    assert ids(build("stage", {"name": "top", "n": 2})(rows, nobody())) == ["4", "5"]
    low = {"name": "top", "prefer": "low", "n": 3, "least": 1.0, "most": 2.0}
    assert ids(build("stage", low)(rows, nobody())) == ["1", "2"]


def test_k_center_goes_far():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, 5.0], [0.2, 0.1]])
    assert {*farthest(points, 3)[1:]} == {2, 3}


def test_whatever_leaves_has_its_line(base, tmp_path):
    """Stages in a row: each row is learned from, or stands in dropped.jsonl once."""
    rows = [{"prompt": f"say {i % 6}", "completion": str(i % 6)} for i in range(12)]
    stages = [{"name": "deduplicate", "near": False}, {"name": "random_rows", "n": 4}]
    luthier.tune(base | {"data": rows, "stages": stages, "max_steps": 1}, folder=tmp_path)
    lines = files.read_rows(tmp_path / "dropped.jsonl")
    remaining = files.read_rows(tmp_path / "rows.jsonl")
    assert [line["stage"] for line in lines].count("random_rows") == 2
    names = [line["id"] for line in lines] + [str(row["id"]) for row in remaining]
    assert len(names) == len({*names}) == 12
    assert all(line["reason"] for line in lines)


@pytest.mark.long
def test_stages_that_were_finished_are_read_back(base, tmp_path, monkeypatch):
    """A run that ended amid its second stage goes on with the rows of the first, and its lines are there."""
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(8)]
    stages = ["perplexity", {"name": "k_center", "n": 6}, {"name": "random_rows", "n": 4}]
    recipe = base | {"data": rows, "stages": stages, "max_steps": 1}
    calls = []
    perplexity = Perplexity.__call__

    def counting(self, rows, roles):
        calls.append(len(list(rows)))
        return perplexity(self, rows, roles)

    def killed(self, rows, roles):
        raise KeyboardInterrupt

    monkeypatch.setattr(Perplexity, "__call__", counting)
    luthier.tune(recipe, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RandomRows, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            luthier.tune(recipe, folder=tmp_path / "cut")
    luthier.tune(recipe, folder=tmp_path / "cut")
    assert calls == [8, 8]
    for name in ("rows.jsonl", "dropped.jsonl"):
        assert files.read_rows(tmp_path / "cut" / name) == files.read_rows(tmp_path / "whole" / name)
