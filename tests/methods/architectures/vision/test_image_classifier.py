"""Classifiers of images: transformers' loss, one row as among others, and the way of a tuned model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import luthier
from helpers.media import CLASSES, make_resnet, make_vit, shade, shades
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.serve.export import export_form

pytest.importorskip("PIL")


def roles_of(path: str, rows: list[dict], **settings) -> Roles:
    architecture = build("architecture", {"name": "image_classifier", **settings})
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)
    return Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)


@pytest.mark.parametrize("make", [make_vit, make_resnet])
def test_sft_is_transformers_cross_entropy(make, tmp_path):
    """Of every row by itself, batch norms too, in training as in evaluation."""
    path = make(tmp_path)
    rows = load_rows(shades(6)).rows
    roles = roles_of(path, rows)
    policy, batch = roles.policy, roles.batch(rows)
    pixels = torch.cat([policy.model.media.inputs(n) for n in policy.model.media.paths])
    expected = policy.model(pixel_values=pixels, labels=torch.tensor([i % 2 for i in range(6)])).loss
    objective = build("objective", "sft")
    own = objective.loss(roles, batch).sum() / objective.divisor(batch)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    plain = policy.architecture.plain(policy.model, policy.attached, batch)
    policy.train()
    batch = roles.batch(rows)
    torch.testing.assert_close(policy.logprobs(batch), plain, atol=1e-5, rtol=1e-5)
    (alone,) = policy.logprobs(roles.batch(rows[2:3]))
    torch.testing.assert_close(alone, plain[2], atol=1e-5, rtol=1e-5)


def test_several_labels_are_binary_cross_entropy(tmp_path):
    images = [shade(i / 4, i) for i in range(4)]
    raw = [{"image": im, "labels": la} for im, la in zip(images, [["a", "b"], ["b"], ["a", "c"], ["c"]])]
    rows = load_rows(raw).rows
    roles = roles_of(make_vit(tmp_path), rows)
    assert roles.policy.model.config.problem_type == "multi_label_classification"
    media = roles.policy.model.media
    logits = roles.policy.model(
        torch.cat([media.inputs((media.encode(r["images"][0])[0] & ~(1 << 62)) >> 16) for r in rows])
    ).logits
    targets = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]])
    objective = build("objective", "sft")
    batch = roles.batch(rows)
    own = objective.loss(roles, batch).sum() / objective.divisor(batch)
    torch.testing.assert_close(own, nn.BCEWithLogitsLoss()(logits, targets), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_the_way_of_a_tuned_model(tmp_path):
    """Tuned with a new head, killed and gone on with, exported, and read by transformers alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, rows = make_vit(tmp_path / "base", num_labels=5), shades(24)
    settings = dict(model=model, data=rows, tuner={"name": "lora", "r": 4, "lora_dropout": 0.1})
    settings |= dict(learning_rate=1e-2, per_device_train_batch_size=8, max_steps=6, save_steps=3)
    settings |= dict(eval_data=0.25, dtype="float32")
    report = luthier.tune(output_dir=tmp_path / "run", **settings)
    luthier.tune(output_dir=tmp_path / "halted", stop_at=4, **settings)
    again = luthier.tune(output_dir=tmp_path / "halted", **settings)
    assert report.after == again.after and report.losses == again.losses
    assert report.after["accuracy"] == 1.0 > report.before["accuracy"]
    assert report.stats["auto_class"] == "AutoModelForImageClassification"

    export_form(tmp_path / "run", "merged", tmp_path / "whole")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "whole").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "whole")
    loaded = luthier.load(tmp_path / "run")
    assert plain.config.id2label == CLASSES["id2label"]
    theirs = plain(**processor(images=[rows[1]["image"]], return_tensors="pt")).logits.log_softmax(-1)
    ours = loaded.logprobs(rows[1:2])
    torch.testing.assert_close(ours, theirs[0, 1:], atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match="cannot generate"):
        loaded.generate("?")


