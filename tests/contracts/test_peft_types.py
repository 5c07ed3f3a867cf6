"""Every tuner type of the installed PEFT, by its name in a recipe: it is trained in a run, PeftModel reads
what was saved and answers the same, it is exported merged or says in a sentence that it cannot, and it is
taken off exactly. What cannot be used says why before a model is loaded.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

import luthier
from helpers.models import make_llama, make_tokenizer
from helpers.rows import recipe_of
from helpers.tuners import IDS, plain
from luthier.errors import RecipeError
from luthier.methods.tuners._peft.foreign import UNSUPPORTED
from luthier.registry import build

TYPES = sorted(k.value for k in PEFT_TYPE_TO_CONFIG_MAPPING if not k.value.startswith("LUTHIER_"))
SETTINGS = {  # what a network of this width needs, or PEFT has no default for
    "C3A": {"block_size": 8},
    "P_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "TRAINABLE_TOKENS": {"token_indices": make_tokenizer()("+=01")["input_ids"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
}
# do not begin as the base model, by PEFT's defaults
ELSEWHERE = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}
UNMERGEABLE = {"BEFT", "LILY", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    make_llama(**shape).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def spec_of(kind: str) -> dict:
    return {"name": "peft", "type": kind.lower(), "config": SETTINGS.get(kind, {})}


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_from_a_run_to_an_export(kind, wide, tmp_path):
    spec = spec_of(kind)
    if kind in UNSUPPORTED:
        with pytest.raises(RecipeError, match=f"type: {kind.lower()} cannot be used here: ") as refusal:
            build("tuner", spec)
        assert "\n" not in str(refusal.value)
        return
    recipe = recipe_of(wide) | {"tuner": spec, "max_steps": 2, "learning_rate": 1e-2}
    run = luthier.tune(recipe, folder=tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(run.losses)))
    base = AutoModelForCausalLM.from_pretrained(wide).eval()
    attached = build("tuner", spec).attach(copy.deepcopy(base))
    attached.load(attached.read(tmp_path / "run"))
    kept = {n: t.clone() for n, t in attached.model.state_dict().items()}
    attached.save(tmp_path / "adapter")
    with torch.no_grad():
        tuned = answers(attached)
        assert not torch.allclose(tuned[:, attached.virtual :], plain(base), atol=1e-6)
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        assert torch.allclose(plain(read), tuned, atol=1e-5)
        with attached.off():
            assert torch.equal(answers(attached), plain(base))
        try:
            with attached.merged() as merged:
                assert torch.allclose(plain(merged), tuned, atol=1e-4)
            attached.export_merged(tmp_path / "merged")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
            assert torch.allclose(plain(again), tuned, atol=1e-4)
            assert kind not in UNMERGEABLE
        except RecipeError as refusal:
            assert "cannot be merged into the weights" in str(refusal)
            assert kind in UNMERGEABLE
        assert torch.equal(answers(attached), tuned)
    after = attached.model.state_dict()
    assert after.keys() == kept.keys() and all(torch.equal(after[n], t) for n, t in kept.items())


def answers(attached) -> torch.Tensor:
    """Logits of the text, and of vectors before it."""
    if not attached.virtual:
        return plain(attached.model)
    words = attached.model.get_input_embeddings()(IDS)
    vectors = attached.soft().expand(len(IDS), -1, -1)
    return attached.model(inputs_embeds=torch.cat([vectors, words], 1)).logits
