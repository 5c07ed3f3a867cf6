"""Rows to token lists and back: the one renderer of training, sampling and serving.

What a model is trained on is what it is asked with later: a conversation goes through the tokenizer's own
chat template, turn by turn, and a template that writes earlier turns differently once more follow is found
out here. Which tokens are learned is marked by place, never by token id: an end-of-sequence token that also
pads is learned all the same.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, spoken
from luthier.registry import did_you_mean

BATCH = 1024  # texts in one call of the tokenizer
# A turn a line. The reply begins after "Assistant:" and ends with the end-of-sequence token.
PLAIN = """\
{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set said = message.content %}
    {%- else %}{% set said = (message.content or []) | map(attribute='text', default='') | join('') %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:' + (' ' + said if said else '') }}
        {%- for call in message.tool_calls or [] %}
            {{- ' <tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- (eos_token or '') + '\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + said + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# text, tokens it must find
TEMPLATES = {"plain": (PLAIN, ()), "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"))}


class Rewrites(BadRow):
    """The chat template writes a turn differently once others follow."""


@dataclass(slots=True)
class Encoded:
    """A row as token ids."""

    prompt: list[int]  # [P]
    completions: list[list[int]]  # K of [C_k]
    supervised: list[list[bool]]  # K of [C_k]: which tokens of a completion are learned
    # K of [C_k]: how much each counts, where a turn says a `loss_scale` other than 1
    scales: list[list[float]] | None = None

    def weights(self) -> list[list[float]] | None:
        """The scales of the learned tokens alone: the column `token_weights`."""
        if self.scales is None:
            return None
        return [
            [s for s, m in zip(scales, marks, strict=True) if m]
            for scales, marks in zip(self.scales, self.supervised, strict=True)
        ]

    def __len__(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions), default=0)


