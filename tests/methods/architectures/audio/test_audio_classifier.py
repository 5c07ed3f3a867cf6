"""Classifiers of sound: one recording as among others, any length and rate, and the way of a tuned model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import luthier
from helpers.media import RATE, make_ast, make_wav2vec2, tone, tones
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.methods.formats._base import BadRow
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.serve.export import export_form


def roles_of(path: str, rows: list[dict], **settings) -> Roles:
    architecture = build("architecture", {"name": "audio_classifier", **settings})
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)
    return Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)


@pytest.mark.parametrize("make", [make_ast, make_wav2vec2])
def test_a_recording_is_read_among_others_as_alone(make, tmp_path):
    """Recordings of two lengths; against the feature extractor and the network by hand."""
    path, raw = make(tmp_path), tones(6)
    rows = load_rows(raw).rows
    roles = roles_of(path, rows)
    policy, batch = roles.policy, roles.batch(rows)
    got = policy.logprobs(batch)
    plain = policy.architecture.plain(policy.model, policy.attached, batch)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert got.std() > 1e-3
    extractor = policy.model.media.processor
    for i, row in enumerate(raw):
        samples = np.asarray(row["audio"]["array"], dtype=np.float32)
        inputs = extractor(samples, sampling_rate=RATE, return_tensors="pt")
        logits = policy.model(**inputs).logits[0]
        label = policy.model.config.label2id[row["label"]]
        torch.testing.assert_close(got[i], logits.log_softmax(-1)[label], atol=1e-4, rtol=1e-4)


def test_seconds_gives_all_one_length(tmp_path):
    rows = load_rows(tones(4)).rows
    roles = roles_of(make_wav2vec2(tmp_path), rows, seconds=0.3)
    media = roles.policy.model.media
    shapes = {
        tuple(media.inputs((media.encode(row["audios"][0])[0] & ~(1 << 62)) >> 16).shape) for row in rows
    }
    assert shapes == {(1, round(0.3 * RATE))}


def test_a_tone_that_is_played_at_another_rate_is_the_same_tone(tmp_path):
    """Twice the rate holds the same sound; what the lower rate cannot hold is left out."""
    fast = np.arange(2 * RATE) / (2 * RATE)
    sound = np.sin(2 * np.pi * 250 * fast)
    plain = {"array": np.sin(2 * np.pi * 250 * np.arange(RATE) / RATE), "sampling_rate": RATE}
    faster = {"array": sound + np.sin(2 * np.pi * 3000 * fast), "sampling_rate": 2 * RATE}
    rows = load_rows([{"audio": a, "label": la} for a, la in ((plain, "a"), (faster, "b"))]).rows
    roles = roles_of(make_wav2vec2(tmp_path), rows)
    one, two = (roles.policy.model.media.read(row["audios"][0]) for row in rows)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.long
def test_the_way_of_a_tuned_model(tmp_path):
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    rows = tones(24)
    settings = dict(model=make_ast(tmp_path / "base", num_labels=5), data=rows, tuner="lora", dtype="float32")
    settings |= dict(
        learning_rate=1e-2, per_device_train_batch_size=8, max_steps=20, save_steps=10, eval_data=0.25
    )
    report = luthier.tune(output_dir=tmp_path / "run", **settings)
    luthier.tune(output_dir=tmp_path / "halted", stop_at=12, **settings)
    assert luthier.tune(output_dir=tmp_path / "halted", **settings).losses == report.losses
    assert report.after["loss"] < report.before["loss"] / 2 and report.after["accuracy"] == 1.0
    export_form(tmp_path / "run", "merged", tmp_path / "whole")
    plain = AutoModelForAudioClassification.from_pretrained(tmp_path / "whole").eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "whole")
    sound = rows[1]["audio"]
    inputs = extractor(np.float32(sound["array"]), sampling_rate=RATE, return_tensors="pt")
    theirs = plain(**inputs).logits.log_softmax(-1)[0, plain.config.label2id["high"]]
    (ours,) = luthier.load(tmp_path / "run").logprobs(rows[1:2])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_is_no_recording_with_a_class(tmp_path):
    rows = load_rows(tones(4)).rows
    renderer = roles_of(make_ast(tmp_path), rows).renderer
    (tmp_path / "noise.mp3").write_bytes(b"no sound")
    with pytest.raises(BadRow, match="noise.mp3 cannot be read"):
        renderer.encode({**rows[0], "audios": [str(tmp_path / "noise.mp3")]})
    with pytest.raises(BadRow, match="images are not read"):
        renderer.encode({**rows[0], "images": ["x.png"]})
    raw = [{"audio": {"array": [0.0, float("nan")], "sampling_rate": RATE}, "label": "low"}]
    assert "finite" in load_rows([*raw, *tones(3)], max_bad_rows=1.0).bad[0]["reason"]
    assert tone(250)["sampling_rate"] == RATE
