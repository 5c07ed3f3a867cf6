"""gguf: what transformers reads back is the network, with its tokenizer and template; every kind of network
that is written here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import luthier
from helpers.exporters import merging, sentencepiece
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.methods.exporters.gguf import _llama_cpp, _tokens, _write
from luthier.serve.export import export_form

pytest.importorskip("gguf")
IDS = torch.tensor([[7, 40, 99, 12, 55, 200, 31, 8]])
SMALL = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(_llama_cpp.shutil, "which", lambda tool: None)


def model_of(kind: str, **changes):
    if kind == "gemma2":
        changes["sliding_window"] = 128
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(_write.ARCHITECTURES))
def test_every_kind_of_network_is_read_back(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "plain")
    _write.write(tmp_path / "plain", tmp_path / "model.gguf", "f32", "x", lambda writer, size: None)
    again = _write.read(tmp_path / "model.gguf")
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gguf")
    base = merging(tiny, folder / "base")
    return luthier.tune(recipe_of(base) | {"tuner": "lora"}, folder=folder / "run").folder


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.long
def test_a_file_answers_like_the_model(run, tmp_path, kind):
    done = export_form(run, {"name": "gguf", "quantization": kind}, tmp_path / "out")
    assert done.agreement.mean < 0.01 and done.agreement.same >= 0.9 * done.agreement.tokens
    assert 0 < done.agreement.weights < {"f16": 1e-3, "q8_0": 0.02}[kind]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    tokenizer = _tokens.read_tokenizer(tmp_path / "out/model.gguf")
    assert tokenizer.chat_template == luthier.load(run).tokenizer.chat_template
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind, family", [("smollm", "digits"), ("llama-bpe", "letters")])
def test_splitting_rules_are_known_by_their_steps(kind, family):
    steps = [dict(step) for step in _tokens.split_rules()[kind]]
    for step in steps:
        step |= {"behavior": "Isolated", "invert": False, "add_prefix_space": False}
    assert _tokens.split_rule({"type": "Sequence", "pretokenizers": steps}) == kind
    steps[0]["pattern"] = {"Regex": "x"}
    with pytest.raises(RecipeError, match="LLAMA_CPP"):
        _tokens.split_rule({"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}]})


def test_scores_join_what_merges_join():
    tokens, merges = ["a", "b", "c", "bc", "ab", "abc"], [["b", "c"], ["a", "b"], ["a", "bc"]]
    scores = dict(zip(tokens, _tokens._scores(tokens, merges)))
    assert scores["bc"] > scores["ab"] > scores["abc"] > scores["a"]


@pytest.mark.long
def test_what_is_not_written_here_is_told(run, tmp_path):
    with pytest.raises(RecipeError, match="llama-cpp-python"):
        export_form(run, {"name": "gguf", "quantization": "q4_k_m"}, tmp_path / "out")
    with pytest.raises(RecipeError, match="leave one of them out"):
        export_form(run, {"name": "gguf", "quantization": "q8_0"}, tmp_path / "out", "float16")
    config = model_of("qwen3").config
    config.model_type = "other"
    with pytest.raises(RecipeError, match="LLAMA_CPP"):
        _write.check_config(config)
    assert not list(tmp_path.iterdir())


def test_a_tool_of_llama_cpp_that_fails_is_told(tmp_path, monkeypatch):
    assert not _llama_cpp.convert(tmp_path, tmp_path / "x.gguf", "f16")
    (tmp_path / _llama_cpp.CONVERTER).write_text("import sys; sys.exit('no such network')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(RecipeError, match="no such network"):
        _llama_cpp.convert(tmp_path, tmp_path / "x.gguf", "f16")


@torch.no_grad()
def test_llama_cpp_reads_what_is_written(tiny, tmp_path):
    """The same tokens, and the same logits but for its 16-bit cache."""
    llama_cpp = pytest.importorskip("llama_cpp")
    base = merging(tiny, tmp_path / "base")
    loaded = luthier.load(base, dtype="float32")

    def add(writer, size):
        _tokens.add_tokenizer(writer, loaded.tokenizer, size, [])

    _write.write(Path(base), tmp_path / "model.gguf", "f32", "x", add)
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), logits_all=True, n_ctx=64, verbose=False)
    text = "<|user|>the then 42?<|end|> x"
    ids = loaded.tokenizer(text)["input_ids"]
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    theirs.eval(ids)
    logits = torch.tensor(theirs.scores[: len(ids)])
    theirs.close()
    assert torch.allclose(logits, loaded.model(torch.tensor([ids])).logits[0].float(), atol=0.05)


def test_a_tokenizer_of_characters_is_read_back(tmp_path):
    """Its merges become scores."""
    tokenizer = sentencepiece()
    model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "plain")

    def add(writer, size):
        _tokens.add_tokenizer(writer, tokenizer, size, [])

    _write.write(tmp_path / "plain", tmp_path / "model.gguf", "f32", "x", add)
    again = _tokens.read_tokenizer(tmp_path / "model.gguf")
    for text in ("then the hen.", "the\nthe \u00e9t", " a  the", "xx<s>the"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
