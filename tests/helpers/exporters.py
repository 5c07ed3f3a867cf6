"""Bases of exports."""

from __future__ import annotations

import json
from pathlib import Path


def merging(tiny: str, folder: Path) -> str:
    """A base whose tokenizer merges two pairs; llama.cpp reads none without merges."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    model = described["model"]
    model["merges"] = [["t", "h"], ["th", "e"]]
    model["vocab"] |= {"th": len(model["vocab"]), "the": len(model["vocab"]) + 1}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    network = AutoModelForCausalLM.from_pretrained(tiny)
    network.resize_token_embeddings(len(model["vocab"]))
    network.save_pretrained(folder)
    return str(folder)


def sentencepiece():
    """A tokenizer of Llama 2's form: BPE over characters, bytes for what it lacks, a space before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("h", "e"), ("n", "\u2581"), ("\u2581", "t")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefhntx.", "\n"]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
