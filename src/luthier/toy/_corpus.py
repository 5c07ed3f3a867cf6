"""Pretraining text of all tasks: documents, the tokenizer trained on them, and packing. Needs no torch.

A document is one row: `<|start|>` prompt completion `<|end|>`, or a conversation as the chat template renders
it. The tokenizer adds `<|start|>` by itself, so that tuned and served rows begin as pretrained ones did.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .tasks import find, names, rows

START, END, PAD, MASK = "<|start|>", "<|end|>", "<|pad|>", "<|mask|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL_TOKENS = [PAD, START, END, *ROLES.values(), MASK]

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('This model knows no role but system, user and assistant: ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""


def parts(row: dict) -> list[tuple[str, bool]]:
    """A row as pretraining text, without the start token, in parts: (text, is it what the model
    should say).
    """
    if "messages" in row:  # what the chat template renders
        turns = [
            (ROLES[turn["role"]], turn["content"] + END, turn["role"] == "assistant")
            for turn in row["messages"]
        ]
        return [part for role, content, spoken in turns for part in ((role, False), (content, spoken))]
    return [(row["prompt"], False), (row["completion"] + END, True)]


def document(row: dict) -> str:
    """A row as pretraining text, without the start token."""
    return "".join(text for text, _ in parts(row))


def train_tokenizer(vocabulary: int = 1536, rows_per_task: int = 3000, seed: int = 0) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own (sums are learned digit by digit)."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain_texts(rows_per_task, seed), trainer)
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{START} $A", pair=f"{START} $A $B:1", special_tokens=[(START, start)]
            ),
        ]
    )
    return tokenizer


def _plain_texts(rows_per_task: int, seed: int) -> Iterator[str]:
    for task in names():
        for row in rows(task, "train", rows_per_task, f"tokenizer/{seed}"):
            if "messages" in row:
                yield from (turn["content"] for turn in row["messages"])
            else:
                yield row["prompt"] + row["completion"]


# of what toy:chat reads; the rest is what every model reads
CHAT_SHARES = {"chat/instruct": 0.45, "chat/train": 0.15}


def corpus(
    tokenizer_file: Path,
    tokens: int,
    length: int,
    seed: int,
    shares: dict[str, float] | None = None,
    processes: int = 2,
) -> np.ndarray:
    """About `tokens` tokens of whole documents in windows [windows, length + 1], in random order.

    A token t of what is asked, not said, is written ~t: prompts are mostly chance, and count less in the
    loss. shares: of "task/split" in the text; what they leave is the train splits of all tasks by their own
    shares.
    """
    parts = max(1, round(tokens / 1_000_000))
    jobs = [(str(tokenizer_file), tokens // parts, length, f"{seed}/{part}", shares) for part in range(parts)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        windows = np.concatenate(list(pool.map(_part, *zip(*jobs, strict=True))))
    return windows[np.random.default_rng(seed).permutation(len(windows))]


def documents(tokenizer_file: Path, tokens: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """About `tokens` tokens as (prompt with the start token, completion with the end token), in
    random order.
    """
    tokenizer, pairs = Tokenizer.from_file(str(tokenizer_file)), []
    for task in names():
        count = round(tokens * find(task).SHARE / _mean_length(str(tokenizer_file), f"{task}/train"))
        both = [halves(row) for row in rows(task, "train", count, f"{seed}/0")]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in both])
        completions = tokenizer.encode_batch([completion for _, completion in both], add_special_tokens=False)
        pairs += [(p.ids, c.ids) for p, c in zip(prompts, completions, strict=True)]
    Random(f"shuffle/{seed}").shuffle(pairs)
    return pairs


def halves(row: dict) -> tuple[str, str]:
    """A document as what is asked and what is answered; of a conversation the last turn is the answer."""
    if "messages" not in row:
        return row["prompt"], row["completion"] + END
    *before, last = row["messages"]
    return document({"messages": before}) + ROLES["assistant"], last["content"] + END


def _part(
    tokenizer_file: str, tokens: int, length: int, seed: str, shares: dict[str, float] | None
) -> np.ndarray:
    tokenizer = Tokenizer.from_file(tokenizer_file)
    pad = tokenizer.get_vocab()[PAD]
    rest = 1 - sum((shares or {}).values())
    documents: list[list[int]] = []
    for place, share in {**{f"{w}/train": rest * find(w).SHARE for w in names()}, **(shares or {})}.items():
        count = round(tokens * share / _mean_length(tokenizer_file, place))
        task, split = place.split("/")
        drawn = [parts(row) for row in rows(task, split, count, seed)]
        read = tokenizer.encode_batch(["".join(text for text, _ in row) for row in drawn])
        documents += [_marked(encoding, row) for encoding, row in zip(read, drawn, strict=True)]
    Random(f"shuffle/{seed}").shuffle(documents)
    return np.array(list(_pack(documents, length + 1, pad)), dtype=np.int16)


def _marked(encoding: Encoding, row: list[tuple[str, bool]]) -> list[int]:
    """The ids of a row, ~id where the token begins in a part that is not said (the start token is not)."""
    learned = np.repeat([learned for _, learned in row], [len(text) for text, _ in row])
    return [t if learned[begin] else ~t for t, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True)]


@cache
def _mean_length(tokenizer_file: str, place: str) -> float:
    tokenizer = Tokenizer.from_file(tokenizer_file)
    task, split = place.split("/")
    texts = [document(row) for row in rows(task, split, 500, "length")]
    return float(np.mean([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]))


def _pack(documents: list[list[int]], length: int, pad: int) -> Iterator[list[int]]:
    """Whole documents, one after the other; what does not fit opens the next window."""
    window: list[int] = []
    for ids in documents:
        if len(window) + len(ids) > length:
            yield window + [pad] * (length - len(window))
            window = []
        window = window + ids[:length]
    yield window + [pad] * (length - len(window))
