"""Tiny random networks of many families: what the layouts, kernels and writers must be right on."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers as t

from luthier.methods.tuners._base import Untuned
from luthier.model.batch import Batch, collate

WORDS = 97
SMALL = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
MOE = dict(
    num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8)
GPT = dict(
    vocab_size=WORDS,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
CAUSAL = {  # name -> (config class, settings)
    "llama": ("LlamaConfig", SMALL),
    "llama_tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen2_sliding": (
        "Qwen2Config",
        SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 8}),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        SMALL | GEMMA | {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL
        | GEMMA
        | {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 4}),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", SMALL | {"sliding_window": 5}),
    "mixtral": ("MixtralConfig", SMALL | MOE),
    "qwen2_moe": ("Qwen2MoeConfig", SMALL | MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", SMALL | MOE | {"head_dim": 8}),
    "cohere": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", SMALL | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", SMALL | {"rotary_pct": 0.5}),
    "falcon": ("FalconConfig", SMALL | {"num_kv_heads": 2}),
    "opt": ("OPTConfig", BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "bert_decoder": ("BertConfig", BERT | {"is_decoder": True}),
    "gpt_neo": (
        "GPTNeoConfig",
        BERT
        | {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "bloom": (
        "BloomConfig",
        dict(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0),
    ),
    "falcon_alibi": ("FalconConfig", SMALL | {"num_kv_heads": 2, "alibi": True}),
    "mamba": (
        "MambaConfig",
        dict(
            vocab_size=WORDS,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=2,
            initializer_range=0.3,
            pad_token_id=0,
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        SMALL | {"lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 5.0, "head_dim": 8},
    ),
    "lfm2": (
        "Lfm2Config",
        SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}
PADDED = {"gpt_neo", "bloom", "mamba", "recurrent_gemma", "lfm2", "falcon_alibi"}  # cannot be packed


def make(name: str, attention: str | None = None, seed: int = 0):
    """A causal LM of the zoo, in evaluation mode. attention: None is the family's own choice."""
    kind, settings = CAUSAL[name]
    config = getattr(t, kind)(**settings)
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


class Soft(Untuned):
    """Three soft vectors in front of everything, and nothing else."""

    virtual = 3

    def __init__(self, model):
        super().__init__(model)
        size = model.get_input_embeddings().weight.shape[1]
        self.vectors = torch.nn.Parameter(
            torch.randn(self.virtual, size, generator=torch.Generator().manual_seed(7))
        )

    def soft(self):
        return self.vectors


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, WORDS, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows() -> Batch:
    """Four rows of unlike lengths, one with three completions, some tokens not supervised."""
    sizes = [(5, [4, 6, 1]), (3, [7]), (9, [2, 3]), (1, [5])]
    made, seed = [], 0
    for g, (p, cs) in enumerate(sizes):
        said = [tokens(c, 50 + seed + k) for k, c in enumerate(cs)]
        marks = [[k % 3 != 1 for k in range(len(c))] for c in said]
        made.append(
            {
                "id": str(g),
                "prompt": "p",
                "encoded": SimpleNamespace(prompt=tokens(p, g), completions=said, supervised=marks),
            }
        )
        seed += len(cs)
    return collate(made, lambda row: row["encoded"])


def common() -> Batch:
    """Rows that begin alike, at several depths: two documents behind one instruction, a question asked twice,
    a prompt that goes on where another ends, completions with the same first words; all of the answers and
    some of what is common are supervised.
    """
    instruction, documents, question = tokens(6, 90), [tokens(4, 91), tokens(3, 92)], tokens(2, 93)
    prompts = [
        instruction + documents[0] + question,
        instruction + documents[1] + tokens(2, 94),
        tokens(5, 95),
        instruction + documents[0] + question,
        instruction + documents[0],
        instruction,
    ]
    start = tokens(3, 96)
    answers = [
        [start + tokens(2, 97), start + tokens(4, 98), tokens(3, 99)],
        [tokens(4, 97)],
        [tokens(2, 88)],
        [start + tokens(2, 97), tokens(1, 87)],
        [question + start + tokens(3, 86)],
        [documents[1] + start],
    ]
    drawn = []
    for i, (prompt, completions) in enumerate(zip(prompts, answers, strict=True)):
        marks = [[k != 1 or i == 0 for k in range(len(c))] for c in completions]
        encoded = SimpleNamespace(prompt=prompt, completions=completions, supervised=marks)
        drawn.append({"id": str(i), "prompt": "p", "encoded": encoded})
    return collate(drawn, lambda row: row["encoded"])


def deep() -> Batch:
    """Trees of depth 2: every second segment branches; inner segments are asked about as well."""
    sizes, parent = [4, 3, 2, 5, 1, 3, 2, 4], [-1, 0, 1, 1, 0, -1, 5, 6]
    ids = torch.tensor(tokens(sum(sizes), 3))
    segment = torch.repeat_interleave(torch.arange(8), torch.tensor(sizes))
    completion = torch.tensor([1, 2, 3, 4, 6, 7])
    asked = torch.isin(segment, completion)
    return Batch(
        ids,
        ids,
        asked,
        segment,
        torch.tensor(parent),
        completion,
        torch.tensor([0, 0, 0, 0, 1, 1]),
        [{"id": "a"}, {"id": "b"}],
    )
