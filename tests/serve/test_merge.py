"""merge: streamed is whole bit for bit, a few tensors at a time; mergekit's YAML; what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from luthier.errors import RecipeError
from luthier.registry import build
from luthier.serve.mergekit import Merge, read_mergekit
from luthier.serve.merging import merge_folders
from luthier.storage.tensor_files import INDEX, TensorFiles

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STREAMED = [
    "average",
    {"name": "average", "weights": [0.2, 0.8]},
    {"name": "task_arithmetic", "scale": 0.4},
    {"name": "ties", "density": 0.3},
    {"name": "dare", "density": 0.5},
    {"name": "dare", "density": 0.5, "ties": True},
    {"name": "breadcrumbs", "beta": 0.2, "gamma": 0.9},
    {"name": "slerp", "t": 0.3},
]
WHOLE = [
    {"name": "average", "by_layer": [[1, 0], [0.5, 0.5]]},
    {"name": "slerp", "attention": [0, 1]},
    {"name": "graft", "share": 0.1},
]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    out = {name: torch.randn(6, 4, generator=rng).bfloat16() for name in names}
    return {"embed": torch.randn(5, 4, generator=rng), **out, "scalar": torch.tensor(2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "other")):
        folder = root / name
        folder.mkdir()
        values = tensors(seed)
        parts = [{k: v for k, v in values.items() if ("layers.1" in k) == last} for last in (False, True)]
        for file, part in zip(SHARDS, parts, strict=True):
            save_file(part, str(folder / file), metadata={"format": "pt"})
        where = {k: SHARDS["layers.1" in k] for k in values}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text('{"dtype": "float32"}')
    return root


def read(folder) -> dict[str, torch.Tensor]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= load_file(str(path))
    return out


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        v.dtype == other[k].dtype and v.equal(other[k]) for k, v in one.items()
    )


@pytest.mark.parametrize("settings", STREAMED + WHOLE, ids=str)
def test_a_streamed_merge_is_the_whole_merge(folders, tmp_path, settings):
    merger = build("merger", settings)
    assert merger.tensor_by_tensor() == (settings in STREAMED)
    base = str(folders / "base") if "base" in merger.requires and merger.name != "slerp" else None
    merge = Merge(settings, [str(folders / "one"), str(folders / "other")], base)
    merge_folders(merge, tmp_path / "out")
    whole = merger.merge([tensors(1), tensors(2)], tensors(0) if base else None)
    assert same(read(tmp_path / "out"), whole)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == TensorFiles(folders / "one").file_of
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in whole.values())


def test_wise_takes_one_run_and_its_base(folders, tmp_path):
    merge_folders(
        Merge({"name": "wise", "alpha": 0}, [str(folders / "one")], str(folders / "base")), tmp_path / "out"
    )
    assert same(read(tmp_path / "out"), tensors(0))


def test_memory_holds_one_tensor_of_each_model(folders, tmp_path, monkeypatch):
    """Before a name is read again, all models' tensors of the name before have been written."""
    names = []
    monkeypatch.setattr(TensorFiles, "__getitem__", spy(names))
    merge = Merge("task_arithmetic", [str(folders / "one"), str(folders / "other")], str(folders / "base"))
    merge_folders(merge, tmp_path / "out")
    assert len(names) == 3 * len(tensors(0))
    assert all(len(set(names[i : i + 3])) == 1 for i in range(0, len(names), 3))


def spy(names):
    plain = TensorFiles.__getitem__

    def read_one(self, name):
        names.append(name)
        return plain(self, name)

    return read_one


def test_the_dtype_of_the_result(folders, tmp_path):
    merge = Merge("average", [str(folders / "one"), str(folders / "other")], None, "float16")
    merge_folders(merge, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        if not tensor.is_floating_point():
            continue
        mean = ((tensors(1)[name].double() + tensors(2)[name].double()) / 2).float().half()
        assert tensor.dtype == torch.float16
        assert tensor.equal(mean)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"dtype": "float16"}


