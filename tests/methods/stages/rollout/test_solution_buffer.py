"""solution_buffer: right beginnings by state, what enters the buffer, and what several are worth."""

from __future__ import annotations

import itertools
import json

import torch

from helpers.rounds import Table, perform, scripted
from luthier.methods.stages.rollout.solution_buffer import Buffer, execute, normal
from luthier.recipe.recipe import Recipe
from luthier.registry import build

REFERENCE = "a = 2 + 3\nb = a * 4\nc = b - 1"
ROW = {"id": "r", "prompt": "Q\n", "completions": [REFERENCE]}


def collect(replies, row=ROW, roles=None, **settings):
    """The stage on one row, with a policy that writes these programs."""
    waiting = itertools.cycle(replies)
    roles = roles or scripted(lambda prompt, seed: next(waiting))
    (out,) = build("stage", {"name": "solution_buffer", "n": len(replies), **settings})([row], roles)
    return out["completions"], roles


def test_lines_are_executed_without_an_interpreter():
    program = "x = min(7, 2) ** 3\ny = -x / 16\n\nz = round(x % 3)"
    assert [value for _, value in execute(program)] == [8, -0.5, 2]
    for line in ("x = 9 ** 9 ** 9", "x = 1 / 0", "x = y", "x = open('f')", "import os", "x = [1] * 9", "x ="):
        assert execute(f"a = 1\n{line}\nb = 2") == execute("a = 1"), line
    assert normal("p = 2\nq = p + 1") == normal("u = 2\nv = u + 1") != normal("u = 2\nv = 1 + u")


def test_a_beginning_is_what_brute_force_finds():
    """All programs of three lines out of a few, against the definition: the longest beginning whose set of
    values is one that the reference passes through."""
    lines = ["a = 2 + 3", "a = 3 + 2", "a = 1", "b = a * 4", "b = 20", "c = b + 9", "c = a"]
    states = [{5}, {5, 20}, {5, 20, 19}]
    checked = set()
    for program in itertools.product(lines, repeat=3):
        names, best = {}, None
        for count, line in enumerate(program, 1):
            try:
                exec(line, {}, names)
            except NameError:
                break
            if set(names.values()) in states:
                best = count
        text = "\n".join(program)
        first = normal(REFERENCE)[: best or 0] == normal(text)[: best or 0]
        longer = best is not None and best > 1 + states.index(set(execute_values(program[:best])))
        expected = None if best is None or first or longer else best
        assert Buffer([REFERENCE]).size(text) == expected, text
        checked.add(expected)
    assert {None, 1, 2} <= checked


def execute_values(lines):
    names: dict = {}
    for line in lines:
        exec(line, {}, names)
    return names.values()


def test_the_buffer_collects_an_alternative():
    other = "k = 4 * 5\nm = k - 1"
    again, long = "x = 4 * 5\ny = x - 1", f"q = 1\n{REFERENCE}"
    entries, roles = collect([other, again, REFERENCE, long, "a = 7"])
    assert entries == [REFERENCE, other]  # once, whatever its variables are called, and nothing longer
    assert roles.stage_metrics == {"solutions": 1.0, "beginnings": 0.0}
    unread, _ = collect([other], {**ROW, "completions": ["nineteen"]})
    assert unread == ["nineteen"]


def test_a_beginning_is_sampled_from_and_has_no_end(tmp_path):
    entries, roles = collect(["a = 3 + 2\nb = a * 9"])
    begun = "a = 3 + 2\n"
    assert entries == [REFERENCE, list(map(ord, begun))]  # token ids, up to the end of its line
    assert collect(["a = 3 + 2\nb = a * 9"], partial=False)[0] == [REFERENCE]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "completions": entries}) + "\n")
    roles = scripted(lambda prompt, seed: "b = a * 4\nc = b - 1" if prompt.endswith(begun) else "?")
    further, _ = collect(["", ""], roles=roles, buffer=str(tmp_path))
    # a whole solution takes the place of its own beginning
    assert roles.policy.prompts == ["Q\n", f"Q\n{begun}"]
    assert further == [REFERENCE, "a = 3 + 2\nb = a * 4\nc = b - 1"]


def test_several_solutions_raise_pass_at_k(tmp_path):
    """2 and 2 make 4 by two programs, which other numbers tell apart: a reference teaches one alone."""
    names = ["r = 2 + 2", "r = 2 * 2", "r = 2 - 2", "r = 2", "r = 2 / 2"]
    row, base = {"id": "r", "prompt": [0], "completions": [names[0]]}, Table(torch.zeros(1, 5))
    recipe = Recipe.load({"model": "toy:lm"})
    plan = {"name": "solution_buffer", "rounds": 2, "n": 24}
    rounds, _ = perform(plan, recipe, base, [row], names, tmp_path, steps=60)
    assert rounds[0].rows[0]["completions"][:2] == names[:2] == rounds[1].rows[0]["completions"][:2]
    once = Table(torch.zeros(1, 5))
    adam = torch.optim.Adam(once.parameters(), lr=0.3)
    for _ in range(120):
        adam.zero_grad()
        (-once.log_policy()[0, 0]).backward()
        adam.step()
    # one held-out problem is right by the sum, one by the product
    several, single = (1 - (1 - p.log_policy().detach().exp()[0, :2]) ** 8 for p in (rounds[1].after, once))
    assert several.mean() > single.mean() + 0.3
