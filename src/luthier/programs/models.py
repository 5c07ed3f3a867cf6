"""Who answers a program's prompts: a model on this machine, one behind a URL, or any object with `name` and
`ask`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from luthier.errors import RecipeError


@runtime_checkable
class Speaker(Protocol):
    """Text in, text out. The same prompt and settings give the same answer."""

    name: str  # tells it apart from others, in caches

    def ask(
        self, prompt: str, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256
    ) -> str: ...


class Local:
    """A run's folder, a model's folder, a hub name or toy:NAME; loaded when it is first asked.

    turns: is a prompt a turn of a conversation, or continued as it is? Default: as the model was
    tuned. settings: keys of a recipe, as for `luthier.load`.
    """

    def __init__(self, model: str | Path, turns: bool | None = None, **settings: Any):
        self.where, self.turns, self.settings, self._loaded = str(model), turns, settings, None
        files = []  # a folder may be overwritten: sizes and times tell its versions apart
        if Path(model).is_dir():
            for path in sorted(Path(model).glob("*.safetensors")):
                files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
        identity = repr((turns, files, sorted(settings.items())))
        self.name = f"{model} {hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def ask(self, prompt: str, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256) -> str:
        if self._loaded is None:
            from luthier.model.loaded import load

            self._loaded = load(self.where, **self.settings)
        turns = self._loaded.turns if self.turns is None else self.turns
        question: Any = prompt
        if turns:
            question = [{"role": "user", "content": prompt}]
        return self._loaded.generate(
            question, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )


class Remembering:
    """Another speaker's answers, cached in a file: the same prompt is answered without it."""

    def __init__(self, speaker: Speaker, path: str | Path):
        self.speaker = speaker
        self.name = speaker.name
        self.calls = 0  # of the speaker itself, where the cache had no answer
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.table = sqlite3.connect(path)
        self.table.execute("create table if not exists answers (question text primary key, answer text)")

    def ask(self, prompt: str, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256) -> str:
        how = {
            "temperature": temperature,
            "seed": seed if temperature else 0,  # greedy answers do not depend on it
            "max_new_tokens": max_new_tokens,
        }
        cached = self.recall(prompt, how)
        if cached is not None:
            return cached
        self.calls += 1
        answer = self.speaker.ask(prompt, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
        self.store(prompt, how, answer)
        return answer

    def recall(self, prompt: str, how: dict[str, Any]) -> str | None:
        """The cached answer to a prompt with these settings; None where there is none."""
        row = self.table.execute(
            "select answer from answers where question = ?", (self.key(prompt, how),)
        ).fetchone()
        return row[0] if row else None

    def store(self, prompt: str, how: dict[str, Any], answer: str) -> None:
        """Cache an answer."""
        entry = (self.key(prompt, how), answer)
        with self.table:
            self.table.execute("insert or replace into answers values (?, ?)", entry)

    def key(self, prompt: str, how: dict[str, Any]) -> str:
        """What a prompt with its settings is stored under."""
        return hashlib.sha256(json.dumps([self.name, prompt, how]).encode()).hexdigest()


def speaker(who: Any) -> Speaker:
    """A name, a URL (`http://host/v1#model`), {base_url, model, ...} or {model, turns, ...} -> who answers. A
    speaker stays itself.
    """
    if isinstance(who, (str, Path)):
        if not str(who).startswith(("http://", "https://")):
            return Local(who)
        url, _, model = str(who).partition("#")
        who = {"base_url": url, "model": model}
    if isinstance(who, dict) and "model" in who and "base_url" not in who:
        return Local(**who)
    if isinstance(who, dict):
        from luthier.registry import build

        return build("role", {"name": "endpoint", **who}).play("speaker", None)
    if not isinstance(who, Speaker):
        raise RecipeError(
            "a program needs a model: a folder, a Hub name, a URL, or an object with `name`"
            f" and `ask`, not {who!r}"
        )
    return who
