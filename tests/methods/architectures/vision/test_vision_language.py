"""Vision-language models: what luthier reads is what the model's own forward reads with its processor."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.vision import make_idefics, make_llava, picture
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods
from luthier.serve.export import export_form

pytest.importorskip("PIL")
MAKE = {"llava": make_llava, "idefics": make_idefics}


@pytest.fixture(scope="module", params=MAKE)
def model(request, tmp_path_factory) -> str:
    return MAKE[request.param](tmp_path_factory.mktemp(request.param))


def rows() -> list[dict]:
    """Two images in one row, none in another, and one image that two rows share."""
    shared, wide = picture(0), picture(1, width=60, height=30)
    asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    both = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    return [
        {"messages": [user(asked), reply("noise")], "images": [shared]},
        {
            "messages": [user(both), reply("two"), user(asked), reply("one more")],
            "images": [wide, shared, wide],
        },
        {"messages": [user("Hi"), reply("Hello")]},
    ]


def user(content) -> dict:
    return {"role": "user", "content": content}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def roles_of(model: str, **settings):
    recipe = Recipe.load({"model": model, "dtype": "float32", "tuner": {"name": "lora", "r": 2}, **settings})
    return assemble(recipe, build_methods(recipe))


def own_logprobs(roles, row: dict) -> torch.Tensor:
    """Of the supervised tokens, by the model's own forward with its processor's tokens and pixels."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = roles.policy.model.config._name_or_path
    processor, model = AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path)
    from PIL import Image

    turns = row["prompt"] + row["completions"][0]
    text = processor.apply_chat_template(turns, tokenize=False)
    images = [Image.open(path).convert("RGB") for path in row.get("images", ())] or None
    inputs = processor(text=text, images=images and [images], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).logits[0]
    ids = inputs["input_ids"][0]
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    encoded = roles.renderer.encode(row)
    marks = [False] * len(encoded.prompt) + encoded.supervised[0]
    assert len(marks) == len(ids)
    return logprobs[torch.tensor(marks[1:])]


def test_reads_as_the_model_itself_does(model):
    roles = roles_of(model)
    data = load_rows(rows()).rows
    with torch.no_grad():
        ours = roles.policy(roles.batch(data)).logprobs
    theirs = torch.cat([own_logprobs(roles, row) for row in data])
    assert torch.allclose(ours, theirs, atol=1e-4)
    batch = roles.batch(data)
    assert torch.allclose(
        roles.policy.architecture.plain(roles.policy.model, roles.tuner, batch), theirs, atol=1e-4
    )


def colours(count: int) -> list[dict]:
    """Plain images of two colours, and which it is."""
    from PIL import Image

    made = []
    for i in range(count):
        name, colour = (("red", (200 + i, 20, 10)), ("blue", (20, 30, 180 + i)))[i % 2]
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        image = Image.new("RGB", (32, 32), colour)
        made.append({"messages": [user(content), reply(name)], "images": [image]})
    return made


@pytest.mark.slow
def test_learns_what_is_seen(model, tmp_path):
    settings = dict(model=model, tuner="full", learning_rate=3e-3, max_steps=30, eval_data=0.25)
    settings["evaluate"] = ["accuracy", {"name": "generate", "max_new_tokens": 6}]
    report = luthier.tune(data=colours(32), output_dir=tmp_path / "run", **settings)
    assert report.before["accuracy"] < 0.6 and report.after["accuracy"] == 1
    assert report.after["exact_match"] == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 8, "the prompts' images stand in the page"


def test_all_linear_is_the_language_model_unless_parts_says_more(model):
    def moved(**settings) -> set[str]:
        return {name.split(".")[1] for name in roles_of(model, **settings).tuner.parameters()}

    language = moved()
    assert len(language) == 1
    assert moved(architecture={"name": "vision_language", "parts": ["projector"]}).isdisjoint(language)
    every = moved(architecture={"name": "vision_language", "parts": ["language_model", "vision_tower"]})
    assert len(every) == 2 and every > language


