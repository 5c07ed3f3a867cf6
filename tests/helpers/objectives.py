"""Tiny networks, batches and trainers of TRL that tests of objectives share."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from helpers.models import make_llama, make_tokenizer
from helpers.rows import SUMS, example_value
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.objectives.representation._features import classes
from luthier.methods.roles.features.generator import Features as Made
from luthier.methods.roles.features.memory import Features
from luthier.methods.roles.networks.part_whole import Heads
from luthier.methods.roles.networks.value_head import Head as ValueHead
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.policy import Policy, Roles
from luthier.registry import Column, build, requires_of
from luthier.text.encode import Renderer

V = 40  # tokens of the tiny vocabulary


@functools.cache
def _network(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def network(seed: int = 0, off_by: float = 0.0) -> LlamaForCausalLM:
    """A small random Llama; `off_by` moves every weight a little."""
    return copy.deepcopy(_moved(seed, off_by))


@functools.cache
def _moved(seed: int, off_by: float) -> LlamaForCausalLM:
    net = copy.deepcopy(_network(seed))
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in net.parameters() if off_by else ():
            p.add_(off_by * torch.randn(p.shape, generator=noise))
    return net


def cast(**others) -> Roles:
    """Policy, reference and teacher, each a network of its own unless given."""
    policy = network()
    made = {
        "reference": network(off_by=0.05),
        "teacher": network(seed=7),
        "memory": copy.deepcopy(memory()),
        "part_heads": copy.deepcopy(heads()),
        "generator": copy.deepcopy(generator()),
        "feature_pairs": copy.deepcopy(pairs()),
        "critic": copy.deepcopy(critic()),
    } | others
    torch.manual_seed(10)  # whatever was made now, and what before
    roles = {k: role(net, k) if isinstance(net, LlamaForCausalLM) else net for k, net in made.items()}
    return Roles(Policy(Causal(), policy, Untuned(policy)), Clock(), Renderer(tokenizer()), **roles)


@functools.cache
def heads() -> Heads:
    """As they begin, but for a little of what they will learn."""
    torch.manual_seed(9)
    made = Heads(16, 2)
    for last in (made.up[-1], made.down[-1]):
        torch.nn.init.normal_(last.weight, std=0.1)
    return made


@functools.cache
def generator() -> Made:
    """Of answers that begin with low tokens, which are known, and with high ones, which are not."""
    torch.manual_seed(10)
    made = Made(16, [f"known {t}" for t in range(3, 37)], [f"unknown {t}" for t in range(37, V)])
    made.tokens.copy_(torch.arange(3, V))
    made.mean.copy_(0.2 * torch.randn(made.mean.shape))
    made.square.copy_(made.mean.square() + 0.01)
    return made


@functools.cache
def memory() -> Features:
    """Random features of rows like those of the contracts: other rows that answer the same."""
    rows = batch_of([{**r, "id": f"{r['id']}-before"} for k in (3, 6) for r in make_rows(4, k=k)])
    made = Features(64, 16)
    rng, kinds = torch.Generator().manual_seed(8), classes(rows)
    made.remember(torch.arange(len(kinds)), kinds, torch.randn(len(kinds), 16, generator=rng))
    made.after_step(None)
    return made


@functools.cache
def critic() -> ValueHead:
    """As it begins, but for a little of what it will learn."""
    torch.manual_seed(12)
    made = ValueHead(16, detach=True)
    torch.nn.init.normal_(made.value.weight, std=0.1)
    return made


@functools.cache
def pairs() -> Features:
    """Random features of both networks, for answers that begin with any token."""
    made, rng = Features(3 * V, 32), torch.Generator().manual_seed(11)
    made.remember(torch.arange(3 * V), torch.arange(3 * V) % V, torch.randn(3 * V, 32, generator=rng))
    made.after_step(None)
    return made


def role(net, name: str) -> Policy:
    return Policy(Causal(), net, Untuned(net), name, nullcontext)


def tokens(n: int, rng: torch.Generator) -> list[int]:
    return torch.randint(3, V, (n,), generator=rng).tolist()


def make_rows(n: int = 4, k: int = 2, seed: int = 0, **columns) -> list[dict]:
    """n rows of k completions of different lengths and scores."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        completions = [tokens(2 + (3 * i + 2 * j) % 5, rng) for j in range(k)]
        scores = [float(x) for x in torch.randperm(k, generator=rng)]
        out.append(
            {
                "id": f"r{i}",
                "prompt": tokens(3 + i % 3, rng),
                "completions": completions,
                "scores": scores,
                **columns,
            }
        )
    return out


def contract_rows(objective, n: int = 4) -> list[dict]:
    """Rows with all that the objective wants; one of them has a completion that is only partly supervised."""
    rows = make_rows(n, k=6 if "contrasts" in requires_of(objective) else 3)
    rows[1]["supervised"] = [[True] * (len(c) - 1) + [j != 1] for j, c in enumerate(rows[1]["completions"])]
    for word in sorted(requires_of(objective)):
        if not isinstance(word, Column) or word in rows[0]:
            continue
        assert word.example, f"column '{word}' needs an example where it is declared"
        for place, row in enumerate(rows):
            row[word] = example_value(word, row, place)
    return rows


