"""Chat templates that nobody should write: each renders, or is stopped in a sentence, within time and
memory.
"""

from __future__ import annotations

import random
import resource
import traceback

import pytest

from helpers.hostile import COUNT, SEED, Hang, Tally, limited, place_of
from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.text.encode import Renderer

pytestmark = pytest.mark.slow
SECONDS = 15.0  # of a row, three of which may go over the limits
MEGABYTES = 1500  # that all of them together may add to this process
ROW = {
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there"}],
    "completions": [[{"role": "assistant", "content": "Hello!"}]],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
DOUBLING = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}" + "{{ ns.x }}"
)
NESTING = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}END"
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) if i < 0 %}x{% endfor %}" * 500,
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}x{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{{ " + "f(" * 40 + "'abc'" + ")" * 40 + " }}",
    "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f('a') }}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [0] * 10**10 }}",
    "{{ 9**9**9**9 }}",
    "{{ (2**9000) * (2**9000) }}",
    "{{ ('1' * 1000000) | int(0, 2) // 3 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1.0 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '%s' | format('x' * 100000) }}{{ ('%s' * 9000) | format('x' * 100000) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.zfill(10**10) }}",
    "{{ ('\t' * 100000).expandtabs(100000) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{{ ('b' * 100000).join('a' * 100000) }}",
    "{{ (['a'] * 100000) | join('b' * 100000) }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ ('a\n' * 100000) | indent(100000) }}",
    "{{ range(99999) | batch(10**10, 'x') | list }}",
    "{{ range(99999) | slice(10**10) | list }}",
    "{{ lipsum(10**9) }}",
    "{{ range(99999) | list | tojson(indent=10**6) }}",
    "{{ ('<' * 9999999) | urlize }}",
    "{{ ('<!--' * 999999) | striptags }}",
    "{{ [[1]] * 90000 | sum(start=[]) | length }}",
    "{{ range(99999) | map('list') | sum(start=[]) }}",
    "{{ 'x' | round(10**9) }}",
    *(
        DOUBLING.replace("STEP", step)
        for step in (
            "ns.x + ns.x",
            "ns.x ~ ns.x",
            "ns.x * 2",
            "[ns.x, ns.x] | join",
            "'{}{}'.format(ns.x, ns.x)",
            "'%s%s' % (ns.x, ns.x)",
            "ns.x.replace('a', 'aa')",
            "ns.x.join(['', ns.x, ''])",
            "(ns.x, ns.x)",
            "[ns.x, ns.x]",
            "{'a': ns.x, 'b': ns.x}",
            "dict(a=ns.x, b=ns.x)",
            "namespace(a=ns.x, b=ns.x)",
            "{'a': ns.x, 'b': ns.x}.values()",
            "[ns.x] * 2",
            "[ns.x] + [ns.x]",
            "ns.x | list + ns.x | list",
        )
    ),
    *(
        NESTING.replace("STEP", step).replace("END", end)
        for step in ("[ns.x, ns.x]", "{'a': ns.x, 1: ns.x}")
        for end in (
            "{{ ns.x | tojson }}",
            "{{ ns.x | string }}",
            "{{ ns.x ~ '' }}",
            "{{ ns.x | pprint }}",
            "{{ ns.x == ns.x | list }}",
            "{{ {(ns.x, ns.x): 1} }}",
        )
    ),
    "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns.x.x.x }}{{ [ns] }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% set x %}" + "{{ 'ab' * 999999 }}" * 50 + "{% endset %}{{ x }}",
    "{% set x = 'ab' * 9999999 %}" + "{{ x }}" * 10000,
    "{% set x = 'ab' * 9999999 %}" + "{% set y = x[1:] %}" * 5000,
    "{% set x = 'ab' * 9999999 %}" + "{% if 'zz' in x %}{% endif %}" * 4000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ undefined.x.y }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ messages[99].content }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% for",
    "{{ 'a' | nofilter }}",
    "{" * 100_000,
    "x" * 5_000_000,
    "\ud800{{ 1 }}",
    "\0{{ 1 }}",
]
ODD = [7, 2.5, True, ["a"], {"default": 3}, {"tool_use": "x"}, {}, b"{{ 1 }}", [{"name": "default"}]]
VALUES = (
    *(
        "'x'",
        "'ab' * 999",
        "[1, 2]",
        "messages",
        "tools",
        "range(99999)",
        "1",
        "10**6",
        "2.5",
        "none",
        "true",
    ),
    *("ns", "ns.x", "ns.y", "m", "m.content", "loop", "loop.index", "undefined", "{'a': 1}", "caller", "f"),
)
FILTERS = (
    *(
        "length",
        "list",
        "join",
        "join(ns.x)",
        "tojson",
        "tojson(indent=4)",
        "string",
        "upper",
        "trim",
        "sort",
    ),
    *("map('string')", "map('center', 999)", "select", "reverse", "unique", "sum", "int", "float", "first"),
    *("replace('a', ns.x)", "indent(99)", "batch(3)", "slice(3)", "center(9999)", "items", "dictsort", "max"),
    *("wordwrap", "pprint", "urlize", "striptags", "escape", "format(ns.x)", "default(ns.y)", "attr('x')"),
)
CALLS = (
    *(
        "upper()",
        "split('a')",
        "format(ns.x, ns.y)",
        "join(ns.y)",
        "replace('a', ns.x)",
        "items()",
        "encode()",
    ),
    *("ljust(9999)", "expandtabs(999)", "splitlines()", "get('a')", "values()", "strip()", "zfill(99)"),
)


