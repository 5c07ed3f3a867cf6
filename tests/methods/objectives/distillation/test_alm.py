"""alm: a teacher with other tokens is refused where sizes agree; the same base with another adapter teaches;
spans of one tokenizer are its tokens; spans of another tokenizer add up to its own log probability.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import luthier
from helpers.models import make_llama, make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.objectives.distillation.alm import event_divergence
from luthier.methods.stages.rollout.teacher_spans import along
from luthier.methods.stages.rollout.teacher_top import calibrated


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A tiny Llama with a tokenizer of its own: two digits are one token."""
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    merges = [[a, b] for a in "0123456789" for b in "0123456789"]
    for pair in merges:
        made["model"]["vocab"]["".join(pair)] = len(made["model"]["vocab"])
    made["model"]["merges"] = merges
    folder = tmp_path_factory.mktemp("other")
    make_llama(3, vocab_size=len(made["model"]["vocab"])).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<|end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    return str(folder)


def test_a_teacher_with_other_tokens_is_refused_where_sizes_agree(base, tiny, tmp_path):
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = made["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    make_llama(3).save_pretrained(tmp_path / "swapped")
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<|end|>", pad_token="<|pad|>"
    )
    swapped.save_pretrained(tmp_path / "swapped")
    asked = {
        **base,
        "objective": "distill",
        "max_steps": 1,
        "roles": {"teacher": {"name": "model", "model": str(tmp_path / "swapped")}},
    }
    with pytest.raises(RecipeError, match="2 tokens differ.*teacher_spans"):
        luthier.tune(asked, folder=tmp_path / "r")


@pytest.mark.long
def test_the_same_base_with_another_adapter_teaches(base, tiny, tmp_path):
    teacher = luthier.tune(
        {**base, "tuner": "lora", "learning_rate": 1e-2, "max_steps": 5}, folder=tmp_path / "teacher"
    ).folder
    asked = {
        **base,
        "tuner": "lora",
        "objective": "distill",
        "roles": {"teacher": {"name": "model", "model": teacher}},
    }
    report = luthier.tune({**asked, "start": teacher, "max_steps": 1}, folder=tmp_path / "same")
    assert report.losses[0] == pytest.approx(0, abs=1e-5)
    report = luthier.tune({**asked, "learning_rate": 1e-2, "max_steps": 12}, folder=tmp_path / "other")
    assert report.losses[0] > 1e-3 and report.losses[-1] < report.losses[0] / 2


def test_spans_of_one_tokenizer_are_its_tokens(base, tiny, tmp_path):
    stages = [{"name": "teacher_spans", "model": tiny}]
    same = luthier.tune(
        {**base, "objective": "alm", "stages": stages, "max_steps": 1, "tuner": "full"},
        folder=tmp_path / "same",
    )
    assert same.losses[0] == pytest.approx(0, abs=1e-6)
    row = json.loads((tmp_path / "same" / "rows.jsonl").read_text().splitlines()[0])
    loaded = luthier.load(tiny, dtype="float32")
    assert row["teacher_spans"][0] == pytest.approx(
        loaded.logprobs([{k: row[k] for k in ("id", "prompt", "completions")}]).tolist(), abs=1e-4
    )


@pytest.mark.long
def test_spans_of_another_tokenizer_add_up_to_its_own_log_probability(base, other, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b}"} for a in range(3) for b in range(8, 16)]
    tuned = {
        **base,
        "data": rows,
        "objective": "alm",
        "stages": [{"name": "teacher_spans", "model": other}],
        "tuner": "full",
    }
    report = luthier.tune({**tuned, "learning_rate": 3e-3, "max_steps": 40}, folder=tmp_path / "a")
    teacher = luthier.load(other, dtype="float32")
    for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        told = [v for v in row["teacher_spans"][0] if v <= 0]
        long = sum(len(n) == 2 for n in re.findall(r"\d+", row["completions"][0]))
        assert len(told) == len(row["teacher_spans"][0]) - long and row["teacher_spans"][0][-1] <= 0
        plain = {k: row[k] for k in ("id", "prompt", "completions")}
        assert sum(told) == pytest.approx(float(teacher.logprobs([plain]).sum()), abs=1e-3)
    assert report.losses[-1] < 0.7 * report.losses[0]


def test_where_both_cut_a_span_ends():
    assert along(5, [(2, 1), (3, 3), (5, 4)], [-1.0, -2.0, -3.0, -4.0]) == [1.0, -1.0, -5.0, 1.0, -4.0]
    assert along(4, [(2, 1)], [-1.0, -9.0]) == [1.0, -1.0, 2.0, 2.0]
    p, q = torch.tensor([0.3, 1.0]).log(), torch.tensor([0.6, 0.5]).log()
    want = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    assert event_divergence(p, q)[0] == pytest.approx(want, rel=1e-5) and event_divergence(p, q)[
        1
    ] == pytest.approx(math.log(2), rel=1e-3)
    assert event_divergence(p, p).abs().max() < 1e-6


def test_an_overconfident_teacher_is_tempered():
    torch.manual_seed(0)
    true = (torch.randn(4000, 5) * 1.5).log_softmax(-1)
    right = torch.multinomial(true.exp(), 1).squeeze(1)
    order = true.argsort(-1, descending=True)
    ranked, hit = true.gather(1, order), order[:, 0] == right
    assert calibrated((3 * ranked).log_softmax(-1), hit) == pytest.approx(3.0, abs=0.5)
    assert calibrated(ranked, hit) == pytest.approx(1.0, abs=0.2)
