"""transfer_rows: new inputs that the discriminator accepts, with the source's answers and no label."""

from __future__ import annotations

from helpers.synthesis import Scripted, nobody
from luthier.methods.stages.synthesize.transfer_rows import TransferRows
from luthier.registry import build

SEEDS = [{"id": str(k), "prompt": f"what is {k}?", "completions": ["secret"]} for k in range(5)]


def written(prompt: str, seed: int) -> str:
    if seed % 5 == 0:
        return " what is 2?"
    return f" {'off' if seed % 3 else 'on'} {seed % 1000}\n\nInput: another"


def test_rows_are_what_the_discriminator_accepts(monkeypatch):
    monkeypatch.setattr(TransferRows, "decision", lambda self, seed: lambda text: text.startswith("on"))
    writer, source = Scripted(written), Scripted(lambda prompt, seed: "" if "7" in prompt else f" {prompt}!")
    settings = {"name": "transfer_rows", "writer": writer, "source": source, "n": 20, "attempts": 10}
    stage, roles = build("stage", settings), nobody()
    out = list(stage(SEEDS, roles))
    assert 5 <= len(out) <= 20
    assert all(row["prompt"].startswith("on ") for row in out)
    assert len({row["prompt"] for row in out}) == len(out)
    for row in out:
        assert row["completions"] == [f" {row['prompt']}!"] and "7" not in row["prompt"]
        assert row["provenance"]["answers"] == "scripted" and len(row["provenance"]["sources"]) == 5
    assert "secret" not in str(writer.prompts) + str(source.prompts) + str(out)
    assert [row["prompt"] for row in stage(SEEDS, nobody())] == [row["prompt"] for row in out]


def test_without_a_discriminator_every_input_stays():
    writer, source = Scripted(written), Scripted(lambda prompt, seed: "answer")
    settings = {"name": "transfer_rows", "writer": writer, "source": source, "n": 20}
    out = list(build("stage", settings)(SEEDS, nobody()))
    assert len(out) == 20 and {row["prompt"][:2] for row in out} == {"on", "of"}
