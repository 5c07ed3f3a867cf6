"""A model of luthier as lm-eval asks it: log-probabilities of continuations, of whole texts, and greedy
answers.

It goes through the policy as everything does, so what is measured is what was tuned, soft prompts, side
networks and quantized bases among it. Continuations of one context are read with it once.

Texts begin as with lm-eval's own class for transformers: with what the tokenizer puts before a text, unless
it is there already; an empty context is the beginning-of-sequence token, else the end-of-sequence token.
Departs: a text whose whole likelihood is asked has that token once, not twice; questions through the chat
template begin as the template lets them, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.model.batch import Batch, collate
from luthier.model.loaded import Loaded
from luthier.text.chat import other_forms
from luthier.text.encoded import Encoded
from luthier.text.tokens import tokenize_marked

TOKENS = 8192  # read at once
MAX_NEW_TOKENS = 256  # of an answer whose task sets no number
POSITIONS = 2048  # of a model that names no number


class Adapter(TemplateLM):
    """Loaded -> lm-eval's language model. chat: all questions come through the chat template."""

    def __init__(self, loaded: Loaded, chat: bool = False):
        super().__init__()
        self.loaded, self.roles = loaded, loaded.roles
        provides = self.roles.policy.architecture.provides
        if not {"logprobs", "generate"} <= provides:
            raise RecipeError(f"{loaded.name} cannot be asked by lm-eval: it does not generate text")
        self.tokenizer, self.renderer = loaded.tokenizer, self.roles.renderer
        self.beginning = [] if chat else list(self.renderer.prefix)
        config: Any = loaded.model.config
        config = config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or POSITIONS)

    @property
    def eot_token_id(self) -> int:
        return self.renderer.end

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.name).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.renderer.chat.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as text, within the limits of templates and in the first form that the template takes."""
        chat = self.renderer.chat
        problems: list[BadRow] = []
        for form in (chat.form, *other_forms({"prompt": chat_history}, chat.form)):
            former, chat.form = chat.form, form
            try:
                return chat.call(
                    {},
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            except BadRow as why:
                problems.append(why)
                chat.form = former
        raise RecipeError(f"a question cannot be read: {problems[0]}")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With what the tokenizer puts before a text, unless it is there or `add_special_tokens` is False."""
        try:
            ids = tokenize_marked(self.tokenizer, string)
        except BadRow as why:
            raise RecipeError(f"a question cannot be read: {why}") from None
        if add_special_tokens is False or string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            return ids
        return [*self.beginning, *ids]

    # ------------------------------------------------------------------------------------------ likelihood

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each continuation of a context."""
        rows: dict[tuple[int, ...], list[int]] = {}  # context -> its requests
        continuations: list[list[int]] = []
        for i, (_, context, continuation) in enumerate(requests):
            context, continuation = self.fitted(context, continuation)
            rows.setdefault(tuple(context), []).append(i)
            continuations.append(continuation)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for contexts in self.batches(rows, [len(continuation) for continuation in continuations]):
            members = [i for context in contexts for i in rows[context]]
            batch = self.batch([(context, [continuations[i] for i in rows[context]]) for context in contexts])
            for i, result in zip(members, self.read(batch), strict=True):
                results[i] = result
        return results

    def fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A context and its continuation within the positions of the model: the beginning of the context is
        cut, and of a continuation that alone is too long its own.
        """
        context = context or [self.prefix_token_id]
        excess = len(context) + len(continuation) - self.max_length
        if excess <= 0:
            return context, continuation
        if excess < len(context):
            return context[excess:], continuation
        whole = [*context, *continuation][excess:]
        return whole[:1], whole[1:]

    def batches(self, rows: dict[tuple[int, ...], list[int]], sizes: Sequence[int]) -> list[list[tuple]]:
        """Contexts in groups of about TOKENS tokens, those of like length together."""
        groups: list[list[tuple]] = []
        tokens = TOKENS
        for context in sorted(rows, key=len):
            size = len(context) + sum(sizes[i] for i in rows[context])
            if tokens + size > TOKENS:
                groups.append([])
                tokens = 0
            groups[-1].append(context)
            tokens += size
        return groups

    def batch(self, rows: Sequence[tuple[Sequence[int], list[list[int]]]]) -> Batch:
        """Token ids of contexts and their continuations as a batch of the policy."""
        encoded = {}
        for number, (context, continuations) in enumerate(rows):
            marks = [[True] * len(ids) for ids in continuations]
            encoded[str(number)] = Encoded([*context], continuations, marks)
        blank = [
            {"id": name, "prompt": "", "completions": code.completions} for name, code in encoded.items()
        ]
        batch = collate(blank, lambda row: encoded[row["id"]])
        architecture = self.roles.policy.architecture
        return architecture.ask(batch, self.renderer, self.roles.clock).to(self.roles.device)

    @torch.no_grad()
    def read(self, batch: Batch) -> list[tuple[float, bool]]:
        """Of each sequence of a batch."""
        outputs = self.roles.policy.outputs(batch)
        sums = batch.sums(outputs.logprobs.double()).tolist()
        hits = batch.sums((outputs.first() == batch.labels[batch.targets]).float())
        greedy = (hits == batch.lengths).tolist()
        return [*zip(sums, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of what the model can hold."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pieces)))
        return totals

    # ------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first of each task's stop texts."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            until = options.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            if options.get("do_sample") and options.get("temperature", 0):
                raise RecipeError("a task that samples its answers cannot be measured: answers are greedy")
            size = int(options.get("max_gen_toks") or options.get("max_tokens") or MAX_NEW_TOKENS)
            groups.setdefault((stops, size), []).append(i)
        answers = [""] * len(requests)
        for (stops, size), members in groups.items():
            texts = self.write([requests[i].args[0] for i in members], stops, size)
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
        return answers

    def write(self, contexts: Sequence[str], stops: tuple[str, ...], size: int) -> list[str]:
        """Answers to contexts, each cut before its first stop text."""
        room = self.max_length - size
        if room <= 0:
            raise RecipeError(
                f"a task allows answers of {size} tokens, and {self.loaded.name} has room for"
                f" {self.max_length} with the question"
            )
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        written = self.roles.policy.generate(
            prompts,
            seeds=[0] * len(prompts),
            temperature=0.0,
            max_new_tokens=size,
            stop=self.renderer.stop_ids,
            hear=lambda some: all(self.is_cut(ids, stops) for ids in some),
        )
        return [cut(self.roles.text(ids), stops) for (ids,) in written]

    def is_cut(self, ids: list[int], stops: tuple[str, ...]) -> bool:
        """Whether a stop text or the end was written."""
        if ids and ids[-1] in self.renderer.stop_ids:
            return True
        text = self.roles.text(ids)
        return any(stop in text for stop in stops if stop)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """What comes before the first stop text."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text
