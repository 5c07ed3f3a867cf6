"""RAIN: the model looks ahead, judges what it would say, and takes tokens back.

A tree of segments of growing length grows from the answer so far. Each turn walks down by value and prior
(PUCT), writes the leaf on to the end of its sentence, judges that text in [-1, 1], and adds the value along
the path. When the most visited child was judged often and well enough, or turns are over, it is committed,
and the search goes on from there (Li et al., 2023). Without a reward the policy judges itself, asked twice
with the options swapped. Departs: siblings are compared by the mean of their tokens' input embeddings, in
the place of a sentence encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.decoders.search._base import AnyReward, Search, ended
from luthier.registry import Range, decoder

LENGTHS = (1, 2, 4, 10)  # tokens of a segment by depth; deeper ones have the last
SENTENCE_ENDS = ".!?\n"
QUESTION = (
    "{question}\n{answer}\n\nIs the answer above harmless or harmful? Reply with one letter.\n"
    "({first}) harmless\n({second}) harmful"
)


@dataclass
class Segment:
    """A node of the tree: some tokens behind its parent's."""

    ids: list[int]
    parent: Segment | None = None
    prior: float = 1.0
    visits: int = 0
    total: float = 0.0  # of the values
    weight: float = 0.0  # of the values: 1 for each visit, less for what siblings lent
    children: list[Segment] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The mean value; 0 before the first."""
        return self.total / self.weight if self.weight else 0.0

    def text(self) -> list[int]:
        """The tokens from the root on."""
        before = self.parent.text() if self.parent is not None else []
        return before + self.ids

    def depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent.depth()


@decoder(
    paper="arXiv:2309.07124",
    row="rain",
    use_when="a pretrained or tuned model should say less that is harmful, at test time alone.",
    costs="up to `turns` looks ahead for every committed segment, each with a judgement.",
    example={"turns": 2, "candidates": 2, "lookahead": 2},
    covers="selection by value and prior, looking ahead, judging with swapped options, backing up to similar"
    " siblings, new siblings, committing.",
    omits="a sentence encoder for similarity.",
    tests=[
        "methods/decoders/search/test_rain.py::test_no_bad_token_is_written",
        "methods/decoders/search/test_rain.py::test_a_judge_with_a_favourite_letter_says_zero",
        "methods/decoders/search/test_rain.py::test_visits_are_the_turns",
        "methods/decoders/search/test_rain.py::test_a_judge_of_one_mind_leaves_the_prior",
    ],
)
class RAIN(Search):
    """A rewindable tree search with self-evaluation."""

    # scores of a text in [-1, 1]; null: the policy judges itself
    reward: AnyReward = None
    turns: Annotated[int, Field(ge=1)] = 50  # of the search for each segment at most
    visits: Annotated[int, Field(ge=1)] = 6  # that a child needs to be committed before that
    threshold: float = 0.8  # mean value that it needs as well
    candidates: Annotated[int, Field(ge=1), Range(2, 20)] = 10  # segments that a node is given at first
    exploration: Annotated[float, Field(ge=0)] = 2.0  # c of PUCT
    lookahead: Annotated[int, Field(ge=0)] = 32  # tokens to the end of a sentence at most
    similarity: float = 0.95  # cosine from which a sibling takes part in a value
    shared: Annotated[float, Field(ge=0)] = 0.2  # weight of such a value
    question: str = QUESTION  # what the policy is asked: {question}, {answer}, {first}, {second}

    def generate(self, roles, rows, prompts, *, seeds, max_new_tokens, n=1, **how):
        self.only(how)
        stop = how.get("stop", ())
        answers = []
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            samples = []
            for sample in range(n):
                clock = Clock(Clock(seed).derive_seed("rain", sample))
                walk = Walk(self, roles, row, list(prompt), stop, max_new_tokens, clock)
                samples.append(walk.answer())
            answers.append(samples)
        return answers

    def judge(self, roles: Any, row: Any, answer: list[int]) -> float:
        """The value of a text, in [-1, 1]."""
        if self.reward is not None:
            (score,) = self.scores(roles, row, [answer])
            return score
        votes = []
        for first, second in (("A", "B"), ("B", "A")):
            letter = self.letter(roles, row, answer, first, second)
            votes.append(float(letter == first))
        return 2 * sum(votes) / len(votes) - 1

    def letter(self, roles: Any, row: Any, answer: list[int], first: str, second: str) -> str:
        """Which letter the policy finds likelier, where `first` stands for harmless."""
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(str(turn.get("content") or "") for turn in prompt)
        options = {"first": first, "second": second, "answer": roles.renderer.answer(answer)}
        text = self.question.format(question=prompt, **options)
        message: Any = [{"role": "user", "content": text}] if roles.renderer.note is None else text
        ids = roles.renderer.prompt({"id": "rain", "prompt": message})
        tokens = {}
        for letter in ("A", "B"):
            (*_, token) = roles.renderer.tokenizer.encode(letter, add_special_tokens=False)
            tokens[token] = letter

        def between(logits, prompts, responses):
            out = torch.full_like(logits, -float("inf"))
            out[:, [*tokens]] = logits[:, [*tokens]]
            return out

        written = roles.policy.generate([ids], seeds=[0], max_new_tokens=1, temperature=0.0, decoder=between)
        return tokens[written[0][0][0]]


@dataclass
class Walk:
    """The search for one answer."""

    settings: RAIN
    roles: Any
    row: Any
    prompt: list[int]
    stop: Any
    most: int
    clock: Clock
    searched: int = 0  # turns so far

    def answer(self) -> list[int]:
        written: list[int] = []
        root = Segment([])
        while not ended(written, self.stop, self.most):
            root = self.commit(root, written)
            written = written + root.ids
            root.parent = None
            root.ids = []
        return written

    def commit(self, root: Segment, written: list[int]) -> Segment:
        """Search from a root, and its best child."""
        for _ in range(self.settings.turns):
            self.turn(root, written)
            best = max(root.children, key=lambda child: child.visits, default=None)
            if best is not None and best.visits >= self.settings.visits:
                if best.mean > self.settings.threshold:
                    return best
        if not root.children:
            self.expand(root, written)
        return max(root.children, key=lambda child: (child.visits, child.prior))

    def turn(self, root: Segment, written: list[int]) -> None:
        """One walk down, a look ahead, and its value backed up."""
        self.searched += 1
        if not root.children:
            self.expand(root, written)
        node = root
        while node.children:
            node = self.select(node, node is root)
        text = written + node.text()
        value = self.settings.judge(self.roles, self.row, self.look_ahead(text))
        self.back_up(node, value)
        if not ended(text, self.stop, self.most):
            self.expand(node, written)
        self.widen(node.parent, written)

    def select(self, node: Segment, is_root: bool) -> Segment:
        """The child with the highest value and prior."""
        means = [child.mean for child in node.children]
        low, span = min(means), max(means) - min(means)

        def score(child: Segment) -> float:
            mean = (child.mean - low) / span if span else 0.0
            prior = child.prior
            if is_root:
                prior = 0.75 * prior + 0.25 / len(node.children)
            explored = self.settings.exploration * prior * math.sqrt(max(1, node.visits)) / (1 + child.visits)
            return mean + explored

        return max(node.children, key=score)

    def expand(self, node: Segment, written: list[int]) -> None:
        """Give a node its first children: the greedy segment and sampled ones, without doubles."""
        before = written + node.text()
        length = min(LENGTHS[min(node.depth(), len(LENGTHS) - 1)], self.most - len(before))
        candidates = self.sample(before, length, 1, 0.0)
        if self.settings.candidates > 1:
            candidates += self.sample(before, length, self.settings.candidates - 1, 1.0)
        self.add(node, candidates, before)

    def sample(self, before: list[int], length: int, n: int, temperature: float) -> list[list[int]]:
        seed = self.clock.derive_seed("segments", self.searched, len(before))
        (written,) = self.roles.policy.generate(
            [self.prompt + before],
            seeds=[seed],
            n=n,
            max_new_tokens=length,
            temperature=temperature,
            stop=self.stop,
        )
        return written

    def add(self, node: Segment, candidates: list[list[int]], before: list[int]) -> None:
        """New children, with their share of the model's probability."""
        segments = {tuple(child.ids) for child in node.children}
        for ids in candidates:
            if tuple(ids) not in segments:
                segments.add(tuple(ids))
                node.children.append(Segment(ids, node, self.probability(before, ids)))
        total = sum(child.prior for child in node.children)
        for child in node.children:
            child.prior /= total

    @torch.no_grad()
    def probability(self, before: list[int], ids: list[int]) -> float:
        """Of a segment behind a text, per token (geometric mean)."""
        policy = self.roles.policy
        if policy.model.get_output_embeddings() is None or policy.attached.rewrites_inputs:
            raise RecipeError("decoder 'rain' needs a causal language model without soft prompts")
        text = self.prompt + before + ids
        tokens = torch.tensor([text], device=policy.model.get_input_embeddings().weight.device)
        with policy.role_context():
            logits = policy.model(input_ids=tokens, use_cache=False).logits[0, -len(ids) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[0, -len(ids) :, None])
        return math.exp(float(logprobs.mean()))

    def look_ahead(self, text: list[int]) -> list[int]:
        """A text, written on greedily to the end of its sentence."""
        room = min(self.settings.lookahead, self.most - len(text))
        if room < 1 or ended(text, self.stop, self.most):
            return text

        def sentence_ended(written: list[list[int]]) -> bool:
            return self.roles.renderer.text(written[0][-1:]).strip(" ")[-1:] in tuple(SENTENCE_ENDS)

        ((rest,),) = self.roles.policy.generate(
            [self.prompt + text],
            seeds=[0],
            max_new_tokens=room,
            temperature=0.0,
            stop=self.stop,
            hear=sentence_ended,
        )
        return text + rest

    def back_up(self, node: Segment, value: float) -> None:
        """Add a value along the path, and to similar siblings a part of it."""
        current: Segment | None = node
        while current is not None:
            current.visits += 1
            current.weight += 1
            current.total += value
            parent = current.parent
            if parent is not None and self.settings.shared and len(parent.children) > 1:
                own = self.embedding(current)
                for sibling in parent.children:
                    if sibling is not current:
                        cosine = float(torch.cosine_similarity(own, self.embedding(sibling), 0))
                        if cosine > self.settings.similarity:
                            share = self.settings.shared * cosine
                            sibling.weight += share
                            sibling.total += share * value
            current = parent

    def embedding(self, node: Segment) -> torch.Tensor:
        """[d] the mean of a segment's input embeddings."""
        weight = self.roles.policy.model.get_input_embeddings().weight.detach()
        return weight[node.ids].float().mean(0)

    def widen(self, node: Segment | None, written: list[int]) -> None:
        """One more child where all are alike and none is good."""
        if node is None or max(child.mean for child in node.children) >= 0:
            return
        stack = torch.stack([self.embedding(child) for child in node.children])
        if len(stack) > 1 and float(stack.var(0).mean()) > float(stack.mean(0).var()):
            return
        before = written + node.text()
        length = len(node.children[0].ids)
        self.add(node, self.sample(before, length, 1, 1.0), before)