def config(folders, method: str, **more) -> dict:
    models = [
        {"model": str(folders / name), "parameters": {"weight": w}}
        for name, w in (("one", 0.3), ("other", 0.7))
    ]
    return {"merge_method": method, "base_model": str(folders / "base"), "models": models, **more}


def written(tmp_path, values):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_mergekits_yaml(folders, tmp_path):
    both = [str(folders / "one"), str(folders / "other")]
    base = str(folders / "base")
    linear = config(folders, "linear", dtype="bfloat16")
    weights = {"weights": [0.3, 0.7]}
    assert read_mergekit(written(tmp_path, linear)) == Merge(
        {"name": "average", **weights}, both, None, "bfloat16"
    )
    ties = config(folders, "ties", parameters={"density": 0.4, "lambda": 0.9, "int8_mask": True})
    ties["models"].append({"model": base})
    expected = Merge({"name": "ties", **weights, "scale": 0.9, "density": 0.4}, both, base)
    assert read_mergekit(written(tmp_path, ties)) == expected
    crumbs = read_mergekit(
        written(tmp_path, config(folders, "breadcrumbs", parameters={"density": 0.9, "gamma": 0.02}))
    )
    assert crumbs.merger["beta"] == pytest.approx(0.08)
    assert crumbs.merger["gamma"] == pytest.approx(0.98)
    slerp = {"merge_method": "slerp", "base_model": both[0], "parameters": {"t": 0.3}}
    slerp["models"] = [{"model": both[0]}, {"model": both[1]}]
    assert read_mergekit(written(tmp_path, slerp)) == Merge({"name": "slerp", "t": 0.3}, both)


def test_everything_without_a_counterpart_stands_in_one_sentence(folders, tmp_path):
    values = config(
        folders, "dare_ties", slices=[], tokenizer_source="union", parameters={"rescale": False, "foo": 1}
    )
    values["models"][0]["parameters"]["weight"] = [0, 1]
    values["models"][1]["bar"] = 2
    with pytest.raises(RecipeError) as refusal:
        read_mergekit(written(tmp_path, values))
    parts = ("slices", "tokenizer_source", "models[1].bar", "parameters.foo", "rescale", "normalize: false")
    assert all(
        part in str(refusal.value) for part in (*parts, "weight of model 0, which is no single number")
    )
    ties = config(folders, "ties")
    ties["models"][0]["parameters"]["weight"] = -1
    with pytest.raises(RecipeError, match="negative weight"):
        read_mergekit(written(tmp_path, ties))
    with pytest.raises(RecipeError, match="merge_method model_stock"):
        read_mergekit(written(tmp_path, config(folders, "model_stock")))


def adapter(folder, alpha: int):
    folder.mkdir()
    save_file(
        {"q.lora_A.weight": torch.full((2, 4), float(alpha))}, str(folder / "adapter_model.safetensors")
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha})
    )
    return str(folder)


def test_adapters_and_refusals(folders, tmp_path):
    one, other = adapter(tmp_path / "a", 4), adapter(tmp_path / "b", 8)
    merge_folders(Merge("average", [one, one]), tmp_path / "out")
    assert same(read(tmp_path / "out"), read(tmp_path / "a"))
    assert (tmp_path / "out/adapter_config.json").is_file()
    whole = str(folders / "one")
    for merge, sentence in (
        (Merge("average", [one, other]), "lora_alpha is 4"),
        (Merge("average", [one, whole]), "cannot be merged with each other"),
        (Merge("ties", [whole, whole]), "give --base"),
        (Merge("ties", [one, one]), "export the adapters as merged"),
        (Merge("average", [whole, str(tmp_path / "none")]), "not a folder"),
        (Merge("average", [whole], None, "int4"), "dtype int4"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            merge_folders(merge, tmp_path / "new")
        assert not (tmp_path / "new").exists()
