"""A run's rows are rendered the same while it lasts and whenever its model is asked: date, template
variables, system prompt, stop tokens.
"""

from __future__ import annotations

import json
import re
from datetime import date

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import luthier
from helpers.chat_templates import tokenizer_for
from luthier.cli import app
from luthier.errors import Refused
from luthier.model.loaded import load
from luthier.serve.chat import chat
from luthier.serve.export import export
from luthier.storage.layout import RENDERING
from luthier.text import chat as chat_module
from luthier.train.trainer import Trainer

DATED = """{{- '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and not enable_thinking|default(true) %}{{ '<none>' }}{% endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('' if enable_thinking|default(true) else '<none>') }}
{%- endif %}"""
SYSTEM = {"role": "system", "content": "Be brief."}


def rows(**columns):
    made = []
    for i in range(12):
        turns = [
            SYSTEM,
            {"role": "user", "content": f"Number {i}?"},
            {"role": "assistant", "content": f"{i}!"},
        ]
        made.append({"messages": turns, **columns})
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny model whose template prints the date."""
    folder = tmp_path_factory.mktemp("dated")
    return save(folder, tokenizer_for(DATED, "<s>", "<|im_end|>"))


def save(folder, tokenizer, vocabulary=None, **generation) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    network = LlamaForCausalLM(config)
    if generation:
        network.generation_config = GenerationConfig(**generation)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe(model, data, **more):
    how = {"evaluate": [], "eval_data": 0, "dtype": "float32", "per_device_train_batch_size": 2}
    return {"model": model, "data": data, "max_steps": 3, "save_steps": 1, **how, **more}


def rendered(folder) -> str:
    return (folder / "shown.json").read_text()


class Tomorrow(date):
    @classmethod
    def today(cls):
        return cls(2031, 5, 6)


def test_a_resumed_run_keeps_its_date(model, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    step = Trainer.step

    def stopping(self):
        if self.roles.clock.step == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(recipe(model, rows()), folder=folder)
    first = rendered(folder)
    today = json.loads((folder / RENDERING).read_text())["today"]
    assert date.fromisoformat(today).strftime("%d %b %Y") in first
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(chat_module, "Date", Tomorrow)
    luthier.tune(recipe(model, rows()), folder=folder)
    assert rendered(folder) == first and "2031" not in first
    renderer = load(folder).roles.renderer
    assert "2031" not in renderer.text(
        renderer.prompt({"prompt": [SYSTEM, {"role": "user", "content": "Hi"}]})
    )


@pytest.mark.parametrize("where", ["rows", "recipe"])
def test_template_variables_and_system_prompt_are_kept(model, tmp_path, where):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    columns, keys = (options, {}) if where == "rows" else ({}, options)
    folder = tmp_path / "run"
    luthier.tune(recipe(model, rows(**columns), **keys), folder=folder)
    assert "<none>" in rendered(folder)
    loaded = load(folder)
    ask = [{"role": "user", "content": "Hi"}]
    prompt = loaded.roles.renderer.prompt({"prompt": ask})
    assert loaded.roles.renderer.text(prompt).endswith("assistant\n<none>")
    assert loaded.system == "Be brief."
    other = load(folder, chat_template_kwargs={"enable_thinking": True}).roles.renderer
    assert other.text(other.prompt({"prompt": ask})).endswith("assistant\n")
    for kind in ("lora", "merged"):
        export(folder, kind, tmp_path / kind)
        exported = load(tmp_path / kind).tokenizer
        text = exported.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        assert text.endswith("assistant\n<none>")
        text = exported.apply_chat_template(
            ask, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert text.endswith("assistant\n")


def test_the_run_that_says_nothing_new_has_no_such_file(model, tmp_path):
    folder = tmp_path / "run"
    plain = [{"prompt": f"{i}+1=", "completion": f" {i + 1}"} for i in range(8)]
    luthier.tune(recipe(model, plain, chat_template="plain"), folder=folder)
    assert not (folder / RENDERING).exists()


def test_generation_stops_where_the_models_own_settings_say(tmp_path):
    tokenizer = tokenizer_for(DATED.replace("<none>", "<|call|>"), "<s>", "<|im_end|>")
    call = tokenizer.convert_tokens_to_ids("<|call|>")
    loaded = load(save(tmp_path, tokenizer, eos_token_id=[tokenizer.eos_token_id, call]))
    assert set(loaded.roles.renderer.stop_ids) == {tokenizer.eos_token_id, call}


def test_a_tokenizer_larger_than_the_embedding_is_a_sentence(tmp_path):
    tokenizer = tokenizer_for(DATED, "<s>", "<|im_end|>")
    last = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model = save(tmp_path / "model", tokenizer, vocabulary=last)
    with pytest.raises(Refused, match=re.escape(f"<|im_start|> (id {last}) has none")):
        luthier.tune(recipe(model, rows()), folder=tmp_path / "run")


def test_a_name_of_a_channel_is_no_part_of_an_answer(model):
    channels = """{% for m in messages %}{{ '<|start|>' + m.role }}
    {%- if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}
    {{- '<|message|>' + m.content + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
    from luthier.text.encode import Renderer

    renderer = Renderer(tokenizer_for(channels, "<s>", "<|end|>"))
    written = (
        "<|channel|>analysis<|message|>I know<|end|><|start|>assistant<|channel|>final<|message|>Lima<|end|>"
    )
    ids = renderer.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert renderer.answer(ids) == "Lima" and renderer.answer(ids[:4]) == renderer.text(ids[:4])


def test_chat_takes_commands(model, tmp_path):
    folder = tmp_path / "run"
    luthier.tune(recipe(model, rows()), folder=folder)
    lines = iter(
        ["/help", "Hi", "/compare " + model, "Hi", "/system Be long.", "Ho", "/reset", "/what", "/quit"]
    )
    output: list[str] = []
    chat(str(folder), ask=lambda _: next(lines), say=output.append, max_new_tokens=2)
    text = "\n".join(output)
    assert "system prompt: Be brief." in text and "/compare MODEL" in text
    assert text.count(f"[{model}]") == 2 and "there is no command /what" in text


def test_chat_asks_as_trained_from_the_command_line(model, monkeypatch):
    prompts = []

    def answering(self, text, before=(), **how):
        prompts.append(([turn["content"] for turn in before], self.recipe.chat_template_kwargs))
        return "ok"

    monkeypatch.setattr("luthier.model.loaded.Loaded.ask", answering)
    words = ["chat", model, "--prompt", "Hi", "--system", "Be kind."]
    result = CliRunner().invoke(app, [*words, "--chat-template-kwargs", "{enable_thinking: false}"])
    assert result.exit_code == 0 and prompts == [(["Be kind."], {"enable_thinking": False})]
    assert CliRunner().invoke(app, [*words, "--chat-template-kwargs", "3"]).exit_code != 0


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(model):
    loaded = load(model)
    seen = []
    loaded.roles.policy.generate = lambda prompts, **how: seen.append(prompts) or [[[1]]]
    loaded.generate([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}])
    assert loaded.roles.text(seen[0][0]).endswith("assistant\nWell, ")
