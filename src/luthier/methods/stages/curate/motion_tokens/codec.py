"""The VQ-VAE of motions: frames to a short sequence of codes, and codes back to frames.

A convolutional encoder gives one vector for every `downsample` frames, which is replaced by the nearest entry
of a codebook. Entries follow the mean of the vectors that chose them (an exponential average), and an entry
that is hardly chosen moves to a drawn vector. Loss: smooth L1 of the frames, the same of their differences,
and the commitment of vectors to their entries (van den Oord et al., 2017, arXiv:1711.00937; the network is
T2M-GPT's, arXiv:2301.06052).

Departs: a moved entry begins with a count of one, so that it is not moved again at the next step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import RecipeError

LEAST = 1.0  # an entry whose average count is below is moved
SMOOTH = 1e-5  # least deviation of a channel


@dataclass(frozen=True)
class Shape:
    """What a codec's network is made of."""

    channels: int  # numbers of a frame
    codes: int = 512  # entries of the codebook
    width: int = 512  # of the network and of an entry
    downsample: int = 4  # frames of one code, a power of two
    depth: int = 3  # residual blocks of a level


class Residual(nn.Module):
    """x + a convolution over distant frames."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.point = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.point(F.relu(self.wide(F.relu(x))))


def residuals(width: int, depth: int) -> list[nn.Module]:
    return [Residual(width, 3**k) for k in reversed(range(depth))]


def encoder(shape: Shape) -> nn.Sequential:
    """[B, channels, T] -> [B, width, T / downsample]."""
    layers: list[nn.Module] = [nn.Conv1d(shape.channels, shape.width, 3, padding=1), nn.ReLU()]
    for _ in range(shape.downsample.bit_length() - 1):
        layers.append(nn.Conv1d(shape.width, shape.width, 4, stride=2, padding=1))
        layers += residuals(shape.width, shape.depth)
    return nn.Sequential(*layers, nn.Conv1d(shape.width, shape.width, 3, padding=1))


def decoder(shape: Shape) -> nn.Sequential:
    """[B, width, T / downsample] -> [B, channels, T]."""
    layers: list[nn.Module] = [nn.Conv1d(shape.width, shape.width, 3, padding=1), nn.ReLU()]
    for _ in range(shape.downsample.bit_length() - 1):
        layers += residuals(shape.width, shape.depth)
        layers += [nn.Upsample(scale_factor=2), nn.Conv1d(shape.width, shape.width, 3, padding=1)]
    layers += [nn.Conv1d(shape.width, shape.width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(shape.width, shape.channels, 3, padding=1))


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """[N, d], [K, d] -> [N]: the entry at the smallest distance from each vector."""
    distances = book.square().sum(1) - 2 * vectors @ book.T  # the vector's own square is alike for all
    return distances.argmin(1)


def straight_through(vectors: Tensor, entries: Tensor) -> Tensor:
    """The entries, whose gradient reaches the vectors as if these had been handed on."""
    return vectors + (entries - vectors).detach()


class MotionCodec(nn.Module):
    """Frames [T, channels] to codes and back."""

    book: Tensor
    count: Tensor
    total: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = encoder(shape), decoder(shape)
        self.register_buffer("book", torch.zeros(shape.codes, shape.width))
        self.register_buffer("count", torch.ones(shape.codes))  # average number of vectors of a batch
        self.register_buffer("total", torch.zeros(shape.codes, shape.width))  # average sum of these
        self.register_buffer("mean", torch.zeros(shape.channels))
        self.register_buffer("deviation", torch.ones(shape.channels))

    def vectors(self, windows: Tensor) -> Tensor:
        """[B, T, channels] normalised frames -> [B, T / downsample, width]."""
        return self.encoder(windows.transpose(1, 2)).transpose(1, 2)

    def frames(self, entries: Tensor) -> Tensor:
        """[B, T / downsample, width] -> [B, T, channels] normalised frames."""
        return self.decoder(entries.transpose(1, 2)).transpose(1, 2)

    def losses(self, windows: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """[B, T, channels] normalised frames -> losses by name, the vectors [N, width], their codes [N]."""
        vectors = self.vectors(windows)
        flat = vectors.flatten(0, 1)
        codes = nearest(flat.detach(), self.book)
        entries = self.book[codes].view_as(vectors)
        frames = self.frames(straight_through(vectors, entries))
        losses = {
            "reconstruction": F.smooth_l1_loss(frames, windows),
            "velocity": F.smooth_l1_loss(frames.diff(dim=1), windows.diff(dim=1)),
            "commitment": F.mse_loss(vectors, entries),
        }
        return losses, flat.detach(), codes

    @torch.no_grad()
    def begin(self, vectors: Tensor, rng: torch.Generator) -> None:
        """Entries begin at drawn vectors [N, width]."""
        self.book.copy_(drawn(vectors, self.shape.codes, rng))
        self.total.copy_(self.book)
        self.count.fill_(1.0)

    @torch.no_grad()
    def follow(self, vectors: Tensor, codes: Tensor, decay: float, rng: torch.Generator) -> None:
        """Entries move to the average of the vectors [N, width] that chose them; rare ones are drawn anew."""
        count = torch.bincount(codes, minlength=self.shape.codes).to(self.count)
        total = torch.zeros_like(self.total).index_add_(0, codes, vectors)
        self.count.lerp_(count, 1 - decay)
        self.total.lerp_(total, 1 - decay)
        rare = self.count < LEAST
        self.total[rare] = drawn(vectors, int(rare.sum()), rng)
        self.count[rare] = LEAST
        self.book.copy_(self.total / self.count[:, None])

    @torch.no_grad()
    def encode(self, motion: Tensor) -> list[int]:
        """[T, channels] -> one code for every `downsample` frames; the last frame is repeated to fill it."""
        frames = (motion.to(self.mean) - self.mean) / self.deviation
        frames = lengthened(frames, -(-len(frames) // self.shape.downsample) * self.shape.downsample)
        return nearest(self.vectors(frames[None])[0], self.book).tolist()

    @torch.no_grad()
    def decode(self, codes: Sequence[int]) -> Tensor:
        """Codes -> [downsample * codes, channels]."""
        if not codes:
            return self.mean.new_zeros(0, self.shape.channels)
        places = torch.tensor(list(codes), device=self.book.device)
        return self.frames(self.book[places][None])[0] * self.deviation + self.mean

    def decode_text(self, text: str) -> Tensor:
        """What a model wrote, `<motion_3><motion_7>`, -> [frames, channels]; other words are passed over."""
        return self.decode([int(number) for number in re.findall(r"<motion_(\d+)>", text)])

    def save(self, path: Path) -> None:
        """One file, complete or not there at all."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        beside = path.with_suffix(".part")
        save_file(tensors, str(beside), metadata={"shape": json.dumps(asdict(self.shape))})
        beside.replace(path)

    @staticmethod
    def load(path: str | Path) -> MotionCodec:
        """Raises RecipeError where there is no such file."""
        if not Path(path).is_file():
            raise RecipeError(f"{path}: there is no such codec of motions")
        with safe_open(str(path), framework="pt") as file:
            shape = json.loads((file.metadata() or {}).get("shape", "null"))
            if shape is None:
                raise RecipeError(f"{path} is no codec of motions")
            codec = MotionCodec(Shape(**shape))
            codec.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return codec.eval()


