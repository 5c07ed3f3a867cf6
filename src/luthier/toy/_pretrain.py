"""Pretraining of a small Llama on two cores: about a million tokens a minute for 4 million parameters.

Three things make it fast: bf16 everywhere with fp32 masters in the optimizer, attention as plain batched
matrix products in both directions (at these sizes faster than the fused CPU kernels), and torch.compile. The
matrices of the layers move by Muon (arXiv:2502.16982), which orthogonalises the momentum of all matrices of
one shape together; embeddings, head and norms by AdamW. The rate warms up, stays, and falls to zero in the
last quarter.
"""

import copy
import json
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WARM_UP_STEPS = 100
# matrices inside the layers of a Llama, a BERT or a T5
INNER = re.compile(r"\b(layers?|block)\.\d+\.(?!.*bias)")
QUERY = re.compile(r"Attention\.q\.weight$")  # of a T5
DECAY_SHARE = 0.25
KEEP_EVERY = 100  # steps
ADAM_RATE, MUON_RATE, WEIGHT_DECAY = 3e-3, 0.02, 0.05
ASKED = 0.2  # weight of a prompt's token in the loss, of a completion's it is 1: prompts are mostly chance
# Five steps x -> a x + b x^3 + c x^5 that send all singular values to about 1 (arXiv:2505.16932).
NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class _Attention(torch.autograd.Function):
    """Causal attention as batched matrix products. q, k, v: [batch, heads, length, head size], bf16."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scaling):
        shape = q.shape
        q, k, v = (x.reshape(-1, *shape[2:]) for x in (q, k, v))
        p = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling), -1)
        ctx.scaling, ctx.shape = scaling, shape
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v).view(shape)

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, p = ctx.saved_tensors
        gradient = gradient.reshape(q.shape)
        dp = torch.bmm(gradient, v.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scaling)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        dv = torch.bmm(p.transpose(1, 2), gradient)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), None, None


_masks: dict[int, Tensor] = {}


def causal_mask(length: int) -> Tensor:
    """Made before compiling: the compiler refuses the side effect."""
    if length not in _masks:
        _masks[length] = torch.full((length, length), -1e4, dtype=torch.bfloat16).triu_(1)
    return _masks[length]


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    context = _Attention.apply(query, key, value, _masks[query.shape[2]], scaling)
    return context.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("toy_pretraining", _attend)


def build(tokenizer, hidden: int, layers: int, heads: int, intermediate: int, seed: int) -> LlamaForCausalLM:
    """A new Llama in bf16. Its head is untied: tied, words interchangeable in a slot become one vector."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.5 * hidden**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).bfloat16()


