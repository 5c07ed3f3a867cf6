"""Two towers of sounds and names: the similarities of CLAP, names of held-out tones, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import luthier
from helpers.media import RATE, make_clap, tone
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build

NAMES = {"low": 200, "middle": 500, "high": 1000, "shrill": 1700}


def sounds(count: int, first: int = 0) -> list[dict]:
    """Tones near those of the names, each with noise of its own."""
    rows = []
    for i in range(first, first + count):
        name = list(NAMES)[i % len(NAMES)]
        shift = np.random.default_rng(i).uniform(0.94, 1.06)
        rows.append({"audio": tone(NAMES[name] * shift, i, 0.4), "label": name})
    return rows


def roles_of(path: str, rows: list[dict], **settings) -> Roles:
    architecture = build("architecture", {"name": "audio_text", **settings})
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    architecture.check_network(model)
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)
    return Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)


def test_it_compares_as_clap_does(tmp_path):
    """Against the feature extractor, the tokenizer and the network's own forward."""
    raw = sounds(6)
    rows = load_rows(raw).rows
    roles = roles_of(make_clap(tmp_path), rows, hypothesis_template="a {} tone")
    policy, batch = roles.policy, roles.batch(rows)
    with torch.no_grad():
        ours = policy.outputs(batch).hidden
        media, names = policy.model.media, policy.model.config.id2label
        texts = media.texts([f"a {names[i]} tone" for i in range(4)], padding=True, return_tensors="pt")
        arrays = [np.float32(row["audio"]["array"]) for row in raw]
        heard = media.processor(arrays, sampling_rate=RATE, return_tensors="pt")["input_features"]
        theirs = policy.model(
            input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], input_features=heard
        ).logits_per_audio
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert theirs.std() > 1e-3
    plain = policy.architecture.plain(policy.model, policy.attached, batch)
    torch.testing.assert_close(policy.logprobs(batch), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_tones_that_are_held_out_are_named(tmp_path):
    settings = dict(objective="info_nce", tuner="full", dtype="float32", learning_rate=3e-3)
    settings |= dict(max_steps=240, per_device_train_batch_size=16, evaluate=["loss", "accuracy"])
    settings |= dict(model=make_clap(tmp_path / "base"), data=sounds(64), eval_data=sounds(32, 64))
    report = luthier.tune(output_dir=tmp_path / "run", **settings)
    assert report.before["accuracy"] < 0.5, "four names: a quarter by chance"
    assert report.after["accuracy"] > 0.9
    own = luthier.load(tmp_path / "run").logprobs(sounds(16, 96))
    assert (own.exp() > 0.5).sum() >= 14


def test_a_halted_run_goes_on_bit_for_bit(tmp_path):
    settings = dict(objective="info_nce", tuner="lora", dtype="float32", learning_rate=3e-3, max_steps=6)
    settings |= dict(per_device_train_batch_size=8, save_steps=2, evaluate=["loss"], eval_data=sounds(8, 64))
    settings |= dict(model=make_clap(tmp_path / "base"), data=sounds(16))
    report = luthier.tune(output_dir=tmp_path / "run", **settings)
    luthier.tune(output_dir=tmp_path / "halted", stop_at=3, **settings)
    assert luthier.tune(output_dir=tmp_path / "halted", **settings).after == report.after


def test_long_recordings_are_cut_not_drawn(tmp_path):
    rows = load_rows([{"audio": tone(300, 1, 1.5), "label": "a"}, {"audio": tone(900), "label": "b"}]).rows
    media = roles_of(make_clap(tmp_path), rows).policy.model.media
    long = media.read(rows[0]["audios"][0])
    assert torch.equal(long, media.read(rows[0]["audios"][0]))
    assert long.shape == media.read(rows[1]["audios"][0]).shape


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="one {}"):
        build("architecture", {"name": "audio_text", "hypothesis_template": "a sound"})
    with pytest.raises(RecipeError, match="one name of several"):
        build("architecture", {"name": "audio_text", "problem_type": "regression"})
    rows = load_rows(sounds(4)).rows
    roles = roles_of(make_clap(tmp_path), rows)
    roles.policy.model.config.audio_config.enable_fusion = True
    with pytest.raises(RecipeError, match="unfused"):
        roles.policy.architecture.check_network(roles.policy.model)
