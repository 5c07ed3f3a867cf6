"""From the shell to the first step: what is not needed is not loaded, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

RUN = """
import gc, sys
from luthier import compat
from luthier.compat.lazy_imports import rarely
often = gc.get_threshold()
compat.keep(), rarely()  # as the command line begins
WAIT = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed._functional_collectives", "datasets")
WAIT += ("scipy.optimize", "sympy", "trl")
WAIT += ("luthier.methods.tuners.adapters.ssf", "luthier.methods.tuners.adapters.houlsby")
from luthier.run.run import tune
seen = []
from luthier.report.console import Callback
class Watch(Callback):
    def step(self, log):
        seen.append([m for m in WAIT if m in sys.modules])
        assert gc.get_threshold() == often and gc.get_freeze_count() > 100_000 > len(gc.get_objects())
        assert gc.get_stats()[2]["collections"] <= 1, gc.get_stats()
keys = {"model": "toy:lm-small", "data": "toy:arithmetic", "tuner": "lora", "max_steps": 1}
tune(**keys, folder=sys.argv[1], callback=Watch())
print("loaded", seen)
"""


KINDS = """
from luthier import compat
compat.keep()
from luthier.compat.lazy_imports import Later, import_models, waiting
import_models()
import sys, torch, transformers.masking_utils as masks, transformers.distributed.sharding_utils as sharding
holds = lambda module: any(type(value) is Later for value in vars(module).values())
kept = [n for n, m in list(sys.modules.items()) if n.startswith("torch") and m and holds(m)]
assert kept == ["torch.distributed.tensor"] or not kept, kept  # torch's own modules hold the real names
assert not isinstance(torch.ones(1), sharding.DTensor) and "torch.distributed.tensor" not in sys.modules
with waiting(), torch.device("meta"):
    torch.nn.Embedding(3, 4)
assert "torch._dynamo" not in sys.modules
from torch.distributed.tensor import DTensor, Shard
assert torch.distributed.tensor.DTensor is DTensor and issubclass(DTensor, sharding.DTensor)
assert sharding.Shard(1) == Shard(1)
with masks.TransformGetItemToIndex():
    pass
from transformers.integrations import finegrained_fp8 as fp8
assert id(fp8._load_finegrained_fp8_kernel) in torch._dynamo.trace_rules._allowed_callable_ids
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
with torch.device("meta"):  # what ran unmarked is marked again
    torch.nn.Embedding(3, 4)
print("as real")
"""


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_compiler_and_sharded_tensors_are_not_loaded_and_modules_not_searched_for_garbage(tmp_path: Path):
    said = run(RUN, str(tmp_path / "run"))
    assert "loaded [[]]" in said


def test_what_waits_becomes_the_real_thing():
    assert "as real" in run(KINDS)


def test_what_transformers_offers_is_found_by_reading_its_files_once():
    """Transformers' own way beside ours, and that ours reads no file again."""
    import transformers.models
    from transformers.utils import import_utils as own

    from luthier.compat.lazy_imports import read_once

    spec = spec_from_file_location("transformers.utils.plain", own.__file__)
    assert spec and spec.loader
    plain, ours = module_from_spec(spec), module_from_spec(spec)
    spec.loader.exec_module(plain)
    spec.loader.exec_module(ours)
    read_once(ours)
    folder = Path(transformers.models.__file__).parent
    found = ours.create_import_structure_from_path(folder)
    assert len(found) > 200 and found == plain.create_import_structure_from_path(folder)
    assert found is ours.create_import_structure_from_path(str(folder / "__init__.py"))
    for text in (
        "",
        "x = 1",
        "__all__ = ['a']\n",
        "a\n__all__ = []\nb\n__all__ = [\n  'c',\n  'd',\n]\ne\n",
        "  __all__ = ['a']",
    ):
        assert ours.fetch__all__(text) == plain.fetch__all__(text)


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3", "mixtral", "gpt2", "gpt_neox", "opt", "bloom", "falcon_alibi", "mamba"]
)
def test_what_is_laid_out_unfilled_is_the_same_network(kind, tmp_path):
    """Every weight and every buffer (rotary frequencies, positions, slopes), and where they lie."""
    import transformers as t

    from helpers.zoo import CAUSAL
    from luthier.methods.architectures.text.causal import Causal

    name, settings = CAUSAL[kind]
    t.AutoModelForCausalLM.from_config(getattr(t, name)(**settings)).save_pretrained(tmp_path)
    want, found = t.AutoModelForCausalLM.from_pretrained(tmp_path), Causal().load(str(tmp_path))
    both = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (want, found)]
    assert both[0].keys() == both[1].keys()
    assert all(
        x.dtype == both[1][k].dtype and x.device == both[1][k].device and torch.equal(x, both[1][k])
        for k, x in both[0].items()
    )


def test_short_rows_are_measured_in_larger_batches_with_the_same_numbers(shallow, tmp_path):
    """16 rows at least, further ones while they are short; as many as are asked for where that is said."""
    from luthier.methods.evaluators._base import LETTERS, batches, run_all
    from luthier.model.load import assemble
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import validate
    from luthier.registry import build

    def of(lengths: list[int], size: int | None = None) -> list[list[int]]:
        rows = [{"prompt": "x" * (n - 1), "completions": ["y"]} for n in lengths]
        roles = SimpleNamespace(batch=lambda some: [len(r["prompt"]) + 1 for r in some])
        return list(batches(roles, rows, size))

    assert of([]) == [] and of([5, 2, 9]) == [[2, 5, 9]]
    long = LETTERS // 4
    assert [len(b) for b in of([long] * 20)] == [16, 4]
    assert [sum(b) for b in of([LETTERS // 64] * 100)] == [LETTERS, 36 * (LETTERS // 64)]
    assert [len(b) for b in of([2] * 7, size=3)] == [3, 3, 1]

    recipe = Recipe.load({"model": shallow, "tuner": "full", "dtype": "float32"})
    rows = [
        {"id": f"{i}", "prompt": f"{i}+{i}=", "completions": [str(i + i) * (i % 3 + 1)]} for i in range(40)
    ]
    roles = assemble(recipe, validate(recipe, rows))
    for name in ("loss", "accuracy"):
        small, large = ({"name": name, "batch_size": size} for size in (1, None))
        with torch.no_grad():
            want, found = (build("evaluator", e).run(roles, rows, tmp_path, "before") for e in (small, large))
        assert found == pytest.approx(want, rel=1e-6), name
    said = roles.policy.outputs(roles.batch(rows))
    assert torch.equal(said.first(), said.top(1)[1].squeeze(1))

    every, alone, passes = [build("evaluator", e) for e in ("loss", "accuracy", "bits_per_byte")], {}, []
    with torch.no_grad():
        for e in every:
            alone |= e.run(roles, rows, tmp_path, "before")
        hook = roles.policy.model.model.register_forward_hook(lambda *_: passes.append(1))
        assert run_all(every, roles, rows, tmp_path, "before") == alone and len(alone) == 4
        hook.remove()
    assert len(passes) == 1, "one batch, read once for all three"
