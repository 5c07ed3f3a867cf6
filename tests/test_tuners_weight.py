"""What each tuner of weight updates promises of its own, beyond the contract in test_tuners.py: identities of the papers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn

from luthier.clock import Clock
from luthier.estimators._estimator import gradients
from luthier.method import build
from luthier.transforms._chain import Chain
from luthier.tuners._sparse import add, spread
from test_tuners import base, logprobs, plain, put, train

torch.set_num_threads(1)
Q = "model.layers.0.self_attn.q_proj"


class One(nn.Module):
    """A network of one linear layer, to be tuned."""

    def __init__(self, W: torch.Tensor):
        super().__init__()
        self.fc = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.fc.weight.data = W.clone()
        self.config = SimpleNamespace(to_dict=dict, get=lambda *a: None, _name_or_path="", model_type="custom")

    def forward(self, x):
        return self.fc(x)


def descend(attached, loss, steps: int, rate: float, transform: str = "adam"):
    """A training loop on any loss; what is called after each step sees the step's number."""
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", transform)], attached, clock, rate)
    for clock.step in range(steps):
        attached.before_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss().backward()
        chain.step(gradients(chain))
        attached.after_step(clock)
        yield chain


def to_end(run) -> None:
    for _ in run:
        pass


# ---------------------------------------------------------------------------------------------- sparse deltas


def test_a_sparse_product_and_its_gradients():
    torch.manual_seed(0)
    x, y, indices = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 4).double(), torch.randperm(24)[:7].sort().values.int()
    x.requires_grad_(True), y.requires_grad_(True)
    values, seen = torch.randn(7).double().requires_grad_(True), []
    assert torch.autograd.gradcheck(lambda x, y, v: add(x, y, v, indices), (x, y, values))
    S = spread(values, indices, (4, 6))
    out = add(x, y, values, indices, seen.append)
    assert torch.allclose(out, y + x @ S.T)
    out.square().sum().backward()
    whole = S.detach().requires_grad_(True)
    (y + x @ whole.T).square().sum().backward()
    assert torch.allclose(seen[0], whole.grad) and torch.allclose(values.grad, whole.grad.flatten()[indices.long()])


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
        attached.before_step(clock)
        share = attached.settings.share(clock.step, 12)
        for n, layer in attached.layers.items():
            p, (indices, values) = layer.tensors("default"), was[n]
            assert len(p.indices.unique()) == len(p.indices) == max(1, round(0.02 * W[n].numel()))
            gone, come = set(indices.tolist()) - set(p.indices.tolist()), set(p.indices.tolist()) - set(indices.tolist())
            assert len(gone) == len(come) <= int(len(values) * share) and (share or not gone)
            mask = attached.masks.get(n, torch.zeros(len(values), dtype=torch.bool))
            assert torch.equal(mask, p.indices != indices) and not p.values.detach()[mask].any()
            if share and 0 < len(gone):
                assert share == 1.0 or values[mask].abs().max() <= values[~mask].abs().max()
            news.append(len(come))
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        chain.step(gradients(chain))
        attached.after_step(clock)
    assert sum(news) > 0 and any(not torch.equal(layer.tensors("default").indices, start[n]) for n, layer in attached.layers.items())
    with attached.merged():
        for n, layer in attached.layers.items():
            assert int((layer.get_base_layer().weight != W[n]).sum()) <= len(start[n])


def test_spiel_at_full_density_is_adam_on_the_weights():
    places = dict(density=1.0, reselection_steps=100, target_modules="all-linear", exclude_modules=["lm_head"])
    sparse, dense = train(put("spiel", **places), 4), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    dense = train(dense, 4)
    with torch.no_grad(), sparse.merged():
        assert torch.allclose(logprobs(sparse), logprobs(dense), atol=1e-4)


