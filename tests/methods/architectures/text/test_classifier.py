"""Heads for one class, for several labels and for numbers: transformers' losses, weights, and metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import luthier
from helpers.models import make_tokenizer
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.labels import of_labels, of_numbers
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build

TEXTS = ["a film", "bad", "very good film", "so so"]
LABELS = {
    "single_label_classification": ["pos", "neg", "pos", "pos"],
    "multi_label_classification": [["a", "b"], [], ["b"], ["a", "c"]],
    "regression": [1.5, -2.0, 0.25, 3.0],
}


def rows_of(problem: str) -> list[dict]:
    rows = []
    for i, (text, label) in enumerate(zip(TEXTS, LABELS[problem], strict=True)):
        completion = ", ".join(label) if isinstance(label, list) else str(label)
        rows.append({"id": str(i), "prompt": text, "completions": [completion], "label": label})
    return rows


def roles_of(problem: str, **settings):
    arch = build("architecture", {"name": "classifier", "problem_type": problem, **settings})
    network = arch.fit_to(rows_of(problem))
    weights = network.pop("class_weights", None)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=262, pad_token_id=0, **sizes, **network))
    model.config.class_weights = weights
    with torch.no_grad():
        model.score.weight.normal_()
    renderer = arch.renderer(make_tokenizer(), model.config)
    return Roles(Policy(arch, model.eval(), Untuned(model)), Clock(), renderer)


def losses(roles, rows, spec="sft"):
    encoded = roles.policy.architecture.encode_all(rows, roles.renderer).rows
    assert len(encoded) == len(rows)
    batch = roles.batch(encoded)
    objective = build("objective", spec)
    return objective.loss(roles, batch).sum() / objective.divisor(batch), batch


def logits(roles, rows):
    out = []
    for row in rows:
        ids = torch.tensor([roles.renderer.prompt(row)])
        out.append(roles.policy.model(input_ids=ids).logits[0])
    return torch.stack(out)


TARGETS = {
    "single_label_classification": torch.tensor([1, 0, 1, 1]),
    "multi_label_classification": torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]),
    "regression": torch.tensor([[1.5], [-2.0], [0.25], [3.0]]),
}
LOSSES = {
    "single_label_classification": nn.CrossEntropyLoss,
    "multi_label_classification": nn.BCEWithLogitsLoss,
    "regression": nn.MSELoss,
}


@pytest.mark.parametrize("problem", LABELS)
def test_sft_is_the_loss_of_transformers(problem):
    roles, rows = roles_of(problem), rows_of(problem)
    own, batch = losses(roles, rows)
    expected = LOSSES[problem]()(logits(roles, rows), TARGETS[problem])
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    policy = roles.policy
    plain = policy.architecture.plain(policy.model, policy.attached, batch)
    torch.testing.assert_close(policy.logprobs(batch), plain, atol=1e-5, rtol=1e-5)
    inputs = torch.tensor([roles.renderer.prompt(rows[0])])
    transformers = policy.model(input_ids=inputs, labels=TARGETS[problem][:1]).loss
    torch.testing.assert_close(transformers, LOSSES[problem]()(logits(roles, rows[:1]), TARGETS[problem][:1]))


def test_class_weights_are_torchs():
    rows = rows_of("single_label_classification")
    roles = roles_of("single_label_classification", class_weights={"neg": 3.0})
    own, _ = losses(roles, rows, {"name": "sft", "normalize": "weights"})
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([3.0, 1.0]))
    expected = weighted(logits(roles, rows), TARGETS["single_label_classification"])
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    balanced = roles_of("single_label_classification", class_weights="balanced")
    assert balanced.renderer.class_weights == {"neg": 2.0, "pos": pytest.approx(2 / 3)}
    rows = rows_of("multi_label_classification")
    roles = roles_of("multi_label_classification", class_weights="balanced")
    assert roles.renderer.class_weights == {"a": 1.0, "b": 1.0, "c": 3.0}
    own, _ = losses(roles, rows)
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 1.0, 3.0]))
    expected = weighted(logits(roles, rows), TARGETS["multi_label_classification"])
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_which_labels_there_are():
    arch = build("architecture", "classifier")
    network = arch.fit_to(rows_of("multi_label_classification"))
    assert network["problem_type"] == "multi_label_classification"
    assert network["label2id"] == {"a": 0, "b": 1, "c": 2}
    marks = [{"id": str(i), "completions": [""], "label": m} for i, m in enumerate([[0, 1, 1], [1, 0, 0]])]
    assert arch.fit_to(marks)["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    number = build("architecture", {"name": "classifier", "problem_type": "regression"})
    assert number.fit_to(rows_of("regression"))["num_labels"] == 1
    assert number.fit_to([{"id": "0", "label": [1, 2.5]}])["num_labels"] == 2
    for labels, reason in (([1.0, "x"], "'x' is not a number"), ([1.0, [1, 2]], "1 and 2 numbers")):
        with pytest.raises(RecipeError, match=reason):
            number.fit_to([{"id": str(i), "label": label} for i, label in enumerate(labels)])
    with pytest.raises(RecipeError, match="class_weights are for classes"):
        roles_of("regression", class_weights="balanced")
    with pytest.raises(RecipeError, match="no row has the class 'z'"):
        roles_of("single_label_classification", class_weights={"z": 2.0})


def test_metrics_by_hand():
    chosen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    present = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    out = of_labels(chosen, present, ["a", "b", "c"])
    third = pytest.approx(2 / 3)
    means = {"f1": pytest.approx(4 / 9), "f1_micro": third, "f1_weighted": third}
    assert out == {**means, "f1/a": third, "f1/b": third, "f1/c": 0.0}
    out = of_numbers(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2.0], [4.0], [100.0]]))
    assert out["mse"] == pytest.approx((1 + 4 + 96**2) / 3) and out["spearman"] == pytest.approx(1.0)
    assert out["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [2, 4, 100])[0, 1])
    assert "pearson" not in of_numbers(torch.ones(3, 1), torch.randn(3, 1))


def test_f1_weighted_is_the_mean_over_rows():
    """Each row counts with the F1 of its label, by scikit-learn's definition: the rare label hardly shows."""
    present = torch.nn.functional.one_hot(torch.tensor([0] * 9 + [1]), 3).bool()
    chosen = torch.nn.functional.one_hot(torch.tensor([0] * 9 + [2]), 3).bool()
    out = of_labels(chosen, present, ["often", "rare", "never"])
    assert out["f1_weighted"] == pytest.approx(0.9) and out["f1"] == pytest.approx(1 / 3)
    swapped = of_labels(chosen[[9, *range(9)]], present[[9, *range(9)]], ["often", "rare", "never"])
    assert swapped == out
    assert of_labels(present, present, ["often", "rare", "never"])["f1_weighted"] == 1.0


