"""Classes by their names: cosines by hand, names that are added, and ViLD on patterns that no row names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import luthier
from helpers.media import make_vit, shades
from helpers.vision import make_clip
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build

pytest.importorskip("PIL")
WIDTH = 16
CLASSES = [f"pattern {i}" for i in range(12)]
NOVEL = CLASSES[6:]


def roles_of(path: str, rows: list[dict], **settings) -> Roles:
    architecture = build("architecture", {"name": "open_vocabulary", **settings})
    model = architecture.load(path, dtype=torch.float32, **architecture.fit_to(rows)).eval()
    renderer = architecture.renderer(architecture.tokenizer(path), model.config)
    return Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)


def test_logits_are_cosines_with_names(tmp_path):
    """With the vectors of a CLIP's prompts, the bias as the background's, and its image tower's own e."""
    from luthier.model.two_towers import two_towers_of

    clip, path = make_clip(tmp_path / "clip"), make_vit(tmp_path / "vit")
    raw = shades(4)
    raw += [{**shades(5)[4], "label": 2, "label_name": "background"}]
    rows = load_rows(raw).rows
    prompts = ("a photo of a {}.", "a {}")
    roles = roles_of(path, rows, clip=clip, prompts=prompts, temperature=0.1)
    policy, batch = roles.policy, roles.batch(rows)
    network: Any = policy.model
    assert network.config.names == ["dark", "light", "background"]
    with torch.no_grad():
        pixels = torch.cat([network.media.inputs(n) for n in network.media.paths])
        values, bias = network(pixel_values=pixels).logits, network.classifier.bias
        towers = two_towers_of(clip)
        names = [towers.texts([p.replace("{}", n) for p in prompts]).mean(0) for n in ("dark", "light")]
        vectors = F.normalize(torch.stack([*names, bias]), dim=-1)
        logits = F.normalize(values - bias, dim=-1) @ vectors.T / 0.1
        expected = logits.log_softmax(-1).gather(1, torch.tensor([[0], [1], [0], [1], [2]])).squeeze(1)
        torch.testing.assert_close(policy.logprobs(batch), expected, atol=1e-4, rtol=1e-4)
        plain = policy.architecture.plain(policy.model, policy.attached, batch)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
    policy.logprobs(roles.batch(rows)).sum().backward()
    assert network.classifier.bias.grad.norm() > 0


def test_what_has_no_name_is_refused(tmp_path):
    path, rows = make_vit(tmp_path), load_rows(shades(4)).rows
    with pytest.raises(RecipeError, match="set clip"):
        roles_of(path, rows)
    with pytest.raises(RecipeError, match="is of 'light'"):
        roles_of(path, rows, embeddings={"dark": [1.0, 0.0]})
    with pytest.raises(RecipeError, match="'light' is novel"):
        roles_of(path, rows, embeddings={"dark": [1.0, 0.0], "light": [0.0, 1.0]}, novel=["light"])
    with pytest.raises(RecipeError, match="one class of several"):
        build("architecture", {"name": "open_vocabulary", "problem_type": "regression"})
    with pytest.raises(RecipeError, match="no tower"):
        roles_of(path, rows, clip=make_vit(tmp_path / "vit"))


# --- ViLD


def tower(pixels: np.ndarray) -> torch.Tensor:
    """A frozen random image tower: [n, 16, 16, 3] -> [n, WIDTH]; the text tower says what it says of a
    pattern without noise.
    """
    generator = torch.Generator().manual_seed(3)
    inner, outer = (torch.randn(*s, generator=generator) for s in ((768, 64), (64, WIDTH)))
    x = torch.tensor(pixels / 255 - 0.5, dtype=torch.float32).flatten(1)
    return F.normalize(torch.tanh(x @ inner / 5) @ outer, dim=-1)


def patterns() -> np.ndarray:
    """[12, 16, 16, 3] squares of four by four colours."""
    colours = np.random.default_rng(0).integers(30, 226, (len(CLASSES), 4, 4, 3))
    return colours.repeat(4, 1).repeat(4, 2)


