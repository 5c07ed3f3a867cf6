"""Toy tasks and models: same seed same rows, nothing leaks, formats hold, the card tells the truth."""

import ast
import json
import re
import subprocess
import sys
from random import Random

import pytest

from luthier import toy
from luthier.toy import task_names
from luthier.toy.tasks import _sample, arithmetic, code, find, people

TASKS = task_names()
SPLITS = [(task, split) for task in TASKS for split in find(task).SPLITS]
ON_CARDS = ("validation", "test", "ood", "new_test")
HELD_OUT = (*ON_CARDS, "preference_test", "unpaired_test")


def text_of(row: dict) -> str:
    """All text of a row in one string."""
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"])
    return row["prompt"] + "".join(written(row))


def written(row: dict) -> list[str]:
    """The completion of a row, or its several ones."""
    return row.get("completions") or [
        row[name] for name in ("completion", "chosen", "rejected") if name in row
    ]


# ---- the tasks


def test_the_toy_tasks_exist():
    asked = (
        "people arithmetic word_problems sentiment topic chat style language code refusal entailment"
        " paraphrase"
    )
    asked += " multilabel entities tools sql long stream"
    assert set(asked.split()) <= set(TASKS)
    assert sum(find(task).SHARE for task in TASKS) == pytest.approx(1)


@pytest.mark.long
@pytest.mark.parametrize("task, split", SPLITS)
def test_rows_follow_from_the_seed(task, split):
    rows = toy.rows(task, split, 30, seed=1)
    assert rows == toy.rows(task, split, 30, seed=1)
    assert [text_of(row) for row in rows] != [text_of(row) for row in toy.rows(task, split, 30, seed=2)]
    assert rows[:10] == toy.rows(task, split, 10, seed=1), "fewer rows are the first of many"


def test_rows_are_the_same_in_another_process():
    program = (
        "import json; from luthier import toy;"
        "print(json.dumps({task: toy.rows(task, 'test', 5) for task in toy.task_names()}))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == {task: toy.rows(task, "test", 5) for task in TASKS}


@pytest.mark.parametrize("task, split", SPLITS)
def test_rows_have_their_format(task, split):
    rows = toy.rows(task, split, 50)
    assert len(rows) == 50 and len({row["id"] for row in rows}) == 50
    for row in rows:
        assert isinstance(row["item"], str) and row["kind"] in find(task).SPLITS[split]
        if "messages" in row:
            roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
        else:
            said = written(row)
            assert all(text.strip() for text in said) and len(set(said)) == len(said)
            assert not row["prompt"].endswith((" ", "\n")), "a blank at the seam changes the tokens"
        if "answer" in row and "clean" not in row:  # a spoiled row may say something else
            assert row["answer"] in text_of(row)
    json.dumps(rows)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "n", [pytest.param(300, marks=pytest.mark.long), pytest.param(800, marks=pytest.mark.slow)]
)
def test_splits_share_no_item(task, n):
    atoms = {
        split: {atom for row in toy.rows(task, split, n) for atom in row["item"].split(";") if atom}
        for split in find(task).SPLITS
    }
    for split in set(HELD_OUT) & set(atoms):
        held_out = {atom for atom in atoms[split] if _sample.atom_bucket(atom) != "train"} or atoms[split]
        assert held_out
        for other in set(atoms) - {split}:
            # one bucket may serve several tasks
            if _sample.bucket_of_split(split) != _sample.bucket_of_split(other):
                assert not held_out & atoms[other], f"{split} shares items with {other}"


@pytest.fixture(scope="module")
def training_rows() -> dict[str, list[dict]]:
    """Of each task some thousands that pretraining reads."""
    return {task: toy.rows(task, "train", 3000) for task in TASKS}


@pytest.mark.long
def test_no_task_trains_on_a_held_out_sum(training_rows):
    sums = re.compile(r"(?<!\d)(\d+)([+-])(\d+)(?=[=: ?]| is)")
    seen = 0
    for task in TASKS:
        for row in training_rows[task]:
            if task != "code":
                for a, sign, b in sums.findall(text_of(row)):
                    seen += 1
                    assert _sample.bucket(_sample.sum_atom(int(a), sign, int(b))) == "train", (task, row)
    assert seen > 3000