@pytest.mark.long
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_run_from_rows_to_a_model_of_transformers(problem, shallow, tmp_path):
    """Learned from a file, measured, loaded again, and exported as what transformers reads."""
    rows = []
    for i in range(24):
        words = [word for k, word in enumerate(("red", "wet", "hot")) if (i >> k) & 1]
        label = words if problem != "regression" else float(len(words))
        rows.append({"text": " ".join(words) or "none", "label": label})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    report = luthier.tune(
        model=shallow,
        data=str(data),
        eval_data=str(data),
        architecture={"name": "classifier", "problem_type": problem},
        tuner="lora",
        learning_rate=1e-2,
        max_steps=30,
        dtype="float32",
        evaluate=["loss", "labels"],
        output_dir=str(tmp_path / "run"),
    )
    metric = "mse" if problem == "regression" else "f1"
    better = report.after[metric] - report.before[metric]
    assert better < 0 if problem == "regression" else better > 0
    if problem == "regression":
        assert report.after["mse"] == pytest.approx(report.after["loss"], rel=1e-3)
    from luthier.serve.export import export

    export(report.folder, "merged", tmp_path / "out")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == problem
    loaded = luthier.load(report.folder)
    ids = torch.tensor([loaded.roles.renderer.prompt({"prompt": "red hot"})])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, loaded.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
