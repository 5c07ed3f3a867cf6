"""Limits of chat templates: what runs on or grows without end is stopped, all else renders as before."""

from __future__ import annotations

import pytest

from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.text import template_limits
from luthier.text.chat import Chat

HI = [{"role": "user", "content": "Hi"}]
LOOP = "{% set ns = namespace(x=X) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def growing(start: str, step: str) -> str:
    return LOOP.replace("X", start).replace("STEP", step)


BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f('a') }}",
    "{{ 'x' * 10**10 }}",
    "{{ 9**999999 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x' | center(10**10) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    growing("'ab'", "ns.x ~ ns.x"),
    growing("'ab'", "'{}{}'.format(ns.x, ns.x)"),
    growing("['a']", "[ns.x, ns.x]"),
    growing("['a']", "{'a': ns.x, 'b': ns.x}.values()"),
    "{% set x = 'ab' * 99999 %}" + "{{ x }}" * 100,
]


@pytest.fixture
def chat(monkeypatch):
    """A conversation's template, whose renderings may take a little."""
    monkeypatch.setattr(template_limits, "MAX_WORK", 1_000_000)
    return Chat(make_tokenizer())


@pytest.mark.parametrize("template", BOMBS)
def test_bombs_are_stopped(chat, template):
    chat.tokenizer.chat_template = template
    with pytest.raises(BadRow, match="the chat template"):
        chat.render({"prompt": []}, HI)


def test_a_template_that_is_often_stopped_is_refused(chat):
    chat.tokenizer.chat_template = BOMBS[1]
    for _ in range(2):
        with pytest.raises(BadRow, match="was stopped"):
            chat.render({"prompt": []}, HI)
    with pytest.raises(RecipeError, match="set another chat_template"):
        chat.render({"prompt": []}, HI)


def test_what_templates_do_is_as_without_limits(chat):
    """Loops and their variables, macros, namespaces, filters, tests, operators, slices, calls."""
    template = (
        "{%- macro show(x, mark='-') %}{{ mark * 2 + x|string }}{{ caller() if caller }}{% endmacro -%}"
        "{% set ns = namespace(text='', n=0) %}"
        "{% for m in messages if m.role != 'system' %}"
        "{{ loop.index ~ '/' ~ loop.length }}{{ ' last' if loop.last }}{{ show(m.content | trim | upper) }}"
        "{% set ns.text = ns.text + m.content[1:] %}{% set ns.n = ns.n + 2 ** 3 %}"
        "{% endfor %}"
        "{{ ns.text.split('i') | join('|') }}{{ '%02d' % ns.n }}{{ '{:>4}'.format(ns.n) }}"
        "{{ messages | map(attribute='role') | list }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ {'a': [1, 2 + 3]} | tojson(indent=2) }}{{ 'us' in messages[1].role }}"
        "{% for key, value in {'b': 1, 'a': 2} | dictsort %}{{ key }}={{ value }}{% endfor %}"
        "{% call show('x') %}y{% endcall %}{{ range(3) | batch(2) | list }}{{ x is defined }}{{ [] + [1] }}"
    )
    turns = [
        {"role": role, "content": content}
        for role, content in (("system", "s"), ("user", " Hi it "), ("assistant", "yes"))
    ]
    chat.tokenizer.chat_template = template
    expected = chat.tokenizer.apply_chat_template(turns, tokenize=False)
    assert chat.render({"prompt": []}, turns) == expected


def test_transformers_compiles_templates_as_before_in_between(chat):
    from transformers.utils import chat_template_utils as utils

    before = utils._compile_jinja_template
    chat.render({"prompt": []}, HI)
    assert utils._compile_jinja_template is before


@pytest.mark.parametrize("template", [7, ["a"], {"default": 3}])
def test_what_is_no_text_is_refused(template):
    from luthier.text.encode import Renderer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="not text"):
        Renderer(tokenizer)


def test_what_is_long_in_a_row_may_be_written(chat):
    long = "x" * 5_000_000
    assert long in chat.render({"prompt": []}, [{"role": "user", "content": long}])


def test_the_threads_own_time_is_read_for_long_renderings_only(monkeypatch):
    """It is a call of the system that may take longer than a row. One that is long is still stopped by it,
    and one that slept is not.
    """
    now = {"wall": 0.0, "thread": 0.0, "reads": 0}

    def thread_time():
        now["reads"] += 1
        return now["thread"]

    monkeypatch.setattr(template_limits.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(template_limits.time, "thread_time", thread_time)
    budget = template_limits.Budget(1000)
    budget.step()
    assert now["reads"] == 0
    for wall in (0.2, 5.0, 60.0):  # slept
        now["wall"] = wall
        budget.step()
    now["thread"] = template_limits.SMALL_WORK_SECONDS + 0.1
    with pytest.raises(template_limits.TemplateLimit, match="5 s of computing"):
        budget.step()
    budget.cpu_start = 0.0
    budget.spend(template_limits.SMALL_WORK)
    now["thread"] = template_limits.MAX_SECONDS + 0.1
    with pytest.raises(template_limits.TemplateLimit, match="1 s of computing"):
        budget.step()
