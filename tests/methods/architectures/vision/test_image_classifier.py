"""Classifiers of images: transformers' loss, one row as among others, and the way of a tuned model."""

from __future__ import annotations

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
