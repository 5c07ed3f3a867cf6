"""spiel: keeps its number of places; at full density is adam on the weights; forgets what the optimizer knew
of a place; ma scores are the outer product of sm3.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from helpers.tuners import base, logprobs, put, train
from helpers.weight_tuners import One, Q, descend, to_end, unfinish
from luthier.clock import Clock
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners.sparse._sparse import spread
from luthier.registry import build
from luthier.train.optimizer import Chain


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_spiel_keeps_its_number_of_places(growth):
    attached = put(
        "spiel",
        density=0.02,
        selection_algorithm=growth,
        reselection_steps=4,
        selection_accumulation_steps=2,
        target_modules=["q_proj", "up_proj"],
    )
    start = {n: layer.tensors("default").indices.clone() for n, layer in attached.layers.items()}
    W = {n: layer.get_base_layer().weight.clone() for n, layer in attached.layers.items()}
    clock, news = Clock(seed=3, total=12), []
    chain = Chain([build("transform", "adam")], attached, clock, 0.05)
    for clock.step in range(12):
        was = {
            n: (layer.tensors("default").indices.clone(), layer.tensors("default").values.detach().clone())
            for n, layer in attached.layers.items()
        }
        attached.begin_step(clock)
        share = attached.settings.share(clock.step, 12)
        for n, layer in attached.layers.items():
            p, (indices, values) = layer.tensors("default"), was[n]
            assert len(p.indices.unique()) == len(p.indices) == max(1, round(0.02 * W[n].numel()))
            gone, come = (
                set(indices.tolist()) - set(p.indices.tolist()),
                set(p.indices.tolist()) - set(indices.tolist()),
            )
            assert len(gone) == len(come) <= int(len(values) * share) and (share or not gone)
            mask = attached.resets.get(f"{n}.values", torch.zeros(len(values), dtype=torch.bool))
            assert torch.equal(mask, p.indices != indices) and not p.values.detach()[mask].any()
            if share and 0 < len(gone):
                assert share == 1.0 or values[mask].abs().max() <= values[~mask].abs().max()
            news.append(len(come))
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
    assert sum(news) > 0 and any(
        not torch.equal(layer.tensors("default").indices, start[n]) for n, layer in attached.layers.items()
    )
    with attached.merged():
        for n, layer in attached.layers.items():
            assert int((layer.get_base_layer().weight != W[n]).sum()) <= len(start[n])


def test_spiel_at_full_density_is_adam_on_the_weights():
    places = dict(
        density=1.0, reselection_steps=100, target_modules="all-linear", exclude_modules=["lm_head"]
    )
    sparse, dense = train(put("spiel", **places), 4), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    dense = train(dense, 4)
    with torch.no_grad(), sparse.merged():
        assert torch.allclose(logprobs(sparse), logprobs(dense), atol=1e-4)


def test_spiel_forgets_what_the_optimizer_knew_of_a_place():
    torch.manual_seed(0)
    attached = build(
        "tuner",
        {
            "name": "spiel",
            "density": 0.1,
            "selection_algorithm": "ma",
            "reselection_steps": 6,
            "selection_accumulation_steps": 2,
        },
    ).attach(base())
    clock = Clock(seed=3, total=12)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    for clock.step in range(9):
        attached.begin_step(clock)
        new = attached.resets.get(f"{Q}.values")
        before = attached.layers[Q].tensors("default").values.detach().clone()
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        grad = attached.layers[Q].tensors("default").values.grad.clone()
        chain.step(gradients(chain))
        attached.end_step(clock)
        # the first step of a new place is Adam's first: its size is the rate
        if new is not None and new.any():
            moved = (attached.layers[Q].tensors("default").values.detach() - before)[new]
            assert torch.allclose(moved, -0.01 * grad[new] / (grad[new].abs() + 1e-8), atol=1e-6)
            known = chain.state[Q]["0"]["values"]
            assert torch.allclose(known["m"][new], 0.1 * grad[new]) and torch.allclose(
                known["v"][new], 0.001 * grad[new].square()
            )
    assert "born" in chain.state[Q]


def test_spiel_seeds_the_moments_of_a_new_place():
    """With growth `ag` Adam begins as if it had run over the gathered gradients: m is their mean corrected
    for the zero start, and the next correction is that of one step more.
    """
    torch.manual_seed(0)
    interval = dict(reselection_steps=6, selection_accumulation_steps=2)
    attached = put("spiel", density=0.1, seed_moments=True, **interval)
    clock = Clock(seed=3, total=12)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    dense, values = [], attached.layers[Q].tensors("default").values
    for clock.step in range(3):
        attached.begin_step(clock)
        params = attached.layers[Q].adapter_params["default"]
        if params.watch is not None:  # the gradient of the whole weight, as it goes by

            def watch(G, gather=params.watch):
                dense.append(G.clone())
                gather(G)

            params.watch = watch
        new = attached.resets.get(f"{Q}.values")
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        before, grad = values.detach().clone(), values.grad.clone()
        chain.step(gradients(chain))
        attached.end_step(clock)
    places = attached.layers[Q].tensors("default").indices.long()[new]
    first, second = (G.flatten()[places] for G in dense)
    mean, square = (first + second) / 2, (first**2 + second**2) / 2
    m = 0.9 * mean * (1 - 0.9**2) + 0.1 * grad[new]
    v = 0.999 * square * (1 - 0.999**2) + 0.001 * grad[new] ** 2
    known = chain.state[Q]["0"]["values"]
    assert new.any() and torch.allclose(known["m"][new], m) and torch.allclose(known["v"][new], v)
    step = (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    assert torch.allclose((values.detach() - before)[new], -0.01 * step, atol=1e-6)


class Threads:
    """Two threads in the place of two processes, for what `agree` uses of them."""

    count = 2

    def __init__(self):
        self.rank, self.barrier, self.sent = threading.local(), threading.Barrier(2, timeout=60), [None, None]

    def gather(self, value):
        self.sent[self.rank.number] = copy.deepcopy(value)
        self.barrier.wait()
        both = list(self.sent)
        self.barrier.wait()
        return both

    def sum(self, x):
        return sum(self.gather(x.clone()))


def test_spiel_grows_alike_in_all_processes(monkeypatch):
    """Two processes with half of a gradient each agree with one that has all of it; from the second step on
    whatever their rows are, and where the first candidates are the same, in all of them.
    """
    from luthier.methods.tuners.sparse.spiel import tuned

    method = build("tuner", {"name": "spiel", "seed_moments": True})
    torch.manual_seed(0)
    parts = [torch.randn(2, 20, 30) for _ in range(3)]
    parts[0][1] = parts[0][0]

    def grown(ranks: list[int]) -> tuple:
        stats = method.nothing((20, 30), 12, torch.int32)
        for both in parts:
            method.gather(both[ranks].sum(0), stats)
            tuned.agree([stats])
            method.close(stats)
        values, indices = torch.zeros(12), torch.arange(12, dtype=torch.int32)
        mask = method.exchange(1.0, values, indices, stats)
        return indices, method.moments(indices[mask], stats)

    alone, together, threads = grown([0, 1]), [], Threads()
    monkeypatch.setattr(tuned, "current", lambda: threads)

    def run(rank: int) -> None:
        threads.rank.number = rank
        together.append(grown([rank]))

    both = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(together) == 2
    for indices, moments in together:
        assert torch.equal(indices, alone[0]) and moments.steps == 3
        assert torch.allclose(moments.mean, alone[1].mean, atol=1e-6)
        assert torch.allclose(moments.square, alone[1].square, atol=1e-5)


def test_spiel_draws_its_values_toward_zero():
    attached = put("spiel", l1=0.5)
    attached.layers[Q].tensors("default").values.data.copy_(
        torch.linspace(-1, 1, len(attached.layers[Q].tensors("default").values))
    )
    pull = attached.extra_grads(Q)["values"]
    assert torch.equal(pull, 0.5 * attached.layers[Q].tensors("default").values.detach().sign())


def test_spiel_ma_scores_are_the_outer_product_of_sm3():
    method = build("tuner", {"name": "spiel", "selection_algorithm": "ma"})
    torch.manual_seed(0)
    indices = torch.tensor([0, 3, 5, 10])
    found = method.nothing((3, 4), 4, torch.int32)
    dense = torch.zeros(3, 4)  # SM3-II on the dense matrix with zeros where nothing moves
    rows, columns = torch.zeros(3), torch.zeros(4)
    for _ in range(3):
        grad = torch.randn(4)
        method.follow(grad, indices, found)
        nu = torch.minimum(rows[:, None], columns[None]) + spread(grad, indices, (3, 4)).square()
        nu = torch.where(spread(torch.ones(4), indices, (3, 4)) > 0, nu, dense)
        rows, columns = torch.maximum(rows, nu.amax(1)), torch.maximum(columns, nu.amax(0))
        assert torch.allclose(found["rows"], rows) and torch.allclose(found["columns"], columns)
    scores = torch.outer(rows, columns).flatten()
    scores[indices] = 0
    values, places = torch.tensor([5.0, 4.0, 3.0, 0.1]), indices.clone().int()
    mask = method.exchange(0.25, values, places, found)
    assert mask.tolist() == [False, False, False, True] and int(places[3]) == int(scores.argmax())


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_spiel_finds_planted_places(growth):
    """One entry in a hundred of a weight is off, in some of its rows and columns: the support moves there."""

    def recall(seed: int) -> float:
        torch.manual_seed(seed)
        planted = torch.zeros(200, 200, dtype=torch.bool)
        planted[torch.randperm(200)[:20][:, None], torch.randperm(200)[:20]] = True
        truth = planted * (1 + torch.rand(200, 200))
        settings = dict(density=0.01, reselection_steps=10, selection_algorithm=growth)
        attached = build("tuner", {"name": "spiel", "target_modules": ["fc"], **settings}).attach(
            One(torch.zeros(200, 200))
        )

        def loss():
            x = torch.randn(64, 200)
            return (attached.model(x) - x @ truth.T).square().mean()

        to_end(descend(attached, loss, 60, 0.02))
        return float(
            planted.flatten()[attached.layers["fc"].tensors("default").indices.long()].sum() / planted.sum()
        )

    found = [recall(seed) for seed in range(4)]
    assert min(found) > 5 * 0.01, found


@pytest.mark.long
def test_spiel_resumes_amid_an_interval(tmp_path, base):
    import luthier
    from luthier.storage import checkpoints

    spec = {"name": "spiel", "density": 0.05, "reselection_steps": 4, "selection_accumulation_steps": 2}
    recipe = {
        **base,
        "tuner": spec,
        "learning_rate": 1e-2,
        "max_steps": 7,
        "save_steps": 5,
        "lr_scheduler_type": "constant",
    }
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    last = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    unfinish(tmp_path / "run")
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    again = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    assert last.step == again.step == 7 and last.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(v, again.tensors[k]) for k, v in last.tensors.items())
