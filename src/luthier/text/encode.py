"""Rows to token ids and back: the one renderer of training, sampling and serving.

What a model is trained on is what it is asked with later: a conversation goes through the tokenizer's own
chat template, turn by turn (turns.py). Which tokens are supervised is marked by place, never by token id: an
end-of-sequence token that also pads is supervised all the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from luthier.methods.formats._base import BadRow, as_turns
from luthier.text.cache import EncodingCache, row_key
from luthier.text.encoded import Encoded, EncodedAll
from luthier.text.templates import render_turns, set_chat_template
from luthier.text.tokens import added_tokens, tokenize, tokenize_all, tokenize_with_offsets
from luthier.text.turns import REWRITES, Rewrites, Span, is_supervised, supervised_spans

BATCH = 1024  # texts in one call of the tokenizer
NO_PREFIX = (
    "encoder-decoder models have no generation prefix: the encoder reads the prompt, the decoder"
    " only the reply"
)
NO_START = "the prompt is empty, and the tokenizer adds no BOS token"
COUNTERS = ("cut", "pieces", "turns", "boundary_mismatches")


class Renderer:
    """Encodes rows with a tokenizer and its chat template.

    max_length: tokens of prompt and completion together (of each of them with `encoder`); what is over is
    cut. chat_template: "plain", "chatml", a .jinja file or template text; it is set on the tokenizer, and so
    saved with it. A tokenizer without a template gets "plain"; `note` says so. encoder: the prompt is for an
    encoder: it keeps all special tokens, and the completion does not continue it.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        chat_template: str | None = None,
        *,
        encoder: bool = False,
        cache_tokens: int = 20_000_000,
    ):
        self.tokenizer, self.max_length, self.encoder = tokenizer, max_length, encoder
        self.cut = self.boundary_mismatches = self.pieces = self.turns = 0
        self.warnings: list[str] = []
        self.cache = EncodingCache(cache_tokens)
        self.prefix, self.suffix = added_tokens(tokenizer)
        self.special = set(tokenizer.all_special_ids)
        for i, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                self.special.add(i)
        self.end = tokenizer.eos_token_id
        if self.end is None:
            self.end = tokenizer.sep_token_id
        self.note = set_chat_template(tokenizer, chat_template, self.prefix[:1] == [tokenizer.bos_token_id])

    # ------------------------------------------------------------------------------------------ rows

    def encode(self, row: dict) -> Encoded:
        """A row's token ids. Raises BadRow where there is nothing to train on, or no room for it."""
        key = row_key("row", row)
        if key in self.cache:  # as in training, where `encode_all` has been over all rows
            return self.cache.load(key)
        encoded = self.encode_batch([row])[0]
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def prompt(self, row: dict) -> list[int]:
        """What generation starts from: the row's prompt, through the chat template where it is turns."""
        key = row_key("prompt", row)
        if key not in self.cache:
            ids, _ = self.encode_prompt(row)
            if not ids:
                raise BadRow(NO_START)
            self.cache.store(key, Encoded(ids, [], []))
        return self.cache.load(key).prompt

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """Token ids as text. special: with special tokens, as `<eos>` and the like."""
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def decode_marked(self, row: dict, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """For people: the prompt, then each completion with its supervised parts between marks, special
        tokens and all.
        """
        encoded = self.encode(row)
        completions = []
        for ids, supervised in zip(encoded.completions, encoded.supervised, strict=True):
            parts = []
            start = 0
            for stop in range(1, len(ids) + 1):
                if stop < len(ids) and supervised[stop] == supervised[start]:
                    continue
                # A difference of two decodings: some tokenizers drop the space that a part begins with.
                before = self.text(encoded.prompt + ids[:start], special=True)
                part = self.text(encoded.prompt + ids[:stop], special=True)[len(before) :]
                if supervised[start]:
                    part = f"{marks[0]}{part}{marks[1]}"
                parts.append(part)
                start = stop
            completions.append("".join(parts))
        return self.text(encoded.prompt, special=True) + "\n---\n".join(completions)

    def encode_all(self, rows: list[dict]) -> EncodedAll:
        """Encode many rows in batches; long texts are cut into pieces, and what cannot be used is set aside.

        Where the chat template rewrites earlier turns, a conversation becomes one row for each turn to train
        on (ids x@1, x@2, ...), each with the context as it will be served.
        """
        good: list[dict] = []
        bad: list[dict] = []
        before = {name: getattr(self, name) for name in COUNTERS}
        tokens = supervised = longest = 0
        queue = self.split_long(rows)
        while queue:
            by_turn: list[dict] = []
            for start in range(0, len(queue), BATCH):
                batch = queue[start : start + BATCH]
                for row, encoded in zip(batch, self.encode_batch(batch), strict=True):
                    if isinstance(encoded, Rewrites) and (turns := self.split_by_turn(row)):
                        by_turn += turns
                    elif isinstance(encoded, BadRow):
                        raw = json.dumps(row, ensure_ascii=False, default=repr)[:500]
                        bad.append({"where": row.get("id", ""), "reason": str(encoded), "raw": raw})
                    else:
                        weights = encoded.weights()
                        if weights is not None and "token_weights" not in row:
                            row = {**row, "token_weights": weights}
                        good.append(row)
                        tokens += len(encoded.prompt) + sum(map(len, encoded.completions))
                        supervised += sum(map(sum, encoded.supervised))
                        longest = max(longest, len(encoded))
            queue = by_turn
        stats = {
            "rows": len(good),
            "tokens": tokens,
            "supervised": supervised,
            "supervised_share": supervised / max(tokens, 1),
            "longest": longest,
        }
        for name in COUNTERS:
            stats[name] = getattr(self, name) - before[name]
        return EncodedAll(good, bad, stats)

    def split_long(self, rows: list[dict]) -> list[dict]:
        """Texts over max_length in consecutive pieces, as token ids (x#0, x#1, ...); every token is trained
        on once.
        """
        if not self.max_length or self.encoder:
            return rows
        # A tokenizer makes at most a token of each byte, so short texts need no look.
        long: list[int] = []
        for i, row in enumerate(rows):
            if is_text(row) and len(row["completions"][0].encode("utf-8", "replace")) + 2 > self.max_length:
                long.append(i)
        if not long:
            return rows
        pieces: dict[int, list[dict]] = {}
        for start in range(0, len(long), BATCH):
            batch = long[start : start + BATCH]
            texts = [rows[i]["completions"][0] for i in batch]
            for i, ids in zip(batch, tokenize_all(self.tokenizer, texts, special=True), strict=True):
                if not isinstance(ids, BadRow):  # a bad one is reported when it is encoded
                    pieces[i] = self.pieces_of(rows[i], ids, str(i))
        split: list[dict] = []
        for i, row in enumerate(rows):
            split += pieces.get(i, [row])
        return split

    def pieces_of(self, row: dict, ids: list[int], position: str) -> list[dict]:
        """A text in pieces of max_length tokens; the row itself where it is short enough."""
        ids = self.ended(self.without_suffix(ids)[len(self.prefix) :])
        most = self.max_length or 0
        if len(self.prefix) + len(ids) <= most:
            return [row]
        # With nothing in front, a piece begins with the last token of the one before: it is the prompt, and
        # not supervised.
        overlap = 0 if self.prefix else 1
        step = max(most - max(len(self.prefix), overlap), 1)
        pieces = []
        for k, start in enumerate(range(0, len(ids) - overlap, step)):
            part = ids[start : start + step + overlap]
            pieces.append({**row, "id": f"{row.get('id', position)}#{k}", "completions": [part]})
        self.pieces += len(pieces)
        return pieces

    def split_by_turn(self, row: dict) -> list[dict]:
        """A conversation as one row a supervised turn; none where there are completions to compare."""
        if len(row["completions"]) != 1:
            return []
        turns, first = row["prompt"] + row["completions"][0], len(row["prompt"])
        positions = [i for i in range(first, len(turns)) if is_supervised(turns[i])]
        if positions == [first]:
            return []
        rows = []
        for k, i in enumerate(positions, 1):
            name = f"{row.get('id', '')}@{k}"
            rows.append({**row, "id": name, "prompt": turns[:i], "completions": [[turns[i]]]})
        self.turns += len(rows)
        return rows

    # ------------------------------------------------------------------------------------------ encoding

    def encode_batch(self, rows: list[dict]) -> list[Encoded | BadRow]:
        """Each row's Encoded, or why there is none. Plain texts go through the tokenizer together."""
        keys = [row_key("row", row) for row in rows]
        new: dict[bytes, dict] = {}
        plain: set[bytes] = set()
        texts: dict[str, None] = {}  # each once
        for key, row in zip(keys, rows, strict=True):
            if key in self.cache or key in new:
                continue
            new[key] = row
            if is_plain(row):
                plain.add(key)
                texts.update(dict.fromkeys(self.texts_of(row)))
        ids = dict(zip(texts, tokenize_all(self.tokenizer, list(texts), special=True), strict=True))
        outcomes: dict[bytes, Encoded | BadRow] = {}
        for key, row in new.items():
            try:
                encoded = self.encode_plain(row, ids) if key in plain else self.encode_structured(row)
                outcomes[key] = self.check(encoded)
            except BadRow as why:
                outcomes[key] = why
        results = []
        for key in keys:
            if key in outcomes:
                results.append(outcomes[key])
            else:
                results.append(self.cache.load(key))
        for key, encoded in outcomes.items():
            if isinstance(encoded, Encoded):
                self.cache.store(key, encoded)
        return results

    def texts_of(self, row: dict) -> list[str]:
        """The texts of a plain row that are encoded whole: the prompt, alone and with each completion."""
        start = prompt_text(row)
        texts = [start]
        if not self.encoder:
            for completion in row.get("completions", []):
                texts.append(start + completion)
        return texts

    def without_suffix(self, ids: list[int]) -> list[int]:
        """Ids without what the tokenizer adds at the end: a prompt goes on. An encoder's prompt does not."""
        n = len(self.suffix)
        if n and not self.encoder and ids[-n:] == self.suffix:
            return ids[:-n]
        return ids

    def ended(self, ids: list[int]) -> list[int]:
        """Ids that end with the end-of-sequence token exactly once."""
        if self.end is None:
            return ids
        n = len(ids)
        while n and ids[n - 1] == self.end:
            n -= 1
        return [*ids[:n], self.end]

    def encode_plain(self, row: dict, ids: dict[str, list[int] | BadRow]) -> Encoded:
        """A row of plain texts, whose token ids are in `ids`. The completion is the joint encoding's rest
        where the prompt is its beginning.
        """
        texts = self.texts_of(row)
        encodings: list[list[int]] = []
        for text in texts:
            encoding = ids[text]
            if isinstance(encoding, BadRow):
                raise encoding
            encodings.append(encoding)
        if self.encoder and texts[0] != row["prompt"]:
            raise BadRow(NO_PREFIX)
        prompt = self.without_suffix(encodings[0])
        completions = []
        supervised = []
        for k, text in enumerate(row.get("completions", []), 1):
            joint = [] if self.encoder else self.without_suffix(encodings[k])
            if len(joint) > len(prompt) and joint[: len(prompt)] == prompt:
                completion = joint[len(prompt) :]
            else:
                completion = tokenize(self.tokenizer, text)
                self.boundary_mismatches += not self.encoder
            if not completion:
                raise BadRow("a completion is empty after tokenization")
            completion = self.ended(completion)
            completions.append(completion)
            supervised.append([True] * len(completion))
        return Encoded(prompt, completions, supervised)

    def encode_structured(self, row: dict) -> Encoded:
        """A row with turns, or with completions that are token ids already (rollouts, pieces of a text)."""
        prompt, opening = self.encode_prompt(row)
        completions: list[list[int]] = []
        supervised: list[list[bool]] = []
        scales: list[list[float]] = []
        weighted = False
        for completion in row.get("completions", []):
            if is_ids(completion):
                ids = list(completion)
                scale = [1.0] * len(ids)
            elif isinstance(row["prompt"], str) and isinstance(completion, str):
                single = {**row, "completions": [completion]}
                texts = self.texts_of(single)
                encodings = dict(zip(texts, tokenize_all(self.tokenizer, texts, special=True), strict=True))
                ids = self.encode_plain(single, encodings).completions[0]
                scale = [1.0] * len(ids)
            elif isinstance(row["prompt"], str):
                raise BadRow("the prompt is text, but a completion is a list of messages")
            else:
                ids, scale = self.encode_reply(row, prompt, opening, as_turns(completion))
            completions.append(ids)
            scales.append(scale)
            supervised.append([value > 0 for value in scale])
            weighted = weighted or any(value not in (0, 1) for value in scale)
        return Encoded(prompt, completions, supervised, scales if weighted else None)

    def encode_prompt(self, row: dict) -> tuple[list[int], str]:
        """(the ids of a row's prompt with what all completions begin with, its `prefix`; the prompt's turns
        as the template opens the reply to them).
        """
        if row.get("prefix") and self.encoder:
            raise BadRow(NO_PREFIX)
        if isinstance(row["prompt"], str):
            return self.without_suffix(tokenize(self.tokenizer, prompt_text(row), special=True)), ""
        if not row["prompt"]:  # whole conversations to train on
            return [], ""
        opening = render_turns(self.tokenizer, row, row["prompt"], add_generation_prompt=True)
        ids = tokenize(self.tokenizer, opening + row.get("prefix", ""), special=self.encoder)
        return ids, opening

    def encode_reply(
        self, row: dict, prompt: list[int], opening: str, completion: list[dict]
    ) -> tuple[list[int], list[float]]:
        """(ids, how much each counts) of the turns after the prompt: by default the assistant's turns count,
        with their end of turn, and nothing else. The prefix does not.
        """
        prefix = row.get("prefix", "")
        if prefix:
            reply = {**completion[0], "content": prefix + completion[0]["content"]}
            completion = [reply, *completion[1:]]
        turns, first = row["prompt"] + completion, len(row["prompt"])
        head = opening + prefix if row["prompt"] else ""
        whole = render_turns(self.tokenizer, row, turns)
        spans = supervised_spans(self.tokenizer, row, turns, first, opening, whole)
        if self.encoder:
            return self.encode_decoder_reply(whole, spans)
        if not whole.startswith(head):
            raise Rewrites(REWRITES)
        spans = [(max(start, len(head)), stop) for start, stop in spans]
        bounds = {len(head)}
        for span in spans:
            bounds.update(span)
        ids, offsets = tokenize_with_offsets(self.tokenizer, whole, bounds)
        # Where a token reaches across the beginning of a reply, what comes before it is served otherwise: cut
        # there.
        cuts = set()
        for start, _ in spans:
            if any(a < start < b for a, b in offsets):
                cuts.add(start)
        skip = len(prompt)
        if ids[:skip] != prompt:
            cuts.add(len(head))
        if cuts:
            self.boundary_mismatches += 1
            ids, offsets = tokenize_with_offsets(self.tokenizer, whole, cuts, apart=True)
        scales = [float(turn.get("loss_scale", 1)) for turn in turns[first:] if is_supervised(turn)]
        weights = [0.0] * len(ids)
        for span, scale in zip(spans, scales, strict=True):
            for i in self.supervised_tokens(ids, offsets, whole, span, skip):
                weights[i] = scale
        size = len(ids)
        while size > skip and not weights[size - 1]:
            size -= 1
        return ids[skip:size], weights[skip:size]

    def supervised_tokens(
        self, ids: list[int], offsets: list[Span], whole: str, span: Span, skip: int
    ) -> list[int]:
        """The places from `skip` on of the tokens that begin within a turn's span. What follows the special
        token that closes the turn (a line break) is left out: it is never sampled.
        """
        start, stop = span
        places = []
        for i in range(skip, len(ids)):
            if start <= offsets[i][0] < stop:
                places.append(i)
        last = -1
        for i in reversed(places):
            if not whole[slice(*offsets[i])].isspace():
                last = i
                break
        if last >= 0 and ids[last] in self.special:
            return [i for i in places if i <= last]
        self.warn(
            "the chat template ends no assistant turn with a special token, so the model does"
            " not learn when to stop"
        )
        return places

    def encode_decoder_reply(self, whole: str, spans: list[Span]) -> tuple[list[int], list[float]]:
        """The one reply that a decoder gives to what the encoder read, ended."""
        if len(spans) != 1:
            raise BadRow("an encoder-decoder trains on exactly one assistant turn per row")
        reply = whole[slice(*spans[0])].strip().removesuffix(self.tokenizer.eos_token or "").strip()
        ids = self.ended(tokenize(self.tokenizer, reply))
        return ids, [1.0] * len(ids)

    def check(self, encoded: Encoded) -> Encoded:
        """An encoded row with something to train on, within max_length. Raises BadRow."""
        if not encoded.prompt and encoded.completions:
            # Nothing comes before the first token, so nothing predicts it: it becomes the prompt.
            first = encoded.completions[0][:1]
            if any(completion[:1] != first for completion in encoded.completions):
                raise BadRow(NO_START)
            encoded.prompt = first
            encoded.keep(1, None)
        if self.max_length:
            self.shorten(encoded, self.max_length)
        if not all(map(any, encoded.supervised)):
            raise BadRow("a completion has no supervised tokens")
        return encoded

    def shorten(self, encoded: Encoded, most: int) -> None:
        """Cut an encoded row to `most` tokens (max_length) at the end of its completions. Raises BadRow where
        that leaves none.
        """
        size = len(encoded.prompt)
        if self.encoder and size > most:
            end = len(self.suffix)
            encoded.prompt = encoded.prompt[: most - end] + encoded.prompt[size - end :]
            self.cut += 1
        room = most if self.encoder else most - size
        if room < 1:
            raise BadRow(
                f"the prompt has {size} tokens, which leaves none for a completion (max_length={most})"
            )
        if any(len(completion) > room for completion in encoded.completions):
            encoded.keep(0, room)
            self.cut += 1

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which generation ends: end of sequence, and end of a turn of the chat template."""
        probe = {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completions": [[{"role": "assistant", "content": "Hi"}]],
        }
        candidates = [self.end]
        try:
            candidates.append(self.encode(probe).completions[0][-1])
        except BadRow:
            pass  # a template that refuses the probe: the end of sequence alone
        return [i for i in dict.fromkeys(candidates) if i is not None and i in self.special]

    def warn(self, message: str) -> None:
        """Warn of something once."""
        if message not in self.warnings:
            self.warnings.append(message)
            warnings.warn(message, stacklevel=3)


# ------------------------------------------------------------------------------------------ shapes of rows


def is_ids(completion: Any) -> bool:
    """Whether a completion is token ids already."""
    return isinstance(completion, (list, tuple)) and bool(completion) and isinstance(completion[0], int)


def is_plain(row: dict) -> bool:
    """Whether a row is plain text throughout."""
    if not isinstance(row["prompt"], str):
        return False
    return all(isinstance(completion, str) for completion in row.get("completions", []))


def is_text(row: dict) -> bool:
    """Whether a row is one text to continue, with nothing before it."""
    completions = row.get("completions", [])
    if row["prompt"] != "" or row.get("prefix"):
        return False
    return len(completions) == 1 and isinstance(completions[0], str)


def prompt_text(row: dict) -> str:
    """A prompt of plain text, and what all its completions begin with."""
    return row["prompt"] + row.get("prefix", "")
