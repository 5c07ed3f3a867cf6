"""A run that begins with the modules of another, under a head of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import luthier
from luthier.errors import RecipeError
from luthier.model.load import attach, tensors_of
from luthier.registry import build
from luthier.storage import checkpoints

SOURCE = [{"prompt": f"item {i}", "completion": f"kind {i % 4}"} for i in range(16)]
TARGET = [{"prompt": f"thing {i}", "completion": f"sort {i % 3}"} for i in range(9)]


def test_modules_of_a_run_begin_under_a_new_head(tmp_path):
    """The adapter is the first run's, number for number; heads are of other labels."""
    common: Any = {"model": "toy:encoder", "architecture": "classifier", "tuner": {"name": "lora", "r": 4}}
    common |= {"learning_rate": 1e-2, "evaluate": [], "eval_data": 0}
    luthier.tune(**common, data=SOURCE, max_steps=4, output_dir=str(tmp_path / "source"))
    start = {"modules_of": str(tmp_path / "source")}
    for name, further in (("before", {"learning_rate": 1e-30}), ("after", {})):
        recipe = {**common, "data": TARGET, "max_steps": 1, "init_from": start, **further}
        luthier.tune(**recipe, output_dir=str(tmp_path / name))
    first, before, after = (tensors(tmp_path / name) for name in ("source", "before", "after"))
    adapter = [name for name in first if ".lora_" in name or name.endswith((".A", ".B"))]
    heads = [name for name in first if name not in adapter]
    assert adapter and any(name.startswith("classifier") for name in heads)
    for name in adapter:
        assert torch.equal(first[name], before[name])
    assert any(not torch.equal(first[name], after[name]) for name in adapter)
    assert all(
        first[name].shape[0] == 4 and before[name].shape[0] == 3 for name in heads if "classifier" in name
    )


def tensors(folder) -> dict[str, Tensor]:
    return checkpoints.load(checkpoints.paths(folder)[-1]).tensors


# --- few rows of a related task


def network(labels: int) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 16}
    config = ViTConfig(**sizes, num_attention_heads=2, patch_size=8, initializer_range=0.2)
    config.num_labels = labels
    model: Any = ViTForImageClassification(config).eval()
    model.fresh = ["classifier"]
    return model


def tuned(labels: int) -> Any:
    torch.manual_seed(1)
    tuner = build("tuner", {"name": "lora", "r": 8, "lora_alpha": 16})
    return attach(tuner, network(labels), build("architecture", "image_classifier"))


class Images:
    """Classes are points in a plane of few directions; everything else is noise of other directions."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(768, 24, generator=generator))[0].T
        self.signal, self.noise = directions[:4], directions[4:]

    def draw(self, classes: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.arange(len(classes)).repeat_interleave(each)
        noise = torch.randn(len(y), len(self.noise), generator=generator)
        flat = 8 * classes[y] @ self.signal + 8 * noise @ self.noise
        return flat.reshape(-1, 3, 16, 16), y


def fit(attached: Any, images: Tensor, y: Tensor, steps: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(list(attached.parameters().values()), lr=5e-3)
    for _ in range(steps):
        some = torch.randint(len(y), (size,), generator=generator)
        adam.zero_grad()
        F.cross_entropy(attached.model(images[some]).logits, y[some]).backward()
        adam.step()


def directions(count: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(count, 4, generator=generator), dim=1)


@pytest.mark.long
def test_tuned_modules_need_fewer_rows_of_a_related_task(monkeypatch):
    """Two images of each of four classes, of five tasks."""
    images, generator = Images(), torch.Generator().manual_seed(3)
    source = tuned(8)
    fit(source, *images.draw(directions(8, generator), 100, generator), steps=250, size=64)
    saved = source.tensors()
    monkeypatch.setattr(type(source), "read", lambda self, folder: saved)
    accuracies: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        classes = directions(4, generator)
        shots, test = images.draw(classes, 2, generator), images.draw(classes, 100, generator)
        for pretrained, results in accuracies.items():
            attached = tuned(4)
            if pretrained:
                attached.load(tensors_of({"modules_of": "."}, attached))
                features = attached.model.base_model(test[0][:4]).last_hidden_state
                assert torch.equal(features, source.model.base_model(test[0][:4]).last_hidden_state)
            fit(attached, *shots, steps=40, size=8)
            with torch.no_grad():
                right = attached.model(test[0]).logits.argmax(-1) == test[1]
            results.append(float(right.float().mean()))
    means = {pretrained: sum(values) / 5 for pretrained, values in accuracies.items()}
    assert means[True] > means[False] + 0.03, accuracies


def test_without_a_new_head_the_folder_is_named_alone(tmp_path):
    attached = tuned(4)
    attached.model.fresh = []
    with pytest.raises(RecipeError, match="this network has none"):
        tensors_of({"modules_of": str(tmp_path)}, attached)
