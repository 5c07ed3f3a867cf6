"""label_switch: a teacher of the toy topics on rows with wrong labels among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.synthesis import nobody
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.model.batch import collate
from luthier.recipe.model_names import resolve_model
from luthier.registry import build


def teacher(rows: list[dict], folder: Path) -> str:
    """The folder of an encoder that was tuned on these rows."""
    architecture: Any = build("architecture", "classifier")
    path = str(resolve_model("toy:encoder"))
    torch.manual_seed(0)
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    tokenizer = architecture.tokenizer(path)
    renderer = architecture.renderer(tokenizer, model.config)
    attached: Any = build("tuner", "full").attach(model)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(90):
        some = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = collate(some, lambda row: architecture.encode(row, renderer))
        adam.zero_grad()
        (-architecture.forward(model, attached, batch).logprobs).mean().backward()
        adam.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_wrong_labels_leave(tmp_path):
    rows = load_rows({"path": "toy:topic", "n": 320}).rows
    rows = [{**row, "completions": [row["completions"][0].strip()]} for row in rows]
    shots, written = rows[:240], rows[240:]
    labels = sorted({row["completions"][0] for row in rows})
    wrong = []
    for row in written:
        turned = labels[(labels.index(row["completions"][0]) + 1) % len(labels)]
        wrong.append({**row, "id": f"{row['id']}-wrong", "completions": [turned]})
    path = teacher(shots, tmp_path)
    switch = build("stage", {"name": "label_switch", "model": path})
    left = {row["id"] for row in switch(written + wrong, nobody())}
    assert sum(row["id"] in left for row in wrong) < 0.1 * len(wrong)
    assert sum(row["id"] in left for row in written) > 0.6 * len(written)
    again = build("stage", {"name": "label_switch", "model": path, "relabel": True})(wrong, nobody())
    truth = {f"{row['id']}-wrong": row["completions"] for row in written}
    assert sum(row["completions"] == truth[row["id"]] for row in again) > 0.6 * len(again)
    sure = build("stage", {"name": "label_switch", "model": path, "least": 0.99})(written, nobody())
    assert len(sure) <= len([row for row in written if row["id"] in left])
    with pytest.raises(RecipeError, match="has no label 'weather'"):
        switch([{**rows[0], "completions": ["weather"]}], nobody())