@pytest.mark.long
def test_held_back_people_are_in_no_pretraining_row(training_rows):
    names = {person["name"] for person in people.HELD_BACK}
    for task in TASKS:
        read = "\n".join(text_of(row) for row in training_rows[task])
        assert not any(name in read for name in names), task


def test_new_facts_are_taught_in_one_form_and_asked_in_others():
    taught = people.new_facts("train", 400, people=40)
    asked = people.new_facts("test", 400, people=40)
    facts = {row["item"].rsplit(" ", 2)[0] for row in taught[:200]}
    assert len(facts) == 200, "the first round touches every fact"
    assert {row["item"].rsplit(" ", 2)[0] for row in asked} == facts
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in taught}


def test_sums_are_right():
    random = Random(0)
    for _ in range(300):
        a, b = random.randint(0, 9999), random.randint(0, 999)
        assert arithmetic.work_sum(a, "+", b)[1] == a + b
        assert arithmetic.work_sum(max(a, b), "-", min(a, b))[1] == abs(a - b)
        steps, result = arithmetic.work_product(a, b % 10)
        assert result == a * (b % 10) and steps
    assert arithmetic.work_sum(42, "-", 17) == ("12-7=5; 4-1-1=2", 25)
    for task in ("arithmetic", "word_problems"):
        for row in toy.rows(task, "train", 300):
            for question, result in re.findall(r"([\d+*-]+)=(\d+)", text_of(row)):
                terms = "+".join(term.lstrip("0") or "0" for term in re.split(r"\+", question))
                assert eval(re.sub(r"(?<!\d)0+(?=\d)", "", terms)) == int(result), row


def test_code_rows_pass_their_own_tests():
    for split in code.SPLITS:
        for row in toy.rows("code", split, 100):
            scope: dict = {}
            source = row["prompt"] + written(row)[0]
            ast.parse(source)
            exec(source + "\n" + "\n".join(row["tests"]), scope)


def test_unknown_names_are_answered_by_the_known_ones():
    with pytest.raises(ValueError, match="people"):
        toy.rows("peeple", "train", 1)
    with pytest.raises(ValueError, match="new_test"):
        toy.rows("people", "tset", 1)
    with pytest.raises(ValueError, match="lm"):
        toy.path("ml")


