"""Other libraries are left as they were: what a run touches in them is taken back at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SNAPSHOT = """
import gc, json, signal, sys, threading, warnings
import accelerate, optuna, torch, transformers, peft
import transformers.modeling_utils, transformers.masking_utils, transformers.generation.utils
from transformers.models.llama import modeling_llama
from transformers.utils import import_utils, logging
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from peft import mapping
from peft.utils.peft_types import PeftType


LIBRARIES = ("torch", "transformers", "peft", "accelerate", "optuna", "safetensors", "tokenizers", "datasets")


def attributes():
    # every function, class and method of the libraries, by its place
    out = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in LIBRARIES or not hasattr(module, "__dict__"):
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                out[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    if callable(member) or isinstance(member, (property, classmethod, staticmethod)):
                        out[name, key, attribute] = member
    return out


def touched(before):
    # what is another object than before, or ours, or gone
    after, out = attributes(), []
    for place, value in after.items():
        ours = str(getattr(value, "__module__", "")).startswith("luthier")
        if ours or before.get(place, value) is not value:
            out.append(place)
    return out + [place for place in before if place not in after and place[0] in sys.modules]


def snapshot():
    tables = {n: dict(v) for n, v in vars(mapping).items() if n.startswith("PEFT_TYPE_TO")}
    return {
        "meta_path": list(sys.meta_path),
        "rotary": modeling_llama.apply_rotary_pos_emb,
        "modeling_llama": dict(vars(modeling_llama)),
        "import_utils": dict(vars(import_utils)),
        "attention": dict(transformers.AttentionInterface._global_mapping),
        "masks": dict(transformers.masking_utils.AttentionMaskInterface._global_mapping),
        "verbosity": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "peft_types": (list(PeftType), list(PeftType.__members__), sorted(PeftType._value2member_map_)),
        "peft_tables": tables,
        "gc": (gc.get_threshold(), gc.isenabled()),
        "optuna": optuna.logging.get_verbosity(),
        "quantizers": {**AUTO_QUANTIZER_MAPPING, **AUTO_QUANTIZATION_CONFIG_MAPPING},
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "defaults": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
                     torch.get_float32_matmul_precision(), torch.is_grad_enabled()),
        "tensor": torch.distributed.tensor if hasattr(torch.distributed, "tensor") else None,
        "threads": torch.get_num_threads(),
    }


def differences(before, after):
    out = []
    for key in before:
        a, b = before[key], after[key]
        same = a is b or a == b
        if isinstance(a, dict) and isinstance(b, dict) and not any(isinstance(x, dict) for x in a.values()):
            same = a.keys() == b.keys() and all(a[k] is b[k] for k in a)
        if not same:
            out.append(key)
    return out
"""


RUN = (
    SNAPSHOT
    + """
before = snapshot()
import luthier
after_import = snapshot()
assert not differences(before, after_import), differences(before, after_import)
loaded = [m for m in sys.modules if m.startswith("luthier.methods.tuners.")]
assert not loaded, "tuners wait until they are used"
for tuner in json.loads(sys.argv[2]):
    luthier.tune(model="toy:lm-small", data="toy:people", tuner=tuner, max_steps=1, max_length=64,
                 evaluate=["loss"], folder=f"{sys.argv[1]}/{tuner}")
    found = differences(before, snapshot())
    assert not found, (tuner, found)
loaded = [m for m in sys.modules if m.startswith("luthier.methods.tuners.adapters.")]
assert "luthier.methods.tuners.adapters.houlsby" not in loaded, loaded
"""
)


def test_a_run_leaves_other_libraries_as_they_were(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), '["lora", "ssf"]'],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


EVERYTHING = (
    SNAPSHOT
    + """
import luthier
from luthier.errors import RecipeError
from luthier.serve.chat import chat
from luthier.serve.inspect import inspect
from luthier.study.compare import ComparisonSpec, run_comparison

folder = sys.argv[1]
SHARED = dict(model="toy:lm-small", data="toy:people", max_steps=1, max_length=64, evaluate=["loss"])
warm = luthier.tune(SHARED, folder=folder + "/warm")  # what libraries import and set by themselves is there
before, places = snapshot(), attributes()


def untouched(what):
    gc.collect()
    changed = differences(before, snapshot()) + touched(places)
    print(what, changed[:8], flush=True)
    assert not changed, (what, changed[:8])


class Fails:
    def __getattr__(self, name):
        raise ZeroDivisionError(name)


def fails():
    try:
        luthier.tune(SHARED, tuner="ssf", folder=folder + "/fails", callback=Fails())
    except ZeroDivisionError:
        return
    raise AssertionError("it did not fail")


def refused():
    try:
        luthier.tune(SHARED, tuner="ssf", learning_rate=1e30, max_steps=8, folder=folder + "/diverges")
    except RecipeError:
        return
    raise AssertionError("it was not refused")


def in_a_thread():
    ended = []
    thread = threading.Thread(
        target=lambda: ended.append(luthier.tune(SHARED, tuner="ssf", folder=folder + "/thread"))
    )
    thread.start()
    thread.join()
    assert ended, "the run in a thread failed"


def compares():
    arms = {rate: luthier.Recipe.load({**SHARED, "learning_rate": float(rate)}) for rate in ("1e-3", "1e-4")}
    run_comparison(ComparisonSpec(arms, seeds=1, subprocesses=False), folder=folder + "/compare")


def searches():
    luthier.search(SHARED, "learning_rate", sampler="random", trials=1, test_seeds=1, subprocesses=False,
                   output_dir=folder + "/search")


def loads():
    model = luthier.load(folder + "/warm")
    assert model.ask("one", max_new_tokens=1) is not None
    assert logging.get_verbosity() == before["verbosity"][0], "loading is quiet, not what follows"
    luthier.tune(SHARED, folder=folder + "/beside")  # what a run takes back is not what the model needs
    model.logprobs([{"id": "0", "prompt": "a", "completions": ["b"]}])
    model.ask("one", max_new_tokens=1)


def chats():
    chat(folder + "/warm", "hello", say=lambda text: None, max_new_tokens=1)


def inspects():
    inspect("toy:lm-small", folder + "/warm")


def quantized():
    luthier.tune(SHARED, quantization="nf4", folder=folder + "/quantized")


for use in (fails, refused, in_a_thread, compares, searches, loads, chats, inspects, quantized):
    use()
    untouched(use.__name__)
assert "luthier.methods.tuners.adapters.houlsby" not in sys.modules, "nobody has used it"
"""
)


@pytest.mark.slow
def test_no_use_of_the_library_changes_another_one(tmp_path: Path):
    """Runs that fail, that diverge, in threads; comparing, searching, loading, chatting, inspecting: every
    function, class and method of the libraries is the object that it was.
    """
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, str(tmp_path)], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_a_lasting_model_keeps_what_it_needs_and_no_more(monkeypatch):
    """Runs and models are counted apart; what one takes back is not what another needs."""
    from luthier import compat

    monkeypatch.setattr(compat, "_models", 0)  # other tests' models may still be alive in this process
    monkeypatch.setattr(compat, "_after_models", [])

    class Model:
        pass

    log, model = [], Model()
    with compat.loading():
        compat.on_exit(lambda: log.append("model"))
        compat.hold(model)
    with compat.session(), compat.session():
        compat.on_exit(lambda: log.append("run"))
    assert log == ["run"]
    del model
    assert log == ["run", "model"]
    with pytest.raises(KeyError), compat.session():
        compat.on_exit(lambda: log.append("failed run"))
        raise KeyError
    assert log[-1] == "failed run"
