"""wordings: exact means and deviations of a scripted model, and refusals."""

from __future__ import annotations

import json
from statistics import pstdev

import pytest
import torch

from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.prompt_ensemble import PromptEnsemble
from luthier.methods.evaluators.quality.wordings import Wordings


def test_mean_and_deviation_of_a_script(monkeypatch, tmp_path):
    """Of ten rows the model is right in as many as the wording begins with."""

    def script(self, roles, rows, template):
        right = int(template.split()[0])
        return {r["id"]: torch.tensor([1.0, 0.0] if i < right else [0.0, 1.0]) for i, r in enumerate(rows)}

    monkeypatch.setattr(PromptEnsemble, "of_template", script)
    rows = [{"id": str(i), "prompt": "", "completions": ["a", "b"], "scores": [1, 0]} for i in range(10)]
    made = Wordings(
        templates=["9 {prompt}", "7 {prompt}"], new_templates=["8 {prompt}", "2 {prompt}", "5 {prompt}"]
    )
    assert made.run(None, rows, tmp_path, "before") == pytest.approx(
        {
            "wording_accuracy": 0.8,
            "wording_deviation": 0.1,
            "new_wording_accuracy": 0.5,
            "new_wording_deviation": pstdev([0.8, 0.2, 0.5]),
            "wording_gap": 0.3,
        }
    )
    by_row = json.loads((tmp_path / "per_example-before.json").read_text())
    old, new = by_row["wording_accuracy"], by_row["new_wording_accuracy"]
    assert old["0"] == 1.0 and old["8"] == 0.5 and old["9"] == 0.0
    assert new["1"] == 1.0 and new["4"] == pytest.approx(2 / 3) and new["8"] == 0.0
    assert made.run(None, [], tmp_path, "before") == {}
    with pytest.raises(RecipeError, match="each of `new_templates` needs"):
        Wordings(new_templates=[])
