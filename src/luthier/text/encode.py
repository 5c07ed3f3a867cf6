"""Rows to token ids and back: the one renderer of training, sampling and serving.

What a model is trained on is what it is asked with later: a conversation goes through the tokenizer's own
chat template, turn by turn (turns.py). Which tokens are supervised is marked by place, never by token id: an
end-of-sequence token that also pads is supervised all the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.methods.formats._base import BadRow, as_turns
from luthier.text.advice import advice
from luthier.text.cache import EncodingCache, row_key
from luthier.text.chat import Chat, other_forms
from luthier.text.encoded import Encoded, EncodedAll
from luthier.text.served import served_reply
from luthier.text.templates import set_chat_template
from luthier.text.tokens import added_tokens, tokenize, tokenize_all, tokenize_marked, tokenize_with_offsets
from luthier.text.turns import REWRITES, Rewrites, Span, is_supervised, supervised_spans
from luthier.text.verify import Lost, check_media, check_rendered, check_tools

BATCH = 1024  # texts in one call of the tokenizer
NO_PREFIX = (
    "encoder-decoder models have no generation prefix: the encoder reads the prompt, the decoder"
    " only the reply"
)
NO_START = "the prompt is empty, and the tokenizer adds no BOS token"
PROBE_PROMPT = [{"role": "user", "content": "Hi"}]
PROBE_CALL = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {"a": 1}}}
COUNTERS = ("cut", "pieces", "turns", "boundary_mismatches")


class Renderer:
    """Encodes rows with a tokenizer and its chat template.

    max_length: tokens of prompt and completion together (of each of them with `encoder`); what is over is
    cut. chat_template: "plain", "chatml", a .jinja file or template text; it is set on the tokenizer, and so
    saved with it. A tokenizer without a template gets "plain"; `note` says so. encoder: the prompt is for an
    encoder: it keeps all special tokens, and the completion does not continue it. chat_template_kwargs:
    handed to the template with every row. split_special_tokens: special tokens that others than the assistant
    typed are read as text. today: the date (2026-12-31) that a template prints as today's.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        chat_template: str | None = None,
        *,
        encoder: bool = False,
        cache_tokens: int = 20_000_000,
        chat_template_kwargs: dict[str, Any] | None = None,
        split_special_tokens: bool = True,
        today: str | None = None,
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
        starts_with_bos = self.prefix[:1] == [tokenizer.bos_token_id]
        self.note = set_chat_template(tokenizer, chat_template, starts_with_bos)
        self.chat = Chat(tokenizer, chat_template_kwargs, today, split_special_tokens)
        self.vocabulary: int | None = None  # rows of the embedding, where the tokenizer has more tokens
        self.stops: list[int] = []  # further tokens at which the model's own settings end generation
        self.advice: dict[str, str] = {}  # what to do about rows that cannot be used: by reason
        # Where the template opens every reply with <think>, replies without reasoning get an empty one: once
        # a row could not be used otherwise. None: they never do.
        self.empty_thoughts: bool | None = False
        self.typed = ""  # the first row with special tokens in the messages of others than the assistant
        self.typed_rows = 0

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
            self.check_media(row)
            ids = self.encode_structured({**row, "completions": []}).prompt
            if not ids:
                raise BadRow(NO_START)
            self.check_vocabulary(Encoded(ids, [], []))
            self.cache.store(key, Encoded(ids, [], []))
        return self.cache.load(key).prompt

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """Token ids as text. special: with special tokens, as `<eos>` and the like."""
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def answer(self, ids: Sequence[int]) -> str:
        """A sampled reply as text, without what the template writes before the text of every reply with
        special tokens, such as the name of a channel.
        """
        ids, opening = list(ids), self.reply_opening
        size = len(opening)
        if size:
            for start in range(len(ids) - size, -1, -1):
                if ids[start : start + size] == opening:
                    return self.text(ids[start + size :])
        return self.text(ids)

    @cached_property
    def reply_opening(self) -> list[int]:
        """The tokens between the generation prompt and a reply's text, where special tokens are among
        them.
        """
        row = {"prompt": PROBE_PROMPT, "completions": [[{"role": "assistant", "content": "Hi"}]]}
        try:
            ids = self.encode_in_form(row).completions[0]
        except BadRow:
            return []
        text = tokenize(self.tokenizer, "Hi")
        for start in range(len(ids)):
            if ids[start : start + len(text)] == text:
                opening = ids[:start]
                return opening if self.special.intersection(opening) else []
        return []

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
        if self.typed_rows:
            as_what = "control tokens (split_special_tokens: true reads them as text)"
            if self.chat.split_special:
                as_what = "text (split_special_tokens: false reads them as control tokens)"
            self.warn(
                f"special tokens in messages that are not the assistant's are read as {as_what};"
                f" rows: {self.typed_rows:,}, first: {self.typed}"
            )
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
            for i, ids in zip(batch, self.tokenize_texts(texts), strict=True):
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
        ids = dict(zip(texts, self.tokenize_texts(list(texts)), strict=True))
        outcomes: dict[bytes, Encoded | BadRow] = {}
        for key, row in new.items():
            try:
                self.check_media(row)
                encoded = self.encode_plain(row, ids) if key in plain else self.encode_structured(row)
                outcomes[key] = self.check(encoded)
            except Lost as why:
                outcomes[key] = self.with_advice(why, row)
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

    def tokenize_texts(self, texts: list[str]) -> list[list[int] | BadRow]:
        """Token ids of texts, with what the tokenizer adds; a BOS token that a text begins with is not added
        once more.
        """
        encodings = tokenize_all(self.tokenizer, texts, special=True)
        bos, size = self.tokenizer.bos_token_id, len(self.prefix)
        if bos is None or bos not in self.prefix:
            return encodings
        for i, ids in enumerate(encodings):
            if not isinstance(ids, BadRow) and ids[size : size + 1] == [bos]:
                encodings[i] = ids[size:]
        return encodings

    def tokenize_text(self, text: str) -> list[int]:
        """As `tokenize_texts`, of one text. Raises BadRow."""
        ids = self.tokenize_texts([text])[0]
        if isinstance(ids, BadRow):
            raise ids
        return ids

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
        """A row with turns, or with completions that are token ids already (rollouts, pieces of a text).

        The turns are handed to the template in one form after another until all of the row is in what it
        writes; the form that did it is the first to be tried for the next row. Raises BadRow, with advice,
        where no form does it.
        """
        if not has_turns(row):
            return self.encode_in_form(row)
        self.chat.typed = {}
        encoded = self.encode_in_some_form(row)
        if self.chat.typed:
            self.typed_rows += 1
            self.typed = self.typed or f"{' and '.join(self.chat.typed)} in {row.get('id', 'a prompt')}"
        return encoded

    def encode_in_some_form(self, row: dict) -> Encoded:
        """As `encode_structured`, of a row with turns."""
        problems: list[BadRow] = []
        encoded = self.try_forms(row, problems)
        if encoded is not None:
            return encoded
        # what is lost says more than what a form that the template does not take made it raise
        problem = next((why for why in problems if isinstance(why, Lost)), problems[0])
        advised = self.with_advice(problem, row)
        if self.empty_thoughts is not False or "chat_template_kwargs" in str(advised):
            raise advised
        if not self.opens_thoughts(row):
            raise advised
        self.empty_thoughts = True
        encoded = self.try_forms(row, problems)
        if encoded is None:
            self.empty_thoughts = False
            raise advised
        self.warn(
            "the chat template opens every reply with <think>: replies without reasoning are learned with an"
            " empty one"
        )
        return encoded

    def try_forms(self, row: dict, problems: list[BadRow]) -> Encoded | None:
        """A row in the first form that loses nothing, which `self.chat` then keeps; None where no form does,
        and why not in `problems`. Raises Rewrites.
        """
        former = self.chat.form
        try:
            return self.encode_in_form(row)
        except Rewrites:
            raise
        except BadRow as why:
            problems.append(why)
        for form in other_forms(row, former):
            self.chat.form = form
            try:
                return self.encode_in_form(row)
            except Rewrites:
                raise
            except BadRow as why:
                problems.append(why)
        self.chat.form = former
        return None

    def opens_thoughts(self, row: dict) -> bool:
        """Whether the template asks for a reply with the beginning of its reasoning."""
        former = self.chat.form
        opening = ""
        for form in (former, *other_forms(row, former)):
            self.chat.form = form
            try:
                opening = self.chat.render(row, row["prompt"], add_generation_prompt=True)
            except BadRow:
                continue
            break
        self.chat.form = former
        return opening.rstrip().endswith("<think>")

    def with_advice(self, problem: BadRow, row: dict) -> BadRow:
        """A problem with what to do about it; looked for once for each."""
        reason = str(problem)
        if reason not in self.advice:
            self.advice[reason] = advice(self, problem, row)
        return BadRow("; ".join(filter(None, (reason, self.advice[reason]))))

    def encode_in_form(self, row: dict) -> Encoded:
        """As `encode_structured`, in the form that `self.chat` has."""
        prompt, opening = self.encode_prompt(row)
        if opening and not row.get("completions"):
            check_rendered(row, row["prompt"], len(row["prompt"]), opening, [])
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
                encodings = dict(zip(texts, self.tokenize_texts(texts), strict=True))
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
            return self.without_suffix(self.tokenize_text(prompt_text(row))), ""
        if not row["prompt"]:  # whole conversations to train on
            return [], ""
        opening = self.chat.render(row, row["prompt"], add_generation_prompt=True)
        if row.get("prefix"):
            opening = self.begun_opening(row, opening)
        text = opening + row.get("prefix", "")
        if self.encoder:
            return self.tokenize_text(text), opening
        return self.token_ids(row, text), opening

    def check_media(self, row: dict) -> None:
        """Raise Lost where a row has what this network cannot read."""
        check_media(row)

    def token_ids(self, row: dict, text: str) -> list[int]:
        """Token ids of a row's rendered turns. Raises BadRow."""
        return tokenize_marked(self.tokenizer, text)

    def token_ids_with_offsets(
        self, row: dict, text: str, cuts: Collection[int], apart: bool = False
    ) -> tuple[list[int], list[Span]]:
        """As `tokenize_with_offsets`, of a row's rendered turns."""
        return tokenize_with_offsets(self.tokenizer, text, cuts, apart)

    def words(self, ids: list[int]) -> list[int]:
        """Those of a row's token ids that the network may say."""
        return ids

    def any_answer(self, row: dict) -> Any:
        """Something that can stand for a row's answer while there is none: the end of its prompt."""
        return self.words(self.prompt(row))[-8:]

    def begun_opening(self, row: dict, opening: str) -> str:
        """What stands before a reply that has begun, as the template writes it; `opening`, what it asks with,
        where the reply follows that.
        """
        begun = row["prefix"]
        try:
            whole = self.chat.render(row, [*row["prompt"], {"role": "assistant", "content": begun}])
        except BadRow:
            return opening
        place = whole.rfind(begun.strip())
        if place < 0 or whole.startswith((opening + begun).rstrip()):
            return opening
        return whole[:place]

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
        whole, spans = self.render_reply(row, turns, first, opening)
        if self.encoder:
            return self.encode_decoder_reply(whole, spans)
        if not whole.startswith(head):
            raise Rewrites(REWRITES)
        spans = [(max(start, len(head)), stop) for start, stop in spans]
        bounds = {len(head)}
        for span in spans:
            bounds.update(span)
        ids, offsets = self.token_ids_with_offsets(row, whole, bounds)
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
            ids, offsets = self.token_ids_with_offsets(row, whole, cuts, apart=True)
        scales = [float(turn.get("loss_scale", 1)) for turn in turns[first:] if is_supervised(turn)]
        weights = [0.0] * len(ids)
        for span, scale in zip(spans, scales, strict=True):
            for i in self.supervised_tokens(ids, offsets, whole, span, skip):
                weights[i] = scale
        size = len(ids)
        while size > skip and not weights[size - 1]:
            size -= 1
        return ids[skip:size], weights[skip:size]

    def render_reply(self, row: dict, turns: list[dict], first: int, opening: str) -> tuple[str, list[Span]]:
        """(the rendered conversation, the span of each supervised turn), verified. Where the template writes
        a last reply otherwise than it asks for one, the reply stands after what it asks with. Raises
        Rewrites where the turns must be learned one by one, BadRow where the row cannot be used.
        """
        whole = self.chat.render(row, turns)
        try:
            spans = supervised_spans(self.chat, row, turns, first, opening, whole)
            check_rendered(row, turns, first, whole, spans)
            return whole, spans
        except BadRow as why:
            served = None
            if opening:
                served = served_reply(self.chat, row, turns, first, opening, bool(self.empty_thoughts))
            if served is None:
                if sum(map(is_supervised, turns[first:])) > 1 and not isinstance(why, Rewrites):
                    raise Rewrites(str(why)) from None
                check_tools(row, opening or whole)
                raise
        check_rendered(row, turns, first, *served)
        return served

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
        self.check_vocabulary(encoded)
        return encoded

    def check_vocabulary(self, encoded: Encoded) -> None:
        """Raise BadRow where a token has no row in the model's embedding."""
        if self.vocabulary is None:
            return
        for ids in (encoded.prompt, *encoded.completions):
            largest = max(ids, default=0)
            if largest >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                raise BadRow(
                    f"the tokenizer has {len(self.tokenizer):,} tokens and the model's embedding"
                    f" {self.vocabulary:,} rows: token {token} (id {largest}) has none; resize the model's"
                    " embedding, or use the tokenizer that belongs to the model"
                )

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
        candidates = [self.end]
        for reply in ({"content": "Hi"}, {"content": "", "tool_calls": [PROBE_CALL]}):
            turn = {"role": "assistant", **reply}
            probe = {"prompt": PROBE_PROMPT, "completions": [[turn]]}
            try:
                candidates.append(self.encode_in_form(probe).completions[0][-1])
            except BadRow:
                pass  # a template that refuses the probe
        ends = [i for i in candidates if i is not None and i in self.special]
        return list(dict.fromkeys([*ends, *self.stops]))

    @cached_property
    def mask_id(self) -> int | None:
        """A token that may stand in the place of hidden ones: the tokenizer's mask token, else its padding
        token where that ends no turn, else a special token that the chat template never writes. None: there
        is none.
        """
        tokenizer = self.tokenizer
        used = {*self.stop_ids, self.end, tokenizer.bos_token_id, tokenizer.eos_token_id}
        for token in (tokenizer.mask_token_id, tokenizer.pad_token_id):
            if token is not None and token not in used:
                return token
        template = str(tokenizer.chat_template or "")
        for token in sorted(self.special - used, reverse=True):
            if tokenizer.convert_ids_to_tokens(token) not in template:
                return token
        return None

    def save(self, folder: Path) -> None:
        """What turns rows into tokens, as transformers reads it."""
        self.tokenizer.save_pretrained(folder)

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


def has_turns(row: dict) -> bool:
    """Whether a row goes through the chat template."""
    return not isinstance(row["prompt"], str)


def is_text(row: dict) -> bool:
    """Whether a row is one text to continue, with nothing before it."""
    completions = row.get("completions", [])
    if row["prompt"] != "" or row.get("prefix"):
        return False
    return len(completions) == 1 and isinstance(completions[0], str)


def prompt_text(row: dict) -> str:
    """A prompt of plain text, and what all its completions begin with."""
    return row["prompt"] + row.get("prefix", "")
