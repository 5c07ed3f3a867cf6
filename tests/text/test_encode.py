"""Rows to token lists: BOS and EOS, boundaries, chat templates, what is learned, what is cut."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from helpers.paths import DATA
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.text.chat import Chat
from luthier.text.encode import Renderer
from luthier.text.turns import Rewrites

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


# As Qwen3: thinking is shown in the last turn only, empty where there is none.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\n<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
        {{- m.content + '<|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And the sky über Köln?"},
    {"role": "assistant", "content": "Blue, sometimes grey."},
]


CHAT = {"id": "talk", "prompt": TALK[:2], "completions": [TALK[2:]]}


def trained(bos=False, eos=False, template=None, words=True, **more):
    """A byte-level BPE tokenizer of our own. bos, eos: it adds them by itself; words: no token goes beyond a
    word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        "the cat sat on the mat",
        "one fish two fish",
        "User: Hi Assistant: Hello!",
        "2+2= 4 and 3+3= 6",
    ] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=more.pop("eos_token", "</s>"),
        pad_token=more.pop("pad_token", "<pad>"),
        additional_special_tokens=SPECIAL[3:],
    )
    wrapped.chat_template = template
    return wrapped


def learned(renderer, row, k=0):
    """The learned parts of a completion, special tokens shown."""
    marked = renderer.decode_marked(row).split("\n---\n")[k]
    return [part.split("⟧")[0] for part in marked.split("⟦")[1:]]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_is_the_tokenizers_and_eos_ends_a_completion_once(bos, eos):
    tokenizer = trained(bos, eos)
    renderer = Renderer(tokenizer)
    for completion in (" cat", " cat</s>", " cat</s></s>"):
        row = {"prompt": "the", "completions": [completion]}
        encoded = renderer.encode(row)
        assert (
            encoded.prompt == ([1] if bos else []) + tokenizer("the", add_special_tokens=False)["input_ids"]
        )
        assert encoded.completions[0].count(2) == 1 and encoded.completions[0][-1] == 2
        assert all(encoded.supervised[0])
        assert renderer.prompt(row) == encoded.prompt
        assert renderer.text(encoded.prompt + encoded.completions[0]) == "the cat"


def test_an_empty_prompt_is_bos_or_the_first_token():
    with_bos, without = Renderer(trained(bos=True)), Renderer(trained())
    row = {"prompt": "", "completions": ["the cat"]}
    assert (
        with_bos.encode(row).prompt == [1] and with_bos.text(with_bos.encode(row).completions[0]) == "the cat"
    )
    encoded = without.encode(row)
    assert len(encoded.prompt) == 1 and without.text(encoded.prompt + encoded.completions[0]) == "the cat"
    with pytest.raises(BadRow, match="prompt is empty"):
        without.prompt({"prompt": ""})


def test_where_a_token_reaches_across_the_boundary_the_completion_is_encoded_alone():
    tokenizer = trained()
    renderer = Renderer(tokenizer)
    joint, alone = tokenizer("one fish")["input_ids"], tokenizer("one f")["input_ids"]
    assert joint[: len(alone)] != alone  # " fish", or its beginning, is one token
    encoded = renderer.encode({"prompt": "one f", "completions": ["ish"]})
    assert encoded.prompt == alone and renderer.boundary_mismatches == 1
    assert encoded.completions[0] == [*tokenizer("ish")["input_ids"], 2]
    renderer.encode({"prompt": "2+2=", "completions": [" 4"]})
    assert renderer.boundary_mismatches == 1


def test_padding_with_eos_does_not_unlearn_the_end():
    renderer = Renderer(trained(pad_token="</s>"))
    encoded = renderer.encode({"prompt": "the", "completions": [" cat"]})
    assert encoded.completions[0][-1] == 2 and encoded.supervised[0][-1]


def test_rollouts_are_taken_as_they_are():
    renderer = Renderer(trained(bos=True))
    encoded = renderer.encode({"prompt": "the", "completions": [[9, 8], [7]]})
    assert encoded.completions == [[9, 8], [7]] and encoded.supervised == [[True, True], [True]]
    assert renderer.encode({"prompt": TALK[:2], "completions": [[9, 8]]}).completions == [[9, 8]]


