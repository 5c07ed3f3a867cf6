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