def deepened(model: LlamaForCausalLM, after: Collection[int] = (1, 3)) -> LlamaForCausalLM:
    """The same network with more layers: behind each of `after` a copy of it that starts as the identity (as
    in LLaMA Pro).
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += len(after)
    bigger = LlamaForCausalLM(config).train()
    torch.nn.Module.to(bigger, model.dtype)
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    place = 0
    for i, layer in enumerate(model.model.layers):
        for copied in range(1 + (i in after)):
            for name, value in layer.state_dict().items():
                silent = copied and name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
                state[f"model.layers.{place}.{name}"] = torch.zeros_like(value) if silent else value
            place += 1
    bigger.load_state_dict(state)
    return bigger


class MuonAdam:
    """Muon for the matrices inside the layers, AdamW for all else; fp32 masters of bf16 weights."""

    def __init__(self, model: torch.nn.Module):
        alike: dict[tuple[torch.Size, float], list[torch.nn.Parameter]] = {}
        self.rest = []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and INNER.search(name):
                # T5 leaves the root of the head's size out of its attention and in its queries' weights. An
                # update as large as other matrices get hardens such attention in some hundred steps, and then
                # it reads no more.
                rate = float(cast(Any, model).config.d_kv) ** -0.5 if QUERY.search(name) else 1.0
                alike.setdefault((parameter.shape, rate), []).append(parameter)
            else:
                self.rest.append(parameter)
        # (matrices of one shape and rate, their masters, their momentum)
        self.groups, self.rates = [], [rate for _, rate in alike]
        for matrices in alike.values():
            masters = torch.stack([matrix.detach().float() for matrix in matrices])
            self.groups.append((matrices, masters, torch.zeros_like(masters)))
        self.masters = [parameter.detach().float().clone() for parameter in self.rest]
        self.adam = torch.optim.AdamW(
            self.masters, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with all learning rates times `scale`; the gradients are gone after it."""
        self._step_adam(scale)
        for (matrices, masters, momentum), rate in zip(self.groups, self.rates, strict=True):
            gradient = torch.stack([matrix.grad for matrix in matrices]).float()
            momentum.lerp_(gradient, 0.05)
            update = orthogonalise(gradient.lerp(momentum, 0.95))
            wide = max(1.0, masters.shape[1] / masters.shape[2]) ** 0.5
            masters.mul_(1 - MUON_RATE * scale * WEIGHT_DECAY).add_(
                update, alpha=-MUON_RATE * scale * wide * rate
            )
            for matrix, master in zip(matrices, masters, strict=True):
                matrix.copy_(master)
                matrix.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that goes on with the next step; the weights are the masters rounded."""
        own = {f"group.{i}.{k}": t for i, (_, *pair) in enumerate(self.groups) for k, t in enumerate(pair)}
        adam = {f"adam.{i}.{k}": t for i, m in enumerate(self.masters) for k, t in self.adam.state[m].items()}
        return {**own, **adam, **{f"master.{i}": m for i, m in enumerate(self.masters)}}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state, weights and all."""
        for i, (matrices, *own) in enumerate(self.groups):
            for k, tensor in enumerate(own):
                tensor.copy_(state[f"group.{i}.{k}"])
            torch._foreach_copy_(matrices, list(own[0]))
        for i, m in enumerate(self.masters):
            m.copy_(state[f"master.{i}"])
            self.adam.state[m] = {k.split(".")[2]: t for k, t in state.items() if k.startswith(f"adam.{i}.")}
        torch._foreach_copy_(self.rest, self.masters)

    def _step_adam(self, scale: float) -> None:
        for parameter, master in zip(self.rest, self.masters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.param_groups[0]["lr"] = ADAM_RATE * scale
        self.adam.step()
        torch._foreach_copy_(self.rest, self.masters)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices [n, rows, columns] with all singular values 1, roughly."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for a, b, c in NEWTON_SCHULZ:
        square = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(b * square + c * torch.bmm(square, square), x)
    return (x.transpose(1, 2) if tall else x).float()


def learning_rate_scale(step: int, done: float, decay: float) -> float:
    """Warm-up, stable, decay over the last `decay` of it. `done` is the finished share of the whole run."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.0, (1 - done) / decay))


def causal(
    model: LlamaForCausalLM, windows: np.ndarray, batch: int = 8
) -> Callable[[int], tuple[Tensor, int]]:
    """The loss of a step on windows [n, length + 1], a batch of them at a time, and the tokens it reads."""
    causal_mask(windows.shape[1] - 1)
    model.set_attn_implementation("toy_pretraining")
    body = torch.compile(model.model, dynamic=False)

    def loss(step: int) -> tuple[Tensor, int]:
        some = windows[np.arange(step * batch, (step + 1) * batch) % len(windows)]
        return _loss(model, body, torch.from_numpy(some.astype(np.int64))), batch * (windows.shape[1] - 1)

    return loss


def pretrain(
    model: PreTrainedModel,
    loss_of: Callable[[int], tuple[Tensor, int]],  # step -> its loss, and the tokens it read
    minutes: float,
    steps: int | None = None,
    # a file in which the state is kept every KEEP_EVERY steps; where it is there, training goes on from it
    checkpoint: Path | None = None,
    peak: float = 1.0,  # of the learning rates: less for a short round that goes on from a finished model
    decay: float = DECAY_SHARE,  # of the run, at its end, in which they fall to zero
    tell: Callable[[str], None] = print,
    look: Callable[[], str] | None = None,
    look_every: float = 3.0,
    # step -> what is called after it, to keep the model as it is then
    weak: Mapping[int, Callable[[], None]] | None = None,
) -> dict:
    """Train for so many minutes, or exactly `steps` steps. Returns what it took.

    Time is measured without compiling. `look` is called every `look_every` minutes, its words are told.
    """
    optimizer = MuonAdam(model)
    seconds, step, tokens, last_line, recent = 0.0, 0, 0, 0.0, []
    if checkpoint and checkpoint.is_file():
        with safe_open(str(checkpoint), framework="pt") as file:
            optimizer.load({name: file.get_tensor(name) for name in file.keys()})
            seconds, step, tokens, recent = json.loads(file.metadata()["progress"])
        last_line, first = seconds, step
        tell(f"going on from step {step}")
    else:
        first = 0
    while (step < steps) if steps else (seconds < 60 * minutes):
        began = time.perf_counter()
        loss, read = loss_of(step)
        loss.backward()
        done = step / steps if steps else seconds / (60 * minutes)
        optimizer.step(peak * learning_rate_scale(step, done, decay))
        recent.append(loss.item())
        step, tokens = step + 1, tokens + read
        if step > first + 2:  # the first steps compile
            seconds += time.perf_counter() - began
        if weak and step in weak:
            weak[step]()
        if checkpoint and step % KEEP_EVERY == 0:
            progress = json.dumps([seconds, step, tokens, recent[-50:]])
            save_file(
                optimizer.state(),
                str(beside := checkpoint.with_suffix(".new")),
                metadata={"progress": progress},
            )
            beside.replace(checkpoint)  # killed while writing, the one before is whole
        if seconds - last_line > 60 * look_every:
            last_line, recent = seconds, recent[-50:]
            words = f"{seconds / 60:5.1f} min  step {step}  {tokens / 1e6:.2f}M tokens"
            tell(f"{words}  loss {np.mean(recent):.4f}  {_looked(model, look) if look else ''}")
    if isinstance(model, LlamaForCausalLM):
        model.set_attn_implementation("sdpa")
    return {
        "steps": step,
        "tokens": tokens,
        "took_minutes": seconds / 60,
        "loss": float(np.mean(recent[-50:])),
    }


def _loss(model: LlamaForCausalLM, body: Callable, ids: Tensor) -> Tensor:
    """Mean loss of windows [batch, length + 1] as the corpus marks them; neither padding nor the start of a
    document is predicted.
    """
    weight = torch.where(ids[:, 1:] < 0, ASKED, 1.0).flatten()
    ids = torch.where(ids < 0, ~ids, ids)
    labels = ids[:, 1:]
    free = (labels == model.config.pad_token_id) | (labels == model.config.bos_token_id)
    states = body(input_ids=ids[:, :-1], attention_mask=None, use_cache=False).last_hidden_state
    logits = model.lm_head(states).flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels.masked_fill(free, -100).flatten(), reduction="none")
    return (losses * weight).sum() / weight.masked_fill(free.flatten(), 0).sum()


def _looked(model: PreTrainedModel, look: Callable[[], str]) -> str:
    if not isinstance(model, LlamaForCausalLM):
        return look()
    model.set_attn_implementation("sdpa")
    words = look()
    model.set_attn_implementation("toy_pretraining")
    return words
