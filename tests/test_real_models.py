"""From a model folder to a plain transformers model again: families with their own kind of tokenizer, and a
real model on real rows.
"""

from __future__ import annotations

import gzip
import json
import math
from functools import cache
from itertools import islice

import pytest
import torch
import transformers

import luthier
from helpers import zoo
from helpers.models import make_tokenizer
from luthier.data.load import load_data
from luthier.errors import RecipeError
from luthier.serve import export

SUMS = [{"prompt": f"{a}+{b}=", "completion": f" {(a + b) % 10}"} for a in range(8) for b in range(8)]


TEXTS = [
    {"text": f"{word} film number {i}", "label": name}
    for i in range(24)
    for word, name in (("good", "pos"), ("bad", "neg"))
]


LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789+=.,:?!\n"]


def pieces(kind: str):
    """A tokenizer as a family has it: how text is cut, and which tokens it puts around a text by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if kind == "bytes":  # Qwen, GPT-2, Phi: bytes, nothing around
        return make_tokenizer()
    # Llama, Mistral, Gemma: "▁" for spaces, <s> in front, bytes where a letter is unknown
    if kind == "sentencepiece":
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        words = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS]
        made = Tokenizer(
            models.BPE(
                {w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
            )
        )
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
        names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    elif kind == "wordpiece":  # BERT: lower case, [CLS] in front and [SEP] behind
        special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
        words = [*special, "good", "bad", "film", "number", *LETTERS[:-1], *(f"##{c}" for c in LETTERS[:-1])]
        made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        names = dict(
            pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]"
        )
    elif kind == "roberta":  # bytes between <s> and </s>
        special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
        words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=False)
        names = dict(
            pad_token="<pad>",
            bos_token="<s>",
            cls_token="<s>",
            eos_token="</s>",
            sep_token="</s>",
            mask_token="<mask>",
        )
    else:  # T5: unigram pieces, </s> behind
        special = ["<pad>", "</s>", "<unk>"]
        made = Tokenizer(
            models.Unigram([(w, -1.0 * (i > 2)) for i, w in enumerate([*special, "▁", *LETTERS])], unk_id=2)
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
        names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


SMALL = {"hidden_size": 48, "intermediate_size": 96, "max_position_embeddings": 96, "initializer_range": 0.15}


BERT = {k: v for k, v in zoo.BERT.items() if k not in ("bos_token_id", "eos_token_id")} | SMALL


T5 = dict(
    d_model=48,
    d_kv=12,
    d_ff=96,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    initializer_factor=1.0,
    dropout_rate=0.0,
)


EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


FAMILIES = {  # name -> (architectures, configuration, tokenizer, settings of lora)
    "llama": ("LlamaForCausalLM", zoo.SMALL | SMALL, "sentencepiece", {}),
    "llama_tied": (
        "LlamaForCausalLM",
        zoo.SMALL | SMALL | {"tie_word_embeddings": True},
        "sentencepiece",
        {},
    ),
    "mistral": ("MistralForCausalLM", zoo.SMALL | SMALL | {"sliding_window": 8}, "sentencepiece", {}),
    "gemma": ("GemmaForCausalLM", zoo.SMALL | SMALL | {"head_dim": 12}, "sentencepiece", {}),
    "qwen2": ("Qwen2ForCausalLM", zoo.SMALL | SMALL | {"tie_word_embeddings": True}, "bytes", {}),
    "qwen3": ("Qwen3ForCausalLM", zoo.SMALL | SMALL | {"head_dim": 12}, "bytes", {}),
    "gpt2": (
        "GPT2LMHeadModel",
        zoo.GPT | {"n_embd": 48, "n_positions": 96, "initializer_range": 0.15},
        "bytes",
        {},
    ),
    "phi": ("PhiForCausalLM", zoo.SMALL | SMALL, "bytes", {}),
    "mixtral": ("MixtralForCausalLM", zoo.SMALL | SMALL | zoo.MOE, "sentencepiece", EXPERTS),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        zoo.SMALL | SMALL | zoo.MOE | {"shared_expert_intermediate_size": 24},
        "bytes",
        EXPERTS,
    ),
    "bert": ("BertForMaskedLM", BERT, "wordpiece", {}),
    "roberta": ("RobertaForMaskedLM", BERT | {"bos_token_id": 1, "eos_token_id": 2}, "roberta", {}),
    "t5": ("T5ForConditionalGeneration", T5, "unigram", {}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny random model with its tokenizer."""

    @cache
    def made(name: str) -> str:
        kind, settings, cut, _ = FAMILIES[name]
        tokenizer = pieces(cut)
        ids = {
            k: getattr(tokenizer, k)
            for k in ("pad_token_id", "bos_token_id", "eos_token_id")
            if getattr(tokenizer, k) is not None
        }
        cls = getattr(transformers, kind)
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**settings, "vocab_size": len(tokenizer), **ids}))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return made