def test_importing_the_tasks_is_light():
    program = (
        "import sys; from luthier import toy;toy.rows('people', 'train', 1); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy.path("lm"))


@pytest.mark.long
def test_text_survives_the_tokenizer(tokenizer):
    for task, split in SPLITS:
        for row in toy.rows(task, split, 20):
            ids = tokenizer(text_of(row))["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == text_of(row)
    for text in ("Grüße, 世界 🎻", "\ttabs\n\nand  blanks ", "1234567"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens(tokenizer):
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert special == ("<|start|>", "<|end|>", "<|pad|>")
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|mask|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.long
def test_rows_are_read_as_pretraining_read_them(tokenizer):
    from luthier.toy._corpus import document
    from luthier.toy.score import tokens_of

    for task, split in SPLITS:
        for row in (row for row in toy.rows(task, split, 20) if "completion" in row or "messages" in row):
            ids, mine = tokens_of(row, tokenizer)
            assert ids == tokenizer(document(row))["input_ids"]
            assert mine[-1] and not mine[0] and ids[-1] == tokenizer.eos_token_id


def test_the_chat_template_is_a_prefix_of_itself(tokenizer):
    for row in toy.rows("chat", "test", 20):
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        for turns in range(1, len(messages) + 1):
            rendered = tokenizer.apply_chat_template(messages[:turns], tokenize=False)
            assert whole.startswith(rendered)
            if turns < len(messages) and messages[turns]["role"] == "assistant":
                asking = tokenizer.apply_chat_template(
                    messages[:turns], tokenize=False, add_generation_prompt=True
                )
                assert asking == rendered + "<|assistant|>" and whole.startswith(asking)
    with pytest.raises(Exception, match="knows no role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def made_of_these_tasks(name: str) -> None:
    """Skip what only holds for a model that was made of the tasks as they are."""
    if {key.split("/")[0] for key in card_numbers(name)} != set(TASKS):
        pytest.skip(f"toy:{name} was made of fewer tasks: python -m luthier.toy.make --model {name}")


@pytest.mark.slow
@pytest.mark.long
def test_the_tokenizer_can_be_made_again():
    made_of_these_tasks("lm")
    from luthier.toy._corpus import train_tokenizer

    made = json.loads(train_tokenizer().to_str())
    shipped = json.loads((toy.path("lm") / "tokenizer.json").read_text(encoding="utf-8"))
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert made["model"]["merges"] == shipped["model"]["merges"]


# ---- the models


def card_numbers(name: str) -> dict[str, float]:
    """The table of a card as {"task/split": share}."""
    card = (toy.path(name) / "README.md").read_text(encoding="utf-8")
    numbers = {}
    for line in card.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in TASKS:
            for split, cell in zip(ON_CARDS, cells[1:], strict=True):
                if cell:
                    numbers[f"{cells[0]}/{split}"] = float(cell) / 100
    return numbers


ROWS = 24  # of each split, to try a card


MEASURED = [pytest.param(name, marks=[pytest.mark.slow] * (name != "lm-small")) for name in toy.models()]


@pytest.fixture(scope="module", params=MEASURED)
def measured(request):
    """A shipped model, its card's numbers, and the same measured here on few other rows."""
    from transformers import AutoTokenizer

    from luthier.toy import score

    made_of_these_tasks(request.param)
    folder = toy.path(request.param)
    model, tokenizer = score.load(folder), AutoTokenizer.from_pretrained(folder)
    card = card_numbers(request.param)
    found = {}
    for key in card:
        task, split = key.split("/")
        found[key] = score.right_share(model, tokenizer, toy.rows(task, split, ROWS, seed="test"))["all"]
    return request.param, card, found


@pytest.mark.slow
@pytest.mark.long
def test_the_model_does_what_its_card_says(measured):
    _, card, found = measured
    assert {key.split("/")[0] for key in card} == set(TASKS)
    for key, share in card.items():
        deviation = (share * (1 - share) / ROWS) ** 0.5
        assert abs(found[key] - share) <= 4 * deviation + 0.09, (key, share, found[key])


@pytest.mark.long
def test_what_is_held_back_is_unknown(measured):
    """Near chance in every model, the tuned one too, so that tuning has something to teach."""
    name, _, found = measured
    assert found["people/new_test"] <= 0.25, "chance is below 7 %"
    for key in ("arithmetic/ood", "arithmetic/new_test", "language/new_test", "style/new_test"):
        assert found[key] <= 0.2, (name, key)


@pytest.mark.long
def test_lm_knows_its_tasks(measured):
    name, card, found = measured
    if name != "lm":
        pytest.skip("only lm promises this")
    for task in "people sentiment topic language style refusal sql stream".split():
        assert card[f"{task}/test"] >= 0.85 and found[f"{task}/test"] >= 0.75, task


@pytest.mark.slow
@pytest.mark.long
def test_chat_follows_chat_and_lm_does_not():
    """What tuning on turns brings: toy:chat answers and refuses in chat, its base mostly does not."""
    if "chat" not in toy.models():
        pytest.skip("toy:chat is not shipped")
    from transformers import AutoTokenizer

    from luthier.toy import score

    rows = toy.rows("chat", "instruct_test", 120, seed="test")
    found = {}
    for name in ("lm", "chat"):
        folder = toy.path(name)
        found[name] = score.right_share(score.load(folder), AutoTokenizer.from_pretrained(folder), rows)
    assert found["chat"]["all"] >= found["lm"]["all"] + 0.2
    assert found["chat"]["refusal"] >= 0.8, "unsafe requests are refused in chat"
    assert found["chat"]["refusal/safe"] >= 0.8, "and safe ones are not"


def test_all_models_are_small():
    assert sum(file.stat().st_size for file in toy.path("lm").parent.rglob("*") if file.is_file()) < 40e6
    parameters = {name: (toy.path(name) / "model.safetensors").stat().st_size / 2 for name in toy.models()}
    assert parameters["lm-small"] < 1e6 < 2e6 < parameters["lm"] < 8e6


def test_teacher_forcing_agrees_with_generating(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.toy.score import is_exact

    model = AutoModelForCausalLM.from_pretrained(toy.path("lm"), dtype=torch.float32).eval()
    rows = [row for split in ("new_test", "test") for row in toy.rows("people", split, 4)]
    rows += toy.rows("style", "test", 2)
    for row, exact in zip(rows, is_exact(model, tokenizer, rows), strict=True):
        ids = tokenizer(row["prompt"], return_tensors="pt")
        written = model.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
        assert (tokenizer.decode(written) == row["completion"] + "<|end|>") == exact


@pytest.mark.long
def test_code_is_right_when_it_does_the_same(tokenizer):
    """Functions of four operations, which the model never writes letter for letter, sometimes run all the
    same.
    """
    from luthier.toy import score

    model, rows = score.load(toy.path("lm")), toy.rows("code", "ood", 8, seed="several")
    exact, right = score.is_exact(model, tokenizer, rows), score.is_right(model, tokenizer, rows)
    assert all(r or not e for e, r in zip(exact, right, strict=True))
    texts = score.written(model, tokenizer, [row["prompt"] for row in rows])
    assert right == [toy.verify(row, text) == 1.0 for row, text in zip(rows, texts, strict=True)]


# ---- making them


@pytest.mark.long
def test_what_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    import torch

    from helpers.models import make_llama
    from luthier.toy import _pretrain

    monkeypatch.setattr(_pretrain, "KEEP_EVERY", 2)

    def trained(kept, stop: int = 99) -> dict:
        model = make_llama(num_hidden_layers=2).bfloat16().train()

        def loss_of(step: int):
            if step == stop:
                raise KeyboardInterrupt
            ids = torch.randint(10, 250, (2, 12), generator=torch.Generator().manual_seed(step))
            return model(input_ids=ids, labels=ids).loss, ids.numel()

        told: list[str] = []
        took = _pretrain.pretrain(model, loss_of, 1.0, steps=7, checkpoint=kept, tell=told.append)
        return {"tokens": took["tokens"], "told": told, **model.state_dict()}

    whole = trained(None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "training.safetensors", stop=5)
    resumed = trained(tmp_path / "training.safetensors")
    assert resumed.pop("told") == ["going on from step 4"] and not whole.pop("told")
    assert resumed.pop("tokens") == whole.pop("tokens")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_attention_equals_torch():
    import torch

    from luthier.toy._pretrain import _Attention

    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    mask = torch.full((16, 16), -1e4).triu_(1)
    ours = _Attention.apply(q, k, v, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_deeper_model_begins_as_the_one_it_is_made_of(tokenizer):
    import torch
    from transformers import LlamaForCausalLM

    from luthier.toy._pretrain import deepened

    model = LlamaForCausalLM.from_pretrained(toy.path("lm-small"), dtype=torch.float32).eval()
    bigger = deepened(model, after=(0, 2)).eval()
    ids = tokenizer("Question: Where does Ann live?", return_tensors="pt")["input_ids"]
    assert bigger.config.num_hidden_layers == model.config.num_hidden_layers + 2
    with torch.no_grad():
        torch.testing.assert_close(bigger(ids).logits, model(ids).logits)


def test_what_an_encoder_decoder_restores_is_what_was_hidden():
    """The text is the read part with each sentinel replaced by what is said behind it."""
    import numpy as np

    from luthier.toy._seq2seq import corrupted

    sentinels = list(range(1000, 1032))
    for seed in range(50):
        ids = list(range(3, 3 + 1 + 2 * seed))
        read, hidden = corrupted(ids, sentinels, 2, np.random.default_rng(seed))
        assert hidden[-1] == 2 and read[0] == ids[0]
        spans: dict[int, list[int]] = {}
        for token in hidden[:-1]:
            spans.setdefault(token, []) if token in sentinels else spans[[*spans][-1]].append(token)
        assert [token for token in read if token in sentinels] == [*spans]
        assert [t for token in read for t in spans.get(token, [token])] == ids


def test_packing_keeps_whole_documents():
    from luthier.toy._corpus import _pack

    documents = [[1, 5, 2], [1, 6, 6, 2], [1, 7, 2], [1] + [8] * 20 + [2]]
    windows = list(_pack(documents, 8, pad=0))
    assert all(len(window) == 8 for window in windows)
    assert windows[0] == [1, 5, 2, 1, 6, 6, 2, 0]
    assert windows[2] == [1] + [8] * 7


def test_the_probe_is_rows_the_model_was_not_trained_on(tmp_path):
    from luthier.toy.make import write_probe

    made_of_these_tasks("lm")
    write_probe(tmp_path)
    assert (tmp_path / "probe.jsonl").read_text() == (toy.path("lm") / "probe.jsonl").read_text()
