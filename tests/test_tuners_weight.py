"""What each tuner of weight updates promises of its own, beyond the contract in test_tuners.py: identities of
the papers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.sparse._sparse import add, greatest, some_of, spread
from luthier.registry import build
from luthier.train.optimizer import Chain
from test_tuners import as_roles, base, logprobs, plain, put, train

torch.set_num_threads(1)
Q = "model.layers.0.self_attn.q_proj"


class One(nn.Module):
    """A network of one linear layer, to be tuned."""

    def __init__(self, W: torch.Tensor):
        super().__init__()
        self.fc = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.fc.weight.data = W.clone()
        self.config = SimpleNamespace(
            to_dict=dict, get=lambda *a: None, _name_or_path="", model_type="custom"
        )

    def forward(self, x):
        return self.fc(x)


def descend(attached, loss, steps: int, rate: float, transform: str = "adam"):
    """A training loop on any loss; what is called after each step sees the step's number."""
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", transform)], attached, clock, rate)
    for clock.step in range(steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
        yield chain


def to_end(run) -> None:
    for _ in run:
        pass


# ---------------------------------------------------------------------------------------------- sparse deltas


def test_a_sparse_product_and_its_gradients():
    torch.manual_seed(0)
    x, y, indices = (
        torch.randn(2, 5, 6).double(),
        torch.randn(2, 5, 4).double(),
        torch.randperm(24)[:7].sort().values.int(),
    )
    x.requires_grad_(True), y.requires_grad_(True)
    values, seen = torch.randn(7).double().requires_grad_(True), []
    assert torch.autograd.gradcheck(lambda x, y, v: add(x, y, v, indices), (x, y, values))
    S = spread(values, indices, (4, 6))
    out = add(x, y, values, indices, seen.append)
    assert torch.allclose(out, y + x @ S.T)
    out.square().sum().backward()
    whole = S.detach().requires_grad_(True)
    (y + x @ whole.T).square().sum().backward()
    assert torch.allclose(seen[0], whole.grad) and torch.allclose(
        values.grad, whole.grad.flatten()[indices.long()]
    )


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
        "tuner", {"name": "spiel", "density": 0.1, "reselection_steps": 6, "selection_accumulation_steps": 2}
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


def unfinish(folder) -> None:
    """As a kill after the last checkpoint but one would leave it."""
    import json
    import shutil

    from luthier.storage import checkpoints

    shutil.rmtree(checkpoints.paths(folder)[-1])
    (folder / "report.json").unlink()
    (folder / "run.json").write_text(
        json.dumps({**json.loads((folder / "run.json").read_text()), "finished": False})
    )


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


# ---------------------------------------------------------------------------------------------- LoRA started from data

KINDS = ["llama", "gpt2"]


def started(kind: str = "llama", **settings):
    attached = put("lora", base(kind), **settings)
    attached.initialize([{}] * 2, as_roles(attached))
    return attached


def untuned(kind: str) -> torch.Tensor:
    return logprobs(Untuned(base(kind))).detach()


def read_by(model, roles_of) -> dict[str, torch.Tensor]:
    """[n, in] what every linear layer of an untuned model reads on the batch."""
    seen, hooks = {}, []
    for n, m in model.named_modules():
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
            hooks.append(
                m.register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0].detach().flatten(0, -2)}))
            )
    roles_of(model)
    for h in hooks:
        h.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["eva", "corda", "kpm", "lora_ga"])
@torch.no_grad()
def test_a_start_from_data_leaves_the_model_as_it_is(kind, start, tmp_path):
    how = (
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
        if start == "kpm"
        else {"init_lora_weights": start}
    )
    attached, was = started(kind, **how), untuned(kind)
    assert (
        torch.equal(logprobs(attached), was)
        if start == "eva"
        else torch.allclose(logprobs(attached), was, atol=1e-4)
    )
    assert all(
        torch.equal(layer.get_base_layer().weight, base(kind).get_submodule(n).weight)
        for n, layer in attached.layers.items()
    )
    start_ = attached.tensors()
    with torch.enable_grad():
        train(attached)
    assert not torch.equal(logprobs(attached), was)
    with attached.off():
        assert torch.equal(logprobs(attached), was)
    tuned = logprobs(attached)
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), plain(attached.model), atol=1e-4
    )
    again = build("tuner", attached.settings).attach(base(kind))
    again.load(again.read(tmp_path))
    assert torch.equal(logprobs(again), tuned)
    again.load(start_)
    assert torch.allclose(logprobs(again), was, atol=1e-4)


@torch.no_grad()
def test_eva_spans_what_layers_read():
    attached = started(init_lora_weights="eva", eva_config={"rho": 1.0})
    seen = read_by(base(), lambda model: logprobs(Untuned(model)))
    for n, layer in attached.layers.items():
        A = layer.lora_A["default"].weight
        assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5) and not layer.lora_B["default"].weight.any()
        top = torch.linalg.svd(seen[n].double(), full_matrices=False)[2][:4].float()
        assert torch.linalg.svdvals(A @ top.T).min() > 1 - 1e-4  # cosines of the principal angles


@torch.no_grad()
def test_eva_gives_ranks_to_layers_where_they_explain_most():
    attached = started(init_lora_weights="eva", r=4, eva_config={"rho": 2.0})
    ranks = {n: layer.r["default"] for n, layer in attached.layers.items()}
    assert sum(ranks.values()) == 4 * len(ranks) and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    seen = read_by(base(), lambda model: logprobs(Untuned(model)))
    shares = {
        n: (v / v.sum())[:8] for n in ranks if len(v := torch.linalg.svdvals(seen[n].double()).square())
    }
    best = torch.cat(list(shares.values())).sort(descending=True).values[: 4 * len(ranks)]
    taken = torch.cat([shares[n][:r] for n, r in ranks.items()]).sort(descending=True).values
    assert torch.allclose(taken, best, atol=1e-6)  # not by name: q, k and v read the same
    # lora_alpha / r, whatever a layer's rank
    assert {layer.scaling["default"] for layer in attached.layers.values()} == {4.0}


