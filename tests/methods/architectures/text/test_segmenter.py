"""segmenter: a band of attention, texts that are whole again, noise, few sentences by low rank."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

from helpers.models import make_tokenizer
from helpers.synthesis import nobody
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures.text.segmenter.renderer import with_breaks, without_breaks
from luthier.methods.architectures.text.segmenter.splitting import (
    best_threshold,
    block_starts,
    cut,
    end_probabilities,
)
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build

SIZES = {"vocab_size": 262, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = "It rained all day. we stayed\nNobody came\n\n  The end"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """An encoder of four layers without a head for tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(**SIZES, num_hidden_layers=4, initializer_range=0.2, pad_token_id=0)
    BertForMaskedLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def roles_of(path: str, **settings) -> Roles:
    torch.manual_seed(1)
    architecture = build("architecture", {"name": "segmenter", **settings})
    model = architecture.load(path, dtype=torch.float32).eval()
    architecture.check_network(model)
    renderer = architecture.renderer(make_tokenizer(), model.config)
    return Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)


def texts(*contents: str) -> list[dict]:
    return load_rows([{"text": content} for content in contents]).rows


def test_no_token_beyond_the_lookahead_is_seen(encoder):
    """Through the whole stack: token i + N counts, token i + N + 1 does not."""
    roles = roles_of(encoder, layers=2, lookahead=6)
    model, read = roles.policy.model, roles.policy.architecture.logits
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    ids = torch.randint(10, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    i, ahead = 5, 6
    base = read(model, ids)[0, i]
    beyond, within = ids.clone(), ids.clone()
    beyond[0, i + ahead + 1 :] += 1
    within[0, i + ahead] += 1
    torch.testing.assert_close(read(model, beyond)[0, i], base, atol=1e-6, rtol=0)
    assert (read(model, within)[0, i] - base).abs().max() > 1e-5
    whole = read(model, ids, ahead=24)
    torch.testing.assert_close(whole, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_sft_is_cross_entropy_of_every_token_but_the_last(encoder):
    roles = roles_of(encoder)
    rows = texts(TEXT, "a\nbc")
    batch = roles.batch(rows)
    objective = build("objective", "sft")
    own = objective.loss(roles, batch)
    ids = torch.tensor([roles.renderer.prompt(rows[1])])
    logits = roles.policy.architecture.logits(roles.policy.model, ids)[0]
    first = len(roles.renderer.prefix)
    expected = torch.nn.functional.cross_entropy(
        logits[first : first + 3], torch.tensor([1, 0, 0]), reduction="none"
    )
    torch.testing.assert_close(own[-3:], expected, atol=1e-5, rtol=1e-5)
    policy = roles.policy
    plain = policy.architecture.plain(policy.model, policy.attached, batch)
    torch.testing.assert_close(policy.logprobs(batch), plain, atol=1e-5, rtol=1e-5)


def test_sentences_joined_are_the_text(encoder):
    joined, ends = without_breaks(TEXT)
    assert joined == "It rained all day. we stayed Nobody came The end" and ends == [28, 40]
    assert without_breaks(with_breaks(joined, ends)) == (joined, ends)
    assert without_breaks("一\n二", "") == ("一二", [1])
    roles = roles_of(encoder, layers=2, lookahead=4)
    for block, stride in ((256, 128), (16, 8), (7, 7)):
        values = end_probabilities(roles, joined, block, stride)
        assert len(values) == len(joined)
        for threshold in (0.0001, 0.3, sorted(values)[len(values) // 2], 1.0):
            assert "".join(cut(joined, values, threshold)) == joined
    assert cut("a b  c", [1, 0, 1, 0, 0, 0], 0.5) == ["a ", "b  ", "c"]
    assert block_starts(5, 8, 4) == [0] and block_starts(11, 8, 4) == [0, 3]
    # one block is a plain pass; a token in two blocks that both see all it may see has the same probability
    whole = end_probabilities(roles, joined, 256, 128)
    ids, _ = roles.renderer.tokens(joined)
    head = roles.renderer.prefix
    logits = roles.policy.architecture.logits(
        roles.policy.model, torch.tensor([[*head, *ids, *roles.renderer.suffix]])
    )
    want = logits[0, len(head) : len(head) + len(ids)].softmax(-1)[:, 1]
    torch.testing.assert_close(torch.tensor(whole), want, atol=1e-6, rtol=1e-5)


def test_long_texts_come_in_pieces(encoder):
    roles = roles_of(encoder)
    renderer = roles.policy.architecture.renderer(make_tokenizer(), roles.policy.model.config, max_length=16)
    text = "\n".join("abcdefg" for _ in range(9))
    encoded = renderer.encode_all(texts(text))
    assert not encoded.bad and len(encoded.rows) > 3 and encoded.stats["longest"] <= 2 * 16
    pieces = [without_breaks(row["completions"][0])[0] for row in encoded.rows]
    whole = pieces[0] + "".join(piece[1:] for piece in pieces[1:])
    assert whole.replace(" ", "") == text.replace("\n", "")
    # every second line ends where a piece does: its mark is the first of the next piece
    assert sum(sum(renderer.encode(row).completions[0]) for row in encoded.rows) == 8
    bad = renderer.encode_all([{"id": "0", "prompt": "a", "completions": ["b"]}, *texts("x")]).bad
    assert "rows of `text` alone" in bad[0]["reason"] and "fewer than two tokens" in bad[1]["reason"]


def test_the_checkpoint_says_its_lookahead(encoder, tmp_path):
    model = roles_of(encoder, layers=3, lookahead=9).policy.model
    model.save_pretrained(tmp_path)
    again = build("architecture", "segmenter").load(str(tmp_path))
    assert again.config.lookahead == 9 and again.config.num_hidden_layers == 3
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert build("architecture", "segmenter").suits(again.config)
    other = BertConfig(**SIZES, architectures=["BertForTokenClassification"])
    assert not build("architecture", "segmenter").suits(other)
    assert build("architecture", "segmenter").load(encoder).config.lookahead == 48


def test_a_network_without_a_band_is_refused(encoder):
    roles = roles_of(encoder)
    model = roles.policy.model

    def forward(self, input_ids, attention_mask=None):
        return BertForTokenClassification.forward(self, input_ids=input_ids)

    model.forward = forward.__get__(model)
    with pytest.raises(RecipeError, match="does not attend as a mask"):
        roles.policy.architecture.check_network(model)


def test_a_threshold_is_the_one_with_the_highest_f1():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = (torch.rand(30, generator=generator) * 8).round() / 8
        ends = (torch.rand(30, generator=generator) < 0.3).float()
        threshold, best = best_threshold(values, ends)
        scores = {}
        for some in values.unique().tolist():
            chosen = (values >= some).float()
            scores[some] = float(2 * (chosen * ends).sum() / (chosen.sum() + ends.sum()))
        assert best == pytest.approx(max(scores.values())) and scores[threshold] == pytest.approx(best)


# ------------------------------------------------------------------------------------------------ learning


def sentences(count: int, seed: int, opening: str) -> str:
    """Lines that begin with a word and end with a full stop; no other word begins with its first letter."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [draw.choice(("sea", "red", "old", "man", "bee")) for _ in range(draw.randint(1, 3))]
        lines.append(" ".join([opening, *words]).capitalize() + ".")
    return "\n".join(lines)


def learn(roles: Roles, rows: list[dict], steps: int, parameters) -> None:
    optimizer, objective = torch.optim.Adam(parameters, lr=3e-3), build("objective", "sft")
    for step in range(steps):
        batch = roles.batch([rows[(8 * step + k) % len(rows)] for k in range(8)])
        optimizer.zero_grad()
        objective.loss(roles, batch).mean().backward()
        optimizer.step()


def f1(roles: Roles, rows: list[dict], folder) -> float:
    measured = build("evaluator", "segmentation").run(roles, rows, folder, "after")
    assert measured["boundary_f1"] <= measured["boundary_f1_best"] + 1e-6
    return measured["boundary_f1"]


@pytest.fixture(scope="module")
def taught(encoder) -> dict[str, Roles]:
    """Segmenters that learned clean texts alone, and texts of which a part has no punctuation and case."""
    out = {}
    for name, share in (("clean", 0.0), ("noise", 0.5)):
        rows = texts(*(sentences(3, seed, "the") for seed in range(64)))
        stage = build("stage", {"name": "sentence_noise", "share": share})
        roles = roles_of(encoder, layers=2, lookahead=8)
        learn(roles, list(stage(rows, nobody())), 60, roles.policy.model.parameters())
        out[name] = roles
    return out


@pytest.mark.long
def test_noise_teaches_what_needs_no_punctuation(taught, tmp_path):
    clean = texts(*(sentences(4, seed, "the") for seed in range(100, 110)))
    bare = list(build("stage", {"name": "sentence_noise", "share": 1.0})(clean, nobody()))
    assert f1(taught["clean"], clean, tmp_path) > 0.9 and f1(taught["noise"], clean, tmp_path) > 0.9
    assert f1(taught["noise"], bare, tmp_path) > f1(taught["clean"], bare, tmp_path) + 0.2


@pytest.mark.long
def test_few_sentences_adapt_by_low_rank(taught, tmp_path):
    """Fifty sentences in another style; unloaded, the network is what it was."""
    roles = taught["noise"]
    policy, stage = roles.policy, build("stage", {"name": "sentence_noise", "share": 1.0})
    few = list(stage(texts(*(sentences(5, seed, "quite") for seed in range(10))), nobody()))
    test = list(stage(texts(*(sentences(4, seed, "quite") for seed in range(50, 58))), nobody()))
    before, read = f1(roles, test, tmp_path), policy.architecture.logits
    ids = torch.tensor([roles.renderer.prompt(test[0])])
    with torch.no_grad():
        base = read(policy.model, ids)
    tuner = build("tuner", {"name": "lora", "r": 8, "target_modules": ["query", "value", "dense"]})
    tuned = tuner.attach(policy.model)
    adapted = Roles(Policy(policy.architecture, policy.model, tuned), Clock(), roles.renderer)
    learn(adapted, few, 24, tuned.parameters().values())
    assert f1(adapted, test, tmp_path) > before + 0.2
    with torch.no_grad():
        after = read(policy.model, ids)
        with tuned.merged():
            torch.testing.assert_close(read(policy.model, ids), after, atol=1e-4, rtol=1e-4)
        with tuned.off():
            torch.testing.assert_close(read(policy.model, ids), base, atol=1e-5, rtol=1e-5)
    assert (after - base).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------- noise


def test_noise_leaves_lines_and_rows_of_other_kinds():
    rows = [*texts("Hi, you!\nOK.\n?"), {"id": "p", "prompt": "A.", "completions": ["B."]}]
    stage = build("stage", {"name": "sentence_noise", "share": 1.0})
    first, other = stage(rows, nobody())
    assert first["completions"] == ["hi you\nok\n?"] and other == rows[1]
    dropped = build("stage", {"name": "sentence_noise", "share": 0.0, "drop": 1.0})(rows, nobody())
    assert dropped[0]["completions"] == ["Hi you\nOK\n"]
    copies = build("stage", {"name": "sentence_noise", "copies": ["asr", "social"]})(rows, nobody())
    assert [row["id"].rpartition("/")[2] for row in copies][1:3] == ["asr", "social"] and len(copies) == 4
    assert copies[0] == rows[0] and copies[1]["completions"] == ["hi you\nok\n?"]
    assert copies[2]["completions"][0].startswith("hi") and "\nok" in copies[2]["completions"][0]