def plain_loss(model, kind: str, rows, renderer) -> float:
    """Mean -log p of what is learned, row by row through a plain transformers model: no layout, no head of
    ours.
    """
    total, count = 0.0, 0
    for row in rows:
        said = renderer.encode(row)
        prompt, reply = torch.tensor([said.prompt]), torch.tensor([said.completions[0]])
        whole, asked = torch.cat([prompt, reply], 1), torch.tensor(said.supervised[0])
        with torch.no_grad():
            if kind == "classifier":
                logits = model(input_ids=prompt).logits
            elif kind == "seq2seq":
                start = torch.full((1, 1), model.config.decoder_start_token_id)
                logits = model(
                    input_ids=prompt, decoder_input_ids=torch.cat([start, reply[:, :-1]], 1)
                ).logits[0]
            elif kind == "masked_lm":
                asked &= ~torch.isin(reply[0], torch.tensor(sorted(renderer.special)))
                whole[0, prompt.shape[1] :][asked] = renderer.tokenizer.mask_token_id
                logits = model(input_ids=whole).logits[0, prompt.shape[1] :]
            else:
                logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1]
        total -= float(logits.float().log_softmax(-1).gather(1, reply.T).squeeze(1)[asked].double().sum())
        count += int(asked.sum())
    return total / count


def journey(folder, tmp_path, kind: str, **recipe):
    """Tune, load, export and read in plain transformers: the same answers everywhere. The loss falls."""
    asked = {
        "model": folder,
        "data": SUMS,
        "eval_data": 0,
        "dtype": "float32",
        "max_steps": 10,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "evaluate": ["loss"],
        "architecture": kind,
    } | recipe
    report = luthier.tune(asked, folder=tmp_path / "run")
    assert len(report.losses) == 10 and all(map(math.isfinite, report.losses))
    assert report.after["loss"] < 0.9 * report.before["loss"]
    loaded = luthier.load(tmp_path / "run")
    roles = loaded.roles
    rows = roles.policy.architecture.encode_all(load_data(loaded.recipe).rows, roles.renderer).rows
    assert -float(loaded.logprobs(rows).double().mean()) == pytest.approx(report.after["loss"], abs=1e-4)
    export.export(tmp_path / "run", "merged", tmp_path / "merged")
    auto = roles.policy.architecture.auto_class()
    model, said = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert plain_loss(model.eval(), kind, rows, roles.renderer) == pytest.approx(
        report.after["loss"], abs=1e-3
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("2+3= 5")["input_ids"] == loaded.tokenizer("2+3= 5")["input_ids"]
    return report, loaded


KIND = {"bert": "masked_lm", "roberta": "masked_lm", "t5": "seq2seq"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_with_lora(folder_of, tmp_path, name):
    tuner = {"name": "lora", "r": 8, **FAMILIES[name][3]}
    report, loaded = journey(folder_of(name), tmp_path, KIND.get(name, "causal"), tuner=tuner)
    assert 0 < report.stats["moving"] < report.stats["all"]
    assert not [n for n in report.notes if "pattern keys" in n]  # what PEFT says to itself
    if report.stats["writes"]:
        assert isinstance(loaded.generate("2+3=", max_new_tokens=3), str)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "roberta", "t5", "qwen2_moe"])