@torch.no_grad()
def test_eva_agrees_with_peft():
    """PEFT's incremental PCA centres what it reads; on centred data with few directions both find the
    same.
    """
    from peft.tuners.lora.eva import SVDHook

    torch.manual_seed(0)
    x = torch.randn(200, 6) @ torch.randn(6, 24)
    x = x - x.mean(0)
    hook = SVDHook(name="x", n_components=4, sim_thresh=0.99)
    hook(None, (x,), None)
    model = One(torch.randn(10, 24))
    attached = build(
        "tuner", {"name": "lora", "r": 4, "init_lora_weights": "eva", "eva_config": {"rho": 1.0}}
    ).attach(model)
    attached._begin_eva(attached.layers, [("fc", x.T @ x)], None)
    assert (
        torch.linalg.svdvals(attached.layers["fc"].lora_A["default"].weight @ hook.svd.components_.T).min()
        > 1 - 1e-4
    )


@torch.no_grad()
def test_corda_with_white_inputs_is_pissa():
    torch.manual_seed(0)
    W = torch.randn(12, 16)
    U, S, Vh = torch.linalg.svd(W)
    for method, some in (("ipm", slice(None, 4)), ("kpm", slice(8, 12))):
        spec = {
            "name": "lora",
            "r": 4,
            "init_lora_weights": "corda",
            "corda_config": {"corda_method": method},
        }
        attached = build("tuner", spec).attach(One(W))
        attached._begin_corda(attached.layers, [("fc", torch.eye(16))], None)
        assert torch.allclose(
            attached.layers["fc"].get_delta_weight("default"), (U[:, some] * S[some]) @ Vh[some], atol=1e-4
        )
        assert torch.equal(attached.model.fc.get_base_layer().weight, W)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@torch.no_grad()
def test_corda_agrees_with_peft(method):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    pytest.importorskip("attr")  # which PEFT's module wants and PEFT does not install
    from peft.tuners.lora.corda import preprocess_corda

    attached = started(
        init_lora_weights="corda",
        corda_config={"corda_method": method},
        target_modules=["q_proj", "down_proj"],
    )
    model = base()
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    preprocess_corda(model, config, run_model=lambda: logprobs(Untuned(model)))
    theirs = get_peft_model(model, config)
    for n, layer in attached.layers.items():
        want = theirs.get_submodule(f"base_model.model.{n}").get_delta_weight("default")
        assert torch.allclose(layer.get_delta_weight("default"), want, atol=2e-3 * float(want.abs().max())), n


def test_lora_ga_is_peft_on_the_mean_gradient():
    attached = started(
        init_lora_weights="lora_ga",
        r=4,
        lora_ga_config={"scale": "unit"},
        target_modules=["q_proj", "o_proj"],
    )
    full = base()
    logprobs(Untuned(full)).mean().neg().backward()
    for n, layer in attached.layers.items():
        U, _, Vh = torch.linalg.svd(full.get_submodule(n).weight.grad, full_matrices=False)
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        # ArB2r: A the first r directions, B the next
        assert torch.linalg.svdvals(A @ Vh[:4].T).min() > 1 - 1e-3
        assert torch.linalg.svdvals(torch.linalg.qr(B)[0].T @ U[:, 4:8]).min() > 1 - 1e-3


def test_calibration_in_parts_is_calibration_at_once(monkeypatch):
    """Layers that do not fit the budget together are gathered one after another, by reading the rows
    again.
    """
    from luthier.model import statistics as _statistics

    attached = put("lora", init_lora_weights="corda")
    passes = []
    roles = as_roles(attached)
    monkeypatch.setattr(
        roles.policy, "forward", lambda batch, was=roles.policy.forward: passes.append(1) or was(batch)
    )
    for kind in ("inputs", "covariance", "gradients"):
        whole = dict(_statistics.statistics(kind, attached.layers, [{}], roles))
        passes.clear()
        with monkeypatch.context() as m:
            m.setattr(_statistics, "BUDGET", 1)
            parts = dict(_statistics.statistics(kind, attached.layers, [{}], roles))
        assert len(passes) == 1 + len(attached.layers) and all(
            torch.allclose(v, parts[n], atol=1e-5) for n, v in whole.items()
        )


@pytest.mark.parametrize(
    "how", [{"init_lora_weights": "eva"}, {"init_lora_weights": "corda", "init_data": "toy:style/new"}]
)
def test_a_start_from_data_in_a_run(how, tmp_path):
    """Ranks and factors come back after a kill, and a later run goes on from the adapter alone."""
    import shutil

    import luthier
    from luthier.storage import checkpoints

    data = {"path": "toy:style/new", "n": 24}
    if "init_data" in how:
        how = {**how, "init_data": {"path": "toy:people/test", "n": 8}}
    recipe = dict(
        model="toy:lm-small",
        data=data,
        tuner={"name": "lora", "r": 4, "init_rows": 4, **how},
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=3,
        evaluate=[],
        eval_data=0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
    )
    folder = tmp_path / "run"
    luthier.tune(**recipe, output_dir=str(folder))
    last = checkpoints.load(checkpoints.paths(folder)[-1])
    unfinish(folder)
    luthier.tune(**recipe, output_dir=str(folder))
    again = checkpoints.load(checkpoints.paths(folder)[-1])
    assert again.step == 4 and all(torch.equal(v, again.tensors[k]) for k, v in last.tensors.items())
    for checkpoint in checkpoints.paths(folder):
        shutil.rmtree(checkpoint)
    further = luthier.tune(
        **{**recipe, "max_steps": 1}, start=str(folder), output_dir=str(tmp_path / "further")
    )
    assert further.losses


