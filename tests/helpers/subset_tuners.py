"""Networks, batches and training steps that tests of tuners of a model's own weights share."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace

import torch
import transformers as t
from torch import nn

from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.registry import build
from luthier.train.optimizer import Chain

IDS = torch.arange(3, 17).reshape(2, 7)


SIZE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.15)


LLAMA = dict(SIZE, intermediate_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)


MOE = dict(
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    decoder_sparse_step=1,
)


MADE = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            n_embd=32,
            n_layer=4,
            n_head=4,
            vocab_size=97,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ),
    "qwen_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**LLAMA, **MOE)),
    "bert": lambda: t.BertForMaskedLM(
        t.BertConfig(
            **SIZE,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=97,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0,
            decoder_start_token_id=0,
        )
    ),
}


TUNERS = {  # name -> settings that suit a tiny network
    "hft": {},
    "lisa": {"n_layers": 1},
    "owlore": {"n_layers": 1},
    "telly": {},
    "cofitune": {"init_rows": 2},
    "part": {},
    "s2ft": {"d_ratio": 0.1, "o_ratio": 0.25},
    "apet": {"n": 200},
    "sara": {},
    "spt": {"init_rows": 2, "r": 2},
    "r_amt": {},
    "reinit": {},
}


@lru_cache
def _made(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = MADE[kind]()
    with torch.no_grad():
        for n, p in model.named_parameters():  # zero hides mistakes
            if n.endswith("bias"):
                p.normal_(std=0.1)
    return model.to(dtype).eval()


def base(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(_made(kind, dtype))


def put(name: str, model: nn.Module | None = None, **settings):
    torch.manual_seed(1)
    return build("tuner", {"name": name, **TUNERS.get(name, {}), **settings}).attach(
        base() if model is None else model
    )


def logits(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def say(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model)


def loss_of(model: nn.Module) -> torch.Tensor:
    z = logits(model).float()[:, :-1]
    return nn.functional.cross_entropy(z.flatten(0, 1), IDS[:, 1:].flatten())


def train(
    attached,
    steps: int = 3,
    rate: float = 0.02,
    transform="adam",
    first: int = 0,
    chain=None,
    total: int | None = None,
    seed: int = 3,
):
    clock = Clock(seed=seed, total=total or steps)
    made = Chain([build("transform", transform)] if transform else [], attached, clock, rate)
    made.state = chain.state if chain else made.state
    for clock.step in range(first, steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss_of(attached.model).backward()
        made.step(gradients(made))
        attached.end_step(clock)
    return made


def batch(rows=None):
    rows = rows or [{"id": i, "ids": r.tolist()} for i, r in enumerate(IDS)]
    encode = lambda r: SimpleNamespace(
        prompt=r["ids"][:3], completions=[r["ids"][3:]], supervised=[[True] * 4]
    )
    return collate(rows, encode)


ROWS = [{"id": i, "ids": r.tolist()} for i, r in enumerate(IDS)]


def roles_of(attached):
    return SimpleNamespace(
        policy=Policy(Causal(), attached.model, attached), batch=batch, clock=Clock(), tuner=attached
    )


def state_bytes(tree) -> int:
    if isinstance(tree, dict):
        return sum(state_bytes(v) for v in tree.values())
    return tree.numel() * tree.element_size() if torch.is_tensor(tree) else 0


def changed(attached, untuned) -> int:
    with attached.merged():
        own = {n.replace(".base_layer", ""): p for n, p in attached.model.named_parameters()}
        return sum(int((own[n] != p).sum()) for n, p in untuned.named_parameters())
