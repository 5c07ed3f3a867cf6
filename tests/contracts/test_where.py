"""The settings that say where a tuner sits hold for every tuner that has them."""

from __future__ import annotations

import re

import pytest
from transformers import MambaConfig, MambaForCausalLM

from helpers.tuners import anywhere, base, put
from luthier.errors import RecipeError
from luthier.methods.tuners._delta import TargetModules
from luthier.model.anatomy import layer_of
from luthier.registry import build, find, names

PLACED = [name for name in names("tuner") if issubclass(find("tuner", name), TargetModules)]


def modules_of(attached) -> set[str]:
    """The modules that a tuner has put something on."""
    return {name for name in attached.layers}


def moved(name: str, kind: str, **where) -> set[str]:
    return modules_of(put(name, base(kind), **where))


@pytest.mark.parametrize("name", PLACED)
def test_where_settings_hold(name):
    attached, kind = anywhere(name)
    everywhere = modules_of(attached)
    inside = {n for n in everywhere if (layer_of(f"{n}.") or ("", -1))[1] == 1}
    assert inside < everywhere
    assert moved(name, kind, layers_to_transform=[1]) == inside
    assert moved(name, kind, layers_to_transform=1) == inside
    leaf = sorted(everywhere)[0].rpartition(".")[2]
    rest = {n for n in everywhere if not n.endswith(f".{leaf}")}
    if name == "autopeft":  # each of its parts has one kind of module, and is refused without it
        with pytest.raises(RecipeError, match="no module for"):
            moved(name, kind, exclude_modules=[leaf])
    elif rest:  # methods that sit on one kind of module have nothing else
        assert moved(name, kind, exclude_modules=[leaf]) == rest
        assert moved(name, kind, exclude_modules=rf".*\.{leaf}") == rest
        assert moved(name, kind, exclude_modules=[leaf], layers_to_transform=[1]) == rest & inside
    with pytest.raises(RecipeError, match="layers_to_transform 9 matches none"):
        put(name, base(kind), layers_to_transform=[9])


def test_counted_budgets_count_the_chosen_modules_alone():
    """A number of parameters is spread over what is chosen, however the exclusion is written."""
    for exclude in (["down_proj"], r".*down_proj"):
        for layers in (None, [1]):
            where = {"exclude_modules": exclude, "layers_to_transform": layers}
            apet = put("apet", n=500, **where)
            assert sum(p.numel() for p in apet.parameters().values()) == 500
            spt = put("spt", budget=500, **where)
            assert abs(sum(p.numel() for p in spt.parameters().values()) - 500) <= len(spt.layers)


@pytest.mark.parametrize("name", ["lora", "apet", "iaa", "spt", "peft"])
def test_layers_that_are_not_there_are_named(name):
    """Whichever way the modules are chosen, and where one of several layers is missing."""

    def attach(**where):
        return put(name, **({"type": "vera", "config": where} if name == "peft" else where))

    for layers in ([0, 9], [9]):
        with pytest.raises(RecipeError, match="layers_to_transform 9 matches none of the 4 modules"):
            attach(layers_to_transform=layers, target_modules=["q_proj", "down_proj"])
    with pytest.raises(RecipeError, match=r"layers_to_transform \[\] names no layer"):
        attach(layers_to_transform=[])
    whole = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert modules_of(attach(layers_to_transform=[1], target_modules=whole)) == {whole[1]}


@pytest.mark.parametrize("name", ["lora", "apet", "ssf", "peft"])
def test_patterns_that_say_nothing(name):
    def attach(**where):
        return put(name, **({"type": "oft", "config": where} if name == "peft" else where))

    for key in ("target_modules", "exclude_modules"):
        with pytest.raises(RecipeError, match=f"{key} '\\(' is no regular expression"):
            attach(**{key: "("})
    with pytest.raises(RecipeError, match=r"layers_to_transform.* (too|must)"):
        attach(layers_pattern="layers")
    for excluded in (["q_prj"], r".*q_prj"):
        warnings = attach(exclude_modules=excluded).warnings
        assert any("q_prj' matches nothing" in text for text in warnings)