# ---------------------------------------------------------------------------------------------- decompositions and maps


def numbers(made: dict) -> SimpleNamespace:
    return SimpleNamespace(
        watch=None,
        **{k: v[1] if isinstance(v, tuple) else v.clone().requires_grad_(True) for k, v in made.items()},
    )


def test_loldu():
    torch.manual_seed(0)
    for shape in ((6, 6), (5, 9), (9, 5)):
        W = torch.randn(shape)
        method = build("tuner", {"name": "loldu", "r": 9, "lora_alpha": 18})
        p = numbers(method.init(W))
        # with all entries nothing is left over
        assert torch.allclose(p.L @ torch.diag(p.z) @ p.U, W, atol=1e-4)
        method = build("tuner", {"name": "loldu", "r": 3, "lora_alpha": 6})
        p = numbers(method.init(W))
        assert p.z.numel() + p.scale.numel() == 4 and torch.allclose(method.weight(W, p), W, atol=1e-6)
        G = torch.randn(shape)
        (method.weight(W, p) * G).sum().backward()
        assert torch.allclose(p.z.grad, 2.0 * (p.L.T @ G @ p.U.T).diagonal(), atol=1e-4)
    attached = put("loldu", r=8)
    assert sum(p.numel() for p in attached.parameters().values()) == 9 * len(attached.layers)


def test_fastfood_is_its_dense_matrix():
    from scipy.linalg import hadamard as dense

    from luthier.methods.tuners.low_rank.intrinsic_dimension import draws, hadamard, project

    d, n = 200, 256
    H = torch.tensor(dense(n), dtype=torch.float32)
    x = torch.randn(n)
    assert torch.allclose(hadamard(x), H @ x, atol=1e-4)
    (G, order, B, norm), a, b = (t[0] for t in draws(d, n, 7, x)), torch.randn(d), torch.randn(d)
    P = (H @ torch.diag(G) @ torch.eye(n)[order] @ H @ torch.diag(B) / norm)[:, :d]
    assert torch.allclose(project(a, n, 7), P @ a, atol=1e-4)
    assert torch.allclose(project(a + b, n, 7), project(a, n, 7) + project(b, n, 7), atol=1e-5)
    theta = a.clone().requires_grad_(True)
    g = torch.randn(1000)
    (project(theta, 1000, 3) * g).sum().backward()
    want = torch.stack([project(e, 1000, 3) @ g for e in torch.eye(d)[:5]])
    assert torch.allclose(theta.grad[:5], want, atol=1e-4)
    lengths = torch.stack([project(a, 1000, s).square().sum() for s in range(60)])
    assert abs(float(lengths.mean() / a.square().sum()) - 1) < 0.05


def test_intrinsic_dimension_moves_d_numbers():
    for said in (True, False):
        attached = put("intrinsic_dimension", d=100, said=said)
        assert sum(p.numel() for p in attached.parameters().values()) == 100
    with pytest.raises(RecipeError, match="leaves nothing to move"):
        put("intrinsic_dimension", d=14)
    one, other = put("intrinsic_dimension", d=100), put("intrinsic_dimension", d=100, seed=1)
    deltas = []
    for attached in (one, other):
        next(iter(attached.layers.values())).adapter_params["default"].theta.data.normal_(
            generator=torch.Generator().manual_seed(0)
        )
        deltas.append([layer.get_delta_weight("default").detach() for layer in attached.layers.values()])
    assert not torch.allclose(deltas[0][0], deltas[1][0]) and not torch.allclose(deltas[0][0], deltas[0][3])


# ---------------------------------------------------------------------------------------------- lottery tickets, dual sparsity


def test_lt_sft_chooses_what_moved_furthest_and_begins_again():
    attached, dense = put("lt_sft", density=0.03), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    start = {n: layer.get_base_layer().weight.detach().clone() for n, layer in attached.layers.items()}
    moved = {}
    for step, _ in enumerate(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01)):
        if step == 2:
            moved = {
                n: (layer.get_base_layer().weight.detach() - start[n]).abs().flatten()
                for n, layer in attached.layers.items()
            }
    k = round(0.03 * sum(m.numel() for m in moved.values()))
    least = torch.cat(list(moved.values())).topk(k).values.min()
    found = 0
    for n, layer in attached.layers.items():
        indices = layer.tensors("default").indices.long()
        assert torch.equal(layer.get_base_layer().weight, start[n]) and (moved[n][indices] >= least).all()
        found += len(indices)
    assert found == k
    with attached.merged():
        assert (
            sum(
                int((layer.get_base_layer().weight != start[n]).sum()) for n, layer in attached.layers.items()
            )
            <= k
        )


def test_lt_sft_with_all_places_is_full_tuning_from_the_start():
    attached, dense = put("lt_sft", density=1.0), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01))
    to_end(descend(dense, lambda: logprobs(dense).mean().neg(), 3, 0.01))
    with torch.no_grad(), attached.merged():
        assert torch.allclose(logprobs(attached), logprobs(dense), atol=1e-4)


@pytest.mark.parametrize("steps", [7, 3])
def test_lt_sft_resumes_in_either_phase(steps, base, tmp_path):
    import luthier
    from luthier.storage import checkpoints

    tuner = {"name": "lt_sft", "density": 0.05, "dense_share": 0.6}
    recipe = {
        **base,
        "tuner": tuner,
        "max_steps": steps,
        "save_steps": 1,
        "save_total_limit": 2,
        "lr_scheduler_type": "constant",
    }
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    last = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    unfinish(tmp_path / "run")
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    again = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    assert last.step == again.step == steps and all(
        torch.equal(v, again.tensors[k]) for k, v in last.tensors.items()
    )


