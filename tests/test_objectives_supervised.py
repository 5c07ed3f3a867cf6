"""Supervised objectives, the stages that make their rows, and the evaluators that tell what came of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.formats._base import BadRow
from luthier.methods.tuners._base import Untuned
from luthier.model.load import assemble
from luthier.model.policy import Policy, Roles
from luthier.recipe.recipe import Recipe, terms
from luthier.recipe.validate import DryRunRoles, validate
from luthier.registry import build
from luthier.text.encode import Renderer
from test_objectives import (
    V,
    average,
    batch_of,
    cast,
    gradients,
    loss_of,
    make_rows,
    pair_rows,
    same,
)


@pytest.fixture(scope="module")
def roles(tiny):
    """Roles of a tiny model; everything moves."""
    recipe = Recipe.load({"model": tiny, "tuner": "full", "dtype": "float32"})
    return assemble(recipe, validate(recipe, load([{"prompt": "a", "completion": "b"}]).rows))


# ------------------------------------------------------------------------------------------------ weights


def test_token_weights_count_and_divide():
    rows = make_rows(3, k=1)
    rng = torch.Generator().manual_seed(0)
    weighted = [
        {**r, "token_weights": [torch.rand(len(r["completions"][0]), generator=rng).tolist()]}
        for r in rows[:2]
    ] + rows[2:]
    roles, batch = cast(), batch_of(weighted)
    nll, w = -roles.policy.logprobs(batch).detach(), batch.weights()
    assert w[-len(rows[2]["completions"][0]) :].eq(1).all(), "a row without weights counts whole"
    for normalize, by in (("tokens", len(nll)), ("weights", float(w.sum()))):
        made = build("objective", {"name": "sft", "normalize": normalize})
        assert float(average(made, roles, batch_of(weighted)).detach()) == pytest.approx(
            float((w * nll).sum()) / by, rel=1e-5
        )
    ones = [{**r, "token_weights": [[1.0] * len(r["completions"][0])]} for r in rows]
    torch.testing.assert_close(loss_of("sft", rows=ones), loss_of("sft", rows=rows))
    with pytest.raises(RecipeError, match="learned tokens"):
        batch_of([{**rows[0], "token_weights": [[1.0]]}]).weights()


TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "sum"},
    {"role": "assistant", "content": "four"},
]


def told(turns, **settings) -> tuple[str, dict]:
    """What is learned of a conversation, marked, and the row as training gets it."""
    renderer = Renderer(make_tokenizer())
    (row,) = load([{"messages": turns}], format={"name": "messages", **settings}, max_bad_rows=0.9).rows
    kept, bad, _ = renderer.encode_all([row])
    assert not bad
    return renderer.decode_marked(kept[0]), kept[0]


def test_each_message_can_be_learned_or_not():
    assert told(TURNS)[0].endswith("<|assistant|>⟦hello<|end|>⟧<|user|>sum<|end|><|assistant|>⟦four<|end|>⟧")
    first_off = [{**t, "loss": False} if t["content"] == "hello" else t for t in TURNS]
    assert told(first_off)[0].endswith(
        "<|assistant|>hello<|end|><|user|>sum<|end|><|assistant|>⟦four<|end|>⟧"
    )
    assert (
        told([{**t, "train": False} if t["content"] == "hello" else t for t in TURNS])[0]
        == told(first_off)[0]
    )
    assert (
        told([{**t, "weight": 0} if t["content"] == "hello" else t for t in TURNS])[0] == told(first_off)[0]
    )
    asked = told([{**t, "loss": True} if t["content"] == "sum" else t for t in TURNS])[0]
    assert "⟦hello<|end|><|user|>sum<|end|>⟧" in asked and "⟦<|user|>hi" not in asked
    with pytest.raises(RecipeError, match="not true or false"):
        load([{"messages": [*TURNS[:-1], {**TURNS[-1], "loss": "perhaps"}]}], max_bad_rows=0)


def test_the_whole_conversation_where_it_is_asked_for():
    marked, row = told(TURNS, assistant_only_loss=False)
    assert row["prompt"] == [] and marked.replace("⟦", "").replace("⟧", "").count("<|end|>") == 5
    assert all(
        f"{word}" in "".join(p.split("⟧")[0] for p in marked.split("⟦")[1:])
        for word in ("be kind", "hi", "hello", "sum", "four")
    )
    kept_out = told([{**TURNS[0], "loss": False}, *TURNS[1:]], assistant_only_loss=False)[0]
    assert "⟦" in kept_out and "be kind" not in "".join(p.split("⟧")[0] for p in kept_out.split("⟦")[1:])


def test_a_message_may_count_half():
    marked, row = told([{**t, "loss_scale": 0.5} if t["content"] == "hello" else t for t in TURNS])
    assert row["token_weights"] == [[0.5] * 6 + [1.0] * 5]
    assert "token_weights" not in told(TURNS)[1]
    renderer = Renderer(make_tokenizer())
    again = renderer.encode_all([row, row])  # from the cache
    assert [r["token_weights"] for r in again.rows] == [row["token_weights"]] * 2
    cut = Renderer(make_tokenizer(), max_length=len(renderer.encode(row)) - 2).encode_all(
        [{k: v for k, v in row.items() if k != "token_weights"}]
    )
    assert cut.rows[0]["token_weights"] == [[0.5] * 6 + [1.0] * 3]


def test_completions_may_share_a_beginning_that_is_not_learned():
    renderer = Renderer(make_tokenizer())
    text = {"id": "a", "prompt": "2+2*3=", "prefix": "2*3=6\n", "completions": ["2+6=8", "2+6=9"]}
    assert renderer.decode_marked(text) == "2+2*3=2*3=6\n⟦2+6=8<|end|>⟧\n---\n⟦2+6=9<|end|>⟧"
    chat = {**text, "prompt": [{"role": "user", "content": "2+2*3="}]}
    assert (
        renderer.decode_marked(chat)
        == "<|user|>2+2*3=<|end|><|assistant|>2*3=6\n⟦2+6=8<|end|>⟧\n---\n⟦2+6=9<|end|>⟧"
    )
    assert renderer.prompt(chat) == renderer.encode(chat).prompt, "writing goes on from the prefix"
    with pytest.raises(BadRow, match="prefix"):
        Renderer(make_tokenizer(), encoder=True).encode(text)


# ------------------------------------------------------------------------------------------------ masked thought


def at_step(step: int, total: int, **others) -> Roles:
    made = cast(**others)
    made.clock.step, made.clock.total = step, total
    return made


def test_masked_thought_without_masks_is_sft():
    for spec, step in (({"name": "masked_thought", "mask_probability": 0.0}, 5), ("masked_thought", 0)):
        roles, batch = at_step(step, 10), batch_of(make_rows(3, k=1))
        assert torch.equal(build("objective", spec).hidden(roles, batch), batch.ids)
        torch.testing.assert_close(
            loss_of(spec, roles, make_rows(3, k=1)), loss_of("sft", rows=make_rows(3, k=1))
        )


def test_what_is_masked_and_how_much():
    rows = make_rows(200, k=1)
    for step, total in ((10, 60), (40, 60), (59, 60)):
        roles, batch = at_step(step, total), batch_of(rows)
        made = build("objective", {"name": "masked_thought", "mask_probability": 0.3})
        read = made.hidden(roles, batch)
        assert torch.equal(read[~batch.supervised], batch.ids[~batch.supervised]), "the question is untouched"
        hidden = (read != batch.ids)[batch.supervised].float()
        p = 0.3 * min(1.0, step / total / (2 / 3))
        assert made.rate(roles.clock) == pytest.approx(p)
        assert abs(float(hidden.mean()) - p) < 3 * math.sqrt(p * (1 - p) / len(hidden)) + 1e-9
    again = build("objective", {"name": "masked_thought", "mask_probability": 0.3}).hidden(
        at_step(60, 60), batch
    )
    assert not torch.equal(read, again), "another step hides others"
    every = build("objective", {"name": "masked_thought", "mask_probability": 1.0, "warmup": 0.0})
    assert (every.hidden(at_step(0, 10), batch)[batch.supervised] == 0).all(), (
        "all of it: the padding token stands for the mask"
    )


def small_llama(seed: int = 0) -> Roles:
    net = make_llama(
        seed,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    roles = cast()
    policy = Policy(Causal(), net, Untuned(net))
    return Roles(policy, Clock(total=1), roles.renderer)


def fit(roles: Roles, objective, rows: list[dict], steps: int, lr: float = 3e-3, size: int = 32) -> None:
    """Adam on batches of the rows."""
    adam = torch.optim.Adam(roles.policy.model.parameters(), lr=lr)
    roles.clock.total = steps
    roles.policy.train()
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        roles.clock.step = step
        some = torch.randint(len(rows), (size,), generator=rng).tolist()
        adam.zero_grad()
        average(objective, roles, batch_of([rows[i] for i in some])).backward()
        adam.step()
    roles.policy.eval()


def test_masked_thought_reads_past_what_is_wrong():
    """Every step of a chain says the question's digit again: it can be copied from the step before, or from
    the question.
    """
    rows = [{"id": str(a), "prompt": [20 + a], "completions": [[20 + a] * 5]} for a in range(16)]
    losses = {}
    for name in ("sft", {"name": "masked_thought", "warmup": 0.3, "replace": "random"}):
        roles = small_llama()
        fit(roles, build("objective", name), rows, steps=60, size=16)
        batch = batch_of(rows)
        # the steps before say another digit
        wrong = torch.where(batch.supervised, 20 + (batch.ids - 20 + 7) % 16, batch.ids)
        logprobs = roles.policy.logprobs(batch.view(ids=wrong)).detach()
        losses[str(name)] = -float(logprobs[batch.place > 0].mean())
    sft, masked = losses.values()
    assert masked < sft - 0.1, losses


# ------------------------------------------------------------------------------------------------ NEFTune


def test_neftunes_noise_is_bounded_and_only_in_training():
    roles, rows = cast(reference=None), make_rows(3, k=2)
    made, batch = Causal(neftune_noise_alpha=5.0), batch_of(rows)
    torch.manual_seed(0)
    noise = made.noise(batch, 16)
    for s, places in enumerate(batch.segments()):
        row = batch.rows[int(batch.segment[places][0]) // 3]
        longest = max(map(len, row["completions"])) if s % 3 == 0 else len(row["completions"][s % 3 - 1])
        bound = 5.0 / math.sqrt((len(row["prompt"]) + longest) * 16)
        assert 0.5 * bound < float(noise[places].abs().max()) <= bound
    plain = roles.policy.logprobs(batch_of(rows)).detach()
    roles.policy.architecture = made
    torch.testing.assert_close(roles.policy.logprobs(batch_of(rows)).detach(), plain)
    roles.policy.train()
    noisy = []
    for layout in (made, Causal(neftune_noise_alpha=5.0, packing=False, share_prompts=False)):
        torch.manual_seed(7)
        roles.policy.architecture = layout
        noisy.append(roles.policy.logprobs(batch_of(rows)).detach())
    assert not torch.allclose(noisy[0], plain, atol=1e-3)
    torch.testing.assert_close(*noisy, atol=1e-5, rtol=1e-5)


def test_neftune_at_the_top_of_a_recipe():
    recipe = Recipe.load({"neftune_noise_alpha": 5, "data": []})
    assert recipe.methods()["architecture"].neftune_noise_alpha == 5


# ------------------------------------------------------------------------------------------------ intuitive fine-tuning


def test_ift_without_its_two_parts_is_sft():
    found = []
    for spec in ({"name": "ift", "lam": 0.0, "gamma": 0.0}, "sft"):
        roles = cast()
        average(build("objective", spec), roles, batch_of(make_rows(3, k=1))).backward()
        found.append(gradients(roles.policy.model))
    same(*found)


def test_discounted_sums():
    batch = batch_of(make_rows(3, k=2))
    values = torch.rand(len(batch.owner), generator=torch.Generator().manual_seed(0))
    for gamma in (1.0, 0.9, 0.0):
        want = [
            sum(
                gamma ** int(j - i) * float(values[j])
                for j in range(i, len(values))
                if batch.owner[j] == batch.owner[i]
            )
            for i in range(len(values))
        ]
        torch.testing.assert_close(batch.suffix(values, gamma), torch.tensor(want))


def test_ift_by_hand_in_two_passes():
    rows, roles, passes = make_rows(2, k=1), cast(), []
    net = roles.policy.model
    roles.policy.logprobs(batch_of(rows))  # what the network does to its logits is measured once
    net.register_forward_hook(lambda *_: passes.append(1))
    batch = batch_of(rows)
    got = build("objective", {"name": "ift", "lam": 0.3, "gamma": 0.9}).loss(roles, batch).detach()
    assert len(passes) == 2
    table, want = net.get_input_embeddings(), []
    with torch.no_grad():
        for row in rows:
            ids, n = torch.tensor([row["prompt"] + row["completions"][0]]), len(row["prompt"])
            guess = net(ids).logits[0, n - 1 : -1].argmax(-1)
            embeds = table(ids)
            assert torch.equal(embeds[:, :n], table(ids[:, :n]))
            embeds[0, n:] = 0.7 * embeds[0, n:] + 0.3 * table(guess)
            cost = F.cross_entropy(
                net(inputs_embeds=embeds).logits[0, n - 1 : -1], ids[0, n:], reduction="none"
            )
            weight = torch.stack(
                [sum(0.9 ** (j - i) * cost[j] for j in range(i, len(cost))) for i in range(len(cost))]
            )
            want.append(weight / weight.mean() * cost)
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ f-divergence SFT


def test_f_sft_is_sft_where_the_curve_is_straight():
    found = []
    for spec, times in (({"name": "f_sft", "beta": 0.3, "divergence": "total_variation"}, 1.0), ("sft", 0.3)):
        roles = cast()
        (times * average(build("objective", spec), roles, batch_of(make_rows(3, k=1)))).backward()
        found.append(gradients(roles.policy.model))
    same(*found)


def test_f_sft_weighs_by_the_slope_of_its_curve():
    rows, roles = make_rows(3, k=1), cast()
    made = build("objective", {"name": "f_sft", "beta": 0.3, "divergence": "chi2", "level": "sequence"})
    batch = batch_of(rows)
    r = 0.3 * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch))
    grads = torch.autograd.grad(
        made.loss(roles, batch).sum(), list(roles.policy.model.parameters()), retain_graph=True
    )
    want = torch.autograd.grad(-(r * (1 - r.detach() / 2)).sum(), list(roles.policy.model.parameters()))
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert made.count(batch) == 3


def test_chi2_stays_nearer_to_the_reference():
    from luthier.toy import bandit

    base, kl = torch.randn(20, generator=torch.Generator().manual_seed(0)), {}
    rows = bandit.pulled([[3], [5], [3]], torch.ones(20))
    for divergence in ("total_variation", "chi2"):
        policy = bandit.Arms(base)
        roles, sgd = bandit.roles_of(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
        for _ in range(60):
            sgd.zero_grad()
            bandit.average(
                build("objective", {"name": "f_sft", "beta": 0.5, "divergence": divergence}), roles, rows
            ).backward()
            sgd.step()
        logp = policy.log_policy().detach()
        kl[divergence] = float((logp.exp() * (logp - base.log_softmax(-1))).sum())
    assert 0 < kl["chi2"] < kl["total_variation"]


def test_values_correlate_where_they_are_values():
    from luthier.methods.evaluators.representation.implicit_value import correlation

    reward = torch.tensor([0.0, 1.0, 0.5, -1.0])
    # a table whose log-sum-exp is a line of the reward
    q = torch.stack([reward * 2 + 1 - math.log(3)] * 3, 1)
    assert correlation(q.logsumexp(1), reward) == pytest.approx(1.0) and correlation(
        -q.logsumexp(1), reward
    ) == pytest.approx(-1.0)
    assert correlation(torch.ones(4), reward) is None


def test_implicit_value_is_measured(roles, tmp_path):
    rows = [
        {"id": str(i), "prompt": f"{i}", "completions": ["a", "bc"], "scores": [float(i), -float(i)]}
        for i in range(4)
    ]
    with torch.no_grad():
        out = build("evaluator", "implicit_value").run(roles, rows, tmp_path, "after")
    assert set(out) == {"value_correlation", "value_correlation_last"} and all(
        -1 <= v <= 1 for v in out.values()
    )


# ------------------------------------------------------------------------------------------------ faults in code


CODE = [  # right, wrong, what of the right one differs
    ("a = b + 1\n", "a = b - 1\n", "+"),
    ("x = 1\nreturn x\n", "x = 1\nreturn y\n", "x"),
    ("for i in range(n):\n", "for i in range(m):\n", "n"),
    ("if a < b:\n    pass\n", "if a > b:\n    pass\n", "<"),
    ("return [1]\n", "return [1]\n", ""),
]


@pytest.mark.parametrize("right, wrong, differs", CODE)
def test_masks_are_the_difference(roles, right, wrong, differs):
    row = {"id": "a", "prompt": "# task\n", "completions": [wrong, right], "scores": [0.0, 1.0]}
    (out,) = list(build("stage", "diff_masks")([row], roles))
    ids = roles.policy.architecture.encode(row, roles.renderer).completions[1]
    line, token = out["line_mask"][1], out["token_mask"][1]
    assert len(line) == len(token) == len(ids)
    assert roles.text([t for t, m in zip(ids, token, strict=True) if m]) == differs
    at = right.rfind(differs) if differs else -1
    lined = next(
        (
            text
            for text in right.splitlines(True)
            if differs and right.index(text) <= at < right.index(text) + len(text)
        ),
        "",
    )
    assert roles.text([t for t, m in zip(ids, line, strict=True) if m]) == lined


def fait_rows() -> list[dict]:
    rows = pair_rows()
    rng = torch.Generator().manual_seed(1)
    draw = lambda: [
        [[float(torch.rand((), generator=rng) > 0.5) for _ in c] for c in r["completions"]] for r in rows
    ]  # noqa: E731
    return [{**r, "line_mask": x, "token_mask": y} for r, x, y in zip(rows, draw(), draw(), strict=True)]


def test_fait_without_weights_is_sft_on_the_right_ones():
    rows = fait_rows()
    assert torch.equal(
        loss_of({"name": "fait", "a": 0.0, "b": 0.0}, rows=rows), loss_of("chosen_sft", rows=rows)
    )


def test_faits_weights_are_constants_and_grow_with_confusion():
    rows, roles = fait_rows(), cast()
    made, batch = build("objective", "fait"), batch_of(rows)
    weights = made.weights(roles, batch)
    assert not weights.requires_grad and (weights >= 1).all()
    loss = made.loss(roles, batch).sum()
    want = (weights[made.chosen(batch)] * -roles.policy.logprobs(batch)[made.chosen(batch)]).sum()
    torch.testing.assert_close(loss, want)
    one = {
        **rows[0],
        "line_mask": [[0.0] * len(c) for c in rows[0]["completions"]],
        "token_mask": [[1.0] * len(c) for c in rows[0]["completions"]],
    }
    turned = {**one, "scores": one["scores"][::-1]}
    found = {}
    for row in (one, turned):
        b = batch_of([row])
        w = made.weights(roles, b)
        found[b.metrics["gap"][0] < 0] = float(w.max())
    assert found[True] > found[False], "the weight is larger where the model prefers the wrong one"


def test_fait_learns_where_programs_differ():
    """Everything but one token is common to right and wrong: how likely that token becomes, at equal
    steps.
    """
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i in range(48):
        head = torch.randint(3, 12, (1,), generator=rng).tolist()
        common = torch.randint(3, 12, (10,), generator=rng).tolist()
        right, wrong = 20 + head[0] % 4, 30
        mask = [[0.0] * 5 + [1.0] + [0.0] * 5] * 2
        said = [[*common[:5], x, *common[5:]] for x in (right, wrong)]
        rows.append(
            {
                "id": str(i),
                "prompt": head,
                "completions": said,
                "scores": [1.0, 0.0],
                "line_mask": mask,
                "token_mask": mask,
            }
        )
    found = {}
    for name in ("chosen_sft", {"name": "fait", "b": 3.0}):
        roles = small_llama()
        fit(roles, build("objective", name), rows, steps=25, size=16)
        batch = batch_of(rows)
        at = (batch.place == 5) & (batch.owner % 2 == 0)
        found[str(name)] = float(roles.policy.logprobs(batch).detach()[at].mean())
    fait, sft = found.pop("{'name': 'fait', 'b': 3.0}"), found.pop("chosen_sft")
    assert fait > sft + 0.05


# ------------------------------------------------------------------------------------------------ tool calls


def declared(name: str, *parameters: str) -> dict:
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {p: {} for p in parameters}},
        },
    }


@pytest.mark.parametrize(
    "said, score",
    [
        ("no call", -2.0),
        ('{"name": "fly", "arguments": {}}', -2.0),
        ('{"name": "get_time", "arguments": {}}', -1.5),
        ('{"name": "get_weather", "arguments": {"zip": 1, "day": "x"}}', -1.8),
        ('{"name": "get_weather", "arguments": {"zip": 1, "day": "x", "city": "Rome"}}', -1.3),
        ('{"name": "get_weather", "arguments": {"zip": 1}}', -1.3),
        ('{"name": "get_weather", "arguments": {"day": "x"}}', -1.0),
        ('{"name": "get_weather", "arguments": {"zip": 1, "city": "Rome"}}', -0.8),
        ('{"name": "get_weather", "arguments": {"day": "x", "city": "Rome"}}', -0.5),
        ('{"name": "get_weather", "arguments": {}}', -0.5),
        ('{"name": "get_weather", "arguments": {"city": "Oslo"}}', -0.25),
        ('So: <tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>', 1.0),
    ],
)
def test_a_tool_call_is_judged_by_its_first_fault(said, score):
    row = {"id": "a", "tools": [declared("get_weather", "city", "day"), declared("get_time")]}
    row["answer"] = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert build("reward", "tool_call").scores(row, [said]) == [score]


def test_failed_calls_are_read_and_not_learned():
    call = lambda c: {"role": "assistant", "content": c}  # noqa: E731
    turns = [
        call("one"),
        {"role": "tool", "content": "NameError: name 'x' is not defined"},
        call("two"),
        {"role": "tool", "content": "4"},
        call("4"),
    ]
    row = {"id": "a", "prompt": [{"role": "user", "content": "2+2"}], "completions": [turns]}
    (out,) = build("stage", "mask_failed_calls")([row], DryRunRoles())
    assert [t.get("loss") for t in out["completions"][0] if t["role"] == "assistant"] == [False, None, None]
    assert "⟦two" in Renderer(make_tokenizer()).decode_marked(out) and "⟦one" not in Renderer(
        make_tokenizer()
    ).decode_marked(out)
    assert not build("stage", "mask_failed_calls")([{**row, "completions": [turns[:2]]}], DryRunRoles())


@pytest.fixture(scope="module")
def calling(roles):
    """The same roles, with a chat template that writes tool calls."""
    made = copy.copy(roles)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    made.renderer = Renderer(tokenizer, chat_template="plain")
    return made


def tool_row(tools: list[dict], arguments: dict) -> dict:
    said = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
    }
    return {"id": "a", "prompt": [{"role": "user", "content": "?"}], "completions": [[said]], "tools": tools}


def test_key_tokens_of_a_call(calling):
    stage = build("stage", "key_tokens")
    row = tool_row([declared("get_weather", "city"), declared("get_time")], {"city": "Rome"})
    (out,) = list(stage([row], calling))
    encoded = calling.policy.architecture.encode(row, calling.renderer)
    learned = [t for t, m in zip(encoded.completions[0], encoded.supervised[0], strict=True) if m]
    weights = out["token_weights"][0]
    keys = [calling.text([t]) for t, w in zip(learned, weights, strict=True) if w > 1]
    assert keys == ["w", "c", "R"], "where the name parts from get_time, the parameter, its value"
    w = min((len(learned) - 3) / 3, 9.0)
    assert sum(weights) == pytest.approx(len(learned) - 3 + 3 * w)


def test_one_tool_without_parameters_is_plain_sft(calling):
    row = tool_row([declared("get_weather")], {})
    (out,) = list(build("stage", "key_tokens")([row], calling))
    assert set(out["token_weights"][0]) == {1.0}
    made = build("objective", {"name": "sft", "normalize": "weights"})
    with torch.no_grad():
        a, b = (average(made, calling, calling.batch([r])) for r in (row, out))
    torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ answers and rationales


def repair_rows(n: int = 6) -> list[dict]:
    return [{**r, "tasks": ["answer", "rationale"]} for r in make_rows(n, k=2)]


def test_morepair_is_the_weighted_mean_of_two_likelihoods():
    rows, roles = repair_rows(), cast()
    one, other = (
        [{**r, "completions": [r["completions"][k]], "scores": [0.0]} for r in rows] for k in range(2)
    )
    apart = [float(average(build("objective", "sft"), roles, batch_of(r)).detach()) for r in (one, other)]
    for beta in (1.0, 0.3):
        got = float(
            average(build("objective", {"name": "morepair", "beta": beta}), roles, batch_of(rows)).detach()
        )
        assert got == pytest.approx((apart[0] + beta * apart[1]) / (1 + beta), rel=1e-5)
    found = []
    for objective, some in (
        (build("objective", {"name": "morepair", "beta": 0.0}), rows),
        (build("objective", "sft"), one),
    ):
        fresh = cast()
        average(objective, fresh, batch_of(some)).backward()
        found.append(gradients(fresh.policy.model))
    same(*found)


def test_morepair_learns_both():
    rows, roles = repair_rows(12), small_llama()
    tasks = [build("objective", {"name": "task_sft", "task": t}) for t in ("answer", "rationale")]
    measure = lambda: [float(average(t, roles, batch_of(rows)).detach()) for t in tasks]  # noqa: E731
    before = measure()
    fit(roles, build("objective", "morepair"), rows, steps=15, size=8)
    assert all(b < a - 0.1 for a, b in zip(before, measure(), strict=True))


def test_a_rationale_becomes_a_second_completion():
    row = {"id": "a", "prompt": "fix: ", "completions": ["x = 1"], "rationale": "x was 2", "scores": [1.0]}
    stage = build("stage", {"name": "rationale", "before": "# "})
    (out,) = stage([row, {**row, "rationale": ""}], DryRunRoles())
    assert (
        out["completions"] == ["x = 1", "# x was 2"]
        and out["tasks"] == ["answer", "rationale"]
        and "scores" not in out
    )


# ------------------------------------------------------------------------------------------------ questions about labels


def test_yes_no_asks_about_every_label():
    rows = [
        {"id": f"r{i}", "prompt": f"text {i}\n", "completions": ["good" if i % 3 else "bad"]}
        for i in range(9)
    ]
    questions = {"good": ["Is it good?", "Is it liked?"], "bad": ["Is it bad?"]}
    stage = {"name": "yes_no", "questions": questions, "task": "films"}
    out = build("stage", stage)(rows, DryRunRoles())
    assert len(out) == 9 * 3 and len({r["id"] for r in out}) == 27
    assert all(
        (r["completions"] == ["yes"]) == (r["asked"] == ("good" if int(r["id"][1]) % 3 else "bad"))
        for r in out
    )
    even = build("stage", {**stage, "balance": True, "cap": 40})(rows, DryRunRoles())
    assert len(even) == 40 and len({r["id"] for r in even}) == 40
    assert sum(r["completions"] == ["yes"] for r in even) == pytest.approx(20, abs=2)
    other = [{**r, "task": "books"} for r in out]
    kept = build("stage", {"name": "groups", "drop": ["books"]})([*out, *other], DryRunRoles())
    held = build("stage", {"name": "groups", "keep": ["books"]})([*out, *other], DryRunRoles())
    assert {r["task"] for r in kept} & {r["task"] for r in held} == set() and len(kept) == len(held) == 27


def test_auc_is_the_share_of_pairs_in_order():
    from luthier.methods.evaluators.quality.yes_no_auc import auc

    assert auc(
        torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    ) == pytest.approx(0.75)
    assert (
        auc(torch.tensor([0.5, 0.5]), torch.tensor([True, False])) == 0.5
        and auc(torch.ones(2), torch.tensor([True, True])) is None
    )
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    scores, truth = torch.rand(50, generator=rng).round(decimals=1), torch.rand(50, generator=rng) > 0.4
    assert auc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores))


def test_meta_tuning_answers_questions_it_was_not_tuned_on(roles, tmp_path):
    """Is the text one of these two words? Four pairs of words are asked about only afterwards; each word is
    known from others.
    """
    rng, pairs = torch.Generator().manual_seed(0), [(a, b) for a in range(8) for b in range(a)]
    held = [(1, 0), (3, 2), (6, 4), (7, 5)]

    def row(i: int, asked: tuple[int, int]) -> dict:
        word = int(torch.randint(8, (1,), generator=rng))
        if torch.rand((), generator=rng) > 0.5:
            word = asked[i % 2]
        return {
            "id": str(i),
            "prompt": [20 + asked[0], 20 + asked[1], 3, 20 + word],
            "completions": [[5 if word in asked else 6]],
        }

    seen = [p for p in pairs if p not in held]
    tuned, asked = (
        [row(i, seen[i % len(seen)]) for i in range(900)],
        [row(i, held[i % 4]) for i in range(120)],
    )
    small = small_llama(3)  # of six seeds it had the widest margin however sums were rounded (0.94 to 1)

    def measure() -> float:
        from luthier.methods.evaluators.quality.yes_no_auc import auc

        batch = batch_of([{**r, "completions": [[5], [6]]} for r in asked])
        with torch.no_grad():
            yes = batch.sums(small.policy.logprobs(batch)).view(-1, 2).softmax(-1)[:, 0]
        return auc(yes, torch.tensor([r["completions"] == [[5]] for r in asked]))

    before = measure()
    fit(small, build("objective", "sft"), tuned, steps=400, lr=1.5e-3)
    assert before < 0.65 and measure() > 0.8
    words = [
        {"id": f"{i}", "prompt": f"{w}\n", "completions": [w]} for i, w in enumerate(("good", "bad", "good"))
    ]
    rows = build("stage", {"name": "yes_no", "questions": {"good": ["Good?", "Fine?"]}})(words, DryRunRoles())
    with torch.no_grad():
        out = build("evaluator", "yes_no_auc").run(roles, rows, tmp_path, "after")
    assert set(out) == {"auc", "auc_ensemble"} and all(0 <= v <= 1 for v in out.values())


# ------------------------------------------------------------------------------------------------ answers alone


def test_response_only_shows_no_question():
    renderer = Renderer(make_tokenizer())
    text = {"id": "a", "prompt": "what is 2+2?", "completions": ["4"]}
    turns = {
        "id": "b",
        "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "2+2?"}],
        "completions": ["4"],
    }
    one, two = build("stage", "response_only")([text, turns], DryRunRoles())
    assert renderer.decode_marked(one) == "<|user|><|end|><|assistant|>⟦4<|end|>⟧"
    assert renderer.decode_marked(two) == "<|system|><|end|><|user|><|end|><|assistant|>⟦4<|end|>⟧"


def test_response_ranking(roles, tmp_path):
    from luthier.methods.evaluators.quality.response_ranking import ResponseRanking

    rows = [{"id": str(i), "prompt": f"say {w} ", "completions": [w * 3]} for i, w in enumerate("abcdef")]
    tuned = copy.copy(roles)
    net = make_llama(seed=1)
    tuned.policy = Policy(Causal(), net, Untuned(net))
    with torch.no_grad():
        before = ResponseRanking().run(tuned, rows, tmp_path, "before")["response_ranking"]
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        adam.zero_grad()
        average(terms("sft"), tuned, tuned.batch(rows)).backward()
        adam.step()
    with torch.no_grad():
        assert ResponseRanking().run(tuned, rows, tmp_path, "after")["response_ranking"] == 1.0 >= before
    assert ResponseRanking().run(tuned, rows[:1], tmp_path, "after") == {}
