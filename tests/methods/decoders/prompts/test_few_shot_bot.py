"""few_shot_bot: scores are those of a plain pass, dialogues go to their skill, answers are one line."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.errors import RecipeError
from luthier.methods.decoders.prompts.few_shot_bot import FewShotBot, Skill
from luthier.registry import build

WORDS = {
    "animals": ("lynx", "otter", "heron", "stoat"),
    "numbers": ("seven", "forty", "ninety", "eleven"),
    "metals": ("zinc", "cobalt", "nickel", "chrome"),
}


def dialogue(words) -> str:
    return "\n".join(f"User: {word} {word}\nSystem: {word}" for word in words)


SKILLS = {name: Skill(f"Talk of {name}.", (dialogue(words),) * 2) for name, words in WORDS.items()}
BOT = FewShotBot(skills=SKILLS)


@pytest.fixture(scope="module")
def loaded():
    return luthier.load("toy:lm", dtype="float32")


def test_scores_are_the_log_probabilities_of_a_plain_pass(loaded):
    tokenizer, model = loaded.tokenizer, loaded.roles.policy.model
    text = "User: otter otter\n"
    for name, score in BOT.scores(loaded.roles, text).items():
        start = tokenizer.encode(BOT.opening(SKILLS[name]))
        target = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([start + target])).logits[0, len(start) - 1 : -1].float()
        want = logits.log_softmax(-1)[range(len(target)), target].sum()
        assert score == pytest.approx(float(want), abs=1e-3 * len(target))


class Counting:
    """A model that expects what it has read: p(token) is proportional to 1 + how often it came before."""

    def logprobs(self, batch):
        targets, owner = batch.labels[batch.targets].tolist(), batch.owner.tolist()
        out, texts = [], [list(row["start"]) for row in batch.rows]
        for token, k in zip(targets, owner, strict=True):
            out.append(math.log((1 + texts[k].count(token)) / (1000 + len(texts[k]))))
            texts[k].append(token)
        return torch.tensor(out)

    def eval_mode(self):
        return nullcontext()


def test_dialogues_go_to_their_skill():
    """12 dialogues of words that one skill alone has; examples make each of them likelier than none."""
    words: dict[str, int] = {}
    encode = lambda text, **_: [words.setdefault(word, len(words)) for word in text.split()] or [999]
    renderer = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode))
    roles = SimpleNamespace(policy=Counting(), renderer=renderer, device=torch.device("cpu"))
    for name, some in WORDS.items():
        for word in some:
            text = BOT.dialogue({"prompt": f"{word} {word}"}, renderer.tokenizer)
            scores = BOT.scores(roles, text)
            assert max(scores, key=scores.__getitem__) == name
            none = FewShotBot(skills={name: SKILLS[name]}, shots=0)
            assert scores[name] > none.scores(roles, text)[name]


def test_the_answer_is_one_line(loaded):
    bot = FewShotBot(skills={"x": Skill("", ("User: a\nSystem: b\n",))})
    ids = loaded.tokenizer.encode(" one\nUser: two", add_special_tokens=False)
    line = bot.line(loaded.roles, ids, [0])
    assert loaded.roles.renderer.text(line[:-1]).strip() == "one" and line[-1] == 0
    answer = loaded.generate("lynx lynx", decoder=BOT, max_new_tokens=12)
    assert "\n" not in answer.strip()


def test_early_turns_leave_and_prompts_without_skills_are_refused(loaded):
    turns = [{"role": role, "content": f"turn {k}"} for k, role in enumerate(["user", "assistant"] * 20)]
    text = FewShotBot(skills=SKILLS, history=60).dialogue({"prompt": turns}, loaded.tokenizer)
    assert text.endswith("System: turn 39\n") and "turn 0\n" not in text
    assert len(loaded.tokenizer.encode(text)) <= 62
    with pytest.raises(RecipeError, match="at least one skill"):
        build("decoder", {"name": "few_shot_bot", "skills": {}})