def test_dsee():
    torch.manual_seed(0)
    plain_, W = build("tuner", {"name": "dsee", "r": 4, "n_sparse": 0}), torch.randn(12, 10)
    p = numbers(plain_.init(W))
    p.B = torch.randn(12, 4)
    # LoRA, where there is no mask and no S
    assert torch.allclose(plain_.weight(W, p), W + 8 * p.B @ p.A, atol=1e-5)
    attached = put("dsee", r=4, n_sparse=5, sparsity=0.5, prune_at=0.5, target_modules=["q_proj", "up_proj"])
    start = {n: layer.tensors("default").indices.clone() for n, layer in attached.layers.items()}
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01))
    for n, layer in attached.layers.items():
        p, W = layer.tensors("default"), layer.get_base_layer().weight
        assert (
            torch.equal(p.indices, start[n])
            and len(p.values) == 5
            and int((~p.mask).sum()) == round(0.5 * W.numel())
        )
        x = torch.randn(3, W.shape[1])
        want = x @ (W * p.mask + 8 * p.B @ p.A + spread(p.values, p.indices, W.shape)).T
        assert torch.allclose(layer(x), want, atol=1e-5)


def structured(make=base, **more):
    how = dict(r=4, n_sparse=5, head_sparsity=0.5, ffn_sparsity=0.4, prune_at=0.5)
    attached = build("tuner", {"name": "dsee", **how, **more}).attach(make())
    own = {
        n: layer.tensors("default").c
        for n, layer in attached.layers.items()
        if hasattr(layer.tensors("default"), "c")
    }
    return attached, own


def test_dsee_takes_heads_and_units_out():
    """From start to end, then without what has left: the same answers for the multiplications that the shape
    says.
    """
    from luthier.methods.tuners.pruned._elastic import macs

    attached, own = structured()
    assert {n.rpartition(".")[2]: len(c) for n, c in own.items()} == {"o_proj": 2, "down_proj": 64}
    start = logprobs(Untuned(base())).detach()
    assert torch.equal(logprobs(attached), start)
    moved = [attached.tensors() for _ in descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01)]
    for n, c in own.items():
        before, after, last = (m[f"{n}.c"] for m in (moved[2], moved[3], moved[5]))
        gone = 1 if n.endswith("o_proj") else 26
        assert not torch.equal(before, torch.ones(len(c))) and (before != 0).all()
        assert (after == 0).sum() == gone and before[after == 0].abs().max() <= before[after != 0].abs().min()
        # the rest of the run leaves them
        assert torch.equal(after, last) and torch.equal(after[after != 0], before[after != 0])
        assert not torch.equal(moved[3][f"{n}.A"], moved[5][f"{n}.A"])
    small, ids, counted = attached.sliced(), torch.arange(3, 17).reshape(2, 7), []
    assert (plain(small) - plain(attached.model)).abs().max() < 1e-5
    shape = ((1, 38),) * 2
    for m in small.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y: counted.append(y.numel() * x[0].shape[-1]))
    small(ids)
    anatomy, whole = attached.anatomy, base()
    assert sum(counted) == ids.numel() * macs(whole, anatomy, shape)
    # half of q, k, v (k and v are half as wide) and o; 26 of 64 units
    per_layer = 0.5 * (4 * 32 * 32 - 2 * 32 * 16) + 26 * 3 * 32
    assert macs(whole, anatomy, anatomy.whole) - macs(whole, anatomy, shape) == 2 * per_layer


@torch.no_grad()
def test_a_head_without_a_coefficient_is_none():
    from test_elastic import bert, said

    for make, says in ((base, plain), (bert, said)):
        attached, own = structured(make)
        torch.manual_seed(2)
        for k, p in attached.parameters().items():
            if k.rpartition(".")[2] in ("B", "values"):
                p.normal_(std=0.1)
        o, c = next((n, c) for n, c in own.items() if n.endswith(("o_proj", "attention.output.dense")))
        c[0], size = 0.0, attached.layers[o].get_base_layer().weight.shape[1] // len(c)
        want, whole = says(attached.model), says(make())
        W = attached.layers[o].get_base_layer().weight
        # what reads the head does not matter, nor does what it says
        W[:, :size] = torch.randn(W[:, :size].shape)
        assert (says(attached.model) - want).abs().max() < 1e-5 and (want - whole).abs().max() > 1e-2
        with attached.merged():
            assert (says(attached.model) - want).abs().max() < 1e-5


def test_dsee_pulls_coefficients_and_is_written_small(tmp_path):
    ends = []
    for weight in (0.0, 0.5):
        attached, own = structured(l1_weight=weight, prune_at=1.0)
        # one plain gradient step
        to_end(descend(attached, lambda tuned=attached: logprobs(tuned).mean().neg(), 1, 0.1, "momentum"))
        ends.append([c.detach().clone() for c in own.values()])
    assert all(torch.allclose(a - b, torch.full_like(a, 0.05), atol=1e-6) for a, b in zip(*ends, strict=True))
    attached, _ = structured()
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 4, 0.01))
    attached.save(tmp_path / "adapter")
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()),
        plain(attached.model),
        atol=1e-5,
    )
    attached.export_merged(tmp_path / "small")
    again = type(attached.model).from_pretrained(tmp_path / "small").eval()
    assert (plain(again) - plain(attached.model)).abs().max() < 1e-5
    assert again.config.intermediate_size == 38 and again.config.num_key_value_heads == 1
    with pytest.raises(RecipeError, match=r"target_modules must hold model.layers.0.self_attn.o_proj"):
        structured(target_modules=["q_proj", "down_proj"])
    with pytest.raises(RecipeError, match="no separate q, k, v"):
        structured(lambda: base("gpt2"))