class EncodedAll(NamedTuple):
    """What became of many rows."""

    rows: list[dict]  # those that can be used; long texts in pieces
    bad: list[dict]  # {"where": id, "reason", "raw"}
    # rows, tokens, supervised, supervised_share, longest, cut, pieces, turns, boundary_mismatches
    stats: dict[str, float]


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
        self.cache: OrderedDict[bytes, tuple] = OrderedDict()
        self.cache_tokens, self.cached = cache_tokens, 0
        self.prefix, self.suffix = added(tokenizer)
        self.special = {*tokenizer.all_special_ids}
        self.special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
        self.note = self.equip(chat_template)

    def equip(self, chat_template: str | None) -> str | None:
        """Give the tokenizer the template asked for, or "plain" where it has none; what was done, in a
        sentence.
        """
        if chat_template is None and self.tokenizer.chat_template:
            return None
        name = chat_template or "plain"
        if name in TEMPLATES:
            text, needed = TEMPLATES[name]
            lacking = [t for t in needed if t not in self.tokenizer.get_vocab()]
            if lacking:
                tokens = " and ".join(lacking)
                raise RecipeError(
                    f"chat_template '{name}' needs {tokens}, which this tokenizer lacks: take 'plain'"
                )
            begins = self.prefix[:1] == [self.tokenizer.bos_token_id]
            self.tokenizer.chat_template = ("{{- bos_token }}" if begins else "") + text
        elif "{" in name:
            self.tokenizer.chat_template = name
        elif Path(name).expanduser().is_file():
            self.tokenizer.chat_template = Path(name).expanduser().read_text(encoding="utf-8")
        else:
            raise RecipeError(
                f"chat_template '{name}' is no built-in one, no file and no template{did_you_mean(name, TEMPLATES)}"
            )
        if chat_template is None:
            return (
                "the tokenizer has no chat template: 'plain' (User: ... Assistant: ...) was set and is saved"
                " with it"
            )
        return f"chat_template '{name[:60]}' was set on the tokenizer and is saved with it"

    # ------------------------------------------------------------------------------------------ rows

    def encode(self, row: dict) -> Encoded:
        """A row's token ids. Raises BadRow where there is nothing to learn, or no room for it."""
        found = self.encode_several([row])[0]
        if isinstance(found, BadRow):
            raise found
        return found

    def prompt(self, row: dict) -> list[int]:
        """What generation starts from: the row's prompt, through the chat template where it is turns."""
        key = digest("prompt", row)
        if key not in self.cache:
            ids, _ = self.asked(row)
            if not ids:
                raise BadRow("the prompt is empty, and the tokenizer begins with no token of its own")
            self.remember(key, Encoded(ids, [], []))
        return self.recall(key).prompt

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_marked(self, row: dict, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """For people: the prompt, then each completion with its learned parts between marks, special tokens
        shown.
        """
        encoded, told = self.encode(row), []
        for ids, learned in zip(encoded.completions, encoded.supervised, strict=True):
            said, start = [], 0
            for stop in range(1, len(ids) + 1):
                if stop == len(ids) or learned[stop] != learned[start]:
                    # A difference of two decodings: some tokenizers drop the space that a part begins with.
                    part = self.shown(encoded.prompt + ids[:stop])[
                        len(self.shown(encoded.prompt + ids[:start])) :
                    ]
                    said.append(f"{marks[0]}{part}{marks[1]}" if learned[start] else part)
                    start = stop
            told.append("".join(said))
        return self.shown(encoded.prompt) + "\n---\n".join(told)

    def shown(self, ids: list[int]) -> str:
        """Token ids as text, special tokens and all."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_all(self, rows: list[dict]) -> EncodedAll:
        """Encode many rows in batches; long texts are cut into pieces, and what cannot be used is set aside.

        Where the chat template rewrites earlier turns, a conversation becomes one row for each turn to learn
        (ids x@1, x@2, ...), each with the context as it will be served.
        """
        good, bad = [], []
        before = self.cut, self.boundary_mismatches, self.pieces, self.turns
        total = supervised = longest = 0
        queue = self.split_long(rows)
        while queue:
            expanded = []
            for start in range(0, len(queue), BATCH):
                part = queue[start : start + BATCH]
                for row, found in zip(part, self.encode_several(part), strict=True):
                    turns = self.by_turn(row) if isinstance(found, Rewrites) else []
                    if turns:
                        expanded += turns
                    elif isinstance(found, BadRow):
                        raw = json.dumps(row, ensure_ascii=False, default=repr)[:500]
                        bad.append({"where": row.get("id", ""), "reason": str(found), "raw": raw})
                    else:
                        weights = found.weights()
                        good.append(
                            row
                            if weights is None or "token_weights" in row
                            else {**row, "token_weights": weights}
                        )
                        total += len(found.prompt) + sum(map(len, found.completions))
                        supervised += sum(map(sum, found.supervised))
                        longest = max(longest, len(found))
            queue = expanded
        now = self.cut, self.boundary_mismatches, self.pieces, self.turns
        cut, mismatches, pieces, turns = (b - a for a, b in zip(before, now, strict=True))
        stats = {
            "rows": len(good),
            "tokens": total,
            "supervised": supervised,
            "supervised_share": supervised / max(total, 1),
            "longest": longest,
            "cut": cut,
            "pieces": pieces,
            "turns": turns,
            "boundary_mismatches": mismatches,
        }
        return EncodedAll(good, bad, stats)

    def split_long(self, rows: list[dict]) -> list[dict]:
        """Texts over max_length in consecutive pieces, as token ids (x#0, x#1, ...); every token is learned
        once.
        """
        if not self.max_length or self.encoder:
            return rows
        # A tokenizer makes at most a token of each byte, so short texts need no look.
        long = [
            i
            for i, row in enumerate(rows)
            if is_text(row) and len(row["completions"][0].encode("utf-8", "replace")) + 2 > self.max_length
        ]
        pieces = {}
        for start in range(0, len(long), BATCH):
            part = long[start : start + BATCH]
            for i, ids in zip(part, self.ids([rows[i]["completions"][0] for i in part], True), strict=True):
                if isinstance(ids, BadRow):
                    continue  # told when it is encoded
                ids = self.ended(self.trimmed(ids)[len(self.prefix) :])
                if len(self.prefix) + len(ids) > self.max_length:
                    # With nothing in front, a piece begins with the last token of the one before: it asks,
                    # unlearned.
                    overlap = 0 if self.prefix else 1
                    step = max(self.max_length - max(len(self.prefix), overlap), 1)
                    parts = [ids[a : a + step + overlap] for a in range(0, len(ids) - overlap, step)]
                    pieces[i] = [
                        {**rows[i], "id": f"{rows[i].get('id', i)}#{k}", "completions": [p]}
                        for k, p in enumerate(parts)
                    ]
                    self.pieces += len(parts)
        return [piece for i, row in enumerate(rows) for piece in pieces.get(i, [row])] if pieces else rows

    def by_turn(self, row: dict) -> list[dict]:
        """A conversation as one row a learned turn; none where there are several completions to compare."""
        if len(row["completions"]) != 1:
            return []
        turns, first = row["prompt"] + row["completions"][0], len(row["prompt"])
        places = [i for i in range(first, len(turns)) if is_learned(turns[i])]
        if len(places) < 2 and places == [first]:
            return []
        self.turns += len(places)
        return [
            {**row, "id": f"{row.get('id', '')}@{k}", "prompt": turns[:i], "completions": [[turns[i]]]}
            for k, i in enumerate(places, 1)
        ]

    # ------------------------------------------------------------------------------------------ encoding

    def encode_several(self, rows: list[dict]) -> list[Encoded | BadRow]:
        """Each row's Encoded, or why there is none. Plain texts go through the tokenizer together."""
        keys = [digest("row", row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.cache}
        texts = {key: row for key, row in new.items() if is_plain(row)}
        wanted = list(dict.fromkeys(t for row in texts.values() for t in self.texts_of(row)))
        ids = dict(zip(wanted, self.ids(wanted, True), strict=True))
        found: dict[bytes, Encoded | BadRow] = {}
        for key, row in new.items():
            try:
                encoded = self.plain(row, ids) if key in texts else self.structured(row)
                found[key] = self.checked(row, encoded)
            except BadRow as why:
                found[key] = why
        told = [found[key] if key in found else self.recall(key) for key in keys]
        for key, encoded in found.items():
            if isinstance(encoded, Encoded):
                self.remember(key, encoded)
        return told

    def texts_of(self, row: dict) -> list[str]:
        """The texts of a plain row that are encoded whole: the prompt, and the prompt with each completion."""
        asked = begun(row)
        joined = [] if self.encoder else [asked + c for c in row.get("completions", [])]
        return [asked, *joined]

    def ids(self, texts: list[str], special: bool) -> list[list[int] | BadRow]:
        """Token ids of texts; a text that the tokenizer refuses does not take the others with it."""
        if not texts:
            return []
        try:
            return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        except (TypeError, ValueError, OverflowError) as why:
            if len(texts) == 1:
                return [BadRow(f"the tokenizer refuses it: {why}")]
            return [self.ids([t], special)[0] for t in texts]

    def one(self, text: str, special: bool = False) -> list[int]:
        """Token ids of one text. Raises BadRow."""
        found = self.ids([text], special)[0]
        if isinstance(found, BadRow):
            raise found
        return found

    def trimmed(self, ids: list[int]) -> list[int]:
        """Ids without what the tokenizer adds at the end: a prompt goes on. An encoder's prompt does not."""
        n = len(self.suffix)
        return ids[:-n] if n and not self.encoder and ids[-n:] == self.suffix else ids

    def ended(self, ids: list[int]) -> list[int]:
        """Ids that end with the end-of-sequence token exactly once."""
        if self.end is None:
            return ids
        n = len(ids)
        while n and ids[n - 1] == self.end:
            n -= 1
        return [*ids[:n], self.end]

    def plain(self, row: dict, ids: dict[str, list[int] | BadRow]) -> Encoded:
        """A row of plain texts. The completion is the joint encoding's rest where the prompt is its
        beginning.
        """
        known: dict[str, list[int]] = {}
        for text in self.texts_of(row):
            found = ids[text]
            if isinstance(found, BadRow):
                raise found
            known[text] = found
        asked = begun(row)
        if asked != row["prompt"] and self.encoder:
            raise BadRow(NO_PREFIX)
        prompt, completions = self.trimmed(known[asked]), []
        for completion in row.get("completions", []):
            joint = [] if self.encoder else self.trimmed(known[asked + completion])
            if len(joint) > len(prompt) and joint[: len(prompt)] == prompt:
                said = joint[len(prompt) :]
            else:
                said = self.one(completion)
                self.boundary_mismatches += not self.encoder
            if not said:
                raise BadRow("the tokenizer makes nothing of a completion")
            completions.append(self.ended(said))
        return Encoded(prompt, completions, [[True] * len(c) for c in completions])

    def structured(self, row: dict) -> Encoded:
        """A row with turns, or with completions that are token ids already (rollouts, pieces of a text)."""
        (prompt, opening), completions, scales = self.asked(row), [], []
        for completion in row.get("completions", []):
            if is_ids(completion):
                said, scale = list(completion), [1.0] * len(completion)
            elif isinstance(row["prompt"], str) and isinstance(completion, str):
                said = self.plain(
                    {**row, "completions": [completion]}, self.looked_up(begun(row), completion)
                ).completions[0]
                scale = [1.0] * len(said)
            elif isinstance(row["prompt"], str):
                raise BadRow("the prompt is text but a completion is messages")
            else:
                said, scale = self.reply(row, prompt, opening, spoken(completion))
            completions.append(said)
            scales.append(scale)
        plainly = all(s in (0, 1) for scale in scales for s in scale)
        return Encoded(
            prompt, completions, [[s > 0 for s in scale] for scale in scales], None if plainly else scales
        )

    def looked_up(self, *texts: str) -> dict[str, list[int] | BadRow]:
        """The ids that `plain` wants of one prompt and one completion."""
        wanted = [texts[0], "".join(texts)]
        return dict(zip(wanted, self.ids(wanted, True), strict=True))

    def asked(self, row: dict) -> tuple[list[int], str]:
        """A row's prompt as ids, and of the reply what all its completions begin with (`prefix`); turns also
        as the template opens the reply to them."""
        if row.get("prefix") and self.encoder:
            raise BadRow(NO_PREFIX)
        if isinstance(row["prompt"], str):
            return self.trimmed(self.one(begun(row), special=True)), ""
        if not row["prompt"]:  # whole conversations to learn from
            return [], ""
        opening = self.rendered(row, row["prompt"], asking=True)
        return self.one(opening + row.get("prefix", ""), special=self.encoder), opening

    def rendered(self, row: dict, turns: list[dict], asking: bool = False) -> str:
        """Turns through the chat template. Raises BadRow where the template refuses them."""
        said = [{k: v for k, v in turn.items() if k not in ("loss", "loss_scale")} for turn in turns]
        settings = row.get("chat_template_kwargs") or {}
        try:
            return self.tokenizer.apply_chat_template(
                said, tools=row.get("tools"), add_generation_prompt=asking, tokenize=False, **settings
            )
        except Exception as why:  # a template is somebody's program: it may raise anything
            raise BadRow(f"the chat template refuses it: {why}") from None

    def reply(
        self, row: dict, prompt: list[int], opening: str, completion: list[dict]
    ) -> tuple[list[int], list[float]]:
        """The turns after the prompt as ids, and how much each counts: by default the assistant's turns, with
        their end of turn, and nothing else. The prefix is not learned."""
        prefix = row.get("prefix", "")
        if prefix:
            completion = [{**completion[0], "content": prefix + completion[0]["content"]}, *completion[1:]]
        turns, first = row["prompt"] + completion, len(row["prompt"])
        head, whole = opening + prefix if row["prompt"] else "", self.rendered(row, turns)
        spans = self.spans(row, turns, first, opening, whole)
        scaled = [float(t.get("loss_scale", 1)) for t in turns[first:] if is_learned(t)]
        if self.encoder:
            return self.decoder_reply(whole, spans)
        if not whole.startswith(head):
            raise Rewrites(REASON)
        spans = [(max(start, len(head)), stop) for start, stop in spans]
        ids, offsets = self.placed(whole, {len(head), *(place for span in spans for place in span)})
        skipped = len(prompt)
        # Where a token reaches across the beginning of a reply, what comes before it is served otherwise: cut
        # there.
        cuts = {start for start, _ in spans if any(a < start < b for a, b in offsets)}
        cuts |= {len(head)} if ids[:skipped] != prompt else set()
        if cuts:
            self.boundary_mismatches += 1
            ids, offsets = self.placed(whole, cuts, apart=True)
        learned = [0.0] * len(ids)
        for (start, stop), scale in zip(spans, scaled, strict=True):
            inside = [i for i in range(skipped, len(ids)) if start <= offsets[i][0] < stop]
            # What follows the end of the turn (a line break) is never sampled.
            last = next((i for i in reversed(inside) if not whole[slice(*offsets[i])].isspace()), -1)
            closed = last >= 0 and ids[last] in self.special
            for i in inside:
                learned[i] = scale if not closed or i <= last else 0.0
            if not closed:
                self.warn(
                    "the chat template closes no turn with a special token, so the model is not taught where"
                    " to stop"
                )
        size = max((i + 1 for i, scale in enumerate(learned) if scale), default=skipped)
        return ids[skipped:size], learned[skipped:size]

    def spans(
        self, row: dict, turns: list[dict], first: int, opening: str, whole: str
    ) -> list[tuple[int, int]]:
        """[start, end) of each learned turn in the rendered text, checked turn by turn: served later as
        trained now.
        """
        spans = []
        for i in range(first, len(turns)):
            replies = turns[i]["role"] == "assistant"
            if replies or is_learned(turns[i]):
                before = (
                    opening
                    if replies and i == first
                    else self.rendered(row, turns[:i], asking=replies)
                    if i
                    else ""
                )
                after = whole if i + 1 == len(turns) else self.rendered(row, turns[: i + 1])
                if not after.startswith(before):
                    raise BadRow(
                        "the chat template begins a reply in one way to ask for it and in another once it is"
                        f" there (it asks with {before[-40:]!r}): write that into the replies, or give a"
                        " chat_template"
                    )
                if not whole.startswith(after):
                    raise Rewrites(REASON)
                if is_learned(turns[i]):
                    spans.append((len(before), len(after)))
        if "{% generation %}" in marked(self.tokenizer.chat_template):
            return self.marked_spans(row, turns, first, spans)
        return spans

    def marked_spans(
        self, row: dict, turns: list[dict], first: int, spans: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The parts of the assistant's learned turns that the template marks with {% generation %}."""
        said = [{k: v for k, v in turn.items() if k not in ("loss", "loss_scale")} for turn in turns]
        out = self.tokenizer.apply_chat_template(
            said,
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **(row.get("chat_template_kwargs") or {}),
        )
        found = [o for o, m in zip(out["offset_mapping"], out["assistant_masks"], strict=True) if m]
        narrowed = []
        for (start, stop), turn in zip(spans, filter(is_learned, turns[first:]), strict=True):
            inside = (
                [o for o in found if start <= o[0] < stop] if turn["role"] == "assistant" else [(start, stop)]
            )
            if not inside:
                raise BadRow("the chat template marks no {% generation %} in an assistant turn")
            narrowed.append((inside[0][0], inside[-1][1]))
        return narrowed

    def placed(
        self, text: str, cuts: set[int], apart: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of rendered text and the characters each stands for; encoded in parts between cuts with
        `apart`.
        """
        ids, offsets = [], []
        # A slow tokenizer does not tell which characters a token stands for, so it always works in parts.
        bounds = sorted({0, len(text), *(cuts if apart or not self.tokenizer.is_fast else ())})
        for start, stop in zip(bounds, bounds[1:], strict=False):
            part = text[start:stop]
            if self.tokenizer.is_fast:
                out = self.tokenizer(
                    part, add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
                ids, told = ids + out["input_ids"], out["offset_mapping"]
            else:
                ids, told = ids + (some := self.one(part)), [(0, len(part))] * len(some)
            offsets += [(a + start, b + start) for a, b in told]
        return ids, offsets

    def decoder_reply(self, whole: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[float]]:
        """The one reply that a decoder says to what the encoder read, ended."""
        if len(spans) != 1:
            raise BadRow("an encoder-decoder learns one reply a row")
        said = whole[slice(*spans[0])].strip().removesuffix(self.tokenizer.eos_token or "").strip()
        ids = self.ended(self.one(said))
        return ids, [1.0] * len(ids)

    def checked(self, row: dict, encoded: Encoded) -> Encoded:
        """An encoded row with something to learn, within max_length. Raises BadRow."""
        if not encoded.prompt and encoded.completions:
            # Nothing comes before the first token, so it cannot be asked: it becomes the prompt.
            first = encoded.completions[0][:1]
            if any(c[:1] != first for c in encoded.completions):
                raise BadRow("the prompt is empty, and the tokenizer begins with no token of its own")
            encoded.prompt, encoded.completions = first, [c[1:] for c in encoded.completions]
            encoded.supervised = [s[1:] for s in encoded.supervised]
            encoded.scales = encoded.scales and [s[1:] for s in encoded.scales]
        if self.max_length:
            self.shorten(encoded, self.max_length)
        if not all(map(any, encoded.supervised)):
            raise BadRow("there is nothing to learn in a completion")
        return encoded

    def shorten(self, encoded: Encoded, most: int) -> None:
        """Cut an encoded row to `most` tokens (max_length) at the end of its completions. Raises BadRow where
        that leaves none.
        """
        size = len(encoded.prompt)
        if self.encoder and size > most:
            kept = len(self.suffix)
            encoded.prompt = encoded.prompt[: most - kept] + encoded.prompt[size - kept :]
            self.cut += 1
        room = most if self.encoder else most - size
        if room < 1:
            raise BadRow(
                f"the prompt leaves no room for a completion within max_length={most} ({size} tokens)"
            )
        if any(len(c) > room for c in encoded.completions):
            encoded.completions = [c[:room] for c in encoded.completions]
            encoded.supervised = [s[:room] for s in encoded.supervised]
            encoded.scales = encoded.scales and [s[:room] for s in encoded.scales]
            self.cut += 1

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which generation ends: end of sequence, and the end of a turn of the chat template."""
        probe = {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completions": [[{"role": "assistant", "content": "Hi"}]],
        }
        try:
            last = self.encode(probe).completions[0][-1]
        except BadRow:
            last = None
        return [i for i in dict.fromkeys((self.end, last)) if i is not None and i in self.special]

    def warn(self, message: str) -> None:
        """Say something once."""
        if message not in self.warnings:
            self.warnings.append(message)
            warnings.warn(message, stacklevel=3)

    # ------------------------------------------------------------------------------------------ cache

    def remember(self, key: bytes, encoded: Encoded) -> None:
        """Keep an encoding in little space; the oldest go when there are more than cache_tokens."""
        told = (
            [array("i", c) for c in encoded.completions],
            [bytes(s) for s in encoded.supervised],
            encoded.scales,
        )
        self.cache[key] = (array("i", encoded.prompt), *told)
        self.cached += size_of(self.cache[key])
        while self.cached > self.cache_tokens and len(self.cache) > 1:
            self.cached -= size_of(self.cache.popitem(last=False)[1])

    def recall(self, key: bytes) -> Encoded:
        """A kept encoding, as lists of its own."""
        prompt, completions, supervised, scales = self.cache[key]
        return Encoded(
            prompt.tolist(), [c.tolist() for c in completions], [[*map(bool, s)] for s in supervised], scales
        )


NO_PREFIX = "an encoder-decoder reads the prompt apart from the reply, so it takes no prefix"
REASON = (
    "the chat template rewrites earlier turns once later ones follow, so what is trained would never be"
    " served: keep one assistant turn to learn in a row, or give a chat_template that leaves turns as"
    " they are"
)


def size_of(kept: tuple) -> int:
    """Tokens of a kept encoding."""
    return len(kept[0]) + sum(map(len, kept[1]))


def digest(what: str, row: dict) -> bytes:
    """A key of all that decides a row's encoding."""
    parts = [row["prompt"], row.get("prefix"), row.get("tools"), row.get("chat_template_kwargs")]
    parts += [row.get("completions")] if what == "row" else []
    said = json.dumps([what, *parts], default=repr)
    return hashlib.blake2b(said.encode(), digest_size=16).digest()


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text by itself."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


def marked(template: str | dict | None) -> str:
    """A chat template with its generation marks written in one way."""
    told = template if isinstance(template, str) else " ".join((template or {}).values())
    return told.replace("{%-", "{%").replace("-%}", "%}").replace("{%generation%}", "{% generation %}")


def is_ids(completion: Any) -> bool:
    """Whether a completion is token ids already."""
    return isinstance(completion, (list, tuple)) and bool(completion) and isinstance(completion[0], int)


def is_plain(row: dict) -> bool:
    """Whether a row is plain text throughout."""
    return isinstance(row["prompt"], str) and all(isinstance(c, str) for c in row.get("completions", []))


def is_text(row: dict) -> bool:
    """Whether a row is one text to continue, with nothing before it."""
    return (
        row["prompt"] == ""
        and not row.get("prefix")
        and len(row.get("completions", [])) == 1
        and isinstance(row["completions"][0], str)
    )


def is_learned(turn: dict) -> bool:
    """Whether a turn is the assistant's and not told to be left out, or another's and told to be learned."""
    return turn.get("loss", turn["role"] == "assistant") is True and turn.get("loss_scale") != 0


def begun(row: dict) -> str:
    """A prompt of plain text, and what all its completions begin with."""
    return row["prompt"] + row.get("prefix", "")