def test_a_family_with_all_of_its_weights(folder_of, tmp_path, name):
    report, _ = journey(folder_of(name), tmp_path, KIND.get(name, "causal"), tuner="full", learning_rate=3e-3)
    assert report.stats["moving"] == report.stats["all"]


@pytest.mark.parametrize(
    "name, tuner", [("bert", "lora"), ("roberta", "lora"), ("roberta", "full"), ("llama", "lora")]
)
def test_a_classifier_on_a_family(folder_of, tmp_path, name, tuner):
    report, loaded = journey(
        folder_of(name), tmp_path, "classifier", tuner=tuner, data=TEXTS, evaluate=["loss", "accuracy"]
    )
    assert report.after["accuracy"] > 0.9
    assert loaded.model.config.id2label == {0: "neg", 1: "pos"}
    shown = json.loads((tmp_path / "run" / "shown.json").read_text())
    assert "pos" in shown[0] and "neg" in shown[1]  # the names of classes, not tokens that have their numbers


STORIES = "models/stories260K"


REAL = {  # file -> (its format, what the recipe adds)
    "tinystories/tinystories.jsonl": ("text", {}),
    "corpora/tinyshakespeare.txt": ("text", {}),
    "gsm8k/gsm8k.jsonl.gz": ("question_answer", {}),
    "math_word/math_word.jsonl": ("question_answer", {}),
    "instructions/instruct_en.jsonl.gz": ("alpaca", {}),
    "instructions/lima.jsonl.gz": ("messages", {}),
    "preference/dpo_en_demo.jsonl": ("preference", {"objective": "dpo"}),
    "preference/hh_harmless.jsonl.gz": ("preference", {"objective": "dpo"}),
    "preference/kto_en_demo.jsonl": ("unpaired", {"objective": "kto"}),
    "preference/alpacaeval_pairs.jsonl.gz": ("pairwise", {"objective": "dpo"}),
    "sst2/sst2.jsonl": ("labelled", {}),
    "ag_news/ag_news.jsonl": ("labelled", {"architecture": "classifier", "tuner": "lora"}),
    "tool_use/glaive_demo.jsonl": ("sharegpt", {}),
    "t0_multitask/t0_tasks.jsonl.gz": ("prompt_completion", {}),
}


@pytest.mark.parametrize("file", REAL)
def test_real_rows_tune_the_story_model(real, tmp_path, file):
    shape, more = REAL[file]
    asked = {
        "model": str(real / STORIES),
        "data": {"path": str(real / file), "limit": 48},
        "max_bad_rows": 1.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "evaluate": [],
        "dtype": "float32",
    } | more
    report = luthier.tune(asked, folder=tmp_path)
    data = load_data(luthier.Recipe.load(asked))
    assert data.format == shape and len(report.losses) == 2 and all(map(math.isfinite, report.losses))
    assert 0 < report.stats["supervised_share"] <= 1
    assert any("are truncated at 512 tokens" in n for n in report.notes) == (report.stats["cut"] > 0)
    assert report.stats["longest"] <= 512


@pytest.mark.parametrize("chat", [False, True])
def test_a_label_stands_apart_from_its_sentence(real, tmp_path, chat):
    data = {"path": str(real / "sst2/sst2.jsonl"), "limit": 40, "format": {"name": "labelled", "chat": chat}}
    asked = {"model": str(real / STORIES), "data": data, "max_steps": 1, "evaluate": []}
    luthier.tune(asked, folder=tmp_path)
    shown = json.loads((tmp_path / "shown.json").read_text())[0]
    assert (" 0" if chat else "\n\ue0000") in shown or (" 1" if chat else "\n\ue0001") in shown