def regions(count: int, seed: int, hidden: bool) -> list[dict]:
    """So many noisy regions of each class, and where novel ones are hidden some of nothing. hidden: novel
    classes are called background, as nobody labelled them.
    """
    from PIL import Image

    rng, rows = np.random.default_rng(seed), []
    sources = [(name, pattern) for name, pattern in zip(CLASSES, patterns(), strict=True)]
    if hidden:
        sources.append(("background", np.full((16, 16, 3), 128)))
    for name, pattern in sources:
        for _ in range(count):
            pixels = (pattern + rng.normal(0, 25, pattern.shape)).clip(0, 255).astype(np.uint8)
            label = "background" if hidden and name in NOVEL else name
            vector = tower(pixels[None])[0].tolist()
            rows.append({"image": Image.fromarray(pixels), "label": label, "region_embedding": vector})
    return rows


@torch.no_grad()
def accuracy(roles: Roles, rows: list[dict]) -> dict[str, float]:
    """Of base and of novel classes, among all names but the background."""
    read = load_rows(rows).rows
    names = roles.policy.model.config.names
    with roles.policy.eval_mode():
        logits = roles.policy.outputs(roles.batch(read)).apply(lambda z: z)
    logits[:, names.index("background")] = -torch.inf
    right = {"base": [], "novel": []}
    for row, best in zip(rows, logits.argmax(1).tolist(), strict=True):
        right["novel" if row["label"] in NOVEL else "base"].append(names[best] == row["label"])
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def settings(tmp_path, **changes) -> dict:
    own = {"novel": NOVEL, "temperature": 0.05, **changes}
    vectors = dict(zip(CLASSES, tower(patterns()).tolist(), strict=True))
    return dict(
        model=make_vit(tmp_path / "base"),
        architecture={"name": "open_vocabulary", "embeddings": vectors, **own},
        data=regions(24, 1, hidden=True),
        tuner="full",
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        dtype="float32",
        eval_data=0,
        evaluate=[],
    )


@pytest.mark.long
def test_novel_classes_come_with_distillation_alone(tmp_path):
    results = {}
    for objective in ("sft", "sft + 0.5*vild"):
        folder = tmp_path / str(len(results))
        luthier.tune(objective=objective, max_steps=150, output_dir=folder, **settings(tmp_path))
        results[objective] = accuracy(luthier.load(folder).roles, regions(20, 2, hidden=False))
    both, text = results["sft + 0.5*vild"], results["sft"]
    assert both["novel"] > 0.7 and text["novel"] < 0.3
    assert both["base"] > 0.8 and text["base"] > 0.8


def test_adding_names_changes_no_weight(tmp_path):
    """Tuned without the novel names, loaded with them: what is said of the others stays as it is."""
    given = settings(tmp_path, novel=[])
    given["data"] = regions(4, 1, hidden=True)
    luthier.tune(max_steps=2, output_dir=tmp_path / "run", **given)
    few = luthier.load(tmp_path / "run").roles
    architecture = build("architecture", given["architecture"] | {"novel": NOVEL})
    names = {"names": [*few.policy.model.config.names, *NOVEL]}
    model = architecture.load(given["model"], dtype=torch.float32, **names).eval()
    weights = few.policy.model.state_dict()
    model.load_state_dict(weights)
    rows = load_rows(regions(1, 3, hidden=True)).rows
    renderer = architecture.renderer(architecture.tokenizer(given["model"]), model.config)
    many = Roles(Policy(architecture, model, Untuned(model)), Clock(), renderer)
    with torch.no_grad(), few.policy.eval_mode():
        before = few.policy.outputs(few.batch(rows)).apply(lambda z: z)
        after = many.policy.outputs(many.batch(rows)).apply(lambda z: z)
        model.train()
        training = many.policy.outputs(many.batch(rows)).apply(lambda z: z)
    assert before.shape[1] + len(NOVEL) == after.shape[1]
    torch.testing.assert_close(after[:, : before.shape[1]], before, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        training.softmax(-1)[:, : before.shape[1]], before.softmax(-1), atol=1e-5, rtol=0
    )
