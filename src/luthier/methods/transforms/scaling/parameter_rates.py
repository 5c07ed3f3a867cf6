"""Learning rates of single parameters: an update is multiplied by what its name has instead of 1.

A recipe writes it as `learning_rate: {default: 2e-4, lora_B: 2e-3}`, and this transform is put at the end of
the chain by itself. A name is that of a parameter (`B`, or PEFT's `lora_B`), of a module (`q_proj`), or of a
whole group (`model.layers.0.self_attn.q_proj`); where several fit, the first one written counts.
"""

from __future__ import annotations

from luthier.errors import RecipeError
from luthier.methods.transforms._base import Transform
from luthier.registry import did_you_mean, transform


@transform(
    example={"factors": {"A": 2.0}},
    contract={"promises": "its settings name parameters of a tuner"},
    use_when="parts of a tuner need rates of their own: a prompt beside a low-rank pair, a head beside a"
    " prompt.",
    costs="nothing.",
    starting_rate="that of the parameters that no name fits.",
)
class ParameterRates(Transform):
    """update * factor of the first name that fits."""

    pointwise = True

    factors: dict[str, float]  # name of a parameter or module -> what its update is multiplied by

    def __post_init__(self):
        for name, factor in self.factors.items():
            if not factor >= 0:
                raise RecipeError(f"parameter_rates: the factor of '{name}' must not be negative")

    def bind(self, attached):
        fitting, present = set(), set()
        for component in attached.components:
            for group in component.all_param_groups():
                for slot in group.params:
                    fitting |= {name for name in self.factors if fits(name, group.name, slot)}
                    present |= {slot, *group.name.split(".")}
        for name in self.factors:
            if name not in fitting:
                raise RecipeError(
                    f"learning_rate: no parameter is called '{name}'{did_you_mean(name, present)}"
                )
        return self

    def apply(self, grads, state, group, step):
        return {slot: grad * self.factor(group.name, slot) for slot, grad in grads.items()}

    def factor(self, group: str, slot: str) -> float:
        for name, factor in self.factors.items():
            if fits(name, group, slot):
                return factor
        return 1.0


def fits(name: str, group: str, slot: str) -> bool:
    """Is it the name of this parameter, or the name or a run of parts of the name of its group?"""
    if name in (slot, f"{group}.{slot}") or name.removeprefix("lora_") == slot:
        return True
    return f".{name}." in f".{group}."
