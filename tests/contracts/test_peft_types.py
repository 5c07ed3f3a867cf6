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
from helpers.tuners import base as make_base
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


def test_places_are_peft_s_own():
    """The modules that PEFT has for a type and kind of network; all linear ones where it has none."""

    def places(kind: str, network="llama", **config) -> set[str]:
        spec = {"name": "peft", "type": kind, "config": config}
        attached = build("tuner", spec).attach(make_base(network))
        return {name.removeprefix("model.layers.") for name in attached.layers}

    norms = {"0.input_layernorm", "0.post_attention_layernorm", "1.input_layernorm"}
    assert places("ln_tuning") == norms | {"1.post_attention_layernorm", "model.norm"}
    ia3 = {
        f"{i}.{name}" for i in (0, 1) for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert places("ia3") == ia3
    both = {f"{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
    assert places("vera") == both
    assert places("vera", layers_to_transform=[1]) == {n for n in both if n.startswith("1.")}
    every = places("miss", r=4, target_modules="all-linear")
    assert len(every) == 14
    assert places("miss", r=4, target_modules="all-linear", layers_to_transform=1) == {
        n for n in every if n.startswith("1.")
    }
    down = {"0.mlp.down_proj", "1.mlp.down_proj"}
    assert places("miss", r=4, target_modules="all-linear", exclude_modules=["down_proj"]) == every - down
    assert places("miss", r=4, target_modules="all-linear", exclude_modules=r".*down_proj") == every - down
    with pytest.raises(RecipeError, match="layers_to_transform 9 matches none"):
        places("miss", r=4, target_modules="all-linear", layers_to_transform=[9])
    with pytest.raises(RecipeError, match="has no setting 'layers_to_transform'"):
        places("ln_tuning", layers_to_transform=[1])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*(k_proj|down_proj)"])
def test_ia3_s_feedforward_modules_are_among_its_targets(targets, tmp_path):
    spec = {"name": "peft", "type": "ia3", "config": {"target_modules": targets}}
    attached = build("tuner", spec).attach(make_base())
    with torch.no_grad():
        for p in attached.parameters().values():
            p.mul_(1.5)
    attached.save(tmp_path)
    read = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert torch.allclose(plain(read), plain(attached.model), atol=1e-5)
    scaled = {n.rpartition(".")[2] for n, m in attached.layers.items() if m.is_feedforward}
    assert scaled == {"down_proj"}


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
    starts = [w for w in attached.warnings if "does not start as the base model" in w]
    assert len(starts) == (kind in ELSEWHERE), attached.warnings
    kept = {n: t.clone() for n, t in attached.model.state_dict().items()}
    attached.save(tmp_path / "adapter")
    with torch.no_grad():
        tuned = answers(attached)
        assert not torch.allclose(tuned[:, attached.virtual :], plain(base), atol=1e-6)
        for folder in ("run", "adapter"):  # as the run left it, and saved again
            read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
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
