"""ensemble: of output layers, the soup is the ensemble."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.models import make_llama
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.evaluators.quality import ensemble
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.policy import Policy
from luthier.registry import build


@pytest.mark.parametrize("part", ["lm_head", ""])
@torch.no_grad()
def test_of_output_layers_the_soup_is_the_ensemble(roles, part, tmp_path, monkeypatch):
    """Of two runs that changed the output layer alone, the average of weights is the average of logits; of
    whole networks it is not.
    """
    net = make_llama(seed=1, tie_word_embeddings=False)
    attached = TunedWeights(build("tuner", "full"), net, lambda name, p: name.startswith(part))
    tuned = copy.copy(roles)
    tuned.policy = Policy(Causal(), net, attached)
    runs = {}
    for k in range(2):
        rng = torch.Generator().manual_seed(k)
        start = attached.tensors()
        runs[str(k)] = {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in start.items()}
    monkeypatch.setattr(ensemble, "tensors_of", lambda folder, attached: runs[folder])
    rows = [{"id": str(i), "prompt": f"say {w} ", "completions": [w * 3]} for i, w in enumerate("abcdef")]
    soup = build("merger", "average").merge(list(runs.values()))
    with attached.using(soup):
        alone = build("evaluator", "loss").run(tuned, rows, tmp_path, "after")["loss"]
    together = build("evaluator", {"name": "ensemble", "of": ["0", "1"]}).run(tuned, rows, tmp_path, "after")
    gap = abs(alone - together["ensemble_loss"])
    assert gap < 1e-5 if part else gap > 1e-4
