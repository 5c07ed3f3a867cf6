"""A stand-in of a model that answers as a script says, and roles that hold it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from helpers.models import make_tokenizer
from luthier.clock import Clock

Script = Callable[[str, int], str]  # the prompt and the number of the sample -> what is written behind it


def scripted_roles(script: Script) -> SimpleNamespace:
    """Roles whose policy writes what `script` says."""
    tokenizer = make_tokenizer()

    def generate(prompts, n=1, **how):
        assert len(how["seeds"]) == len(prompts)
        written = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            written.append([tokenizer.encode(script(text, k)) for k in range(n)])
        return written

    renderer = SimpleNamespace(
        stop_ids=[1],
        tokenizer=tokenizer,
        prompt=lambda row: tokenizer.encode(row["prompt"]),
        answer=tokenizer.decode,
    )
    return SimpleNamespace(policy=SimpleNamespace(generate=generate), renderer=renderer, clock=Clock())
