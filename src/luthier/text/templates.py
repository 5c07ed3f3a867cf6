"""Chat templates: the built-in ones, how one is set on a tokenizer, and turns rendered through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.registry import did_you_mean

# A turn a line. The reply begins after "Assistant:" and ends with the end-of-sequence token.
PLAIN = """\
{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set said = message.content %}
    {%- else %}{% set said = (message.content or []) | map(attribute='text', default='') | join('') %}\
{% endif %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:' + (' ' + said if said else '') }}
        {%- for call in message.tool_calls or [] %}
            {{- ' <tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- (eos_token or '') + '\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + said + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# name -> template, special tokens that the tokenizer must have
TEMPLATES = {"plain": (PLAIN, ()), "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"))}
TURN_WEIGHTS = ("loss", "loss_scale")  # keys of a turn that are ours: templates must not see them


def set_chat_template(tokenizer: Any, chat_template: str | None, starts_with_bos: bool) -> str | None:
    """Set a template on a tokenizer; "plain" where it has none and `chat_template` is None. Returns a
    sentence about what was set, None where the tokenizer's own stays.

    chat_template: "plain", "chatml", a .jinja file or template text. starts_with_bos: the tokenizer puts its
    beginning-of-sequence token before a text, so built-in templates do the same. Raises RecipeError.
    """
    if chat_template is None and tokenizer.chat_template:
        return None
    name = chat_template or "plain"
    if name in TEMPLATES:
        tokenizer.chat_template = builtin_template(tokenizer, name, starts_with_bos)
    elif "{" in name:
        tokenizer.chat_template = name
    elif Path(name).expanduser().is_file():
        tokenizer.chat_template = Path(name).expanduser().read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"chat_template '{name}' is not a built-in name, a file or a Jinja"
            f" template{did_you_mean(name, TEMPLATES)}"
        )
    if chat_template is None:
        return (
            "the tokenizer has no chat template; using 'plain' (User: ... Assistant: ...),"
            " which is saved with it"
        )
    return f"using chat_template '{name[:60]}', which is saved with the tokenizer"


def builtin_template(tokenizer: Any, name: str, starts_with_bos: bool) -> str:
    """The text of a built-in template for a tokenizer. Raises RecipeError where it lacks a special token."""
    template, required = TEMPLATES[name]
    missing = []
    if required:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in required if token not in vocabulary]
    if missing:
        tokens = " and ".join(missing)
        raise RecipeError(
            f"chat_template '{name}' needs {tokens}, which this tokenizer does not have; use 'plain'"
        )
    if starts_with_bos:
        template = "{{- bos_token }}" + template
    return template


def render_turns(tokenizer: Any, row: dict, turns: list[dict], add_generation_prompt: bool = False) -> str:
    """Turns through the chat template, with the row's tools and `chat_template_kwargs`. Raises BadRow where
    the template refuses them.
    """
    options = row.get("chat_template_kwargs") or {}
    try:
        return tokenizer.apply_chat_template(
            without_weights(turns),
            tools=row.get("tools"),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **options,
        )
    except Exception as why:  # a template is somebody's program: it may raise anything
        raise BadRow(f"the chat template raised an error: {why}") from None


def without_weights(turns: list[dict]) -> list[dict]:
    """Turns as a template may see them: without how much each counts in the loss."""
    visible = []
    for turn in turns:
        visible.append({key: value for key, value in turn.items() if key not in TURN_WEIGHTS})
    return visible


def marks_generation(tokenizer: Any) -> bool:
    """Whether the chat template marks what the assistant writes with {% generation %}."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        template = " ".join((template or {}).values())
    template = (
        template.replace("{%-", "{%").replace("-%}", "%}").replace("{%generation%}", "{% generation %}")
    )
    return "{% generation %}" in template