def test_what_is_no_image_with_a_class(tmp_path):
    rows = load_rows(shades(4)).rows
    renderer = roles_of(make_vit(tmp_path), rows).renderer
    assert "⟦dark⟧" in renderer.decode_marked(rows[0])
    with pytest.raises(BadRow, match="reads no text"):
        renderer.encode({**rows[0], "prompt": "Which one?"})
    with pytest.raises(BadRow, match="needs one image"):
        renderer.encode({**rows[0], "images": []})
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BadRow, match="broken.png cannot be read"):
        renderer.encode({**rows[0], "images": [str(tmp_path / "broken.png")]})
    bad = load_rows([{"image": "nowhere.png", "label": "dark"}, *shades(3)], max_bad_rows=1.0).bad
    assert "no file that can be read" in bad[0]["reason"]
    with pytest.raises(RecipeError, match="preprocessor_config"):
        build("architecture", "image_classifier").tokenizer(str(tmp_path / "empty"))


WITH_HEAD = {"modules_to_save": ["classifier"]}
SMALL = {
    "lora": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"], **WITH_HEAD},
    "adapter": {"name": "parallel_adapter", "target_modules": ["fc1", "fc2"], **WITH_HEAD},
    "bitfit": {"name": "bitfit", "also": ["head"]},
}


def attached_to(model, spec):
    torch.manual_seed(0)
    model.fresh = []
    return build("tuner", spec).attach(model)


def test_each_tuner_trains_its_own_part(tmp_path):
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    base = AutoModelForImageClassification.from_pretrained(make_vit(tmp_path)).eval()
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = {}
    for name, spec in SMALL.items():
        model = copy.deepcopy(base)
        parameters = attached_to(model, spec).parameters()
        names[name] = sorted(parameters)
        torch.testing.assert_close(model(pixels).logits, base(pixels).logits, atol=1e-6, rtol=0)
    own = {"lora": (".q_proj.", ".v_proj."), "adapter": (".fc1.", ".fc2."), "bitfit": (".bias.",)}
    for name, parts in own.items():
        assert all(n.startswith("classifier.") or any(p in n for p in parts) for n in names[name]), names
    assert all(any("classifier" in n for n in own) for own in names.values())
    with torch.device("meta"):  # in the size that is used
        model = ViTForImageClassification(ViTConfig())
    count = sum(p.numel() for p in model.parameters())
    tuned = attached_to(model, SMALL["bitfit"])
    assert sum(p.numel() for p in tuned.parameters().values()) < 0.02 * count


def seasons(count: int, shifted: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[count, 3, 16, 16] fields over 16 dates, and which of two crops each is. A second band says in which
    half of the world it lies; shifted: in the southern one, summer is half a year later.
    """
    label, south = torch.arange(count) % 2, torch.arange(count) // 2 % 2
    curve = torch.sin(torch.arange(16) / 16 * 2 * torch.pi) * (1 - 2 * label[:, None])
    if shifted:
        curve = curve * (1 - 2 * south[:, None])
    fields = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) / 4
    fields[:, 0] += curve[:, None]
    fields[:, 1] += (1 - 2 * south)[:, None, None]
    return fields, label


def fit(model, parameters, fields, label, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(fields).logits, label).backward()
        optimizer.step()


@torch.no_grad()
def macro_f1(model, fields, label) -> float:
    predicted = model(fields).logits.argmax(-1)
    scores = []
    for crop in (0, 1):
        hits = int(((predicted == crop) & (label == crop)).sum())
        scores.append(2 * hits / int((predicted == crop).sum() + (label == crop).sum()))
    return sum(scores) / 2


@pytest.mark.long
def test_shifted_seasons_need_more_than_a_head(tmp_path):
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(make_vit(tmp_path)).eval()
    fit(base, base.parameters(), *seasons(96, False, 0), steps=50)
    assert macro_f1(base, *seasons(200, False, 1)) > 0.9 > 0.7 > macro_f1(base, *seasons(200, True, 1))
    f1 = {}
    for name, spec in (("head", None), ("lora", SMALL["lora"])):
        model = copy.deepcopy(base)
        if spec is None:
            parameters = list(model.classifier.parameters())
        else:
            parameters = list(attached_to(model, spec).parameters().values())
        fit(model, parameters, *seasons(96, True, 2), steps=60)
        f1[name] = macro_f1(model, *seasons(200, True, 3))
    assert f1["lora"] > f1["head"] + 0.1, f1
