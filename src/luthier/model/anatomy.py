"""Where a weight stands in a transformer, by its name: in which layer, in attention or feed-forward, and as
what.

Names are those of transformers: Llama, Qwen, Gemma, Mistral, Phi, GPT-2, NeoX, OPT, Bloom, Falcon, BERT,
RoBERTa, DistilBERT, DeBERTa, ALBERT, ModernBERT, XLNet, T5, BART, GPT-J, wav2vec 2.0 and its kin, the towers
of Qwen-VL. Methods that sit on a certain part find it here and nowhere else.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

from luthier.errors import RecipeError

LAYER = re.compile(r"^(.*?(?:layers?|\bh|blocks?))\.(\d+)\.")
NORM = re.compile(r"norm|\bln_", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
INSIDE = {  # attention: part -> last names
    "q": {"q_proj", "query", "q", "q_lin", "query_proj", "linear_q"},
    "k": {"k_proj", "key", "k", "k_lin", "key_proj", "linear_k"},
    "v": {"v_proj", "value", "v", "v_lin", "value_proj", "linear_v"},
    "qkv": {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv"},
    "o": {"o_proj", "out_proj", "c_proj", "dense", "o", "out_lin", "Wo", "linear_out", "proj"},
}
OUTSIDE = {  # feed-forward
    "up": {
        "up_proj",
        "c_fc",
        "fc1",
        "fc_in",
        "wi",
        "wi_1",
        "dense_h_to_4h",
        "lin1",
        "w3",
        "ffn",
        "intermediate_dense",
        "layer_1",
        "dense1",
    },
    "gate": {"gate_proj", "wi_0", "w1"},
    "gate_up": {"gate_up_proj", "Wi"},
    "down": {
        "down_proj",
        "c_proj",
        "c_fc2",
        "fc2",
        "fc_out",
        "wo",
        "dense_4h_to_h",
        "lin2",
        "w2",
        "ffn_output",
        "Wo",
        "output_dense",
        "layer_2",
        "dense2",
    },
}
BERTS = {"intermediate": "up", "output": "down"}  # whose two matrices are both called dense
_last_mlps: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # network -> its last block, and the MLP in it


def layer_of(name: str) -> tuple[str, int] | None:
    """'model.layers.3.mlp.up_proj.weight' -> ('model.layers', 3); None for what stands in no layer."""
    match = LAYER.match(name)
    if match is None:
        return None
    return match[1], int(match[2])


def kind_of(name: str) -> str:
    """attention, feed-forward or norm: of a weight or module inside a layer."""
    inner = LAYER.sub("", name)
    if NORM.search(inner):
        return "norm"
    if ATTENTION.search(inner):
        return "attention"
    return "feed-forward"


def part_of(module: str) -> str | None:
    """q, k, v, qkv, o, up, gate, gate_up or down: what a matrix does in its layer; None for anything else."""
    if layer_of(f"{module}.") is None or kind_of(module) == "norm":
        return None
    *_, above, leaf = module.split(".")
    parts = INSIDE
    if kind_of(module) != "attention":
        if leaf == "dense":
            return BERTS.get(above)
        parts = OUTSIDE
    for part, names in parts.items():
        if leaf in names:
            return part
    return None


def part_names(model: Any, *parts: str) -> list[str]:
    """The names inside a layer of the modules that do one of these things, each once."""
    names = set()
    for name, _ in model.named_modules():
        if part_of(name) in parts:
            names.add(LAYER.sub("", name))
    return sorted(names)


def part_pattern(names: list[str]) -> str:
    """The regular expression of these names in any layer; of none where there are none."""
    if not names:
        return r"(?!)"
    return rf".*\.\d+\.({'|'.join(map(re.escape, names))})"


def pattern_of(tuner: str, model: Any, *parts: str) -> str:
    """The regular expression of the modules that do one of these things. Raises RecipeError where there are
    none.
    """
    names = part_names(model, *parts)
    if not names:
        raise RecipeError(
            f"tuner '{tuner}' does not know the modules of {type(model).__name__}; name those that it sits on"
            " in target_modules"
        )
    return part_pattern(names)


def last_mlp(model: Any) -> tuple[Any, Any] | None:
    """The block of a network that comes last, and the one module in it of a class that is called MLP; None
    where there is not exactly one.
    """
    if model not in _last_mlps:
        layers, mlps = [], []
        for name, module in model.named_modules():
            layer = layer_of(f"{name}.")
            if layer is not None and type(module).__name__.endswith("MLP"):
                layers.append(layer)
                mlps.append(module)
        last = None
        if layers and layers.count(layers[-1]) == 1:
            path, index = layers[-1]
            last = model.get_submodule(f"{path}.{index}"), mlps[-1]
        _last_mlps[model] = last
    return _last_mlps[model]