def test_a_prompt_alone_has_no_completions():
    encoded = Renderer(trained()).encode({"prompt": "the", "answer": "cat"})
    assert encoded.prompt and encoded.completions == encoded.supervised == []


def test_long_texts_are_cut_into_pieces_that_learn_every_token_once():
    text = "the cat sat on the mat " * 30
    for bos in (False, True):
        tokenizer = trained(bos=bos)
        renderer = Renderer(tokenizer, max_length=16)
        rows, bad, stats = renderer.encode_all([{"id": "x", "prompt": "", "completions": [text]}])
        assert (
            not bad
            and [r["id"] for r in rows] == [f"x#{i}" for i in range(len(rows))]
            and stats["pieces"] == len(rows)
        )
        encoded = [renderer.encode(r) for r in rows]
        assert all(len(e) <= 16 for e in encoded) and stats["cut"] == 0
        whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        said = [t for e in encoded for t in e.completions[0]]
        assert said == whole[0 if bos else 1 :]


def test_long_completions_are_cut_and_counted_and_long_prompts_refused():
    renderer = Renderer(trained(), max_length=12)
    rows = [
        {"id": "a", "prompt": "the", "completions": [" cat xyzxyzxyzxyz"]},
        {"id": "b", "prompt": "xyzxyzxyzxyzxyz", "completions": [" cat"]},
        {"id": "c", "prompt": "the", "completions": [" cat"]},
    ]
    good, bad, stats = renderer.encode_all(rows)
    assert (
        [r["id"] for r in good] == ["a", "c"] and stats["cut"] == renderer.cut == 1 and stats["longest"] == 12
    )
    assert bad[0]["where"] == "b" and "leaves none for a completion" in bad[0]["reason"]
    assert renderer.encode_all(rows).stats["cut"] == 0  # encoded already


@pytest.mark.parametrize(
    "template, end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MARKED, "<|im_end|>")]
)
@pytest.mark.parametrize("bos", [False, True])
def test_exactly_the_assistant_turns_are_learned(template, end, bos):
    tokenizer = trained(bos=bos, template=template)
    renderer = Renderer(tokenizer)
    assert renderer.note is None
    assert learned(renderer, CHAT) == ["Four." + end, "Blue, sometimes grey." + end]
    encoded = renderer.encode(CHAT)
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert whole[: len(encoded.prompt)] == encoded.prompt == renderer.prompt(CHAT)  # trained as served
    assert whole[: len(encoded)] == encoded.prompt + encoded.completions[0] and encoded.supervised[0][-1]
    assert encoded.prompt.count(1) == (template is LLAMA3)  # BOS is the template's, once
    assert tokenizer.convert_tokens_to_ids(end) in renderer.stop_ids
    assert not renderer.warnings and renderer.boundary_mismatches == 0


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_marked_as_not_to_learn(template):
    renderer = Renderer(trained(template=template))
    for mark in ({"loss": False}, {"loss_scale": 0}):
        turns = [*TALK[:2], {**TALK[2], **mark}, *TALK[3:]]
        assert learned(renderer, {"prompt": turns[:2], "completions": [turns[2:]]}) == [
            "Blue, sometimes grey.<|im_end|>"
        ]
    silent = {"prompt": TALK[:2], "completions": [[{**TALK[2], "loss": False}]], "id": "s"}
    _, bad, _ = renderer.encode_all([silent])
    assert bad[0]["where"] == "s" and "no supervised tokens" in bad[0]["reason"]


def test_a_template_that_rewrites_earlier_turns_is_refused_or_taken_turn_by_turn():
    renderer = Renderer(trained(template=THINKING))
    with pytest.raises(Rewrites, match="changes earlier turns"):
        renderer.encode(CHAT)
    rows, bad, stats = renderer.encode_all([CHAT])
    assert not bad and [r["id"] for r in rows] == ["talk@1", "talk@2"] and stats["turns"] == 2
    assert learned(renderer, rows[0]) == ["<think>\n\n</think>\n\nFour.<|im_end|>"]
    assert learned(renderer, rows[1]) == ["<think>\n\n</think>\n\nBlue, sometimes grey.<|im_end|>"]
    # The second is asked as it will be served: without the thinking of the first.
    assert "think" not in renderer.tokenizer.decode(renderer.prompt(rows[1]))
    single = {"prompt": TALK[:2], "completions": [[{**TALK[2], "reasoning_content": "2+2"}]]}
    assert learned(renderer, single) == ["<think>\n2+2\n</think>\n\nFour.<|im_end|>"]
    several = {"id": "p", "prompt": TALK[:2], "completions": [TALK[2:], TALK[2:3]], "scores": [1.0, 0.0]}
    assert "changes earlier turns" in renderer.encode_all([several]).bad[0]["reason"]