def test_a_planted_sparse_part_is_found():
    from luthier.methods.tuners.sparse.dsee import low_rank_and_sparse

    torch.manual_seed(0)
    planted = torch.randperm(64 * 48)[:100]
    W = torch.randn(64, 4) @ torch.randn(4, 48) + torch.zeros(64 * 48).index_fill_(0, planted, 8.0).view(
        64, 48
    )
    U, V, S = low_rank_and_sparse(W, 4, 100)
    found = S.flatten().nonzero().flatten()
    assert torch.isin(found, planted).float().mean() > 0.9 and (W - U @ V - S).norm() < 0.1 * W.norm()


# ---------------------------------------------------------------------------------------------- LoRA under noise


def walk(estimator, steps: int = 4, **settings):
    """Steps of LoRA by an estimator; the attached tuner, its chain and the gradients of the last step."""
    attached, seen = put("lora", base(), **settings), {}
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    for clock.step in range(steps):

        def closure(grad: bool = True) -> float:
            for p in attached.parameters().values():
                p.grad = None
            torch.manual_seed(clock.derive_seed("noise"))
            loss = logprobs(attached).mean().neg()
            loss.backward()
            return loss.item()

        was = attached.tensors()
        build("estimator", estimator).step(closure, chain, clock)
        seen = {k: (was[k], p.grad.clone()) for k, p in attached.parameters().items()}
    return attached, chain, seen


def test_ggpo_without_noise_is_lora():
    one, _, _ = walk({"name": "ggpo", "sigma": 0.0, "beta": 0.0})
    two, _, _ = walk("backprop")
    noisy, chain, seen = walk("ggpo")
    assert all(torch.equal(v, two.tensors()[k]) for k, v in one.tensors().items())
    assert any(not torch.equal(v, two.tensors()[k]) for k, v in noisy.tensors().items())
    with torch.no_grad():
        assert torch.equal(logprobs(noisy), logprobs(noisy))  # measuring is without noise
    (A, gA), (B, gB) = seen[f"{Q}.A"], seen[f"{Q}.B"]
    assert torch.allclose(chain.state[Q]["ggpo"]["rows"], (4.0 * (B @ gA + gB @ A)).norm(dim=1), atol=1e-6)


def test_ggpo_noise_has_the_spread_it_says():
    from luthier.methods.estimators.sharpness.ggpo import noisy

    torch.manual_seed(0)
    attached, chain, _ = walk("ggpo", 1)
    layer, group = attached.layers[Q], next(s for s in chain.param_groups() if s.name == Q)
    rows = torch.rand(32)
    size = build("estimator", {"name": "ggpo", "sigma": 0.5, "beta": 0.1}).size(layer, group.params, rows)
    W = layer.get_base_layer().weight
    change = (4.0 * group.params["B"] @ group.params["A"]).norm(dim=1)
    want = (0.5 * (W.norm(dim=1).mean().square() + change.square()).sqrt() + 0.1 * rows.square()) / 32**0.5
    assert torch.allclose(size, want, atol=1e-6)
    x = torch.randn(1, 32, requires_grad=True)
    said = torch.stack([noisy(x, torch.zeros(1, 32), size)[0] for _ in range(5000)]).detach()
    assert float((said.std(0) / (x.norm() * size) - 1).abs().mean()) < 0.03
    y = noisy(x, torch.zeros(1, 32), size)  # what backward draws is what forward drew
    assert torch.allclose((torch.autograd.grad(y.sum(), x)[0] * x).sum(), y.sum(), atol=1e-5)


def test_mgpo_takes_one_gradient_where_the_momentum_leads():
    one, _, _ = walk({"name": "mgpo", "rho": 0.0})
    two, _, _ = walk("backprop")
    assert all(torch.equal(v, two.tensors()[k]) for k, v in one.tensors().items())
    attached, chain, _ = walk({"name": "mgpo", "rho": 0.3, "mu": 0.9, "beta": 0.8})
    for name in attached.layers:  # the direction is that of Adam's mean
        for slot in "AB":
            assert torch.allclose(
                chain.state[name]["mgpo"][slot], chain.state[name]["0"][slot]["m"], atol=1e-8
            )
    kept = {n: chain.state[n]["mgpo"] for n in attached.layers}
    sizes, slots = (
        {n: k["size"].clone() for n, k in kept.items()},
        {s.name: s.params for s in chain.param_groups()},
    )
    start, E = {}, {}
    for n, layer in attached.layers.items():
        M = 4.0 * (kept[n]["B"] @ slots[n]["A"] + slots[n]["B"] @ kept[n]["A"]).detach()
        E[n] = 0.3 * M / M.norm() / sizes[n].clamp(min=0.1)
        start[n] = layer.get_base_layer().weight.data
        layer.get_base_layer().weight.data = start[n] + E[n]
    loss = logprobs(attached).mean().neg()
    want = torch.autograd.grad(loss, list(attached.parameters().values()))
    for n, layer in attached.layers.items():
        layer.get_base_layer().weight.data = start[n]
    calls, seen, was = [], [], attached.tensors()

    def closure() -> float:
        for p in attached.parameters().values():
            p.grad = None
        said = logprobs(attached).mean().neg()
        said.backward()
        calls.append(said.item()), seen.extend(p.grad.clone() for p in attached.parameters().values())
        return calls[-1]

    assert (
        build("estimator", {"name": "mgpo", "rho": 0.3, "beta": 0.8}).step(closure, chain, chain.clock)
        == calls[0]
    )
    assert len(calls) == 1 and abs(calls[0] - loss.item()) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, want, strict=True))
    gA, gB = (dict(zip(attached.parameters(), seen, strict=True))[f"{Q}.{slot}"] for slot in "AB")
    size = (4.0 * (was[f"{Q}.B"] @ gA + gB @ was[f"{Q}.A"])).norm()
    assert torch.allclose(chain.state[Q]["mgpo"]["size"], 0.8 * sizes[Q] + 0.2 * size, rtol=1e-4)


