"""less: gradients of rows, influence by brute force, planted copies, what is on disk."""

from __future__ import annotations

import pytest
import torch

from helpers.rows import SUMS
from luthier.data.load import load_rows
from luthier.methods.stages.select._influence.gradients import (
    adam_direction,
    lora_layers,
    parameters,
    row_gradients,
    row_losses,
)
from luthier.methods.stages.select._influence.projection import Projection
from luthier.methods.stages.select._influence.store import VectorStore
from luthier.methods.stages.select._short_run import ShortRun, mean_loss, restored
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build

SPEECH = [{"prompt": f"say {w}", "completion": f"{w} {w}!"} for w in "one two three four five six".split()]


@pytest.fixture(scope="module")
def lora(shallow):
    """Roles of a tiny model with LoRA whose B is not zero."""
    recipe = Recipe.load({"model": shallow, "tuner": {"name": "lora", "r": 4}, "dtype": "float32"})
    roles = assemble(recipe, validate(recipe, load_rows(SUMS).rows))
    rng = torch.Generator().manual_seed(0)
    for name, p in roles.tuner.parameters().items():
        if name.endswith(".B"):
            p.data = 0.05 * torch.randn(p.shape, generator=rng)
    return roles


@pytest.fixture
def pool() -> list[dict]:
    return load_rows([*SUMS[:10], *SPEECH]).rows


def less(**settings):
    small = {"epochs": 2, "warmup": 0.5, "dim": 0, "batch_size": 4, "rate": 1e-3, "n": 3}
    return build("stage", {"name": "less", **small, **settings})


def exact_gradient(roles, row: dict) -> torch.Tensor:
    """By autograd, one row by itself."""
    loss = row_losses(roles.policy, roles.batch([row])).sum()
    grads = torch.autograd.grad(loss, parameters(roles.tuner))
    return torch.cat([g.flatten() for g in grads])


def test_gradients_of_rows_are_those_of_autograd(lora, pool):
    assert lora_layers(lora.tuner, None)
    together = row_gradients(lora, pool[:6])
    with lora.policy.eval_mode():
        alone = torch.stack([exact_gradient(lora, row) for row in pool[:6]])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-6)
    assert not lora.tuner.others and all(p.grad is None for p in parameters(lora.tuner))


def test_gradients_of_another_tuner_are_computed_row_by_row(tiny_roles, pool):
    assert lora_layers(tiny_roles.tuner, None) is None
    with tiny_roles.policy.eval_mode():
        alone = exact_gradient(tiny_roles, pool[0])
    assert torch.allclose(row_gradients(tiny_roles, pool[:1])[0], alone, rtol=1e-3, atol=1e-6)


def test_adam_without_moments_is_the_plain_direction():
    g = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(7)
    direction = adam_direction(g, zero, zero, betas=(0.0, 0.0), eps=1e8)
    assert torch.allclose(direction * 1e4, g, rtol=1e-4)


@pytest.mark.long
def test_scores_are_those_of_brute_force(lora, pool):
    """Not projected: against float64 sums over checkpoints, rows and subtasks."""
    target = [{**row, "task": str(i % 2)} for i, row in enumerate(SUMS[20:24])]
    stage = less(target=target)
    before = lora.tuner.tensors()
    out = {row["id"]: row["influence"] for row in stage.__class__(**{**vars(stage), "n": 99})(pool, lora)}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), lora.tuner.tensors().values(), strict=True))
    expected = torch.zeros(len(pool), 2, dtype=torch.float64)
    unit = lambda g: torch.nn.functional.normalize(g.double(), dim=-1)
    with restored(lora), lora.policy.eval_mode():
        for point in stage.points(lora, pool):
            lora.tuner.load(point.tensors)
            goals = torch.stack([unit(exact_gradient(lora, r)) for r in load_rows(target).rows])
            goals = torch.stack([goals[0::2].mean(0), goals[1::2].mean(0)])
            for i, row in enumerate(pool):
                direction = adam_direction(exact_gradient(lora, row)[None], point.m, point.v)[0]
                expected[i] += point.rate * (goals @ unit(direction))
    found = torch.tensor([out[row["id"]] for row in pool], dtype=torch.float64)
    assert torch.allclose(found, expected.max(1).values, rtol=1e-3, atol=1e-5)


def test_copies_of_the_target_rank_first(lora):
    """Planted copies of the target's rows are the first of the pool."""
    target = SPEECH[:2]
    pool = load_rows([*SUMS[:20], *target]).rows
    chosen = list(less(target=target, n=2, dim=512, epochs=1)(pool, lora))
    assert {row["prompt"] for row in chosen} == {row["prompt"] for row in target}


