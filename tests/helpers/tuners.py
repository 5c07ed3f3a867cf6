"""Tiny networks with a tuner on them, and steps of training."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import fields
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from luthier.clock import Clock
from luthier.compat.transformers import checkpoint_activations
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.architectures.text.classifier import Classifier
from luthier.methods.estimators._base import gradients
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.model.quantized import quantize
from luthier.registry import build, find, names
from luthier.train.optimizer import Chain

IDS = torch.arange(3, 17).reshape(2, 7)


SHAPE = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.15
)


# settings that a tiny network needs small
DESCRIPTIONS = {f"LABEL_{i}": [3 + i, 20 + i] for i in range(5)}
SMALL = {
    "descriptions": DESCRIPTIONS,
    "r": 4,
    "num_virtual_tokens": 3,
    "init_rows": 2,
    "n_layers": 1,
    "depths": 2,
}


@lru_cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    llama = dict(SHAPE, intermediate_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=1
            )
        )
    elif kind == "labels":
        model = LlamaForSequenceClassification(LlamaConfig(**llama, num_labels=5, pad_token_id=0))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**llama, num_local_experts=3, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=kind == "tied"))
    with torch.no_grad():
        for n, p in model.named_parameters():  # biases start at zero, and zero hides mistakes
            if n.endswith("bias"):
                p.normal_(std=0.1)
    if kind == "codes":  # a Llama whose linear weights are quantized
        quantize(model, build("quantizer", {"name": "rtn", "group_size": 16}))
    return model.eval()


def base(kind: str = "llama") -> nn.Module:
    return copy.deepcopy(_made(kind))


def architecture_of(model):
    """What reads a network: it has a vocabulary to answer with, or labels."""
    return Causal() if model.get_output_embeddings() is not None else Classifier()


def batch(model=None):
    """Two rows; for a network of labels their whole text and a label each."""
    if model is not None and model.get_output_embeddings() is None:
        return collate([{"id": i, "ids": row.tolist()} for i, row in enumerate(IDS)], labelled)
    rows = [{"id": i, "ids": row.tolist()} for i, row in enumerate(IDS)]
    encode = lambda r: SimpleNamespace(
        prompt=r["ids"][:3], completions=[r["ids"][3:], r["ids"][2:5]], supervised=[[True] * 4, [True] * 3]
    )
    return collate(rows, encode)


def labelled(row):
    return SimpleNamespace(prompt=row["ids"], completions=[[row["id"] % 3]], supervised=[[True]])


def logprobs(attached) -> torch.Tensor:
    """What the product's own path says."""
    model = attached.model
    return architecture_of(model).forward(model, attached, batch(model)).logprobs


def plain(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def put(name: str, model: nn.Module | None = None, **settings):
    own = {f.name for f in fields(find("tuner", name))}
    torch.manual_seed(1)
    spec = {"name": name, **{k: v for k, v in SMALL.items() if k in own}, **settings}
    return build("tuner", spec).attach(base() if model is None else model)


def anywhere(name: str):
    """The tuner with its defaults on the first kind of network that it does not refuse."""
    kinds = ["llama", "gpt2", "mixtral", "codes"]
    if LABEL_HEAD in find("tuner", name).requires:
        kinds = ["labels"]
    for kind in kinds:
        try:
            return put(name, base(kind)), kind
        except RecipeError as error:
            refusal = error
    raise refusal


def train(attached, steps: int = 2, rate: float = 0.05):
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", "adam")], attached, clock, rate)
    for clock.step in range(steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        (-logprobs(attached)).mean().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
    return attached


TUNERS = names("tuner")


each = pytest.mark.parametrize("name", TUNERS)


def as_roles(attached):
    model = attached.model
    policy = Policy(architecture_of(model), model, attached)
    return SimpleNamespace(policy=policy, batch=lambda rows: batch(model), clock=Clock())


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


LOAD = """
import torch; torch.set_num_threads(1)
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r}).eval()
torch.save(model(torch.arange(3, 17).reshape(2, 7)).logits.detach(), {out!r})
"""


SHAPES = ["gpt2", "tied", "moe", "bert"]


@lru_cache
def _shaped(kind: str) -> nn.Module:
    """A network of another shape, under gradient checkpointing."""
    if kind == "moe":
        torch.manual_seed(0)
        sizes = dict(
            SHAPE,
            intermediate_size=48,
            num_key_value_heads=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        )
        model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)
        ).eval()
    elif kind == "bert":
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(**SHAPE, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
        ).eval()
    else:
        model = base(kind)
    checkpoint_activations(model)
    return model


def asked(model, attached) -> torch.Tensor:
    """Log-probabilities, by the architecture that the network is of: an encoder is asked about words in their
    places.
    """
    if model.config.model_type == "bert":
        return model(input_ids=IDS).logits.log_softmax(-1).gather(2, IDS[..., None]).flatten()
    return Causal().forward(model, attached, batch()).logprobs
