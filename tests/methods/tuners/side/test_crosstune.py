"""CrossTune: a table in the place of the network, labels in another order, and few rows of toy topics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.tuners import DESCRIPTIONS, IDS, base, put
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.side._readout import Reading
from luthier.model.batch import collate
from luthier.recipe.model_names import resolve_model
from luthier.registry import build


def tuned(descriptions: Any = DESCRIPTIONS, labels: dict[int, str] | None = None, **settings: Any) -> Any:
    model: Any = base("labels")
    if labels is not None:
        model.config.id2label = labels
    attached: Any = put("crosstune", model, descriptions=descriptions, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return attached


@pytest.mark.parametrize("query", ["labels", "text"])
def test_a_table_of_states_takes_the_place_of_the_network(query):
    attached = tuned(query=query)
    own = attached.model(IDS).logits
    with torch.no_grad(), attached.off():
        table = attached.model.base_model(IDS).last_hidden_state
    reading = Reading(IDS, None, [], table)
    logits = attached.settings.answers(reading, attached.named())
    assert torch.equal(logits, own)
    F.cross_entropy(own, torch.tensor([1, 4])).backward()
    assert all(p.grad is None for p in attached.model.parameters())
    assert all(p.grad is not None for p in attached.parameters().values())
    assert own.std(1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("query", ["labels", "text"])
def test_labels_in_another_order_are_the_same_logits(query):
    order = [3, 0, 4, 2, 1]
    one = tuned(query=query).model(IDS).logits
    names = {i: f"LABEL_{place}" for i, place in enumerate(order)}
    other = tuned(query=query, labels=names).model(IDS).logits
    assert torch.allclose(other, one[:, order], atol=1e-5)
    # padding is read by nobody
    short = tuned(query=query).model(IDS[:, :5]).logits
    mask = torch.tensor([[1] * 5 + [0] * 2] * 2)
    assert torch.allclose(tuned(query=query).model(IDS, attention_mask=mask).logits, short, atol=1e-5)


def test_descriptions_of_no_label_are_refused():
    with pytest.raises(RecipeError, match="names no label with 'LABEL_9'"):
        tuned(descriptions={**DESCRIPTIONS, "LABEL_9": [3]})
    with pytest.raises(RecipeError, match="needs the model's tokenizer"):
        tuned(descriptions=None)


@pytest.mark.long
def test_few_rows_teach_it_more_than_logistic_regression():
    """Sixteen rows of each of the toy topics; the regression reads the state of the first token."""
    from sklearn.linear_model import LogisticRegression

    rows, shots, held_out = load_rows({"path": "toy:topic", "n": 600}).rows, [], []
    counts: dict[str, int] = {}
    for row in rows:
        label = row["completions"][0]
        counts[label] = counts.get(label, 0) + 1
        (shots if counts[label] <= 16 else held_out).append(row)
    architecture: Any = build("architecture", "classifier")
    path = str(resolve_model("toy:encoder"))
    torch.manual_seed(0)
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)

    def read(some):
        """The states of rows, as an interface would give them, and their labels."""
        batch, parts = collate(some, lambda row: architecture.encode(row, renderer)), {}
        hooks = [
            model.register_forward_pre_hook(lambda m, x, k: parts.update(k), with_kwargs=True),
            model.base_model.register_forward_hook(lambda m, x, y: parts.update(last=y[0])),
        ]
        with torch.no_grad():
            architecture.forward(model, Untuned(model), batch)
        for hook in hooks:
            hook.remove()
        reading = Reading(parts["input_ids"], parts["attention_mask"], [], parts["last"])
        return reading, batch.labels[batch.targets]

    (train, y), (test, answers) = read(shots), read(held_out[:300])
    probe = LogisticRegression(max_iter=2000).fit(train.last[:, 0].numpy(), y.numpy())
    attached: Any = build("tuner", {"name": "crosstune", "heads": 2}).attach(model)
    settings, adam = attached.settings, torch.optim.Adam([*attached.parameters().values()], lr=3e-3)
    for _ in range(120):
        adam.zero_grad()
        F.cross_entropy(settings.answers(train, attached.named()), y).backward()
        adam.step()
    with torch.no_grad():
        right = settings.answers(test, attached.named()).argmax(-1) == answers
    accuracy = float(right.float().mean())
    assert accuracy >= probe.score(test.last[:, 0].numpy(), answers.numpy()), accuracy
