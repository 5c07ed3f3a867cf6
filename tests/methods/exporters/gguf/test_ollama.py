"""ollama: the Modelfile asks as the chat template does."""

from __future__ import annotations

import re

import pytest

import luthier
from helpers.exporters import merging
from helpers.models import make_tokenizer
from helpers.rows import recipe_of
from luthier.methods.exporters.gguf._chat import pieces_of
from luthier.serve.export import export_form
from luthier.text.templates import CHATML, PLAIN

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{"
    " '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}"


def go(template: str, messages: list[dict]) -> str:
    """What the Go templates that are written here write: a range with one branch each role."""
    text = re.findall(r'if eq .Role "(\w+)" }}(.*?)(?={{- else|{{- end)', template)
    literal = lambda part: "".join(
        m[1].encode().decode("unicode_escape") if m[1] else m[0] for m in re.findall(r'({{ "(.*?)" }})', part)
    )
    out = ""
    for message in messages:
        before, after = dict(text)[message["role"]].split("{{ .Content }}")
        out += literal(before) + message["content"] + literal(after)
    return out + literal(template[template.index("ne .Role") :])


@pytest.mark.parametrize("template, system", [(CHATML, ""), (PLAIN, ""), (SMOL, "You help.")])
def test_a_modelfile_asks_as_the_template_does(template, system):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    pieces = pieces_of(tokenizer)
    assert pieces is not None and pieces.system == system
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert pieces.write(TURNS) == go(pieces.go(), TURNS) == expected


def test_the_first_token_is_left_to_who_adds_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.bos_token = "<|mask|>"
    assert pieces_of(tokenizer) is None  # it begins every text, and no message
    process = TemplateProcessing(single="<|mask|> $A", special_tokens=[("<|mask|>", 5)])
    tokenizer.backend_tokenizer.post_processor = process
    pieces = pieces_of(tokenizer)
    assert pieces is not None and pieces.around["system"][0] == "<|im_start|>system\n"


def test_a_template_that_counts_messages_is_left_to_ollama():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NUMBERED
    assert pieces_of(tokenizer) is None


@pytest.mark.long
def test_a_folder_for_ollama_create(tiny, tmp_path):
    pytest.importorskip("gguf")
    base = merging(tiny, tmp_path / "base")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    recipe = recipe_of(base) | {"data": [{"messages": turns}] * 8, "tuner": "lora", "max_steps": 1}
    run = luthier.tune(recipe, folder=tmp_path / "run").folder
    done = export_form(run, "ollama", tmp_path / "out")
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and 'PARAMETER stop "<|end|>"' in lines
    assert any(line.startswith("TEMPLATE") and "<|user|>" in line for line in lines)
    assert "ollama create run" in done.usage[0].code
