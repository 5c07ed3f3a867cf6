"""aug_pe: votes without noise are the histogram; epsilon in closed form; texts come nearer to the private
ones.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from helpers.synthesis import Scripted, nobody
from luthier.errors import RecipeError
from luthier.methods.stages.synthesize.aug_pe import AugPE, delta_of, epsilon, histogram, noise_for
from luthier.registry import build

LETTERS = "abcdef"


class ByLetters(AugPE):
    """A text stands where its letters' shares are."""

    def vectors(self, roles, texts):
        table = [[text.count(letter) for letter in LETTERS] for text in texts]
        return torch.tensor(table, dtype=torch.float64)


def edits(prompt: str, seed: int) -> str:
    """A paraphraser: one or two letters of a text change; without a text, twelve letters."""
    chance = random.Random(seed)
    if "\n\n" not in prompt:
        return "".join(chance.choice(LETTERS) for _ in range(12))
    text = [*prompt.rsplit("\n\n", 1)[1]]
    for _ in range(2):
        text[chance.randrange(len(text))] = chance.choice(LETTERS)
    return "".join(text)


def private(n: int = 200) -> list[dict]:
    chance, rows = random.Random(5), []
    for k in range(n):
        text = "".join(chance.choices(LETTERS, [8, 8, 1, 1, 0, 0], k=12))
        rows.append({"id": str(k), "prompt": f"{text}\n", "completions": ["x"]})
    return rows


def made(**settings) -> AugPE:
    return ByLetters(writer=Scripted(edits), **{"n": 20, "iterations": 5, "variations": 4, **settings})


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians with the means and covariances of two sets."""
    from scipy.linalg import sqrtm

    means = float((a.mean(0) - b.mean(0)).square().sum())
    one, other = (np.cov(x.numpy().T) + 1e-6 * np.eye(len(LETTERS)) for x in (a, b))
    return means + float(np.trace(one + other - 2 * np.real(sqrtm(one @ other))))


def test_without_noise_the_choice_is_the_histogram():
    """n of the texts with the most private texts nearest to them, of equals the first."""
    stage, rows = made(sigma=0.0, iterations=1, n=5), private()
    roles = nobody()
    out = list(stage(rows, roles))
    texts = stage.author(roles).ask(
        ["Write a text of the class x. Write the text alone.\n"] * 20, [f"x first {k}" for k in range(20)]
    )
    votes = [0] * 20
    places = stage.vectors(None, texts)
    for row in stage.vectors(None, [row["prompt"].strip() for row in rows]):
        votes[int((places - row).square().sum(1).argmin())] += 1
    best = sorted(range(20), key=lambda k: -votes[k])[:5]
    assert [row["votes"] for row in out] == [votes[k] for k in best]
    assert [row["prompt"].strip() for row in out] == [texts[k] for k in best]
    assert sum(histogram(places, places)) == 20 and "epsilon inf" in roles.sentences[0]


def test_epsilon_is_the_closed_form_of_composed_gaussians():
    """Of T votes of noise sigma: the privacy profile of one Gaussian of mu = sqrt(T) / sigma."""
    from scipy.stats import norm

    for mu in (0.3, 1.0, 2.5):
        spent = epsilon(mu, 1e-5)
        want = norm.cdf(-spent / mu + mu / 2) - math.exp(spent) * norm.cdf(-spent / mu - mu / 2)
        assert want == pytest.approx(1e-5, rel=1e-6) and delta_of(mu, spent) == pytest.approx(1e-5, rel=1e-6)
    sigma = noise_for(4.0, 1e-5, 10)
    assert epsilon(math.sqrt(10) / sigma, 1e-5) == pytest.approx(4.0, rel=1e-6)
    roles = nobody()
    list(made(sigma=sigma, iterations=2, n=2, delta=1e-5)(private(20), roles))
    assert f"epsilon {epsilon(math.sqrt(2) / sigma, 1e-5):.3g} at delta 1e-05" in roles.sentences[0]


def test_texts_come_nearer_unless_noise_drowns_the_votes():
    rows = private()
    want = made().vectors(None, [row["prompt"].strip() for row in rows])
    distances = {}
    for name, settings in {
        "first": {"iterations": 1, "sigma": 1e6},
        "noise": {"sigma": 1e6},
        "votes": {},
    }.items():
        out = list(made(delta=1e-3, **settings)(rows, nobody()))
        distances[name] = frechet(made().vectors(None, [row["prompt"].strip() for row in out]), want)
    assert distances["votes"] < 0.6 * distances["first"] and distances["noise"] > 0.8 * distances["first"]


def test_classes_provenance_and_what_is_refused():
    rows = private(30)
    for k, row in enumerate(rows):
        row["completions"] = ["xy"[k % 2]]
    for settings in ({"choose": "sample"}, {"lookahead": 2}, {"threshold": 1.0}):
        out = list(made(n=3, iterations=2, sigma=0.5, **settings)(rows, nobody()))
        assert [row["label"] for row in out] == ["x"] * 3 + ["y"] * 3
        assert all(row["provenance"]["sources"] == [] for row in out)
    texts = list(made(n=3, iterations=1, labelled=False)(rows, nobody()))
    assert all(row["prompt"] == "" and row["completions"][0] for row in texts)
    with pytest.raises(RecipeError, match="more than one of 30 rows"):
        build("stage", {"name": "aug_pe", "delta": 0.5})(rows, nobody())
