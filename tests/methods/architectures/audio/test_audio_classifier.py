"""Classifiers of sound: one recording as among others, any length and rate, and the way of a tuned model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForAudioClassification

import luthier
from helpers.media import RATE, make_ast, make_wav2vec2, tone, tones
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.methods.formats._base import BadRow
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.recipe.published import find_published
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


def ways(name: str) -> list[dict]:
    """The tuners of the study, with bottlenecks of a width that suits a tiny network."""
    tuners = [way["tuner"] for way in find_published("petl-ast").recipe["plan"]["ways"]]
    small = [{**t, "reduction_factor": 4} if "reduction_factor" in t else t for t in tuners]
    return [t for t in small if isinstance(t, dict) and t["name"] == name]


def tuned(path: str, tuner: dict):
    torch.manual_seed(1)
    model = AutoModelForAudioClassification.from_pretrained(path).eval()
    model.fresh = []
    return build("tuner", tuner).attach(model)


def test_tuners_of_a_spectrogram_start_at_the_base_with_their_formulas(tmp_path):
    path = make_ast(tmp_path)
    plain = AutoModelForAudioClassification.from_pretrained(path).eval()
    sound = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0))
    head = sum(p.numel() for p in plain.classifier.parameters())
    width, k, layers = 16, 4, 2
    adapter = 2 * width * k + k + width
    counts = {"part": 0, "lora": 2 * layers * 2 * 6 * width, "houlsby": 2 * layers * adapter}
    counts |= {"pfeiffer": layers * adapter, "sublayer_adapter": layers * adapter}
    for name, count in counts.items():
        for tuner in ways(name):
            attached = tuned(path, tuner)
            own = sum(p.numel() for p in attached.parameters().values())
            assert own == count + head, name
            same = torch.allclose(attached.model(sound).logits, plain(sound).logits, atol=1e-6)
            assert same == (tuner.get("composition") != "replace"), tuner


def test_an_adapter_on_a_spectrogram_beats_the_linear_probe(tmp_path):
    """Whether two tones are alike: the head of a random network alone does not say."""
    path, generator = make_ast(tmp_path), torch.Generator().manual_seed(3)
    low, high = torch.randint(2, (2, 48), generator=generator)
    sounds = torch.randn(48, 32, 16, generator=generator) / 4
    sounds[:, :16, :8] += (2.0 * low - 1)[:, None, None]
    sounds[:, 16:, 8:] += (2.0 * high - 1)[:, None, None]
    label, losses = low ^ high, {}
    for name in ("part", "houlsby"):
        attached = tuned(path, ways(name)[0])
        adam = torch.optim.Adam(attached.parameters().values(), lr=0.02)
        for _ in range(40):
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(attached.model(sounds).logits, label)
            loss.backward()
            adam.step()
        losses[name] = loss.item()
    assert losses["houlsby"] < 0.7 * losses["part"], losses
