"""What stages share whose rows a language model writes: who writes, answers cached call by call, where a row
comes from, and a file of what was rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.stages._base import Stage, workspace
from luthier.programs.models import Remembering, speaker
from luthier.registry import family
from luthier.storage import files

ITEM = re.compile(r"^\s*(?:[-*]|\d+[.)])\s+(.*\S)\s*$", re.MULTILINE)


@family
class Synthesis(Stage):
    """Family: rows that a language model writes. Column `provenance` says from which rows, and by whom."""

    # who writes: a folder, a hub name, `http://HOST/v1#MODEL`, or keys of role `endpoint`; null: the policy
    writer: Any = None
    temperature: Annotated[float, Field(ge=0)] = 0.7  # of what is to vary
    max_new_tokens: Annotated[int, Field(ge=1)] = 512  # of a reply
    parallel: Annotated[int, Field(ge=1)] = 1  # requests at a time, to a model behind a URL
    licence: str = ""  # of what the writer writes, as it stands in `provenance`

    def author(self, roles: Any, who: Any = None) -> Author:
        """Of new rows. who: another than `writer`."""
        return Author(self, roles, self.writer if who is None else who)


class Author:
    """A model that writes, its replies and what was rejected of them.

    Replies are stored as they come: a stage that was killed goes on behind the last one.
    """

    def __init__(self, stage: Synthesis, roles: Any, who: Any):
        self.stage, self.roles = stage, roles
        self.speaker = PolicySpeaker(roles) if who is None else speaker(who)
        place = workspace(roles, stage.name)
        self.path = place and place / "rejected.jsonl"
        self.stored = Remembering(self.speaker, place / "replies.sqlite" if place else Path(":memory:"))
        self.rejected: list[dict] = []

    def ask(
        self, prompts: Sequence[str], keys: Sequence[Hashable], temperature: float | None = None
    ) -> list[str]:
        """A reply to each prompt. keys: of the draws of random numbers. temperature: None is the stage's."""
        t = self.stage.temperature if temperature is None else temperature
        how: list[dict] = []
        for key in keys:
            seed = self.roles.clock.derive_seed(self.stage.name, key, at=0) % 2**31
            draw = seed if t else 0
            how.append({"temperature": t, "seed": draw, "max_new_tokens": self.stage.max_new_tokens})
        replies = [self.stored.recall(prompt, h) for prompt, h in zip(prompts, how, strict=True)]
        missing = [place for place, reply in enumerate(replies) if reply is None]
        for some in self.batches(missing):
            new = self.replies([prompts[place] for place in some], [how[place] for place in some])
            for place, reply in zip(some, new, strict=True):
                self.stored.store(prompts[place], how[place], reply)
                replies[place] = reply
        return [str(reply) for reply in replies]

    def batches(self, places: list[int]) -> list[list[int]]:
        """Places that are asked together: replies are stored after each batch."""
        size = 64 if isinstance(self.speaker, PolicySpeaker) else self.stage.parallel
        return [places[first : first + size] for first in range(0, len(places), size)]

    def replies(self, prompts: list[str], how: list[dict]) -> list[str]:
        self.stored.calls += len(prompts)
        if isinstance(self.speaker, PolicySpeaker):
            return self.speaker.ask_all(prompts, how)
        with ThreadPoolExecutor(self.stage.parallel) as pool:
            return list(pool.map(lambda prompt, h: self.speaker.ask(prompt, **h), prompts, how))

    def reject(self, source: str, text: str, why: str) -> None:
        """Something that was written does not become a row."""
        self.rejected.append({"source": source, "text": text, "reason": why})

    def row(self, source: dict, key: Hashable, prompt: str, answer: str, **columns: Any) -> dict:
        """A new row of another, in its form: texts, or turns of a conversation."""
        turns = not isinstance(source["prompt"], str)
        turn: Any = [{"role": "user", "content": prompt}] if turns else prompt
        reply: Any = [{"role": "assistant", "content": answer}] if turns else answer
        provenance = {"stage": self.stage.name, "sources": [str(source["id"])], "writer": self.speaker.name}
        if self.stage.licence:
            provenance["licence"] = self.stage.licence
        row = {"id": f"{source['id']}/{key}", "prompt": turn, "completions": [reply]}
        return {**row, **columns, "provenance": provenance}

    def finish(self, rows: Sequence[dict], out: list[dict], why: str) -> list[dict]:
        """Write down what was rejected, say how it went, and give every source without a row its reason."""
        if self.path is not None:
            files.write_rows(self.path, self.rejected)
        sources = {name for row in out for name in row["provenance"]["sources"]}
        for row in rows:
            if str(row["id"]) not in sources:
                getattr(self.roles, "dropped", {}).setdefault(row["id"], why)
        reasons: dict[str, int] = {}
        for line in self.rejected:
            reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
        summary = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        sentence = f"{len(out)} rows of {len(rows)} by {self.stored.calls} new calls of {self.speaker.name}"
        self.stage.warn(self.roles, sentence + (f"; rejected: {summary}" if summary else ""))
        return out


class PolicySpeaker:
    """The policy as who writes."""

    name = "policy"

    def __init__(self, roles: Any):
        self.roles = roles

    def ask(self, prompt: str, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256) -> str:
        how = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
        return self.ask_all([prompt], [how])[0]

    def ask_all(self, prompts: list[str], how: list[dict]) -> list[str]:
        """All at the first one's temperature and length."""
        renderer = self.roles.renderer
        ids = []
        for text in prompts:
            message: Any = [{"role": "user", "content": text}] if renderer.note is None else text
            ids.append(renderer.prompt({"id": "synthesis", "prompt": message}))
        written = self.roles.policy.generate(
            ids,
            seeds=[h["seed"] for h in how],
            n=1,
            max_new_tokens=how[0]["max_new_tokens"],
            temperature=how[0]["temperature"],
            stop=renderer.stop_ids,
        )
        return [renderer.answer(samples[0]) for samples in written]


def items(text: str) -> list[str]:
    """The items of a list, numbered or with dashes; else its lines that are not empty."""
    lines = ITEM.findall(text)
    return lines or [line.strip() for line in text.splitlines() if line.strip()]


def json_in(text: str) -> Any:
    """The first JSON object or list in a text; None where there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except ValueError:
            continue
    return None


def section(text: str, name: str) -> str | None:
    """What stands between [name] and [/name], or the end; None where it does not begin."""
    _, mark, rest = text.partition(f"[{name}]")
    return rest.partition(f"[/{name}]")[0].strip() if mark else None
