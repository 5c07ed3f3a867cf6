"""Other libraries are left as they were: what a run touches in them is taken back at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SNAPSHOT = """
import gc, json, sys
import torch, transformers, peft
import transformers.modeling_utils, transformers.masking_utils, transformers.generation.utils
from transformers.models.llama import modeling_llama
from transformers.utils import import_utils, logging
from peft import mapping
from peft.utils.peft_types import PeftType


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
tuners = [m for m in sys.modules if m.startswith("luthier.methods.tuners.")]
assert not tuners, "tuners wait until they are used"
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


def test_register_peft_makes_every_delta_known():
    code = (
        "import luthier; luthier.register_peft()\n"
        "from peft.utils.peft_types import PeftType\n"
        "print('LUTHIER_SSF' in PeftType.__members__, 'LUTHIER_HOULSBY' in PeftType.__members__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[0] == "True", done.stderr[-2000:]