@pytest.mark.parametrize("name", PLACED)
def test_targets_that_name_nothing(name):
    """One sentence that says which setting it is, whatever the tuner does with its modules."""
    _, kind = anywhere(name)
    for target, words in (
        (["q_prj"], "target_modules 'q_prj' matches nothing; did you mean 'q_proj'"),
        (r".*\.q_prj", r"target_modules '.*\.q_prj' matches nothing"),
        ([], r"target_modules [] names no module"),
    ):
        if kind == "gpt2":
            words = words.partition(";")[0]
        with pytest.raises(RecipeError, match=re.escape(f"tuner '{name}': {words}")):
            put(name, base(kind), target_modules=target)
        if target:
            with pytest.raises(RecipeError, match="' matches nothing"):
                put(name, base(kind), target_modules=target, layers_to_transform=[1])
    with pytest.raises(
        RecipeError, match=rf"tuner '{name}': exclude_modules '\.\*' leaves none of the \d+ mod"
    ):
        put(name, base(kind), exclude_modules=r".*")


def test_exclusions_that_leave_a_ratio_without_modules():
    with pytest.raises(RecipeError, match="the settings leave out every module that d_ratio is for"):
        put("s2ft", exclude_modules=["down_proj"])


@pytest.mark.parametrize("name", PLACED)
def test_experts_that_all_linear_leaves_out_are_said(name):
    """One sentence, also where a tuner chose its modules by their whole names."""
    spec = build("tuner", name)
    if spec.target_modules != "all-linear":
        pytest.skip("chooses parts of layers")
    where = {"where": "all"} if name == "r_amt" else {}
    try:
        attached = put(name, base("mixtral"), **where)
    except RecipeError as error:
        assert re.search("no separate linear module|quantized base|no feed-forward block", str(error))
        return
    sentences = [text for text in attached.warnings if "fused expert weights" in text]
    trained = any(".experts" in group.name for group in attached.param_groups())
    assert len(sentences) == (0 if trained else 1)


def test_vectors_of_ia3_and_pools_that_leave_experts_out_say_so():
    for name in ("ia3", "l2m"):
        (sentence,) = put(name, base("mixtral")).warnings
        assert sentence.startswith(f"tuner '{name}' leaves out 4 fused expert weights")
    attached = put("peft", base("mixtral"), type="vera", config={"target_modules": "all-linear"})
    assert any("all-linear leaves out 4 fused expert weights" in text for text in attached.warnings)


def test_pefts_usual_modules_of_lora_on_a_mixture():
    """PEFT itself loses them where experts are one tensor."""
    attached = put("peft", base("mixtral"), type="lora")
    assert {n.rpartition(".")[2] for n in attached.layers} == {"q_proj", "v_proj"}


def test_what_a_state_space_network_does_not_call_is_left_out():
    """The step sizes of Mamba are computed from a weight whose module is never called."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

    def attach(name: str, **settings) -> set[str]:
        attached = put(name, MambaForCausalLM(MambaConfig(**shape)), **settings)
        return {n.rpartition(".")[2] for n in getattr(attached, "layers", ())}

    assert attach("lora") == attach("lora", layers_to_transform=[1]) == {"in_proj", "x_proj"}
    assert attach("lora", exclude_modules=r".*in_proj") == {"x_proj"}
    assert attach("spiel") == attach("apet", n=50) == {"in_proj", "x_proj", "out_proj"}
    with pytest.raises(RecipeError, match="without calling the module"):
        attach("lora", target_modules=["dt_proj"])
    attach("pruned")
    for name, settings in (("antidote", {}), ("pruned", {"criterion": "wanda"})):
        with pytest.raises(RecipeError, match=f"tuner '{name}' measures what matrices read"):
            attach(name, **settings)
