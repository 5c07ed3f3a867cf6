"""Chat templates: the built-in ones, how one is set on a tokenizer, and what a template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import loopcontrols

from luthier.errors import RecipeError
from luthier.registry import did_you_mean

REASONING = """\
{%- if message.reasoning_content %}
    {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}"""
# A turn a line. The reply begins after "Assistant:" and ends with the end-of-sequence token.
PLAIN = (
    """\
{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}
    {%- else %}{% set content = (message.content or []) | map(attribute='text', default='') | join('') %}\
{% endif %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:' + (' ' if content or message.reasoning_content else '') }}
        """
    + REASONING
    + """
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- ' <tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- (eos_token or '') + '\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
)
CHATML = (
    """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    """
    + REASONING
    + """
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)
# name -> template, special tokens that the tokenizer must have
TEMPLATES = {"plain": (PLAIN, ()), "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"))}
# variables that every template has; what else it reads is a switch of its own (`enable_thinking`)
GIVEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
    *("namespace", "range", "dict", "date_string", "loop", "caller", "varargs", "kwargs"),
}


def set_chat_template(tokenizer: Any, chat_template: str | None, starts_with_bos: bool) -> str | None:
    """Set a template on a tokenizer; "plain" where it has none and `chat_template` is None. Returns a
    sentence about what was set, None where the tokenizer's own stays.

    chat_template: "plain", "chatml", a .jinja file or template text. starts_with_bos: the tokenizer puts its
    beginning-of-sequence token before a text, so built-in templates do the same. Raises RecipeError.
    """
    if chat_template is None and tokenizer.chat_template:
        check_is_text(tokenizer.chat_template)
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


def check_is_text(template: Any) -> None:
    """Raise RecipeError where what a tokenizer brings as its chat template is neither a text nor texts by
    name.
    """
    texts = list(template.values()) if isinstance(template, Mapping) else [template]
    for text in texts:
        if not isinstance(text, str):
            raise RecipeError(
                f"the tokenizer's chat_template is of type {type(text).__name__}, not text; set chat_template"
                " in the recipe"
            )


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


def with_defaults(template: str, options: Mapping[str, Any]) -> str:
    """A template whose variables have these values wherever they are not given."""
    lines = []
    for name, value in options.items():
        lines.append(f"{{% set {name} = {name} if {name} is defined else {jinja_literal(value)} %}}")
    return "".join(lines) + template


def jinja_literal(value: Any) -> str:
    """A plain value as a Jinja expression."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {jinja_literal(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(jinja_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def template_text(tokenizer: Any) -> str:
    """A tokenizer's chat template; of several by name, all of them."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return " ".join(map(str, template.values()))
    return str(template or "")


def marks_generation(template: str) -> bool:
    """Whether a chat template marks what the assistant writes with {% generation %}."""
    template = (
        template.replace("{%-", "{%").replace("-%}", "%}").replace("{%generation%}", "{% generation %}")
    )
    return "{% generation %}" in template


@lru_cache(maxsize=32)
def names_read(template: str) -> frozenset[str]:
    """The keys of messages that a template may read: every attribute it takes, and every text it compares or
    looks up. Empty where the template cannot be parsed.
    """
    tree = parse_template(template)
    if tree is None:
        return frozenset()
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    for node in tree.find_all(nodes.Const):
        if isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)
    return frozenset(names)


@lru_cache(maxsize=32)
def switches(template: str) -> tuple[str, ...]:
    """The variables of a template that `chat_template_kwargs` may set, in the order they are read."""
    tree = parse_template(template)
    if tree is None:
        return ()
    stored: set[str] = set()
    read: dict[str, None] = {}
    for node in tree.find_all(nodes.Name):
        if node.ctx == "load":
            read[node.name] = None
        else:
            stored.add(node.name)
    local: set[str] = set()  # macros and their arguments, loop variables
    for node in tree.find_all(nodes.Macro):
        local.add(node.name)
        local.update(argument.name for argument in node.args)
    for node in tree.find_all(nodes.For):
        local.update(name.name for name in node.target.find_all(nodes.Name))
        if isinstance(node.target, nodes.Name):
            local.add(node.target.name)
    # A switch may be given its default by the template itself: `{% set thinking = false %}` where undefined.
    tested = {node.node.name for node in tree.find_all(nodes.Test) if isinstance(node.node, nodes.Name)}
    free = []
    for name in read:
        if name not in GIVEN and name not in local and (name not in stored or name in tested):
            free.append(name)
    return tuple(free)


def parse_template(template: str) -> nodes.Template | None:
    """A template's syntax tree; None where it has none of ours."""
    plain = template
    for word in ("generation", "endgeneration"):
        for opening in ("{%- ", "{% "):
            for closing in (" -%}", " %}"):
                plain = plain.replace(f"{opening}{word}{closing}", "")
    try:
        return Environment(extensions=[loopcontrols]).parse(plain)
    except (TemplateError, RecursionError):
        return None
