"""Compiled layers: refused where nothing can be compiled, and otherwise the same answers and gradients."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from helpers.rows import SUMS
from luthier.compat.compiler import check_compiler
from luthier.errors import RecipeError
from luthier.kernels import compiled
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods, dry_run


def test_refused_in_a_sentence_without_a_compiler(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    recipe = Recipe.load({"model": tiny, "data": SUMS, "torch_compile": True})
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError, match="no C.. compiler was found"):
        dry_run(recipe, [{"id": "0", "prompt": "1+1=", "completions": ["2"], "scores": [1.0]}])
    monkeypatch.setenv("CXX", "/nowhere/cc")
    with pytest.raises(RecipeError, match="the compiler in CXX, /nowhere/cc"):
        check_compiler()


def test_a_network_without_known_layers_is_refused():
    with pytest.raises(RecipeError, match="does not declare which modules are its layers"):
        compiled.compile_blocks(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++")), reason="there is no C++ compiler")
def test_compiled_layers_answer_alike(tmp_path):
    """Log-probabilities and the gradient of every LoRA factor, of rows of two lengths; nothing is compiled
    again for the second.
    """
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = []
    for asked in (False, True):
        recipe = Recipe.load(
            {
                "model": str(tmp_path),
                "data": SUMS,
                "dtype": "float32",
                "tuner": "lora",
                "torch_compile": asked,
            }
        )
        roles = assemble(recipe, build_methods(recipe), {})
        for s in roles.tuner.param_groups():
            torch.nn.init.normal_(s.params["B"], std=0.1, generator=torch.Generator().manual_seed(0))
        said = []
        for text in ("123456", "12345678901"):
            rows = [
                {"id": str(i), "prompt": "1+1=", "completions": [text[i:]], "scores": [1.0]} for i in range(3)
            ]
            logprobs = roles.policy.logprobs(roles.batch(rows))
            logprobs.sum().backward()
            said.append(logprobs.detach())
        found.append([*said, *(p.grad for p in roles.tuner.parameters().values())])
    assert len(found[0]) > 10
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
