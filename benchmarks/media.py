"""Small classifiers of images and of sound, from scratch on real sets, beside a plain loop of torch over the
same network and scikit-learn on the same pixels or spectrograms.

python benchmarks/media.py DATA                # DATA holds mnist/, cifar10_small/, spoken_digits/; minutes
python benchmarks/media.py DATA mnist          # one set

Every contestant sees the same training rows as often and is measured on the same held-out ones (3 of 10; of
the spoken digits, those of one speaker, whom no training row is of). Batches are drawn by each loop itself.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

import luthier
from luthier.registry import build
from luthier.storage import images

STEPS, ROWS, RATE = 300, 64, 1e-3
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
SPEAKER = "theo"  # of the spoken digits, held out


class Task(NamedTuple):
    """Rows, and the network that they are learned by."""

    train: list[dict]
    held_out: list[dict]
    model: Any
    processor: Any
    architecture: str


def mnist(folder: Path) -> Task:
    """Handwritten digits of 28 x 28 pixels."""
    from PIL import Image

    data = np.load(folder / "mnist" / "mnist_t10k.npz")
    rows = []
    for pixels, label in zip(data["images"], data["labels"], strict=True):
        rows.append({"image": Image.fromarray(pixels).convert("RGB"), "label": int(label)})
    return of_images(rows, size=28, patch=7)


def cifar10_small(folder: Path) -> Task:
    """Photos of 32 x 32 pixels, ten classes."""
    rows = []
    for row in parquet(folder / "cifar10_small" / "cifar10.parquet"):
        rows.append({"image": row["image"], "label": row["label"]})
    return of_images(rows, size=32, patch=4)


def spoken_digits(folder: Path) -> Task:
    """English digits by several speakers, 8 kHz."""
    sizes = dict(max_length=64, num_mel_bins=32)
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        **SHAPE, **sizes, patch_size=8, frequency_stride=8, time_stride=8, num_labels=10
    )
    extractor = transformers.ASTFeatureExtractor(sampling_rate=8000, mean=-1.0, std=3.0, **sizes)
    train, held_out = [], []
    for row in parquet(folder / "spoken_digits" / "fsdd.parquet"):
        side = held_out if row["speaker"] == SPEAKER else train
        side.append({"audio": row["audio"], "label": row["label"]})
    network = transformers.ASTForAudioClassification(config)
    return Task(train, held_out, network, extractor, "audio_classifier")


def of_images(rows: list[dict], size: int, patch: int) -> Task:
    """A ViT for such rows; three of ten are held out."""
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) * 7 // 10
    train, held_out = ([rows[i] for i in part] for part in (order[:cut], order[cut:]))
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SHAPE, image_size=size, patch_size=patch, num_labels=10)
    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    return Task(
        train, held_out, transformers.ViTForImageClassification(config), processor, "image_classifier"
    )


def parquet(path: Path) -> list[dict]:
    """The rows of a file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def by_luthier(task: Task, folder: Path) -> float:
    """Accuracy after a run."""
    report = luthier.tune(
        model=str(folder / "base"),
        data=task.train,
        eval_data=task.held_out,
        tuner="full",
        learning_rate=RATE,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        dtype="float32",
        max_eval_samples="all",
        output_dir=folder / "run",
    )
    return report.after["accuracy"]


def inputs_of(task: Task, folder: Path, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, ...] as the processor makes them, and labels [n]."""
    architecture: Any = build("architecture", task.architecture)
    processor = architecture.tokenizer(str(folder / "base"))
    inputs = []
    for row in rows:
        value = row["image"] if "image" in row else row["audio"]
        path = images.in_file(value)
        inputs.append(processor.read(path))
    return torch.cat(inputs), torch.tensor([row["label"] for row in rows])


def by_torch(task: Task, train: tuple, held_out: tuple) -> float:
    """Accuracy after a plain loop: AdamW without decay, warm-up and linear decay, clipped at 1."""
    model = task.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    warm = max(1, round(0.03 * STEPS))
    rate = lambda step: min((step + 1) / warm, (STEPS - step) / (STEPS - warm))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draws = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(train[1]), generator=draws) for _ in range(STEPS)])
    for step in range(STEPS):
        rows = order[step * ROWS : (step + 1) * ROWS]
        loss = cross_entropy(model(train[0][rows]).logits, train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = torch.cat([model.eval()(part).logits for part in held_out[0].split(256)])
    return float((logits.argmax(-1) == held_out[1]).float().mean())


def by_sklearn(train: tuple, held_out: tuple) -> float:
    """Accuracy of a logistic regression on all numbers of the inputs."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=0.01, max_iter=100).fit(train[0].flatten(1).numpy(), train[1].numpy())
    return float(fitted.score(held_out[0].flatten(1).numpy(), held_out[1].numpy()))


def measure(name: str, data: Path) -> str:
    """A row of the table."""
    task = {"mnist": mnist, "cifar10_small": cifar10_small, "spoken_digits": spoken_digits}[name](data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task.model.save_pretrained(folder / "base")
        task.processor.save_pretrained(folder / "base")
        cells = []
        start = time.time()
        accuracy = by_luthier(task, folder)
        cells.append(f"{accuracy:.1%} ({time.time() - start:.0f} s)")
        train, held_out = (inputs_of(task, folder, rows) for rows in (task.train, task.held_out))
        start = time.time()
        accuracy = by_torch(task, train, held_out)
        cells.append(f"{accuracy:.1%} ({time.time() - start:.0f} s)")
        cells.append(f"{by_sklearn(train, held_out):.1%}")
    counts = f"{len(task.train):,} / {len(task.held_out):,}"
    return f"| {name} | {counts} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    root, *names = sys.argv[1:]
    print("| set | rows / held out | luthier | plain torch | logistic regression |\n| - | - | - | - | - |")
    for name in names or ("mnist", "cifar10_small", "spoken_digits"):
        print(measure(name, Path(root)), flush=True)
