"""The wide table of tuners: what it says of each was tried, its shares are the papers' numbers, and what it
says is declared.
"""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.registry import cards
from luthier.tools import capability_matrix as abilities

pytestmark = pytest.mark.long  # the table tries every tuner


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    done = CliRunner().invoke(app, ["methods", "--kind", "tuner", "--wide", "--json"])
    assert done.exit_code == 0, done.output
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_every_tuner_has_a_row_and_a_share(table):
    assert table.keys() == {c.name for c in cards("tuner")}
    for row in table.values():
        assert set(abilities.WIDE) <= row.keys()
        assert row["share"] == "not supported on Llama" or 0 < float(row["share"]) <= 100


def test_what_is_declared_was_done(table):
    """A file that says merge or off does it, and one that does not is refused."""
    for c in cards("tuner"):
        for word, declared in (("merge", "merge"), ("off", "disable_adapter")):
            assert (table[c.name][word] == "yes") == (declared in c.provides), (c.name, word)


def test_shares_of_seven_billion(table):
    """By hand: 6,738,415,616 weights; LoRA of rank 8 on seven matrices of 32 layers; S2FT's 330 columns of
    down; LISA's two layers.
    """
    every, width, inner = 6_738_415_616, 4096, 11008
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    outside = 2 * 32000 * width + width
    lora = 32 * 8 * (4 * 2 * width + 3 * (width + inner))
    expected = {
        "full": every,
        "lora": lora,
        "s2ft": 32 * round(0.03 * inner) * width,
        "lisa": 2 * layer + outside,
        "owlore": 5 * layer + outside,
        "telly": 8 * layer + width + 32000 * width,
        "cofitune": 8 * 2 * width * inner,
        "prompt": 20 * width,
        "r_amt": 32 * 4 * width**2,
    }
    for name, n in expected.items():
        assert float(table[name]["share"]) == pytest.approx(100 * n / every, rel=0.006), name
    assert float(table["hft"]["share"]) == pytest.approx(50, abs=3)


def test_experts_tied_and_codes(table):
    assert table["full"]["experts"] == table["lisa"]["experts"] == "yes" and table["ssf"]["experts"] == "no"
    assert table["lora"]["experts"] == "by target_parameters"
    assert (
        table["lora"]["quantized"] == table["s2ft"]["quantized"] == "yes"
        and table["full"]["quantized"] == "no"
    )
    assert all(row["tied"] == "yes" for row in table.values())


def test_only_tuners_are_wide():
    done = CliRunner().invoke(app, ["methods", "--kind", "objective", "--wide"])
    assert done.exit_code == 2