def expression(chance: random.Random, depth: int = 3) -> str:
    """Any expression."""
    if not depth or chance.random() < 0.2:
        return chance.choice(VALUES)
    inner = expression(chance, depth - 1)
    kind = chance.randrange(8)
    if kind < 2:
        operator = chance.choice(("+", "~", "*", "%", "-", "==", "in", "and"))
        return f"({inner} {operator} {expression(chance, depth - 1)})"
    if kind < 4:
        return f"({inner} | {chance.choice(FILTERS)})"
    if kind == 4:
        return f"({inner}).{chance.choice(CALLS)}"
    if kind == 5:
        return f"[{inner}, {expression(chance, depth - 1)}]"
    if kind == 6:
        return f"({inner})[{chance.choice(('0', '1:', '::2', 'ns.x', '-1'))}]"
    return f"f({inner})"


def statements(chance: random.Random, depth: int = 3) -> str:
    """Any statements."""
    pieces = []
    for _ in range(chance.randint(1, 3)):
        kind = chance.randrange(6)
        value = expression(chance)
        body = statements(chance, depth - 1) if depth else "x"
        if kind == 0:
            pieces.append(f"{{% for m in {value} %}}{body}{{% endfor %}}")
        elif kind == 1:
            pieces.append(f"{{% set ns.{chance.choice('xy')} = {value} %}}")
        elif kind == 2:
            pieces.append(f"{{% if {value} %}}{body}{{% else %}}{{{{ {value} }}}}{{% endif %}}")
        elif kind == 3:
            pieces.append(f"{{% set ns.x %}}{body}{{% endset %}}")
        elif kind == 4:
            pieces.append(f"{{% call f({value}) %}}{body}{{% endcall %}}")
        else:
            pieces.append(f"{{{{ {value} }}}}")
    return "".join(pieces)


def template(chance: random.Random) -> str:
    """Any template: loops that keep what they make, a macro that may call itself, the messages."""
    head = "{% set ns = namespace(x='ab', y=['c']) %}"
    macro = f"{{% macro f(m) %}}{statements(chance, 1)}{{% endmacro %}}"
    turns = chance.choice(("messages", "range(40)", "range(9999)", "range(99999)"))
    return f"{head}{macro}{{% for m in {turns} %}}{statements(chance, 2)}{{% endfor %}}{{{{ ns.x }}}}"


def attempt(tally: Tally, text, label: str) -> None:
    """Encode a row with a template, and write down what came of it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    try:
        with limited(SECONDS):
            renderer = Renderer(tokenizer, max_length=512)
            renderer.encode_all([ROW] * 4)
            tally.add("read, or set aside")
    except (RecipeError, BadRow) as error:
        assert str(error).strip() and len(str(error)) < 3100
        tally.add("refused")
    except Hang:
        lines = traceback.format_exc().strip().splitlines()[-8:]
        tally.add("hangs", f"{label}: {text!r:.300}\n" + "\n".join(lines))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:150]} at {place_of(error)}"
        tally.add("tracebacks", f"{label}: {what}\n  {text!r:.300}")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_bombs():
    before = peak()
    tally = Tally("templates, bombs")
    for i, text in enumerate([*BOMBS, *ODD]):
        attempt(tally, text, str(i))
        if peak() - before > MEGABYTES:
            tally.add("hangs", f"{i}: {peak() - before:.0f} MB after {text!r:.200}")
            before = peak()
    tally.close()


def test_any_template():
    chance = random.Random(SEED)
    before = peak()
    tally = Tally("templates, any")
    for i in range(COUNT):
        text = template(chance)
        attempt(tally, text, str(i))
        if peak() - before > MEGABYTES:
            tally.add("hangs", f"{i}: {peak() - before:.0f} MB after {text!r:.900}")
            before = peak()
    tally.close()