def test_spiel_forgets_what_the_optimizer_knew_of_a_place():
    torch.manual_seed(0)
    attached = build("tuner", {"name": "spiel", "density": 0.1, "reselection_steps": 6, "selection_accumulation_steps": 2}).attach(base())
    clock = Clock(seed=3, total=12)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    for clock.step in range(9):
        attached.before_step(clock)
        new = attached.masks.get(Q)
        before = attached.layers[Q].tensors("default").values.detach().clone()
        for p in attached.parameters().values():
            p.grad = None
        logprobs(attached).mean().neg().backward()
        grad = attached.layers[Q].tensors("default").values.grad.clone()
        chain.step(gradients(chain))
        attached.after_step(clock)
        if new is not None and new.any():  # the first step of a new place is Adam's first: its size is the rate
            moved = (attached.layers[Q].tensors("default").values.detach() - before)[new]
            assert torch.allclose(moved, -0.01 * grad[new] / (grad[new].abs() + 1e-8), atol=1e-6)
            known = chain.state[Q]["0"]["values"]
            assert torch.allclose(known["m"][new], 0.1 * grad[new]) and torch.allclose(known["v"][new], 0.001 * grad[new].square())
    assert "born" in chain.state[Q]


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


@pytest.mark.parametrize("growth, density, times", [("ag", 0.02, 5), ("ma", 0.1, 2)])
def test_spiel_finds_planted_places(growth, density, times):
    """One entry in a hundred of a weight is off: the support moves there. Row and column statistics are blind to all but
    rows and columns: they find it less well, and only where what those columns read is large."""

    def recall(seed: int) -> float:
        torch.manual_seed(seed)
        planted = torch.zeros(40, 40, dtype=torch.bool)
        planted[torch.randperm(40)[:4][:, None], torch.randperm(40)[:4]] = True
        truth, wide = planted * (1 + torch.rand(40, 40)), 1 + 3 * planted.any(0) * (growth == "ma")
        settings = dict(density=density, reselection_steps=10, initial_reselection_rate=0.5, selection_algorithm=growth)
        attached = build("tuner", {"name": "spiel", "target_modules": ["fc"], **settings}).attach(One(torch.zeros(40, 40)))

        def loss():
            x = torch.randn(64, 40) * wide
            return (attached.model(x) - x @ truth.T).square().mean()

        to_end(descend(attached, loss, 150, 0.02))
        return float(planted.flatten()[attached.layers["fc"].tensors("default").indices.long()].sum() / planted.sum())

    found = [recall(seed) for seed in range(4)]
    assert sum(found) / 4 > times * density, found


def test_spiel_resumes_amid_an_interval(tmp_path, base):
    import luthier
    from luthier import store

    spec = {"name": "spiel", "density": 0.05, "reselection_steps": 4, "selection_accumulation_steps": 2}
    recipe = {**base, "tuner": spec, "learning_rate": 1e-2, "max_steps": 7, "save_steps": 5, "lr_scheduler_type": "constant"}
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    last = store.load_checkpoint(store.checkpoints(tmp_path / "run")[-1])
    unfinish(tmp_path / "run")
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    again = store.load_checkpoint(store.checkpoints(tmp_path / "run")[-1])
    assert last.step == again.step == 7 and last.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(v, again.tensors[k]) for k, v in last.tensors.items())


def unfinish(folder) -> None:
    """As a kill after the last checkpoint but one would leave it."""
    import json
    import shutil

    from luthier import store

    shutil.rmtree(store.checkpoints(folder)[-1])
    (folder / "report.json").unlink()
    (folder / "run.json").write_text(json.dumps({**json.loads((folder / "run.json").read_text()), "finished": False}))


@torch.no_grad()
def test_sparse_deltas_add_up(tmp_path):
    """Two adapters at once in PEFT: W + S + S', whatever their order."""
    sums = {}
    for seed in range(2):
        torch.manual_seed(seed)
        attached = build("tuner", {"name": "spiel", "density": 0.05}).attach(base())
        with torch.enable_grad():
            train(attached)
        attached.save(tmp_path / str(seed))
        for n, layer in attached.layers.items():
            sums[n] = sums.get(n, 0) + layer.get_delta_weight("default")
    model = PeftModel.from_pretrained(base(), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    want = base()
    for n, delta in sums.items():
        want.get_submodule(n).weight += delta
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        assert torch.allclose(plain(model.eval()), plain(want), atol=1e-5)