def test_a_template_that_asks_otherwise_than_it_writes_is_refused():
    renderer = Renderer(
        trained(template=CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"))
    )
    with pytest.raises(BadRow, match="is not how it begins a reply"):
        renderer.encode(CHAT)


def test_a_template_that_refuses_a_row_makes_it_a_bad_one():
    renderer = Renderer(trained(template="{{ raise_exception('no system turn, please') }}"))
    assert "no system turn, please" in renderer.encode_all([CHAT]).bad[0]["reason"]


def test_a_template_that_never_ends_a_turn_is_told_once():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    renderer = Renderer(
        trained(template=template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    )
    with pytest.warns(UserWarning, match="does not learn when to stop"):
        renderer.encode(CHAT)
    assert len(renderer.warnings) == 1


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizer_without_a_template_gets_a_plain_one_that_is_saved(bos, tmp_path):
    tokenizer = trained(bos=bos)
    renderer = Renderer(tokenizer)
    assert "no chat template" in renderer.note
    shown = renderer.decode_marked(CHAT)
    assert (
        shown
        == ("<s>" if bos else "")
        + "System: Be brief.\nUser: What is two and two?\nAssistant:⟦ Four.</s>⟧\n"
        "User: And the sky über Köln?\nAssistant:⟦ Blue, sometimes grey.</s>⟧"
    )
    tokenizer.save_pretrained(tmp_path)
    served = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    assert served.note is None and served.prompt(CHAT) == renderer.prompt(CHAT)


def test_a_token_across_the_beginning_of_a_reply_is_cut_there():
    tokenizer = trained(words=False)  # knows "Assistant: " as a token or two
    renderer = Renderer(tokenizer)
    assert (
        learned(renderer, CHAT) == [" Four.</s>", " Blue, sometimes grey.</s>"]
        and renderer.boundary_mismatches == 1
    )
    encoded = renderer.encode(CHAT)
    assert (
        tokenizer.decode(encoded.prompt + encoded.completions[0])
        == Chat(tokenizer).render(CHAT, TALK).rstrip()
    )
    assert encoded.prompt == renderer.prompt(CHAT)


def test_templates_by_name_file_and_text(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    for given in ("chatml", str(tmp_path / "mine.jinja"), CHATML):
        assert learned(Renderer(trained(template=LLAMA3), chat_template=given), CHAT)[0] == "Four.<|im_end|>"
    with pytest.raises(RecipeError, match="did you mean 'chatml'"):
        Renderer(trained(), chat_template="chatlm")
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    )
    with pytest.raises(RecipeError, match="which this tokenizer does not have"):
        Renderer(bare, chat_template="chatml")


def test_tools_and_calls_are_rendered():
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "soup"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "one soup"},
        {"role": "assistant", "content": "One."},
    ]
    tools = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]
    row = {"prompt": [{"role": "user", "content": "Find soup"}], "completions": [turns], "tools": tools}
    renderer = Renderer(trained())
    said = learned(renderer, row)
    assert len(said) == 2 and '"find"' in said[0] and said[1] == " One.</s>"
    assert "Finds." in renderer.decode_marked(row)


def test_a_tokenizer_that_tells_no_offsets_works_in_parts():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    renderer = Renderer(slow)
    encoded = renderer.encode(CHAT)
    said = [i for i, kept in zip(encoded.completions[0], encoded.supervised[0], strict=True) if kept]
    assert renderer.text(said).split("\n")[0].startswith(" Four.") and said.count(slow.eos_token_id) == 2
    assert encoded.prompt == renderer.prompt(CHAT)


