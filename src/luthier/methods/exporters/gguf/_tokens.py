"""A tokenizer as GGUF stores it, and the way back.

llama.cpp splits text before BPE by a rule that it knows by name (`tokenizer.ggml.pre`); RULES has those whose
pre-tokenizers are told apart here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "\u2581"  # what sentencepiece writes for a space


def split_rules() -> dict[str, tuple[dict[str, Any], ...]]:
    """Name of a rule in llama.cpp -> the steps of the pre-tokenizer that it stands for."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    words = {"type": "ByteLevel", "use_regex": True}
    rules: dict[str, tuple[dict[str, Any], ...]] = {
        "gpt-2": (words,),
        "smollm": ({"type": "Digits", "individual_digits": True}, words),
    }
    letters = {"type": "ByteLevel", "use_regex": False}
    for name in ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"):
        pattern = {"type": "Split", "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}}
        rules[name] = (pattern, letters)
    return rules


def split_rule(pre_tokenizer: dict[str, Any] | None) -> str:
    """The name of a pre-tokenizer in llama.cpp. Raises RecipeError where it has none that is known here."""
    pre_tokenizer = pre_tokenizer or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for name, rule in split_rules().items():
        if len(rule) == len(steps) and all(map(_is_step, steps, rule)):
            return name
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise RecipeError(
        f"the tokenizer splits text ({kinds}) by a rule that luthier has no name of llama.cpp's for; set"
        " LLAMA_CPP to a copy of llama.cpp, whose convert_hf_to_gguf.py knows more"
    )


def _is_step(step: dict[str, Any], rule: dict[str, Any]) -> bool:
    if step.get("add_prefix_space"):
        return False
    if step.get("type") == "Split" and (step.get("behavior"), step.get("invert")) != ("Isolated", False):
        return False
    return all(step.get(key) == value for key, value in rule.items())


def add_tokenizer(writer: Any, tokenizer: Any, size: int, stops: list[int]) -> None:
    """Write a tokenizer of transformers. writer: of the gguf package. size: rows of the embedding. stops:
    tokens at which answers end.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RecipeError("the tokenizer has no tokenizer.json, from which its GGUF form is made")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise RecipeError(f"the tokenizer's model is {model['type']}; luthier writes BPE tokenizers to GGUF")
    if not model["merges"]:
        raise RecipeError("the tokenizer has no merges, and llama.cpp reads none without")
    tokens, types = _tokens(tokenizer, model, size)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_rule(described["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if stops and stops[-1] != tokenizer.eos_token_id:
        writer.add_eot_token_id(stops[-1])
    writer.add_add_bos_token(adds_beginning(tokenizer))
    eos = tokenizer.eos_token_id
    writer.add_add_eos_token(eos is not None and tokenizer("a")["input_ids"][-1] == eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def adds_beginning(tokenizer: Any) -> bool:
    """Does the tokenizer put its first token before a text?"""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def _tokens(tokenizer: Any, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and its type; ids that no token has are filled up."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        if i >= size:
            raise RecipeError(f"token {i} of the tokenizer has no row in the embedding, which has {size}")
        tokens[i], types[i] = token, NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < size:
            types[i] = CONTROL if token.special else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown is not None and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Sentencepiece joins the pair whose result has the highest score, BPE the pair that stands first: the
    score of a token is the place of its first pair, negated.
    """
    place: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        place.setdefault(left + right, i)
    scores = []
    for token in tokens:
        scores.append(-float(place.get(token, len(merges))))
    return scores


def _adds_space(described: dict[str, Any]) -> bool:
    """Does the tokenizer put a space before a text?"""
    normalizer, pre_tokenizer = described["normalizer"] or {}, described["pre_tokenizer"] or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Prepend":
            return True
    return pre_tokenizer.get("prepend_scheme", "never") != "never"


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file as transformers reads it, but with llama.cpp's rules where these differ:
    it splits digits for `smollm`, and puts a space before every text of sentencepiece, also one that has one.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import get_gguf_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _, described, _ = get_gguf_tokenizer(str(path))
    backend = tokenizer.backend_tokenizer
    if described.get("pre_tokenizer_type") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif described["tokenizer_type"] == "llama":
        spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
        if described.get("add_prefix_space", True):
            spaces.insert(0, normalizers.Prepend(SPACE))
        backend.normalizer = normalizers.Sequence(spaces)
        backend.pre_tokenizer = None
    return tokenizer
