"""A dictionary learned from texts of two languages, and what code-switching by it is worth."""

from __future__ import annotations

import json
import random

import pytest
import torch

import luthier
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.stages.augment.code_switch.translations import learned, rotation, vectors
from luthier.registry import build
from luthier.toy.tasks import language

WORDS = 60


def texts(n: int, seed: int) -> list[list[int]]:
    """Chains of words, some of them frequent, each word with its own few successors."""
    grammar, rng = random.Random(0), random.Random(seed)
    after = [[grammar.randrange(WORDS) for _ in range(4)] for _ in range(WORDS)]
    out = []
    for _ in range(n):
        text = [min(int(rng.paretovariate(0.8)) - 1, WORDS - 1)]
        for _ in range(7):
            text.append(
                rng.choice(after[text[-1]])
                if rng.random() < 0.8
                else min(int(rng.paretovariate(0.8)) - 1, WORDS - 1)
            )
        out.append(text)
    return out


def said(texts: list[list[int]], language: str, shared: int = 0) -> list[list[str]]:
    """Word w is w5 in one language, v30 in another, and 5 in both where it is shared."""
    other = random.Random(5).sample(range(WORDS), WORDS)
    return [
        [str(w) if w < shared else f"{language}{w if language == 'w' else other[w]}" for w in text]
        for text in texts
    ]


def hits(known: dict[str, list[str]], shared: int = 0) -> float:
    right = dict(
        zip(said([[*range(WORDS)]], "w", shared)[0], said([[*range(WORDS)]], "v", shared)[0], strict=True)
    )
    return sum(t[0] == right[w] for w, t in known.items()) / len(known)


def test_words_of_pairs_are_found_whatever_their_order():
    a, b = said(texts(200, 1), "w"), [t[::2] + t[1::2] for t in said(texts(200, 1), "v")]
    there, back = learned(a, b, Clock().rng, pairs=True, k=2)
    assert hits(there) > 0.95 and all(len(t) == 2 for t in there.values())
    assert sum(w in back[t[0]][:1] for w, t in there.items()) > 0.95 * len(there)
    assert (there, back) == learned(a, b, Clock().rng, pairs=True, k=2)


def test_words_of_texts_that_are_no_pairs_are_found_from_what_both_write_alike():
    a, b = said(texts(1500, 1), "w", 10), said(texts(1500, 2), "v", 10)
    there, _ = learned(a, b, Clock().rng, window=3)
    assert hits(there, 10) > 0.8


def test_a_rotation_is_found_and_vectors_tell_words_by_their_company():
    rng = torch.Generator().manual_seed(0)
    X, Q = torch.randn(40, 8, generator=rng), torch.linalg.qr(torch.randn(8, 8, generator=rng)).Q
    torch.testing.assert_close(rotation(X, X @ Q), Q, atol=1e-5, rtol=0)
    company = [["a", "x"], ["a", "y"], ["b", "x"], ["b", "y"], ["c", "z"]] * 5
    V = vectors(company, ["a", "b", "c", "x", "y", "z"], 4, 2, rng)
    V = V / V.norm(dim=1, keepdim=True)
    assert V[0] @ V[1] > 0.99 and (V[0] @ V[2]).abs() < 0.01


def test_nothing_is_learned_of_too_little():
    assert learned([["a"]], [["b"]], Clock().rng) == ({}, {})


class Nobody:
    def __init__(self):
        self.clock, self.told = Clock(), []

    def warn(self, sentence: str) -> None:
        self.told.append(sentence)


def velmi(n: int = 200) -> list[dict]:
    """Pairs of English and Velmi, whose words stand in another order."""
    rows = language.rows("new", n)
    return [
        {
            "id": i,
            "prompt": r["prompt"].split("\n")[0].removeprefix("English: "),
            "completions": [r["answer"]],
        }
        for i, r in enumerate(rows)
    ]