def test_generates_what_the_model_itself_does(model):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    roles = roles_of(model)
    row = load_rows(rows()).rows[0]
    prompt = roles.renderer.prompt(row)
    ours = roles.policy.architecture.generate(
        roles.policy.model,
        roles.tuner,
        [prompt, prompt[:-1]],
        seeds=[0, 1],
        max_new_tokens=8,
        temperature=0.0,
    )
    processor, plain = (
        AutoProcessor.from_pretrained(model),
        AutoModelForImageTextToText.from_pretrained(model),
    )
    text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    image = Image.open(row["images"][0]).convert("RGB")
    inputs = processor(text=text, images=[[image]], return_tensors="pt", add_special_tokens=False)
    theirs = plain.eval().generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert ours[0][0] == theirs[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.long
def test_the_way_of_a_tuned_model(tmp_path):
    """Tuned, asked, exported whole and as an adapter, loaded by transformers; killed and gone on with."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = make_llava(tmp_path / "base")
    settings = dict(
        model=model, data=colours(16), tuner={"name": "lora", "r": 4, "lora_dropout": 0.1}, learning_rate=3e-3
    )
    settings |= dict(eval_data=0.25, evaluate=["loss"], save_steps=2, max_steps=4)
    report = luthier.tune(output_dir=tmp_path / "run", **settings)
    luthier.tune(output_dir=tmp_path / "halted", stop_at=3, **settings)
    again = luthier.tune(output_dir=tmp_path / "halted", **settings)
    assert report.after == again.after and report.after["loss"] < report.before["loss"]

    tuned = luthier.load(tmp_path / "run")
    image = colours(1)[0]["images"][0]
    answer = tuned.ask("?", images=[image], max_new_tokens=4)
    assert answer == tuned.generate([user([{"type": "image", "image": image}, text("?")])], max_new_tokens=4)
    with pytest.raises(RecipeError, match="marks more images"):
        tuned.generate([user([{"type": "image"}, text("?")])])

    export_form(tmp_path / "run", "merged", tmp_path / "whole")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    asked = processor.apply_chat_template([user([{"type": "image"}, text("?")])], add_generation_prompt=True)
    inputs = processor(text=asked, images=[image], return_tensors="pt", add_special_tokens=False)
    theirs = merged.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(theirs, skip_special_tokens=True) == answer


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.mark.long
def test_pairs_and_samples_with_images(model, tmp_path):
    """Preferences and rollouts: what is seen decides which answer is better."""
    asked = [{"type": "image"}, text("?")]
    pairs, questions = [], []
    for row in colours(16):
        right = row["messages"][1]["content"]
        wrong = {"red": "blue", "blue": "red"}[right]
        question = {"prompt": [user(asked)], "images": row["images"]}
        pairs.append(question | {"chosen": [reply(right)], "rejected": [reply(wrong)]})
        questions.append(question | {"answer": right})
    settings = dict(model=model, tuner="full", learning_rate=3e-3, eval_data=0.25)
    report = luthier.tune(
        data=pairs,
        objective="dpo",
        max_steps=12,
        output_dir=tmp_path / "dpo",
        evaluate=["preference"],
        **settings,
    )
    assert report.after["ranking_accuracy"] == 1 > report.before["ranking_accuracy"]
    rollout = {"name": "rollout", "n": 4, "max_new_tokens": 3}
    luthier.tune(
        data=questions,
        objective="grpo",
        online_stages=[rollout, {"name": "score", "reward": {"name": "length"}}],
        evaluate=[],
        max_steps=2,
        output_dir=tmp_path / "grpo",
        **settings,
    )
    with open(tmp_path / "grpo" / "metrics.jsonl") as log:
        assert len(log.readlines()) >= 2


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    model = make_llava(tmp_path / "base")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    row = colours(1)[0]
    renderer = roles_of(model).renderer
    for path, sentence in ((broken, "cannot be read"), (tmp_path / "none.png", "is missing")):
        encoded = renderer.encode_all(load_rows([{**row, "images": [str(path)]}]).rows)
        assert not encoded.rows and sentence in encoded.bad[0]["reason"]
    with pytest.raises(RecipeError, match="1 of them"):
        load_rows([{"messages": [user("<image>?"), reply("x")], "images": row["images"] * 2}])
    with pytest.raises(RecipeError, match="on the web"):
        load_rows([{**row, "images": ["https://example.com/a.png"]}])


def test_a_photo_that_lies_on_its_side_is_read_upright(tmp_path):
    """As cameras write it: the file's pixels, and which side is up."""
    from PIL import Image

    images = roles_of(make_llava(tmp_path / "base")).renderer.images
    upright = picture(0, 32, 32)
    upright.save(tmp_path / "upright.png")
    marks = Image.Exif()
    marks[0x0112] = 6  # turn it by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=marks)
    pixels = []
    for name in ("upright.png", "turned.png"):
        number = images.number(str(tmp_path / name))
        pixels.append(images.inputs(number)["pixel_values"])
    assert torch.equal(*pixels)


def test_a_network_that_does_more_with_an_image_is_refused(model, monkeypatch):
    """Whose own forward moves positions behind an image, as Qwen-VL's does."""
    from luthier.methods.architectures.vision import vision_language

    roles = roles_of(model)
    assert vision_language.reading_gap(roles.policy.model) < 1e-5
    forward = type(roles.policy.model).forward

    def shifted(self, *args, **kwargs):
        if kwargs.get("pixel_values") is not None:
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None] * 2
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(roles.policy.model), "forward", shifted)
    with pytest.raises(RecipeError, match="does more with an image"):
        roles_of(model)


@pytest.mark.slow
def test_low_rank_updates_of_all_parts(tmp_path):
    """Where the frozen projector passes no image on, the language model alone cannot tell what is seen; with
    updates of tower and projector it does, merged as well.
    """
    from transformers import AutoModelForImageTextToText

    folder = make_llava(tmp_path / "base")
    blind = AutoModelForImageTextToText.from_pretrained(folder)
    blind.model.multi_modal_projector.linear_1.weight.data.zero_()
    blind.save_pretrained(folder)
    accuracy = {}
    for parts in (["language_model"], ["vision_tower", "projector", "language_model"]):
        report = luthier.tune(
            model=folder,
            dtype="float32",
            data=colours(32),
            tuner={"name": "lora", "r": 8, "lora_alpha": 16},
            architecture={"name": "vision_language", "parts": parts},
            learning_rate=1e-2,
            max_steps=30,
            eval_data=0.25,
            evaluate=["accuracy"],
            output_dir=tmp_path / str(len(parts)),
        )
        accuracy[len(parts)] = report.after["accuracy"]
    assert accuracy[1] <= 0.6 and accuracy[3] > 0.9
    assert "projector" in str(list(luthier.load(tmp_path / "3").roles.tuner.parameters()))
    adapter = export_form(tmp_path / "3", "lora", tmp_path / "adapter")
    assert "AutoModelForImageTextToText" in adapter.usage[0].code and adapter.agreement.mean < 1e-5
    with pytest.raises(RecipeError, match="for causal language models"):
        export_form(tmp_path / "3", "gguf", tmp_path / "gguf")
    exported = export_form(tmp_path / "3", "merged", tmp_path / "whole")
    assert exported.agreement.mean < 1e-5
