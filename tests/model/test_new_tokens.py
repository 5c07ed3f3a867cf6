"""`add_tokens`: new tokens are single ids, their rows train, and PEFT and transformers load them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from helpers.models import make_llama, make_tokenizer
from luthier.errors import RecipeError
from luthier.model.new_tokens import add_tokens, token_modules
from luthier.recipe.new_tokens import NewTokens, read_new_tokens

NEW = ["<lookup>", "<found>"]
ROWS = [{"prompt": f"<lookup>{i}", "completion": f"<found>{i}"} for i in range(8)]


def model_at(folder, tie: bool) -> str:
    make_llama(num_hidden_layers=2, tie_word_embeddings=tie).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_new_row_is_the_mean_of_what_the_token_was():
    for tie in (True, False):
        model, tokenizer = make_llama(num_hidden_layers=1, tie_word_embeddings=tie), make_tokenizer()
        before = model.get_input_embeddings().weight.detach().clone()
        old = tokenizer("<lookup>").input_ids
        ids = add_tokens(model, tokenizer, NewTokens((*NEW, "<|end|>")))
        assert ids == [262, 263] and len(old) > 1 and tokenizer("a<lookup>b").input_ids[1:2] == [262]
        weight = model.get_input_embeddings().weight
        assert torch.equal(weight[:262], before) and torch.allclose(weight[262], before[old].mean(0))
        assert len(token_modules(model)) == 2 - tie and model.config.vocab_size == 264
        assert model.get_output_embeddings().weight.shape[0] == 264
        assert tokenizer.decode([262]) == "<lookup>"


def test_new_rows_leave_the_logits_of_old_tokens():
    """On texts of old tokens their logits stay; and the logit of a new token is the mean of its parts'."""
    tokens = torch.arange(40, 60)[None]
    for tie in (True, False):
        model, tokenizer = make_llama(num_hidden_layers=2, tie_word_embeddings=tie).eval(), make_tokenizer()
        old = tokenizer("<lookup>", add_special_tokens=False).input_ids
        with torch.no_grad():
            before = model(tokens).logits
            add_tokens(model, tokenizer, NewTokens(tuple(NEW)))
            after = model(tokens).logits
        torch.testing.assert_close(after[..., : before.shape[-1]], before, atol=1e-6, rtol=0)
        torch.testing.assert_close(after[..., 262], before[..., old].mean(-1), atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tuner", [{"name": "lora", "r": 2}, "ssf", "full"], ids=["lora", "ssf", "full"])
def test_a_run_with_new_tokens(tie, tuner, tmp_path):
    base = model_at(tmp_path / "base", tie)
    report = luthier.tune(
        model=base,
        data=ROWS,
        add_tokens=NEW,
        tuner=tuner,
        learning_rate=1e-2,
        max_steps=4,
        dtype="float32",
        evaluate=["loss"],
        output_dir=str(tmp_path / "run"),
    )
    loaded = luthier.load(report.folder)
    tokenizer, tuned = loaded.tokenizer, loaded.roles.tuner
    ids = loaded.roles.renderer.encode({**ROWS[3], "completions": [ROWS[3]["completion"]]})
    assert ids.prompt[0] == 262 and 263 in ids.completions[0]
    before = {name: tensor.clone() for name, tensor in tuned.tensors().items()}
    if tuner != "full":
        rows = [t for n, t in before.items() if "trainable_tokens_delta" in n]
        assert len(rows) == 2 - tie and all(t.shape == (2, 48) for t in rows)
    sequence = torch.tensor([[*ids.prompt, *ids.completions[0]]])
    with torch.no_grad():
        expected = loaded.model(sequence).logits
    luthier.register_peft()
    saved = AutoTokenizer.from_pretrained(report.folder)
    assert saved("<lookup>").input_ids == [262] and len(saved) == len(tokenizer)
    if tuner == "full":
        again = AutoModelForCausalLM.from_pretrained(report.folder)
    else:
        network = AutoModelForCausalLM.from_pretrained(base)
        network.resize_token_embeddings(len(saved))
        again = PeftModel.from_pretrained(network, report.folder)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(sequence).logits, expected, atol=1e-5, rtol=1e-5)
    from luthier.serve.export import export

    export(report.folder, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(sequence).logits, expected, atol=1e-4, rtol=1e-4)
    if tuner != "full":
        with tuned.off(), torch.no_grad():
            assert not torch.allclose(loaded.model(sequence).logits, expected, atol=1e-4)


def test_what_is_refused(tmp_path):
    assert read_new_tokens(None) is None and read_new_tokens("<a>") == NewTokens(("<a>",))
    assert read_new_tokens(["<x>", "<a_{9..11}>"]) == NewTokens(("<x>", "<a_9>", "<a_10>", "<a_11>"))
    odd = {
        "is listed twice": ["<a>", "<a>"],
        "that is not empty": ["<a>", ""],
        "no setting 'specal'": {"tokens": ["<a>"], "specal": True},
        "train is one of": {"tokens": ["<a>"], "train": "some"},
        "expected a list": {"special": True},
        "counts from 2 to 1": ["<a{2..1}>"],
        "is 1,000,000,001 tokens; 1,000,000 at most": ["<a{0..1000000000}>"],
    }
    for reason, value in odd.items():
        with pytest.raises(RecipeError, match=reason):
            read_new_tokens(value)
    base = model_at(tmp_path / "base", True)
    common = {"model": base, "data": ROWS, "max_steps": 1, "output_dir": str(tmp_path / "run")}
    for tuner, train, reason in (
        ("telly", "auto", "does not train the rows of new tokens"),
        ("full", "new", "cannot train new rows of the embeddings alone"),
        ("prompt", "auto", "does not train the rows of new tokens"),
    ):
        with pytest.raises(RecipeError, match=reason):
            luthier.tune(**common, tuner=tuner, add_tokens={"tokens": NEW, "train": train})
    assert json.loads((tmp_path / "run" / "failed.json").read_text())["code"] == "recipe"