@pytest.mark.parametrize("name", ["ggpo", "mgpo"])
def test_embeddings_are_left_where_they_are(name):
    attached, chain, _ = walk(name, 2, target_modules=["q_proj", "embed_tokens"])
    assert name in chain.state[Q] and name not in chain.state["model.embed_tokens"]
    assert attached.parameters()["model.embed_tokens.B"].any()


def flatness(estimator, seed: int) -> float:
    """How much the loss of a small network rises on average where its weights are changed at random, after
    100 steps of LoRA.
    """

    class Net(One):
        def __init__(self):
            super().__init__(torch.randn(32, 12) / 12**0.5)
            self.out = nn.Linear(32, 8)

        def forward(self, x):
            return self.out(torch.tanh(self.fc(x)))

    torch.manual_seed(seed)
    x, y, net = torch.randn(16, 12), torch.randn(16, 8), Net()
    attached = build("tuner", {"name": "lora", "r": 8, "target_modules": ["fc", "out"]}).attach(net)
    clock = Clock(seed=3, total=100)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    method = build("estimator", estimator)
    for clock.step in range(100):

        def closure() -> float:
            for p in attached.parameters().values():
                p.grad = None
            torch.manual_seed(clock.derive_seed("noise"))
            loss = (attached.model(x) - y).square().mean()
            loss.backward()
            return loss.item()

        method.step(closure, chain, clock)
    weights = [layer.get_base_layer().weight for layer in attached.layers.values()]
    kept, rises = [w.clone() for w in weights], []
    with torch.no_grad():
        here = (attached.model(x) - y).square().mean()
        for _ in range(50):
            for w, k in zip(weights, kept, strict=True):
                w.copy_(k + 0.1 * torch.randn_like(k) / k.shape[1] ** 0.5)
            rises.append(float((attached.model(x) - y).square().mean() - here))
    return sum(rises) / 50


def test_noise_and_displacement_lead_to_flatter_places():
    lora = [flatness("backprop", seed) for seed in range(3)]
    for name in ("ggpo", "mgpo"):
        shares = [flatness(name, seed) / lora[seed] for seed in range(3)]
        assert max(shares) < 1 and sum(shares) / 3 < 0.95, (name, shares)


# ---------------------------------------------------------------------------------------------- counts, adapters, surveys


@pytest.mark.parametrize(
    "name, formula",
    [
        ("lora", lambda out, in_: 4 * (out + in_)),
        ("lora_sb", lambda out, in_: 16),
        ("loldu", lambda out, in_: 5),
        ("spiel", lambda out, in_: max(1, round(0.01 * out * in_))),
        ("ssf", lambda out, in_: 2 * out),
        ("dsee", lambda out, in_: 4 * (out + in_) + 64),
        ("parallel_adapter", lambda out, in_: max(1, round(in_ / 16)) * (in_ + 1 + out) + out),
    ],
)
def test_as_many_numbers_move_as_the_formula_says(name, formula):
    attached = put(name)
    shapes = [layer.get_base_layer().weight.shape for layer in attached.layers.values()]
    assert sum(p.numel() for p in attached.parameters().values()) == sum(formula(*s) for s in shapes)