def test_preference_pairs_share_their_prompt():
    renderer = Renderer(trained(template=CHATML))
    row = {"prompt": TALK[:2], "completions": [[TALK[2]], [{"role": "assistant", "content": "Five."}]]}
    encoded = renderer.encode(row)
    assert len(encoded.completions) == 2 and encoded.prompt == renderer.prompt(row)
    assert learned(renderer, row, 1) == ["Five.<|im_end|>"]


def test_a_prompt_goes_through_the_template_once_for_all_that_follows_it(monkeypatch):
    renderer = Renderer(trained(template=CHATML))
    pair = load([{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]).rows[0]
    turns = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completions": [[{"role": "assistant", "content": c}] for c in "45"],
    }
    apply, seen = renderer.tokenizer.apply_chat_template, []
    monkeypatch.setattr(
        renderer.tokenizer,
        "apply_chat_template",
        lambda said, **how: seen.append(len(said)) or apply(said, **how),
    )
    renderer.encode({**pair, **turns})
    assert sorted(seen) == [1, 2, 2]


def test_an_encoder_keeps_the_end_of_its_prompt():
    renderer = Renderer(trained(eos=True), encoder=True, max_length=16)
    encoded = renderer.encode({"prompt": "the", "completions": [" cat"]})
    assert encoded.prompt[-1] == 2 and encoded.completions[0][-1] == 2 and renderer.boundary_mismatches == 0
    long = renderer.encode({"prompt": "xyz" * 20, "completions": [" cat"]})
    assert len(long.prompt) == 16 and long.prompt[-1] == 2 and renderer.cut == 1
    chat = Renderer(trained(eos=True), encoder=True)
    turn = {"prompt": TALK[:2], "completions": [TALK[2:3]]}
    assert chat.encode(turn).prompt[-1] == 2 and chat.text(chat.encode(turn).completions[0]) == "Four."


def test_many_rows_at_once_are_the_same_as_one_by_one():
    rows = [{"id": str(i), "prompt": f"{i}+{i}=", "completions": [f" {2 * i}"]} for i in range(300)] + [CHAT]
    rows.append({"id": "bad", "prompt": "a", "completions": ["\ud800"]})
    together, single = Renderer(trained(template=CHATML)), Renderer(trained(template=CHATML), cache_tokens=1)
    good, bad, stats = together.encode_all(rows)
    assert len(good) == 301 == stats["rows"] and bad[0]["where"] == "bad"
    assert all(together.encode(r) == single.encode(r) for r in good)
    assert len(single.cache) == 1 and 0 < stats["supervised_share"] < 1
    assert stats["supervised"] == sum(sum(map(sum, together.encode(r).supervised)) for r in good)


REAL = [
    "tinystories/tinystories.jsonl",
    "gsm8k/gsm8k.jsonl.gz",
    "math_word/math_word.jsonl",
    "instructions/lima.jsonl.gz",
    "preference/dpo_en_demo.jsonl",
    "preference/kto_en_demo.jsonl",
    "preference/hh_harmless.jsonl.gz",
    "tool_use/glaive_demo.jsonl",
    "sst2/sst2.jsonl",
    "corpora/tinyshakespeare.txt",
    "instructions/instruct_zh.jsonl",
]


@pytest.mark.parametrize("name", REAL)
def test_real_rows_with_a_real_tokenizer(name):
    model = DATA / "models" / "stories260K"
    if not (DATA / name).exists() or not model.exists():
        pytest.skip("the data is not here")
    renderer = Renderer(AutoTokenizer.from_pretrained(model), max_length=2048)
    found = load(DATA / name, limit=60)
    rows, bad, stats = renderer.encode_all(found.rows)
    assert len(rows) >= 0.5 * len(found.rows) and all("which leaves none" in b["reason"] for b in bad)
    for row in rows[:20]:
        encoded = renderer.encode(row)
        assert encoded.prompt[0] == 1 and len(encoded) <= 2048 and 1 not in encoded.completions[0]
        if isinstance(row["prompt"], list) and row["prompt"] and len(encoded) < 2048:
            want = [
                t["content"]
                for t in row["completions"][0]
                if t["role"] == "assistant" and not t.get("tool_calls")
            ]
            said = [s for s in learned(renderer, row) if "<tool_call>" not in s]
            assert [s.removesuffix("</s>").strip() for s in said] == [w.strip() for w in want]
    assert stats["longest"] <= 2048 and stats["supervised"] > 0