def encode(row: dict) -> SimpleNamespace:
    marks = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return SimpleNamespace(prompt=row["prompt"], completions=row["completions"], supervised=marks)


def batch_of(rows: list[dict]):
    return collate(rows, encode)


def average(objective, roles: Roles, batch) -> torch.Tensor:
    """What the loop makes of a loss: the weighted sum of each term's average."""
    return sum(w * o.loss(roles, batch).sum() / o.divisor(batch) for w, o in objective.terms())


def gradients(net) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def same(a: dict, b: dict, atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def marks(row, rng) -> list[list[float]]:
    """0 or 1 for each learned token."""
    learned = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return [[float(torch.rand((), generator=rng) > 0.5) for _ in range(sum(m))] for m in learned]


def pair_rows(n: int = 4) -> list[dict]:
    rows = make_rows(n, k=2)
    for i, row in enumerate(rows):
        row["scores"] = [1.0, 0.0] if i % 2 else [0.0, 1.0]
    return rows


def loss_of(spec, roles=None, rows=None) -> torch.Tensor:
    return build("objective", spec).loss(roles or cast(), batch_of(rows or pair_rows()))


def full_logits(roles: Roles, name: str, rows: list[dict]) -> torch.Tensor:
    """[T, V] the slow way: one sequence at a time."""
    net = getattr(roles, name).model
    read = [(r["prompt"], c) for r in rows for c in r["completions"]]
    with torch.no_grad():
        return torch.cat(
            [net(torch.tensor([prompt + c])).logits[0, len(prompt) - 1 : -1] for prompt, c in read]
        )


def by_hand(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)


@functools.cache
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, V))])}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="w3"
    )


def trainer(trl, kind: str, tmp_path, row: dict, settings: dict | None = None, **kwargs):
    """TRL's trainer of a kind around the policy's network. It only ever computes losses of batches made
    here.
    """
    from datasets import Dataset

    plain = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
    }
    kwargs = {
        "model": network(),
        "train_dataset": Dataset.from_list([row] * 4),
        "processing_class": tokenizer(),
        **kwargs,
    }
    config = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path / "out"), **plain, **(settings or {}))
    made = getattr(trl, f"{kind}Trainer")(args=config, **kwargs)
    made.model.eval()  # no dropout here; and no division by accumulation steps
    return made


def agree(objective, rows: list[dict], net, theirs: torch.Tensor, **others) -> None:
    """Our average over the batch against their loss: the number, and its gradient in every weight."""
    roles = cast(**others)
    ours = average(objective, roles, batch_of(rows))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=2e-5, abs=2e-6)
    ours.backward()
    theirs.backward()
    same(gradients(roles.policy.model), gradients(net), atol=5e-5)  # of gradients up to 16: rounding


def preference_inputs(rows: list[dict]) -> dict:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    def side(row, pick):
        return row["completions"][row["scores"].index(pick(row["scores"]))]

    return DataCollatorForPreference(pad_token_id=0)(
        [{"prompt_ids": r["prompt"], "chosen_ids": side(r, max), "rejected_ids": side(r, min)} for r in rows]
    )


def tune_two_steps(tmp_path, name: str, **changes):
    base = {
        "data": SUMS,
        "eval_data": SUMS,
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "evaluate": ["loss"],
        "dtype": "float32",
    }
    return luthier.tune({**base, **changes}, folder=tmp_path / name)


def text_roles(step: int = 0):
    tokenizer = make_tokenizer()
    text = lambda ids, special=False: tokenizer.decode(ids)
    return SimpleNamespace(
        clock=Clock(seed=1), renderer=SimpleNamespace(tokenizer=tokenizer, text=text), warn=lambda s: None
    )


def combined(name: str, grads: torch.Tensor) -> torch.Tensor:
    share = build("estimator", name).combine(
        grads.double() @ grads.double().T, torch.ones(len(grads)), torch.Generator().manual_seed(0)
    )
    return share.float() @ grads


def fitted(objective, roles, rows, weights=None, steps: int = 60) -> torch.Tensor:
    """[arms] log-policy at the minimum of the (weighted) mean loss."""
    from luthier.toy import bandit

    batch = bandit.batch_of(rows)
    optimizer = torch.optim.LBFGS(
        roles.policy.parameters(), lr=0.5, max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        values = objective.loss(roles, batch)
        value = (values if weights is None else values * weights).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return roles.policy.log_policy().detach()


def small_llama(seed: int = 0) -> Roles:
    net = make_llama(
        seed,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    roles = cast()
    policy = Policy(Causal(), net, Untuned(net))
    return Roles(policy, Clock(total=1), roles.renderer)


def fit(roles: Roles, objective, rows: list[dict], steps: int, lr: float = 3e-3, size: int = 32) -> None:
    """Adam on batches of the rows."""
    adam = torch.optim.Adam(roles.policy.model.parameters(), lr=lr)
    roles.clock.total = steps
    roles.policy.train()
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        roles.clock.step = step
        some = torch.randint(len(rows), (size,), generator=rng).tolist()
        adam.zero_grad()
        average(objective, roles, batch_of([rows[i] for i in some])).backward()
        adam.step()
    roles.policy.eval()