@pytest.mark.long
def test_projected_products_rank_as_exact_ones():
    """A million numbers to 8192: products keep their order (Spearman above 0.95)."""
    rng = torch.Generator().manual_seed(0)
    share = torch.linspace(-0.6, 0.6, 13)[:, None]
    rank = lambda x: x.argsort().argsort().double()
    for kind, numbers, dim in (("sparse", 1_000_000, 8192), ("rademacher", 20_000, 2048)):
        goal = torch.nn.functional.normalize(torch.randn(1, numbers, generator=rng), dim=-1)
        noise = torch.nn.functional.normalize(torch.randn(13, numbers, generator=rng), dim=-1)
        rows = share * goal + (1 - share.square()).sqrt() * noise
        exact = (rows @ goal.T)[:, 0]
        projection = Projection(numbers, dim, 3, kind)
        near = (projection(rows) @ projection(goal).T)[:, 0]
        assert float(torch.corrcoef(torch.stack([rank(exact), rank(near)]))[0, 1]) > 0.95
        assert torch.equal(projection(rows[:1]), Projection(numbers, dim, 3, kind)(rows[:1]))
    assert torch.equal(Projection(numbers, 0, 3)(goal), goal)


@pytest.mark.long
def test_chosen_rows_teach_the_target_more_than_random_ones(lora):
    target = load_rows(SPEECH[:2]).rows
    pool = load_rows([*SUMS[:24], *SPEECH[2:]]).rows
    chosen = list(less(target=SPEECH[:2], n=4, dim=512, rate=5e-3)(pool, lora))
    drawn = list(build("stage", {"name": "random_rows", "n": 4})(pool, lora))
    losses = []
    for rows in (chosen, drawn):
        with restored(lora):
            run = ShortRun(lora, 5e-3, 4, "test")
            for epoch in range(4):
                run.epoch(rows, epoch, 4)
            losses.append(mean_loss(lora, target, 4))
    assert losses[0] < losses[1]


def test_gradients_on_disk_serve_another_target(lora, pool, tmp_path, monkeypatch):
    """A stage that was killed goes on, and another target or a larger pool reads what is there."""
    import luthier.methods.stages.select.less as module

    counts = []

    def counting(roles, rows, only=None):
        counts.append(len(rows))
        return row_gradients(roles, rows, only)

    monkeypatch.setattr(module, "row_gradients", counting)
    settings = {"dim": 64, "store": str(tmp_path), "epochs": 1}
    first = list(less(target=SUMS[20:22], **settings)(pool[:8], lora))
    assert sum(counts) == 8 + 2
    assert list(less(target=SUMS[20:22], **settings)(pool[:8], lora)) == first
    assert sum(counts) == 8 + 2 + 2
    vectors = next(tmp_path.glob("gradients-*/vectors.bin"))
    with open(vectors, "r+b") as file:
        file.truncate(vectors.stat().st_size - 10)  # killed amid a row
    assert list(less(target=SUMS[20:22], **settings)(pool[:8], lora)) == first
    assert sum(counts) == 8 + 2 + 2 + 2 + 1
    assert list(less(target=SPEECH[:1], **settings)(pool[:8], lora)) != []
    assert sum(counts) == 8 + 2 + 2 + 2 + 1 + 1


def test_a_smaller_model_scores_for_another(lora, pool, shallow):
    sentences: list[str] = []
    lora.warn = sentences.append
    chosen = list(less(target=SPEECH[:1], scorer=shallow, dim=64, epochs=1)(pool, lora))
    assert len(chosen) == 3 and any("will take about" in s for s in sentences)


def test_a_store_in_memory_and_on_disk_are_alike(tmp_path):
    rows = [{"id": str(i), "prompt": str(i), "completions": ["x"]} for i in range(5)]
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    products = []
    for folder in (None, tmp_path / "s"):
        store = VectorStore(folder, 8, exact=True)
        assert store.missing([*rows, rows[0]]) == rows
        store.add(rows[:2], vectors[:2])
        store = store if folder is None else VectorStore(folder, 8, exact=True)
        assert store.missing(rows) == rows[2:]
        store.add(rows[2:], vectors[2:])
        products.append(store.products(rows, torch.eye(8), block=2))
    assert torch.equal(products[0], products[1]) and torch.allclose(products[0].float(), vectors)
    with pytest.raises(Exception, match="lower `dim`"):
        VectorStore(tmp_path / "s", 8).check_disk(10**18)
