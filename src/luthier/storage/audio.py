"""Recordings as numbers and back: WAV files of PCM (8, 16, 24, 32 bits) and of floats (32, 64), which need no
other library; other formats by `soundfile`, where it is installed.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from luthier.errors import Damaged
from luthier.storage import images

if TYPE_CHECKING:  # it is imported where it is needed: every recipe is read by way of this file
    import numpy as np

MAX_BYTES = 200 << 20  # of a recording's file
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # values of a WAV file's format tag
HEADER = 44  # bytes before the samples of a file that `encode` writes


def is_in_memory(value: Any) -> bool:
    """Is a value {"array": ..., "sampling_rate": ...} as `datasets` has it?"""
    return isinstance(value, dict) and value.get("array") is not None and "sampling_rate" in value


def in_file(value: dict) -> str:
    """The path of the file that holds such a recording, written where it is not there. Raises ValueError,
    DiskError.
    """
    try:
        return images.stored(encode(value["array"], int(value["sampling_rate"])), "audio")
    except TypeError as error:
        raise ValueError(str(error)) from None


def encode(samples: Any, rate: int) -> bytes:
    """samples [n] (a list or an array, usually in -1..1) as a WAV file of 32-bit floats. Raises ValueError
    for what is not a row of numbers.
    """
    import numpy as np

    values = np.asarray(samples, dtype="<f4")
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("a recording is a list of finite numbers")
    content = values.tobytes()
    described = struct.pack("<4sIHHIIHH", b"fmt ", 16, FLOAT, 1, rate, 4 * rate, 4, 32)
    size = struct.pack("<4sI4s", b"RIFF", HEADER - 8 + len(content), b"WAVE")
    return size + described + struct.pack("<4sI", b"data", len(content)) + content


def decode(content: bytes) -> tuple[np.ndarray, int]:
    """(samples [n] float32, the mean of several channels; samples a second) of a file's content. Raises
    Damaged where it is none that can be read.
    """
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return _decode_wav(content)
    try:
        import soundfile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Damaged("it is not a WAV file, and soundfile is not installed: pip install soundfile") from None
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except Exception as error:  # whatever a file that calls itself a recording makes it raise
        raise Damaged(f"soundfile: {str(error)[:100]}") from None
    return samples.mean(1), int(rate)


def _decode_wav(content: bytes) -> tuple[np.ndarray, int]:
    import numpy as np

    parts = _parts(content)
    described, data = parts.get(b"fmt ", b""), parts.get(b"data", b"")
    if len(described) < 16:
        raise Damaged("the WAV file does not say how its samples are stored")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", described[:16])
    if tag == EXTENSIBLE and len(described) >= 26:
        (tag,) = struct.unpack("<H", described[24:26])
    if not channels or not rate:
        raise Damaged("the WAV file has no channels or no rate")
    samples = _samples(data, tag, bits)
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(1)
    if not len(samples):
        raise Damaged("the WAV file has no samples")
    return samples.astype(np.float32), rate


def _parts(content: bytes) -> dict[bytes, bytes]:
    """The chunks of a RIFF file by name; the first of each."""
    parts: dict[bytes, bytes] = {}
    start = 12
    while start + 8 <= len(content):
        name, size = struct.unpack("<4sI", content[start : start + 8])
        parts.setdefault(name, content[start + 8 : start + 8 + size])
        start += 8 + size + size % 2
    return parts


def _samples(data: bytes, tag: int, bits: int) -> np.ndarray:
    """Samples in -1..1, channels in turn."""
    import numpy as np

    width = bits // 8
    data = data[: len(data) // max(width, 1) * max(width, 1)]
    if tag == FLOAT and bits in (32, 64):
        return np.frombuffer(data, dtype=f"<f{width}")
    if tag != PCM or bits not in (8, 16, 24, 32):
        raise Damaged(f"WAV files of format {tag} with {bits} bits are not read; convert it to 16-bit PCM")
    if bits == 8:
        return np.frombuffer(data, dtype="u1").astype(np.float64) / 128 - 1
    if bits == 24:  # as the upper three bytes of four
        whole = np.zeros((len(data) // 3, 4), dtype="u1")
        whole[:, 1:] = np.frombuffer(data, dtype="u1").reshape(-1, 3)
        return whole.reshape(-1).view("<i4") / 2.0**31
    return np.frombuffer(data, dtype=f"<i{width}") / 2.0 ** (bits - 1)


def resampled(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """samples [n] at another rate [round(n * to / rate)]: frequencies that the lower rate cannot hold are
    left out, the rest stays as it is (by the Fourier transform of the whole).
    """
    import numpy as np

    if rate == to:
        return samples
    count = max(1, round(len(samples) * to / rate))
    spectrum = np.fft.rfft(samples)
    bins = np.zeros(count // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(bins), len(spectrum))
    bins[:shared] = spectrum[:shared]
    return (np.fft.irfft(bins, count) * (count / len(samples))).astype(np.float32)
