"""The model card of a toy model: how it was made, and measured scores of what it can and cannot do."""

from .tasks import find

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: {task}
---
# toy:{name}

{what} of {parameters:.2f}M parameters, made from scratch by luthier on generated text about invented
people, sums, little stories, small Python functions, requests, tools, tables, made-up words and made-up
languages. It knows nothing else: it is there to be tuned in minutes on two cores, and to show what tuning
changed and what it broke.

## How it was made
{commands}

That is {steps} steps, {tokens:.1f}M tokens of the tasks in `luthier/toy/tasks`
(each text read once), {minutes:.0f} minutes on two shared cores; loss at the end {loss:.3f} nats a token.
{how}
Muon for the matrices, AdamW for the rest; a round is warm-up, constant rate, and linear decay over the last
quarter. The text follows from the seed to the byte; the weights up to rounding, which depends on the machine.

{shape}, {heads} heads, bf16. Byte-level BPE of {vocabulary} tokens, every digit a token. A document is
`<|start|>` prompt completion `<|end|>` (the tokenizer adds `<|start|>` itself; `<|end|>` is the
end-of-sequence token, `<|pad|>` is for padding only). Chat: `<|start|><|system|>Be
brief.<|end|><|user|>Hello!<|end|><|assistant|>Hello! How can I help you?<|end|>`.

## What it can do
Right answers in percent, {decoding}, {rows} rows a split (seed "card"); code and SQL are run, all else is
compared. No item of `validation`, `test` or `ood` occurs in a pretraining row; `ood` differs in kind as
well (longer, other wording, unseen pairs, facts never asked before); `new` is what no pretraining row
mentions at all.

| task | validation | test | ood | new |
|---|---|---|---|---|
{table}

Within `test`, by kind of row: {kinds}.

Asked in chat, as one turn (`toy:chat/instruct_test`): {asked}.

## What it cannot do
{weak}

It has never seen natural English beyond the templates of the tasks, answers nothing about the real world,
has no notion of safety outside the `refusal` task's templates, and reads at most 512 tokens.
"""

WHAT_IT_IS = {  # model type -> what it is, what the hub calls its task, how its answers are judged
    "llama": (
        "A language model",
        "text-generation",
        "greedy decoding; in chat all turns of the assistant must be right",
    ),
    "bert": (
        "An encoder",
        "fill-mask",
        "all places of the completion filled at once, which long completions are not made for",
    ),
    "t5": (
        "An encoder-decoder",
        "text-generation",
        "greedy decoding; in chat the last turn of the assistant",
    ),
}
HOW = {
    "chat": (
        "It goes on from toy:lm: 45 % of the text are rows of the tasks asked in chat turns, 15 %"
        " conversations. "
    ),
    "lm-large": "It goes on from toy:lm with two layers more, which begin as the identity. ",
    "encoder": "A fifth of a document's tokens is hidden, or the whole of a short completion.",
    "seq2seq": (
        "Prompts are read and completions said; of a fifth of the documents, hidden spans are restored"
        " (`<extra_id_0>` to 31)."
    ),
}

WEIGHED = (
    "Windows of 512 tokens of whole documents; a token of what is asked counts a fifth in the loss of one"
    " that is said."
)

SPLITS = ("validation", "test", "ood", "new_test")
WHAT = {
    "arithmetic/ood": "four-digit sums",
    "arithmetic/new_test": "products",
    "chat/ood": "conversations of three or four questions",
    "chat/new_test": 'ending every answer with "Over."',
    "chat/instruct_test": "rows of other tasks asked in chat",
    "code/ood": "functions of four operations",
    "code/new_test": "functions without their loop",
    "entailment/ood": "three comparisons in a row",
    "entities/ood": "names in other sentences",
    "language/ood": "Zorian with unseen pairs of adjective and noun",
    "language/new_test": "the language Velmi",
    "long/ood": "longer counting",
    "long/new_test": "counting from both ends",
    "multilabel/ood": "four labels",
    "paraphrase/ood": "both changes at once",
    "people/ood": "questions about people it was only told about",
    "people/new_test": "facts about the held-back people (chance is 1 to 7 %)",
    "refusal/ood": "requests in other words",
    "sentiment/ood": "reviews in other words",
    "sql/ood": "two conditions",
    "sql/new_test": "what is left out",
    "stream/ood": "the first tasks in other words",
    "style/ood": "styles with unseen pairs of person and deed",
    "style/new_test": "the style pirate",
    "tools/ood": "calls asked in other words",
    "tools/new_test": "a tool it never saw",
    "topic/ood": "texts in other words",
    "word_problems/ood": "stories of four steps",
}


def card(name: str, model, rounds: list[dict], numbers: dict[str, dict[str, float]], rows: int) -> str:
    """The README of a model measured on so many rows as {"task/split": {kind or "all": share right}}."""
    config = model.config
    what, task, decoding = WHAT_IT_IS[config.model_type]
    layers, layers_of_decoder = config.num_hidden_layers, getattr(config, "num_decoder_layers", 0)
    return CARD.format(
        name=name,
        what=what,
        task=task,
        decoding=decoding,
        how=HOW.get(name, "") + (WEIGHED if config.model_type == "llama" else ""),
        shape=(
            f"{config.model_type.capitalize()}, {layers}{f' + {layers_of_decoder}' * bool(layers_of_decoder)}"
            f" layers of width {config.hidden_size}"
        ),
        parameters=model.num_parameters() / 1e6,
        commands="\n".join(_commands(name, rounds)),
        steps=sum(part["steps"] for part in rounds),
        tokens=sum(part["tokens"] for part in rounds) / 1e6,
        minutes=sum(part["took_minutes"] for part in rounds),
        loss=rounds[-1]["loss"],
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        rows=rows,
        table=_table(numbers),
        kinds=_kinds(numbers),
        asked=", ".join(
            f"{kind} {_percent(share)}" for kind, share in sorted(numbers["chat/instruct_test"].items())
        ),
        weak=_weak(numbers),
    )


def _commands(name: str, rounds: list[dict]) -> list[str]:
    """What to type to make the model again: one command a round, each in the folder the last one wrote."""
    commands = []
    for i, part in enumerate(rounds):
        start = f" --start toy-{name}" if i else ""
        options = f"--seed {part['seed']} --minutes {part['minutes']:g} --steps {part['steps']}"
        commands.append(f"    python -m luthier.toy.make --model {name} {options}{start}")
    return commands


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(numbers: dict[str, dict[str, float]]) -> str:
    """Exact match by task and split."""
    lines = []
    for task in dict.fromkeys(key.split("/")[0] for key in numbers):
        by_split = [numbers.get(f"{task}/{split}") for split in SPLITS]
        cells = [_percent(by_kind["all"]) if by_kind else "" for by_kind in by_split]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kinds(numbers: dict[str, dict[str, float]]) -> str:
    """Exact match by kind of row, of the tasks whose test split mixes several."""
    several = {key.split("/")[0]: by_kind for key, by_kind in numbers.items() if key.endswith("/test")}
    return "; ".join(
        f"{task}: " + ", ".join(f"{kind} {_percent(by_kind[kind])}" for kind in find(task).SPLITS["test"])
        for task, by_kind in several.items()
        if len(by_kind) > 2
    )


def _weak(numbers: dict[str, dict[str, float]]) -> str:
    """What is below 80 percent, in words."""
    weak = [
        f"- {WHAT.get(key, key + ', in distribution')}: {_percent(by_kind['all'])} (`toy:{key}`)"
        for key, by_kind in numbers.items()
        if by_kind["all"] < 0.8 and not key.endswith("/validation")
    ]
    return "\n".join(weak)