@torch.no_grad()
def test_adapters_stand_where_the_papers_put_them():
    for kind, attention, ffn in (("llama", "o_proj", "down_proj"), ("gpt2", "attn.c_proj", "mlp.c_proj")):
        both, one = put("houlsby", base(kind)).layers, put("pfeiffer", base(kind)).layers
        assert len(both) == 4 and all(n.endswith((attention, ffn)) for n in both)
        assert len(one) == 2 and all(n.endswith(ffn) for n in one)
    attached, x = put("houlsby", reduction_factor=8), torch.randn(3, 32)
    layer = attached.layers["model.layers.0.self_attn.o_proj"]
    p = layer.tensors("default")
    p.up.normal_(), p.up_bias.normal_()
    y = layer.base_layer(x)
    assert torch.allclose(layer(x), y + (y @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias, atol=1e-5)
    with pytest.raises(RecipeError, match="has no LoRA form"):
        attached.export_lora("/nowhere")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ia3_is_scales_that_fold_into_weights(kind, tmp_path):
    from peft import IA3Config, get_peft_model

    attached = put("ia3", base(kind))
    # of k and v (half as wide as q), or of the fused three; of what is inside
    widths = {"llama": 2 * 16 + 64, "gpt2": 3 * 32 + 128}
    assert sum(p.numel() for p in attached.parameters().values()) == 2 * widths[kind]
    torch.manual_seed(3)
    for p in attached.parameters().values():
        p.add_(0.3 * torch.randn(p.shape))
    tuned, start = logprobs(attached), base(kind)
    k, down = (
        ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
        if kind == "llama"
        else ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")
    )
    with attached.merged() as model:
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
        for name, dim in ((k, 0), (down, 1)):
            W, was = (m.get_submodule(name) for m in (model, start))
            scale = attached.layers[name].ia3_l["default"].flatten()
            sides = (
                (scale[:, None] if dim == 0 else scale[None])
                if kind == "llama"
                else (scale[None] if dim == 0 else scale[:, None])
            )
            assert torch.equal(W.get_base_layer().weight, was.weight * sides)
            if was.bias is not None:
                assert torch.equal(W.get_base_layer().bias, was.bias * scale if dim == 0 else was.bias)
    inner = ["k_proj", "v_proj", "down_proj"] if kind == "llama" else ["c_attn", "mlp.c_proj"]
    asked = IA3Config(target_modules=inner, feedforward_modules=inner[-1:], fan_in_fan_out=kind == "gpt2")
    theirs = get_peft_model(base(kind), asked)
    for name, layer in attached.layers.items():
        theirs.base_model.model.get_submodule(name).ia3_l["default"].copy_(layer.ia3_l["default"])
    assert torch.allclose(plain(theirs.eval()), plain(attached.model), atol=1e-6)
    named = put("ia3", base(kind), target_modules=inner, feedforward_modules=inner[-1:])
    assert named.layers.keys() == attached.layers.keys()
    assert [m.is_feedforward for m in named.layers.values()] == [
        m.is_feedforward for m in attached.layers.values()
    ]
    attached.save(tmp_path)
    assert '"peft_type": "IA3"' in (tmp_path / "adapter_config.json").read_text()


def test_compacter_is_its_kronecker_sums():
    attached, shape = put("compacter", reduction_factor=4, phm_dim=4, phm_rank=2), (32, 8)
    layers, n, r = attached.layers, 4, 2
    assert len(layers) == 4
    assert sum(p.numel() for p in attached.parameters().values()) == n**3 + len(layers) * (
        2 * r * sum(shape) + sum(shape)
    )
    held = [layer.adapter_params["default"] for layer in layers.values()]
    assert len({id(h.A) for h in held}) == 1  # one parameter, whose gradient is the sum of all
    torch.manual_seed(1)
    for k, p in attached.parameters().items():
        p.data.normal_(std=0.5 if k.endswith("A") else 0.3)
    layer, x = layers["model.layers.0.self_attn.o_proj"], torch.randn(3, 32)
    p, y = layer.tensors("default"), layer.base_layer(x)
    down, up = (
        sum(torch.kron(p.A[i], s[i] @ t[i]) for i in range(n))
        for s, t in ((p.down_s, p.down_t), (p.up_s, p.up_t))
    )
    assert down.shape == (8, 32) and up.shape == (32, 8)
    want = y + nn.functional.gelu(y @ down.T + p.down_bias) @ up.T + p.up_bias
    assert torch.allclose(layer(x), want, atol=1e-5)
    logprobs(attached).mean().backward()
    whole = held[0].A.grad.clone()
    for h in held:
        h.A = nn.Parameter(held[0].A.detach().clone())
    logprobs(attached).mean().backward()
    assert torch.allclose(whole, sum(h.A.grad for h in held), atol=1e-6) and (held[1].A.grad != 0).any()
    one = build("tuner", {"name": "compacter", "phm_dim": 1, "reduction_factor": 4})
    q = numbers(one.init(torch.zeros(32, 32)))
    assert torch.allclose(one.maps(q)[0], q.A[0, 0, 0] * q.down_s[0] @ q.down_t[0])  # of rank one
    with pytest.raises(RecipeError, match="phm_dim: 5 does not divide a module's width, 32"):
        put("compacter", phm_dim=5)


def test_compacter_learns_what_an_adapter_learns_with_few_numbers():
    """A bump along one direction behind a linear map, under noise."""
    ends, numbers_ = {}, {}
    for name, more in (("compacter", {"phm_dim": 4}), ("houlsby", {"non_linearity": "gelu"})):
        torch.manual_seed(0)
        net = One(torch.randn(128, 128) / 128**0.5)
        u, v = torch.randn(128), torch.randn(128) / 128**0.5
        attached = build(
            "tuner", {"name": name, "target_modules": ["fc"], "reduction_factor": 4, **more}
        ).attach(net)

        def loss(n=256, net=net, u=u, v=v, tuned=attached):
            x = torch.randn(n, 128)
            with torch.no_grad(), tuned.off():
                y = net(x)
            return (net(x) - y - nn.functional.gelu(y @ v)[:, None] * u - torch.randn_like(y)).square().mean()

        start = loss(4096).item()
        to_end(descend(attached, loss, 300, 0.02 if name == "compacter" else 3e-3))
        ends[name], numbers_[name] = (
            loss(4096).item(),
            sum(p.numel() for p in attached.parameters().values() if p.ndim > 1),
        )
        assert ends[name] < 0.9 * start
    assert ends["compacter"] < 1.1 * ends["houlsby"] and numbers_["compacter"] < 0.05 * numbers_["houlsby"], (
        ends,
        numbers_,
    )


def test_the_search_for_d90_stops_where_the_metric_is_reached(tiny):
    from luthier.recipe.recipe import Recipe

    def found(share: float) -> int:
        plan = build(
            "plan",
            {
                "name": "intrinsic_dimension",
                "dimensions": [100, 200, 400, 800],
                "learning_rates": [0.1, 0.3],
                "share": share,
            },
        )
        play = plan.recipes(Recipe.load({"model": tiny}))
        asked, said = next(play), SimpleNamespace(after={"accuracy": 0.8}, folder="full")
        try:
            while True:
                asked = play.send(said)
                said = [
                    SimpleNamespace(
                        after={"accuracy": r.tuner["d"] / 1000 + r.learning_rate / 100},
                        folder=str(r.tuner["d"]),
                    )
                    for r in asked
                ]
        except StopIteration as end:
            return int(end.value.folder)

    ds = [found(share) for share in (0.9, 0.4, 0.2, 0.1)]
    assert ds == sorted(ds, reverse=True) and ds == [800, 400, 200, 100]


def test_lora_sb_is_ahead_of_factors_of_the_weight():
    """LoRA-XS is the same form with the SVD of W in place of that of the first step."""
    for seed in range(3):
        torch.manual_seed(seed)
        W, x = torch.randn(16, 16), torch.randn(200, 16)
        target = x @ (W + torch.randn(16, 4) @ torch.randn(4, 16)).T
        sides = {}
        for name in ("sb", "xs"):
            method = build("tuner", {"name": "lora_sb", "r": 4, "first_step": 1e-3})
            grad = 2 * (x @ W.T - target).T @ x / target.numel()
            U, _, Vh = torch.linalg.svd(W)
            p = (
                method.start(W, grad)
                if name == "sb"
                else {"B": U[:, :4], "A": Vh[:4], "R": torch.zeros(4, 4)}
            )
            R = p.pop("R").clone().requires_grad_(True)
            optimizer = torch.optim.Adam([R], 0.05)
            for _ in range(100):
                optimizer.zero_grad()
                loss = (x @ method.weight(W, SimpleNamespace(R=R, **p)).T - target).square().mean()
                loss.backward()
                optimizer.step()
            sides[name] = float(loss)
        assert sides["sb"] < sides["xs"], sides


# ---------------------------------------------------------------------------------------------- adalora


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_adalora_shares_ranks_out_as_peft_does():
    """The same numbers, gradients and updates in both: the same importance, the same triplets lost, step by
    step.
    """
    from peft import AdaLoraConfig, get_peft_model

    total, begin, end = 12, 2, 4
    settings = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=begin,
        tfinal=end,
        deltaT=1,
        total_step=total,
        lora_alpha=8,
        target_modules=["one", "two"],
    )
    theirs = get_peft_model(Two(), settings)
    model = Two()
    spec = {
        "name": "adalora",
        "init_r": 4,
        "target_r": 2,
        "tinit": begin / total,
        "tfinal": end / total,
        "lora_alpha": 8,
    }
    ours = build("tuner", {**spec, "target_modules": ["one", "two"]}).attach(model)
    for name, layer in ours.layers.items():
        p, q = layer.tensors("default"), theirs.base_model.model.get_submodule(name)
        for slot, value in (
            ("A", q.lora_A["default"]),
            ("E", q.lora_E["default"]),
            ("B", q.lora_B["default"]),
        ):
            value.data.normal_(0, 0.3)
            getattr(p, slot).data.copy_(value.data.view_as(getattr(p, slot)))
    clock, x = Clock(0, total=total), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    target = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    left = []
    for step in range(total):
        clock.step = step
        for network, mine in ((model, True), (theirs, False)):
            moving = [p for p in network.parameters() if p.requires_grad]
            for p in moving:
                p.grad = None
            (network(x) - target).square().mean().backward()
            with torch.no_grad():
                for p in moving:
                    p -= 0.02 * p.grad
            ours.after_step(clock) if mine else theirs.base_model.update_and_allocate(step + 1)
        for name, layer in ours.layers.items():
            q = theirs.base_model.model.get_submodule(name)
            assert torch.allclose(layer.tensors("default").E, q.lora_E["default"].view(-1), atol=1e-4), (
                step,
                name,
            )
        left.append(sum(int((layer.tensors("default").E != 0).sum()) for layer in ours.layers.values()))
    assert left[0] == 8 and left[-1] == 4 and len(set(left)) > 2


