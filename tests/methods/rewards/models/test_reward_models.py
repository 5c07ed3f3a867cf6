"""reward_model, process_reward_model, classifier: what transformers' own forward says."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.architectures.text.reward_model import RewardModel
from luthier.registry import build

ROW = {"id": "r", "prompt": "abc"}
TEXTS = ["de", "f g h", "i"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A scalar head on the tiny network, saved as transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scorer")
    RewardModel().load(tiny, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def theirs(folder: str, *texts: str, end: bool = True) -> list[float]:
    """The logit of transformers' own forward, after the token that ends an answer or without it."""
    from transformers import AutoModelForSequenceClassification

    net, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    out = []
    for text in texts:
        ids = tokenizer("abc" + text).input_ids + [tokenizer.eos_token_id] * end
        with torch.no_grad():
            out.append(float(net(torch.tensor([ids])).logits[0, 0]))
    return out


def test_a_reward_model_says_what_its_network_says(folder):
    for size in (1, 8):
        spec = {"name": "reward_model", "model": folder, "dtype": "float32", "batch_size": size}
        judge = build("reward", spec)
        assert judge.scores(ROW, TEXTS) == pytest.approx(theirs(folder, *TEXTS), abs=1e-4)


def test_steps_are_probabilities_at_their_ends(folder):
    spec = {"name": "process_reward_model", "model": folder, "dtype": "float32"}
    steps = build("reward", spec).steps(ROW, ["d\ne"])[0]
    logits = theirs(folder, "d\n", "d\ne\n", end=False)
    assert steps == pytest.approx(torch.tensor(logits).sigmoid().tolist(), abs=1e-4)
    for aggregate, value in (("min", min(steps)), ("product", steps[0] * steps[1]), ("last", steps[1])):
        other = build("reward", {**spec, "aggregate": aggregate})
        assert other.scores(ROW, ["d\ne", ""]) == pytest.approx([value, 0.0])


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A small encoder with three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("heads"), make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_labels_probabilities_and_weighted_heads(heads):
    base = {"name": "classifier", "model": heads, "input": "text"}
    each = [build("reward", {**base, "label": k}).scores(ROW, TEXTS) for k in range(3)]
    assert build("reward", {**base, "label": "good"}).scores(ROW, TEXTS) == each[2]
    logits = torch.tensor(each).T
    soft = build("reward", {**base, "label": "fair", "output": "softmax"}).scores(ROW, TEXTS)
    assert soft == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=1e-5)
    some = build("reward", {**base, "weights": {"good": 1.0, "bad": -0.5}}).scores(ROW, TEXTS)
    assert some == pytest.approx((logits[:, 2] - 0.5 * logits[:, 0]).tolist(), abs=1e-5)
    pair = build("reward", {**base, "input": "pair", "label": 1})
    assert pair.scores(ROW, TEXTS) != each[1]
    with pytest.raises(RecipeError, match="no label 'best'"):
        build("reward", {**base, "label": "best"}).scores(ROW, TEXTS)
