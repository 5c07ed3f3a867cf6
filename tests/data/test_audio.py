"""Recordings of rows: every layout becomes the same canonical row, and files are read as written."""

from __future__ import annotations

import struct
import wave

import numpy as np
import pytest

from luthier.data.load import load_rows
from luthier.data.split import content_key, split
from luthier.errors import Damaged
from luthier.storage import audio

SAMPLES = np.linspace(-0.9, 0.9, 101, dtype=np.float32)


def pcm(path, bits: int, channels: int = 1) -> bytes:
    """SAMPLES as a WAV file of whole numbers."""
    width, scale = bits // 8, 2 ** (bits - 1)
    values = np.repeat(np.round(SAMPLES.astype(np.float64) * scale).astype(np.int64), channels)
    if bits == 8:
        content = (values + 128).astype("u1").tobytes()
    else:
        content = b"".join(int(v).to_bytes(width, "little", signed=True) for v in values)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, 8000, len(SAMPLES), "NONE", ""))
        file.writeframes(content)
    return path.read_bytes()


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_numbers_are_read_as_they_were_written(bits, channels, tmp_path):
    samples, rate = audio.decode(pcm(tmp_path / "a.wav", bits, channels))
    assert rate == 8000 and np.abs(samples - SAMPLES).max() <= 0.5 / 2 ** (bits - 1) + 1e-7


def test_floats_come_back_exactly():
    samples, rate = audio.decode(audio.encode(SAMPLES, 16000))
    assert rate == 16000 and np.array_equal(samples, SAMPLES)
    with pytest.raises(ValueError, match="finite numbers"):
        audio.encode([[1.0]], 8000)
    for broken in (
        b"RIFF\0\0\0\0WAVE",
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 7, 1, 8000, 1, 1, 8),
    ):
        with pytest.raises(Damaged, match="WAV"):
            audio.decode(broken)


def test_rates():
    """A sum of sines at half and at twice the rate; the same rate is the same numbers."""
    time = lambda rate: np.arange(rate) / rate
    tone = lambda rate: np.sin(2 * np.pi * 40 * time(rate)).astype(np.float32)
    for rate in (1000, 2000, 4000):
        assert np.abs(audio.resampled(tone(2000), 2000, rate) - tone(rate)).max() < 1e-4
    high = np.sin(2 * np.pi * 700 * time(2000)).astype(np.float32)
    assert np.abs(audio.resampled(high, 2000, 1000)).max() < 1e-4


def test_every_layout_is_the_same_row(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = pcm(tmp_path / "a.wav", 16)
    layouts = [
        {"audio": "a.wav", "label": 3},
        {"audio": {"bytes": content, "path": None}, "label": 3},
        {"audio": {"array": SAMPLES, "sampling_rate": 8000}, "label": 3},
        {"audios": [tmp_path / "a.wav"], "label": 3},
    ]
    monkeypatch.chdir(tmp_path)
    for raw in layouts:
        (row,) = load_rows([raw]).rows
        assert row["completions"] == ["3"] and "audio" not in row
        samples, rate = audio.decode(open(row["audios"][0], "rb").read())
        assert rate == 8000 and np.abs(samples - SAMPLES).max() < 1e-4
    long = {"array": np.zeros(2_000_000), "sampling_rate": 8000}
    assert len(load_rows([{"audio": long, "label": 1}]).rows) == 1
    (words,) = load_rows([{"prompt": "p", "completion": "c", "audio": "a song"}]).rows
    assert words["audio"] == "a song"


def test_what_is_held_out_follows_from_the_recording(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = [
        {"audio": {"array": SAMPLES * (1 + i // 2), "sampling_rate": 8000}, "label": i % 2} for i in range(40)
    ]
    rows = load_rows(raw).rows
    train, other = split(rows, 0.25)
    assert {content_key(r) for r in train}.isdisjoint(map(content_key, other)) and other


def test_words_beside_a_label_are_not_dropped():
    """A row that says in words what is to be learned is read by another format."""
    rows = load_rows([{"prompt": "What?", "completion": "red", "image": {"path": "x.png"}, "label": 1}]).rows
    assert rows[0]["prompt"][0]["content"][-1] == {"type": "text", "text": "What?"}
