"""metric: is its count by hand, needs an estimator without gradients; generated_reward scores the greedy
answer; the reward f1.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run
from luthier.registry import build


def test_a_metric_is_its_count_by_hand():
    roles, rows = cast(), make_rows(4, k=2)
    batch = batch_of(rows)
    likeliest = roles.policy.outputs(batch).first()
    for n, owner in enumerate(batch.owner.tolist()):  # the first completion says what is likeliest
        if owner == 0:
            rows[0]["completions"][0][int(batch.place[n])] = int(likeliest[n])
    batch = batch_of(rows)
    likeliest, labels = roles.policy.outputs(batch).first(), batch.labels[batch.supervised]
    for of in ("accuracy", "token_accuracy", "f1"):
        values = build("objective", {"name": "metric", "of": of}).loss(roles, batch)
        for i in range(len(batch.completion)):
            ours, right = likeliest[batch.owner == i].tolist(), labels[batch.owner == i].tolist()
            same = [a == b for a, b in zip(ours, right, strict=True)]
            shared, left = 0, list(right)
            for token in ours:
                if token in left:
                    left.remove(token)
                    shared += 1
            want = {"accuracy": all(same), "token_accuracy": sum(same) / len(same), "f1": shared / len(same)}
            assert float(values[i]) == pytest.approx(1 - float(want[of]), abs=1e-6)


def test_a_reward_is_that_of_the_greedy_answer():
    roles, rows = cast(), make_rows(3)
    objective = build("objective", {"name": "generated_reward", "reward": "length", "max_new_tokens": 5})
    values = objective.loss(roles, batch_of(rows))
    prompts = [row["prompt"] for row in rows]
    stop = list(roles.renderer.stop_ids)
    written = roles.policy.generate(prompts, seeds=[0] * 3, max_new_tokens=5, temperature=0.0, stop=stop)
    texts = [roles.renderer.answer(ids) for (ids,) in written]
    assert values.tolist() == [-float(len(text.split())) for text in texts] and not values.requires_grad


@pytest.mark.parametrize("objective", ["metric", {"name": "generated_reward", "reward": "f1"}])
def test_metrics_need_an_estimator_that_compares_values(objective, tiny):
    rows = [{"prompt": "a", "completions": ["b"], "answer": "b"}]
    recipe = {"model": tiny, "data": rows, "objective": objective, "tuner": "lora"}
    with pytest.raises(RecipeError, match="estimator: mezo"):
        dry_run(Recipe.load(recipe), rows)
    dry_run(Recipe.load({**recipe, "estimator": "mezo"}), rows)


def test_f1_of_words():
    f1 = build("reward", "f1")
    row = {"answer": ["the red House.", "blue"]}
    assert f1.scores(row, ["red house", "a house", "blue!", "green"]) == [1.0, pytest.approx(2 / 3), 1.0, 0.0]
    assert torch.tensor(f1.scores({"answer": "x x y"}, ["x y y"])).item() == pytest.approx(2 / 3)
