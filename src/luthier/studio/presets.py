"""Where the form of a new run begins: the usual ways to fine-tune, with values to start from and what each
costs.

A learning rate is named only where it departs from the one that the tuner and the objective declare.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RANK = 16  # of the presets' LoRA
FLOAT = 4  # bytes of a gradient, of a master weight, of each of AdamW's two averages
NF4_BITS = 4.127  # of a weight, scales included


@dataclass(frozen=True)
class Preset:
    """One way to fine-tune.

    fields: of the form, by their keys. rows: what the data must have. costs: beside the memory, which depends
    on the model. trains: 'lora' or 'all' weights. bits: of a base weight, where it is quantized. models: how
    many lie in memory.
    """

    name: str
    title: str
    says: str
    rows: str
    costs: str
    fields: dict[str, str] = field(default_factory=dict)
    trains: str = "lora"
    bits: float = 0.0
    models: int = 1


LORA = {"tuner": "lora", "tuner.r": str(RANK), "tuner.lora_alpha": str(2 * RANK)}
PRESETS = (
    Preset(
        "lora",
        "LoRA",
        "Trains two small matrices beside every linear layer. The usual first choice.",
        "prompts with completions, or conversations",
        "Little memory beside the model. Leaves an adapter of a few MB.",
        LORA,
    ),
    Preset(
        "qlora",
        "QLoRA",
        "LoRA on a base that is kept in 4 bits. For models that do not fit in memory otherwise.",
        "prompts with completions, or conversations",
        "A quarter of the model's memory. Slower: weights are expanded each time they are used.",
        {**LORA, "quantization": "nf4"},
        bits=NF4_BITS,
    ),
    Preset(
        "full",
        "Full fine-tuning",
        "Trains every weight. For small models, and for data that is far from what the model knows.",
        "prompts with completions, or conversations",
        "Gradients and optimizer state for every weight. Leaves a whole model, and forgets more.",
        {"tuner": "full"},
        trains="all",
    ),
    Preset(
        "dpo",
        "DPO",
        "Learns from pairs: which of two answers is better. After supervised fine-tuning.",
        "prompts with a chosen and a rejected answer",
        "Twice the texts of supervised fine-tuning, and a pass of the untuned model; no second model.",
        {**LORA, "objective": "dpo + 0.1*chosen_sft"},
    ),
    Preset(
        "grpo",
        "GRPO",
        "The model answers, a rule scores the answers, and better ones become likelier.",
        "prompts with an answer that can be checked",
        "Most of the time goes into generating eight answers to each prompt.",
        {
            **LORA,
            "objective": "grpo",
            "online_stages": (
                "[{name: rollout, n: 8, max_new_tokens: 256}, {name: score, reward: exact_match}]"
            ),
        },
    ),
    Preset(
        "classify",
        "Classify",
        "Gives each class a score instead of writing text. For labels, ratings, topics.",
        "texts with a label",
        "As LoRA; the model reads each text once and writes nothing.",
        {**LORA, "architecture": "classifier"},
    ),
    Preset(
        "distill",
        "Distill",
        "Learns a larger model's probabilities along with the answers. Name the teacher in `roles`.",
        "prompts with completions, and a teacher with the same tokenizer",
        "The teacher lies in memory too, and reads every row.",
        {**LORA, "objective": "0.5*sft + distill"},
        models=2,
    ),
)


def memory(preset: Preset, model: dict[str, int]) -> dict[str, int]:
    """Bytes of {weights, state} and the number of trainable parameters of a preset, without the activations.

    model: parameters, linear (those of them that can be quantized), lora (of an adapter of rank RANK), bytes
    (of a parameter as it is loaded).
    """
    total, linear, size = model["parameters"], model["linear"], model["bytes"]
    weights = total * size
    if preset.bits:
        weights = round((total - linear) * size + linear * preset.bits / 8)
    trained = total if preset.trains == "all" else model["lora"]
    each = 3 * FLOAT  # a gradient and AdamW's two averages
    if preset.trains == "lora":
        each += FLOAT  # the adapter itself
    elif size < FLOAT:
        each += FLOAT  # a master weight in fp32
    # a teacher is taken to be as large as the model: which it is stands in the recipe
    return {"weights": weights * preset.models, "state": trained * each, "trained": trained}
