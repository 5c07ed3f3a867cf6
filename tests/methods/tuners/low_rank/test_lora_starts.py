"""lora_starts: a start from data leaves the model as it is; eva spans what layers read; eva gives ranks to
layers where they explain most; eva agrees with peft.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers.tuners import as_roles, base, logprobs, plain, put, train
from helpers.weight_tuners import KINDS, One, unfinish
from luthier.methods.tuners._base import Untuned
from luthier.registry import build


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


@pytest.mark.long
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


@pytest.mark.long
def test_corda_that_previews_the_task_learns_more_where_the_task_is_in_what_is_read():
    """A layer whose inputs lie mostly in few directions, and a task that changes what it makes of these: in
    all of three draws the principal components (ipm) end lower than LoRA, each at its better of two rates,
    and the smallest ones (kpm) higher.
    """
    from helpers.weight_tuners import One, descend, to_end
    from luthier.methods.tuners.low_rank.lora.tuned import invertible

    def end(seed: int, rate: float, start: dict) -> float:
        rng = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=rng)
        x = normal(256, 32) @ (torch.linalg.qr(normal(32, 32))[0] * (-0.2 * torch.arange(32)).exp()).T
        W = normal(32, 32) / 32**0.5
        C = x.T @ x / len(x)
        damped, inverse = invertible(C)
        S, Vh = torch.linalg.svd(W @ damped)[1:]
        target = W + 0.5 * S[:6].mean() * normal(32, 6) / 32**0.5 @ (Vh[:6] @ inverse)
        torch.manual_seed(seed)
        spec = {"name": "lora", "r": 6, "lora_alpha": 6, "target_modules": ["fc"], **start}
        attached = build("tuner", spec).attach(One(W))
        if start:
            attached._begin_corda(dict(attached.layers), [("fc", C)], None)
        loss = lambda: (attached.model(x) - x @ target.T).square().mean()
        to_end(descend(attached, loss, 30, rate))
        return float(loss().detach())

    corda = lambda how: {"init_lora_weights": "corda", "corda_config": {"corda_method": how}}
    for seed in range(3):
        ends = {}
        for name, start in {"lora": {}, "ipm": corda("ipm"), "kpm": corda("kpm")}.items():
            ends[name] = min(end(seed, rate, start) for rate in (0.01, 0.03))
        assert ends["ipm"] < 0.9 * ends["lora"] < 0.9 * ends["kpm"], ends
