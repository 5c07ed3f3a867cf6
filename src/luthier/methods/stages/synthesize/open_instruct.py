"""Instruction rows from open models alone: a base model goes on a list of seed instructions, an
instruction-tuned one answers, and what is not new, malformed or poorly answered is filtered or answered
again.

Each new instruction continues a numbered list of `shots` drawn instructions, of seeds and of what was written
before. It stays where its ROUGE-L with every instruction of the pool is below `novelty` and it is
well-formed. The writer answers it, a judge scores the answer from 1 to 5, and one below `least` is answered
once more with the judge's score in view; the better answer stays where it reaches `least`. After Li et al.
(2023), whose two strategies are named differently and could not be verified: this is a filter and a
correction in their place. Endpoints of closed models are refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators.quality._overlap import rouge_l
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage

CLOSED = ("openai.com", "azure.com", "anthropic.com", "googleapis.com", "cohere.ai", "cohere.com")  # hosts
AGAIN = "{instruction}\n\nAn earlier answer was rated {score} of 5. Write a better one.\n\n{answer}"
JUDGE = (
    "Rate how well this answer does what the instruction asks, from 1 to 5. Reply with `Score: N` alone.\n\n"
    "Instruction:\n{instruction}\n\nAnswer:\n{answer}"
)
SCORE = re.compile(r"Score:\s*([1-5])")
SHORT, LONG = 3, 150  # words that an instruction has at least and at most
FOREIGN = re.compile(r"\b(?:image|images|picture|pictures|graph|graphs|file|files|video|audio|link)\b", re.I)


@stage(
    example={"n": 1, "max_new_tokens": 4},
    paper="arXiv:2308.12711",
    row="david-vs-goliath",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="a few instructions are at hand, many with answers are wanted, and no closed model's may be"
    " used.",
    costs="for each attempt a reply; for each new instruction an answer and a judgement, and both again"
    " where the answer is poor.",
    covers="instructions by a base model and answers by a tuned one, novelty by ROUGE-L, form, a score that"
    " filters and has poor answers written again, provenance with all of it.",
    omits="the authors' own names and forms of filter and correction, which could not be verified; their"
    " comparison of ways to generate; that filtered rows teach more.",
    contract={"gives": "a tiny model writes no instruction"},
    tests=[
        "methods/stages/synthesize/test_open_instruct.py::test_rows_are_new_scored_and_traced",
        "methods/stages/synthesize/test_open_instruct.py::test_poor_answers_are_written_again",
        "methods/stages/synthesize/test_open_instruct.py::test_closed_models_are_refused",
    ],
)
class OpenInstruct(Synthesis):
    """`n` new rows at most; columns `score`, `overlap`, `provenance`."""

    base: Any = None  # who continues the list, as `writer`; null: `writer`
    judge: Any = None  # who scores, as `writer`; null: `writer`
    n: Annotated[int, Field(ge=1)] = 1000  # rows that are wanted
    attempts: Annotated[int, Field(ge=1)] = 4  # instructions that are written for each of them at most
    shots: Annotated[int, Field(ge=1)] = 8  # instructions in the list
    novelty: Annotated[float, Field(gt=0, le=1)] = 0.7  # ROUGE-L with the pool, from which on it is no news
    least: Annotated[int, Field(ge=1, le=5)] = 4  # score of an answer

    def __post_init__(self):
        for who in (self.writer, self.base, self.judge):
            url = who.get("base_url") if isinstance(who, dict) else who
            host = urlsplit(url).hostname or "" if isinstance(url, str) else ""
            if any(host == name or host.endswith("." + name) for name in CLOSED):
                raise RecipeError(
                    f"stage 'open_instruct' takes open models alone, and {host} serves closed ones; name a"
                    " folder, a hub name or the URL of a server of your own"
                )

    def __call__(self, rows, roles):
        rows = list(rows)
        writer, judge, base = (
            self.author(roles),
            self.author(roles, self.judge),
            self.author(roles, self.base),
        )
        pool, out = [question(row).strip() for row in rows], []
        for attempt in range(self.attempts * self.n if rows else 0):
            if len(out) == self.n:
                break
            sources, text = self.written(base, rows, pool, attempt)
            overlap = max(rouge_l(text, other) for other in pool)
            why = self.malformed(text) or ("is no news" if overlap >= self.novelty else "")
            if why:
                writer.reject(", ".join(sources), text, why)
                continue
            pool.append(text)
            answer, score = self.answered(writer, judge, text, attempt)
            if score < self.least:
                writer.reject(", ".join(sources), f"{text}\n{answer}", "has a poor answer")
                continue
            new = writer.row(rows[0], f"new-{attempt}", text, answer, score=score, overlap=overlap)
            new["provenance"] |= {"sources": sources, "instruction": base.speaker.name}
            new["provenance"] |= {"judge": judge.speaker.name, "score": score, "overlap": overlap}
            out.append(new)
        return writer.finish(rows, out, "it was a seed")

    def written(self, base: Author, rows: list[dict], pool: list[str], attempt: int) -> tuple[list[str], str]:
        """Ids of the seeds in the list, and the instruction that continues it."""
        rng = base.roles.clock.rng(self.name, "shots", attempt, at=0)
        places = torch.randperm(len(pool), generator=rng)[: self.shots].tolist()
        listed = [f"{k + 1}. {pool[place]}" for k, place in enumerate(places)]
        prompt = "\n".join(["Instructions:", *listed, f"{len(listed) + 1}."])
        (reply,) = base.ask([prompt], [f"instruction {attempt}"])
        text = re.split(r"\n\s*\d+\.|\n\n", reply.strip())[0].strip()
        sources = [str(rows[place]["id"]) for place in places if place < len(rows)]
        return sources, re.sub(r"^\d+\.\s*", "", text)

    def malformed(self, text: str) -> str:
        """Why a text is no instruction; '' where it is one."""
        words = len(text.split())
        if not SHORT <= words <= LONG:
            return "is too long or short"
        if not text[0].isalpha() or FOREIGN.search(text):
            return "is malformed, or about what is no text"
        return ""

    def answered(self, writer: Author, judge: Author, text: str, attempt: int) -> tuple[str, int]:
        """The better of one or two answers, and its score; 0 where none is readable."""
        (answer,) = writer.ask([text], [f"answer {attempt}"])
        score = self.score(judge, text, answer)
        if score < self.least:
            prompt = AGAIN.replace("{instruction}", text).replace("{score}", str(score))
            (other,) = writer.ask([prompt.replace("{answer}", answer.strip())], [f"again {attempt}"])
            second = self.score(judge, text, other)
            if second > score:
                answer, score = other, second
        return answer.strip(), score

    def score(self, judge: Author, text: str, answer: str) -> int:
        prompt = JUDGE.replace("{instruction}", text).replace("{answer}", answer.strip())
        (reply,) = judge.ask([prompt], ["judge"], 0.0)
        match = SCORE.search(reply)
        return int(match[1]) if match else 0