def test_adalora_goes_on_bit_for_bit(tmp_path):
    import luthier
    from conftest import SUMS

    keys = {
        "model": "toy:lm-small",
        "data": SUMS,
        "tuner": {"name": "adalora", "init_r": 4, "target_r": 2},
        "learning_rate": 1e-2,
        "max_steps": 8,
        "transforms": [{"name": "orthogonality", "weight": 0.1}, "clip"],
        "evaluate": [],
        "save_steps": 4,
        "per_device_train_batch_size": 8,
    }
    whole = luthier.tune(keys, folder=tmp_path / "whole")
    from luthier.run.run import perform

    perform(luthier.Recipe.load(keys), tmp_path / "parts", stop_at=4)
    parts = luthier.tune(keys, folder=tmp_path / "parts")
    a, b = (luthier.load(r.folder).roles.tuner.tensors() for r in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    ranks = [int((v != 0).sum()) for k, v in a.items() if k.endswith(".E")]
    assert sum(ranks) == 2 * len(ranks)


def test_orthogonality_is_the_gradient_of_its_term_and_nothing_where_it_holds():
    model = One(torch.randn(8, 6))
    attached = build(
        "tuner", {"name": "adalora", "init_r": 3, "target_r": 2, "target_modules": ["fc"]}
    ).attach(model)
    (group,) = attached.all_param_groups()
    A, B = group.params["A"], group.params["B"]
    A.data.normal_(), B.data.normal_()
    term = (A @ A.T - torch.eye(3)).square().sum() + (B.T @ B - torch.eye(3)).square().sum()
    want = torch.autograd.grad(0.3 * term, [A, B])
    zero = {slot: torch.zeros_like(p) for slot, p in group.params.items()}
    got = build("transform", {"name": "orthogonality", "weight": 0.3}).apply(zero, {}, group, 1)
    assert (
        torch.allclose(got["A"], want[0], rtol=1e-4)
        and torch.allclose(got["B"], want[1], rtol=1e-4)
        and not got["E"].any()
    )
    A.data, B.data = (
        torch.linalg.qr(torch.randn(6, 3))[0].T.contiguous(),
        torch.linalg.qr(torch.randn(8, 3))[0],
    )
    still = build("transform", "orthogonality").apply(zero, {}, group, 1)
    assert max(float(g.abs().max()) for g in still.values()) < 1e-5


def test_places_are_drawn_and_found_without_all_of_a_weight():
    torch.manual_seed(0)
    for n, k in ((10, 3), (10, 9), (1000, 400)):
        drawn = some_of(n, k)
        assert len(drawn) == len(set(drawn.tolist())) == k and 0 <= int(drawn.min()) and int(drawn.max()) < n
    counts = torch.zeros(6)
    for _ in range(2000):
        counts[some_of(6, 2)] += 1
    assert (counts / 2000 - 1 / 3).abs().max() < 0.05  # every place as likely
    values = torch.randn(2**20 + 3).abs()
    for k in (1, 1000, 2**17, 2**19):
        assert set(greatest(values, k).tolist()) == set(values.topk(k).indices.tolist())
    values = torch.zeros(2**20)
    values[5:9] = 1.0
    assert set(greatest(values, 4).tolist()) == {5, 6, 7, 8}
