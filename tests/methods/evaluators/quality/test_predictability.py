"""predictability: the chain's identities, its direction on a planted ladder, and a run's report."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.evaluators.quality.predictability import CHAIN, Predictability, along, area, chain

ROWS = [
    {"id": str(i), "prompt": f"{i}+1=", "completions": [str(i + 1), "9", "no"], "scores": [1.0, 0.0, 0.0]}
    for i in range(4)
]


def test_the_chain_of_one_question():
    options = torch.tensor([0.2, 0.1, 0.1]).double().log()
    scores = chain(options, torch.tensor([1.0, 0.0, 0.0]))
    assert scores["p_vocab"] == pytest.approx(0.2) and scores["p_choices"] == pytest.approx(0.5)
    assert scores["brier"] == pytest.approx(0.5**2 + 2 * 0.25**2) and scores["choice_accuracy"] == 1.0
    assert scores["log_wrong"] == pytest.approx(torch.tensor(0.2).log().item(), abs=1e-6)


def test_two_options_and_a_constant_wrong_mass():
    """Then nothing is lost from log p to the share among options."""
    rng = torch.Generator().manual_seed(0)
    right = torch.log(0.5 * torch.rand(8, 20, generator=rng, dtype=torch.float64))
    points = []
    for line in right:
        questions = {}
        for k, value in enumerate(line):
            questions[str(k)] = chain(
                torch.stack([value, torch.tensor(-2.0).double()]), torch.tensor([1.0, 0])
            )
        points.append(questions)
    metrics = along(range(8), points)
    assert metrics["predictability/log_p_vocab"] == pytest.approx(
        metrics["predictability/p_choices"], abs=1e-12
    )
    assert metrics["wrong_mass_slope"] == pytest.approx(0, abs=1e-12)


def test_the_area_is_the_mean():
    """The integral of the survival function, by a fine grid."""
    values = 2 * torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    survival = (values.abs()[None] > grid[:, None]).double().mean(1)
    assert area(values) == pytest.approx(float(torch.trapezoid(survival, grid)), abs=1e-4)


def test_a_ladder_loses_along_the_chain():
    """log p rises with compute and the wrong options fluctuate: accuracy is the least predictable. Where
    nothing rises, nothing is predicted.
    """
    rng = torch.Generator().manual_seed(0)
    metrics = {}
    for planted in (0.6, 0.0):
        points = []
        for k in range(8):
            questions = {}
            for q in range(60):
                noise = torch.randn(4, generator=rng, dtype=torch.float64)
                options = torch.cat([-6 + planted * k + 0.2 * noise[:1], -3 + 1.5 * noise[1:]])
                questions[str(q)] = chain(options, torch.tensor([1.0, 0, 0, 0]))
            points.append(questions)
        metrics[planted] = along(range(8), points)
    rising, flat = (metrics[planted] for planted in (0.6, 0.0))
    names = [f"predictability/{name}" for name in ("log_p_vocab", "p_choices", "choice_accuracy")]
    first, shares, accuracy = (rising[name] for name in names)
    assert first > 0.95 > shares > accuracy == rising["predictability"]
    assert flat["predictability/log_p_vocab"] < 0.45


def test_a_run_reports_the_whole_chain(roles, tmp_path):
    results = []
    for when, step in (("before", 0), ("during", 5), ("after", 10)):
        roles.clock.step = step
        results.append(Predictability().run(roles, ROWS, tmp_path, when))
    roles.clock.step = 0
    assert results[0].keys() == {*CHAIN}
    assert {f"predictability/{name}" for name in CHAIN} < results[-1].keys()
    assert results[-1]["predictability"] == 0.0  # the model did not change
    assert results[0]["p_choices"] <= 1.0 and Predictability().run(roles, [], tmp_path, "after") == {}
