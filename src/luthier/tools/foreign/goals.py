"""What the tools' preference losses and rewards are called here."""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.tools.foreign.draft import Draft, as_list, is_on, number, whole

# loss_type of TRL's DPOTrainer and of the tools that follow it -> our objective
PREFERENCE_LOSSES = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "aot_pair": "aot",
    "discopop": "discopop",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sigmoid_norm": "sigmoid_norm",
    "kto": "kto",
    "kto_pair": "kto",
    "apo_zero_unpaired": "apo_zero_unpaired",
    "bco": "bco",
    "orpo": "orpo",
    "simpo": "simpo",
    "cpo": "cpo",
    "sft": "chosen_sft",
}
# a reward function of TRL, ms-swift or a recipe of theirs -> ours
REWARDS: dict[str, Any] = {
    "accuracy": "math",
    "accuracy_reward": "math",
    "reasoning_accuracy_reward": "math",
    "math": "math",
    "math_reward": "math",
    "correctness_reward": {"name": "exact_match", "extract": "last_number"},
    "countdown": {"name": "exact_match", "extract": "last_number"},
    "toolbench": "tool_call",
    "react_orm": "tool_call",
    "code_reward": "python_tests",
    "soft_overlong": {"name": "length", "scale": -0.001},
    "length": "length",
    "len_reward": "length",
    "reward_len": "length",
}
GUESS = "exact_match"  # where no reward of the configuration has a counterpart


def put_preference(draft: Draft, losses: list[str], weights: list[float], key: str) -> None:
    """The objective of a preference loss, or the sum of several."""
    terms = []
    for i, loss in enumerate(losses):
        ours = PREFERENCE_LOSSES.get(loss)
        if ours is None:
            ours = "dpo"
            draft.change(key, "objective", f"there is no loss '{loss}'; dpo is nearest")
        weight = weights[i] if i < len(weights) else 1.0
        terms.append({"name": ours, "weight": weight})
    if len(terms) == 1 and terms[0]["weight"] == 1.0:
        draft.put("objective.name", terms[0]["name"], key)
    else:
        draft.recipe["objective"] = terms
        draft.note(key, "mapped", "objective")


def put_setting(draft: Draft, setting: str, value: Any, key: str) -> None:
    """A setting of the objective; of a sum, in its first term."""
    objective = draft.recipe.get("objective")
    if isinstance(objective, list):
        objective[0][setting] = value
        draft.note(key, "mapped", f"objective.0.{setting}")
    else:
        draft.put(f"objective.{setting}", value, key)


def add_term(draft: Draft, name: str, weight: float, key: str) -> None:
    """A further term of the objective."""
    objective = draft.recipe["objective"]
    if not isinstance(objective, list):
        objective = [{**objective, "weight": 1.0}]
    draft.recipe["objective"] = [*objective, {"name": name, "weight": weight}]
    draft.note(key, "mapped", "objective")


def put_samples(draft: Draft, n: int, keys: dict[str, str]) -> None:
    """A rollout and a score in each step. keys: setting of the rollout -> the tool's key."""
    rollout: dict[str, Any] = {"name": "rollout", "n": max(2, n)}
    for setting in ("max_new_tokens", "temperature", "top_p", "top_k"):
        key = keys.get(setting)
        if key is None or draft.get(key) is None:
            continue
        value = number(draft.get(key))
        if setting == "top_k":
            value = max(0, whole(value))  # -1 is off elsewhere, 0 is here
        if setting == "max_new_tokens":
            value = whole(value)
        rollout[setting] = value
        draft.note(key, "mapped", f"online_stages.0.{setting}")
    if "n" in keys:
        draft.note(keys["n"], "mapped", "online_stages.0.n")
    draft.recipe["online_stages"] = [rollout, {"name": "score", "reward": GUESS}]


def put_rewards(draft: Draft, key: str, weights_key: str | None = None) -> None:
    """The rewards that have a counterpart here, with their weights."""
    names = [str(name).rpartition(".")[2] for name in as_list(draft.get(key))]
    weights = [number(weight) for weight in as_list(draft.get(weights_key or ""))]
    rewards, used_weights, missing = [], [], []
    for i, name in enumerate(names):
        reward = REWARDS.get(name)
        if reward is None:
            missing.append(name)
        elif reward not in rewards:
            rewards.append(reward)
            used_weights.append(weights[i] if i < len(weights) else 1.0)
    score = draft.recipe["online_stages"][-1]
    score["reward"] = rewards or [GUESS]
    if any(weight != 1.0 for weight in used_weights):
        score["reward_weights"] = used_weights
    if missing:
        advice = "" if rewards else f"; {GUESS} stands in its place, so choose a reward before training"
        why = f"there is no reward {', '.join(missing)}{advice}"
        draft.change(key, "online_stages.1.reward", why)
    draft.note(key, "mapped", "online_stages.1.reward")
    if weights_key:
        draft.note(weights_key, "mapped", "online_stages.1.reward_weights")


POLICY_GRADIENTS = {"grpo": "grpo", "bnpo": "dapo", "dapo": "dapo", "dr_grpo": "dr_grpo", "cispo": "cispo"}


def put_policy_gradient(draft: Draft, loss: str, key: str, scale_key: str = "scale_rewards") -> None:
    """GRPO in one of its forms, with its clipping and its penalty."""
    ours = POLICY_GRADIENTS.get(loss)
    if ours is None:
        ours = "grpo"
        draft.change(key, "objective", f"there is no loss '{loss}'; grpo is nearest")
    draft.put("objective.name", ours, key)
    for setting in ("beta", "epsilon", "epsilon_high"):
        if setting == "epsilon" and ours == "cispo":
            continue  # it has no lower bound
        if draft.get(setting) is not None:
            draft.put(f"objective.{setting}", number(draft.get(setting)), setting)
    scale = draft.get(scale_key)
    if scale is not None:
        scale = str(scale).lower()
        by = {"true": "group", "false": "none", "group": "group", "none": "none", "batch": "batch"}
        draft.put("objective.scale_rewards", by.get(scale, "group"), scale_key)
    if ours == "dr_grpo":
        length = draft.get("max_completion_length")
        if length is not None:
            draft.put("objective.max_completion_length", whole(length))
    if draft.get("num_iterations") is not None and whole(draft.get("num_iterations")) > 1:
        draft.put("num_iterations", whole(draft.get("num_iterations")), "num_iterations")
        draft.recipe["online_stages"][0]["old"] = True
    draft.note("num_iterations", "mapped", "num_iterations")


def put_prompts(draft: Draft, rows: int, n: int, key: str) -> None:
    """Prompts of a micro-batch, where the tool counts completions and n belong to a prompt."""
    if n < 1:
        raise RecipeError(f"{key}: {n} stands where a number of completions is expected")
    steps = draft.recipe.get("gradient_accumulation_steps", 1)
    prompts = max(1, round(rows * steps / n))
    size = max(1, rows // n)
    while prompts % size:
        size -= 1
    draft.put("per_device_train_batch_size", size)
    draft.put("gradient_accumulation_steps", prompts // size)
    if n > 1:
        why = f"a batch counts prompts, not completions: {rows * steps} completions of a step are {prompts}"
        draft.change(key, "per_device_train_batch_size", f"{why} prompts with {n} each")


def put_reference(draft: Draft, key: str) -> None:
    """A reference model of its own."""
    if draft.get(key):
        draft.put("roles.reference", {"name": "model", "model": draft.get(key)}, key)


def flag(draft: Draft, key: str) -> bool:
    """Whether a switch of the tool is on."""
    return is_on(draft.get(key))