def drawn(vectors: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n of these vectors [N, width], drawn with repetition."""
    return vectors[torch.randint(len(vectors), (n,), generator=rng).to(vectors.device)]


def lengthened(frames: Tensor, size: int) -> Tensor:
    """At least so many frames: the last one is repeated."""
    missing = size - len(frames)
    return frames if missing <= 0 else torch.cat([frames, frames[-1:].expand(missing, -1)])


@dataclass(frozen=True)
class Training:
    """How a codec is learned."""

    steps: int
    learning_rate: float
    batch_size: int
    window: int
    decay: float
    velocity: float
    commitment: float


def learn(
    motions: Sequence[Tensor], shape: Shape, how: Training, clock: Any, device: torch.device | str = "cpu"
) -> MotionCodec:
    """A codec of these motions, each [T, channels]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(clock.derive_seed("motion_tokens", "weights", at=0))
        codec = MotionCodec(shape)
    together = torch.cat(list(motions))
    codec.mean.copy_(together.mean(0))
    codec.deviation.copy_(together.std(0, unbiased=False).clamp(min=SMOOTH))
    normal = [lengthened((motion - codec.mean) / codec.deviation, how.window) for motion in motions]
    codec.to(device)
    rng = clock.rng("motion_tokens", "draws", at=0)
    optimizer = torch.optim.AdamW(codec.parameters(), how.learning_rate, (0.9, 0.99), weight_decay=0.0)
    with torch.no_grad():
        codec.begin(codec.vectors(windows(normal, how, rng).to(device)).flatten(0, 1), rng)
    for _ in range(how.steps):
        losses, vectors, codes = codec.losses(windows(normal, how, rng).to(device))
        loss = losses["reconstruction"] + how.velocity * losses["velocity"]
        loss = loss + how.commitment * losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codec.follow(vectors, codes, how.decay, rng)
    return codec.eval()


def windows(motions: Sequence[Tensor], how: Training, rng: torch.Generator) -> Tensor:
    """[batch_size, window, channels]: pieces of drawn motions at drawn places."""
    pieces = []
    for _ in range(how.batch_size):
        motion = motions[int(torch.randint(len(motions), (1,), generator=rng))]
        first = int(torch.randint(len(motion) - how.window + 1, (1,), generator=rng))
        pieces.append(motion[first : first + how.window])
    return torch.stack(pieces)