def test_answers_that_max_length_cuts_are_told(real, tmp_path):
    with gzip.open(real / "gsm8k/gsm8k.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in islice(file, 60)]
    asked = {
        "model": str(real / STORIES),
        "data": rows,
        "eval_data": 0,
        "max_steps": 1,
        "evaluate": [],
        "max_bad_rows": 0.5,
    }
    report = luthier.tune(asked | {"max_length": 192}, folder=tmp_path)
    cut, rows = report.stats["cut"], report.stats["rows"]
    assert (
        0 < cut < rows
        and f"the completions of {cut:,} of {rows:,} rows are truncated at 192 tokens (max_length)"
        in report.notes
    )


def test_a_completion_that_runs_into_its_prompt_is_told(real, tmp_path):
    data = {
        "path": str(real / "dialogsum/dialogsum.jsonl"),
        "limit": 40,
        "columns": {"prompt": "dialogue", "completion": "summary"},
    }
    asked = {"model": str(real / STORIES), "data": data, "max_steps": 1, "evaluate": [], "max_bad_rows": 0.9}
    report = luthier.tune(asked, folder=tmp_path)
    assert any("without a space or line break" in n for n in report.notes)


def test_a_run_on_samples_shows_what_is_asked(real, tmp_path):
    """Of questions with answers that a policy is to find itself, nothing is marked as learned."""
    live = [
        {"name": "rollout", "n": 2, "max_new_tokens": 4, "old": True},
        {"name": "score", "reward": "exact_match"},
    ]
    data = {"path": str(real / "math_word/math_word.jsonl"), "limit": 24}
    asked = {
        "model": str(real / STORIES),
        "data": data,
        "objective": "grpo",
        "live": live,
        "max_steps": 1,
        "evaluate": [],
    }
    report = luthier.tune(asked, folder=tmp_path)
    assert not report.stats["supervised_share"] and not any(
        "\ue000" in s for s in json.loads((tmp_path / "shown.json").read_text())
    )


@pytest.mark.slow
def test_prompts_that_fill_max_length_count_as_bad_rows(real, tmp_path):
    asked = {
        "model": str(real / STORIES),
        "data": str(real / "preference/dpo_en_demo.jsonl"),
        "objective": "dpo",
        "max_steps": 1,
    }
    with pytest.raises(RecipeError, match="of the data are bad") as refused:
        luthier.tune(asked, folder=tmp_path)
    assert str(refused.value).count("max_length=512") == 1  # one reason, whatever each prompt's own length
    listed = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert f"{len(listed)} of " in str(refused.value)
    luthier.tune(
        asked | {"max_bad_rows": 0.9, "evaluate": [], "data": {"path": asked["data"], "limit": 60}},
        folder=tmp_path,
    )
    # of this run, not of the refused one
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) < len(listed)


def test_what_a_text_row_leaves_out_is_told(real, tmp_path):
    """MBPP has `text` and `code`: read as text only the task would be learned."""
    asked = {
        "model": str(real / STORIES),
        "data": {"path": str(real / "code_python/mbpp.jsonl"), "limit": 20},
        "max_steps": 1,
    }
    report = luthier.tune(asked | {"evaluate": []}, folder=tmp_path)
    assert any(n.startswith("rows are read as format 'text'") and "code" in n for n in report.notes)


def test_a_story_is_opened_and_continued(real, tmp_path):
    """Held-out texts are each begun with their own words, not all with an empty page."""
    data = {"path": str(real / "tinystories/tinystories.jsonl"), "limit": 100}
    asked = {
        "model": str(real / STORIES),
        "data": data,
        "max_steps": 1,
        "evaluate": [{"name": "generate", "n": 3, "max_new_tokens": 4}],
    }
    report = luthier.tune(asked, folder=tmp_path)
    begun = [
        json.loads(line)["prompt"] for line in (tmp_path / "samples-after.jsonl").read_text().splitlines()
    ]
    assert len(set(begun)) == 3 and all(begun) and "exact_match" not in report.after