def test_code_switching_learns_its_dictionary_and_writes_both_languages():
    nobody, rows = Nobody(), velmi()
    made = build("stage", {"name": "code_switch", "dictionary": "learn", "neighbours": 1})(rows, nobody)
    assert len(made) == 2 * len(rows) and len({r["id"] for r in made}) == len(made)
    assert [made[0]["completions"][0], made[1]["completions"][0]] == [
        rows[0]["prompt"],
        rows[0]["completions"][0],
    ]
    assert "words are learned" in nobody.told[0]
    right = changed = total = 0
    for row, to in zip(
        made, [language.TO_VELMI, {v: k for k, v in language.TO_VELMI.items()}] * len(rows), strict=True
    ):
        for was, now in zip(row["completions"][0].split(" "), row["prompt"].split(" "), strict=True):
            total += 1
            changed += was != now
            right += was != now and was in to and to[was] == now
    assert changed / total == pytest.approx(0.35, abs=0.03)
    assert right > 0.6 * changed, "plurals and articles apart, words are exchanged for their translations"


def test_code_switching_of_two_sources_and_what_is_refused():
    rows = [
        {"id": f"a{i}", "prompt": "", "completions": [" ".join(t)], "source": "a"}
        for i, t in enumerate(said(texts(300, 1), "w", 10))
    ]
    rows += [
        {"id": f"b{i}", "prompt": "", "completions": [" ".join(t)], "source": "b"}
        for i, t in enumerate(said(texts(300, 2), "v", 10))
    ]
    stage = build("stage", {"name": "code_switch", "dictionary": "learn", "languages": ["a", "b"]})
    made = stage(rows, Nobody())
    assert [r["id"] for r in made] == [r["id"] for r in rows] and any(
        w[0] == "v" for w in made[0]["prompt"].split(" ")
    )
    with pytest.raises(RecipeError, match="there are none"):
        stage(rows[:300], Nobody())
    with pytest.raises(RecipeError, match="dictionary: learn"):
        build("stage", {"name": "code_switch", "languages": ["a", "b"]})


def seq2seq(folder) -> str:
    """A small T5 to which a word is a token."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", *(f"{side}{i}" for side in "wv" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    shape = dict(
        vocab_size=len(words), d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    t.T5ForConditionalGeneration(
        t.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ).save_pretrained(folder)
    t.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.long
def test_restoring_before_translating_helps_and_brings_languages_together(tmp_path):
    pairs = [
        {"prompt": " ".join(a), "completion": " ".join(b)}
        for a, b in zip(said(texts(340, 1), "w"), said(texts(340, 1), "v"), strict=True)
    ]
    base = {
        "model": seq2seq(tmp_path / "model"),
        "data": pairs[:300],
        "eval_data": pairs[300:],
        "tuner": "full",
        "dtype": "float32",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "evaluate": ["loss"],
        "save_steps": 1000,
    }
    alone = luthier.tune({**base, "max_steps": 100}, folder=tmp_path / "alone")
    first = {"stages": [{"name": "code_switch", "dictionary": "learn", "neighbours": 1}], "max_steps": 150}
    both = luthier.tune({**base, "plan": [first, {"max_steps": 100}]}, folder=tmp_path / "both")
    assert both.after["loss"] < alone.after["loss"]

    def apart(folder: str) -> float:
        """How far the encoder keeps the two texts of a pair from each other, beside how far it keeps texts
        that are no pair.
        """
        loaded = luthier.load(folder, dtype="float32")
        model, tokenizer = loaded.roles.policy.model, loaded.roles.renderer.tokenizer
        with torch.no_grad():
            read = lambda s: model.get_encoder()(**tokenizer(s, return_tensors="pt")).last_hidden_state.mean(
                1
            )[0]
            a, b = (torch.stack([read(p[side]) for p in pairs[300:]]) for side in ("prompt", "completion"))
        far = torch.cdist(a, b)
        return float(far.diagonal().mean() / far.mean())

    stage_one = json.loads((tmp_path / "both" / "report.json").read_text())["runs"][0]
    assert apart(stage_one) < apart(base["model"])
