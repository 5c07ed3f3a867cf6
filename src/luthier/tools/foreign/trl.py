"""TRL: the YAML of its scripts and of `trl sft --config`, their command lines, and the JSON of a
TrainingArguments.
"""

from __future__ import annotations

import re
from typing import Any

from luthier.errors import RecipeError
from luthier.tools.foreign import goals
from luthier.tools.foreign.draft import Draft, Drop, Rule, To, as_list, as_object, is_on, number, whole
from luthier.tools.foreign.training_arguments import (
    ATTENTION,
    LOADING,
    TRAINING_ARGUMENTS,
    check_text_only,
    read_lora,
    read_quantization,
)

NAME = "TRL"
SIGNS = ("use_peft", "dataset_train_split", "dataset_text_field", "attn_implementation", "model_init_kwargs")
DEFAULTS = {
    "num_train_epochs": 3.0,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
# trainer -> learning rate of its arguments
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "cpo": 1e-6, "reward": 1e-4, "grpo": 1e-6}
# trainer -> keys that only its arguments have, the more telling trainers first
TELLING = {
    "grpo": ("num_generations", "reward_funcs", "scale_rewards", "num_completions_to_print"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "reward": ("center_rewards_coefficient",),
    "dpo": ("beta", "precompute_ref_log_probs", "rpo_alpha", "f_divergence_type", "ref_model_init_kwargs"),
}
SCRIPTS = {"reward_modeling": "reward", "rloo": "grpo", "ppo": "grpo", "simpo": "cpo", "rm": "reward"}
LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "lora_modules_to_save",
}
PEFT_DEFAULT = ["q_proj", "v_proj"]  # PEFT's choice for Llama and its relatives
DIVERGENCES = {"reverse_kl", "js_divergence", "alpha_divergence"}


def prepare(draft: Draft, command: str) -> None:
    """The trainer: of the command or the file's name, else of the keys that only its arguments have."""
    values = dict(draft.values)
    if isinstance(values.get("max_seq_length"), int):
        values.setdefault("max_length", values.pop("max_seq_length"))
    trainer = str(values.get("trainer", "")) or trainer_of(command, values)
    values["trainer"] = trainer
    draft.values = values
    draft.defaults = {**draft.defaults, "learning_rate": RATES[trainer]}


def trainer_of(command: str, values: dict[str, Any]) -> str:
    """The trainer that a command, the name of a file, or else the keys of a file are of."""
    for word in re.split(r"[^a-z0-9]+", command.lower()):
        word = SCRIPTS.get(word, word)
        if word in RATES:
            return word
    if "reward_modeling" in command:
        return "reward"
    for trainer, keys in TELLING.items():
        if any(values.get(key) is not None for key in keys):
            return trainer
    return "sft"


def refuse(draft: Draft) -> None:
    """Raises RecipeError for models that read images."""
    why = check_text_only(draft, (), ("model_name_or_path",))
    if why:
        raise RecipeError(f"{NAME}: {why}; a recipe trains models of text")


def read_tuner(draft: Draft) -> None:
    """LoRA where PEFT is used, else all weights."""
    if not is_on(draft.get("use_peft")):
        draft.put("tuner", "full", "use_peft")
        return
    read_lora(draft, LORA)
    draft.note("use_peft", "mapped", "tuner")
    if not as_list(draft.get("lora_target_modules")):
        draft.put("tuner.target_modules", PEFT_DEFAULT)
    if draft.get("lora_target_parameters"):
        draft.put("tuner.target_parameters", as_list(draft.get("lora_target_parameters")))
        draft.note("lora_target_parameters", "mapped", "tuner.target_parameters")
    read_quantization(draft)
    if draft.get("use_bnb_nested_quant") is not None and isinstance(draft.recipe.get("quantization"), dict):
        nested = is_on(draft.get("use_bnb_nested_quant"))
        draft.put("quantization.double_quant", nested, "use_bnb_nested_quant")


def read_objective(draft: Draft) -> None:
    """What is trained for: the trainer's loss and its settings."""
    trainer = str(draft.get("trainer"))
    losses = [str(loss) for loss in as_list(draft.get("loss_type"))]
    if trainer == "sft":
        read_supervised(draft, losses)
    elif trainer == "grpo":
        read_samples(draft, losses)
    elif trainer == "reward":
        draft.put("objective.name", "reward")
        draft.put("architecture", "reward_model")
        if draft.get("center_rewards_coefficient") is not None:
            factor = number(draft.get("center_rewards_coefficient"))
            draft.put("objective.center_rewards_coefficient", factor, "center_rewards_coefficient")
    else:
        read_preference(draft, trainer, losses)
    draft.note("trainer", "mapped", "objective")


def read_supervised(draft: Draft, losses: list[str]) -> None:
    """SFT, with its loss and which tokens are learned."""
    draft.put("objective.name", "dft" if losses == ["dft"] else "sft", "loss_type")
    if draft.get("label_smoothing_factor") is not None:
        factor = number(draft.get("label_smoothing_factor"))
        draft.put("objective.label_smoothing_factor", factor, "label_smoothing_factor")
    for key in ("assistant_only_loss", "completion_only_loss"):
        if is_on(draft.get(key)):
            draft.note(key, "mapped", "data.format")
        everything = "format {name: messages, assistant_only_loss: false}"
        why = f"replies and completions are learned; {everything} learns all"
        draft.change(key, "data.format", why)


def read_preference(draft: Draft, trainer: str, losses: list[str]) -> None:
    """DPO, KTO, ORPO and CPO with the losses that their trainers have."""
    default = {"dpo": "sigmoid", "kto": "kto", "orpo": "orpo", "cpo": "cpo"}[trainer]
    if trainer == "cpo" and losses == ["sigmoid"]:
        losses = []
    weights = [number(weight) for weight in as_list(draft.get("loss_weights"))]
    goals.put_preference(draft, losses or [default], weights, "loss_type")
    draft.note("loss_weights", "mapped", "objective")
    if is_on(draft.get("use_weighting")):
        draft.put("objective.name", "wpo", "use_weighting")
    goals.put_setting(draft, "beta", number(draft.get("beta", 0.1)), "beta")
    objective = draft.recipe["objective"]
    name = "" if isinstance(objective, list) else objective["name"]
    settings = {
        "label_smoothing": ("dpo", "ipo", "robust", "exo_pair", "cpo", "simpo", "aot"),
        "simpo_gamma": ("simpo",),
        "cpo_alpha": ("cpo",),
        "desirable_weight": ("kto", "bco", "apo_zero_unpaired"),
        "undesirable_weight": ("kto", "bco", "apo_zero_unpaired"),
        "discopop_tau": ("discopop",),
    }
    for setting, able in settings.items():
        value = draft.get(setting)
        if value is not None and name in able and not (setting == "label_smoothing" and not number(value)):
            goals.put_setting(draft, setting, number(value), setting)
    if draft.get("f_divergence_type") in DIVERGENCES - {"reverse_kl"} and name == "dpo":
        draft.put("objective.name", "f_dpo")
        draft.put("objective.f_divergence_type", draft.get("f_divergence_type"), "f_divergence_type")
    if name == "simpo" and number(draft.get("cpo_alpha", 1.0)):
        goals.add_term(draft, "chosen_sft", number(draft.get("cpo_alpha", 1.0)), "cpo_alpha")
    if draft.get("rpo_alpha"):
        goals.add_term(draft, "chosen_sft", number(draft.get("rpo_alpha")), "rpo_alpha")
    if trainer in ("dpo", "kto"):
        goals.put_reference(draft, "ref_model_name_or_path")


def read_samples(draft: Draft, losses: list[str]) -> None:
    """Fresh samples in each step; a batch of TRL counts completions."""
    n = whole(draft.get("num_generations", 8))
    names = {"n": "num_generations", "max_new_tokens": "max_completion_length"}
    goals.put_samples(draft, n, {**names, **{name: name for name in ("temperature", "top_p", "top_k")}})
    if draft.get("max_completion_length") is None:
        draft.recipe["online_stages"][0]["max_new_tokens"] = 256
    goals.put_rewards(draft, "reward_funcs", "reward_weights")
    goals.put_policy_gradient(draft, losses[0] if losses else "dapo", "loss_type")
    if draft.get("beta") is None:
        draft.put("objective.beta", 0.0)
    why = "no reward reads a reward model; exact_match stands in its place, so choose one before training"
    draft.change("reward_model_name_or_path", "online_stages.1.reward", why)
    size = draft.recipe["per_device_train_batch_size"]
    goals.put_prompts(draft, size, n, "per_device_train_batch_size")


def read_data(draft: Draft) -> None:
    """A data set of the hub or a file, or the list of a mixture; the test split where rows are evaluated."""
    entries = as_list(draft.get("datasets"))
    if not entries and draft.get("dataset_name") is not None:
        entries = [{"path": draft.get("dataset_name"), "name": draft.get("dataset_config")}]
    if not entries:
        if draft.get("trainer") == "sft" and draft.get("model_name_or_path") is None:
            return  # arguments alone: model and data are given in Python
        raise RecipeError(f"{NAME}: `dataset_name` is not set, so there is nothing to train on")
    draft.put("data", sources(draft, entries, "dataset_train_split"))
    for key in ("dataset_name", "dataset_config", "dataset_train_split", "datasets", "dataset_text_field"):
        draft.note(key, "mapped", "data")
    strategy = str(draft.get("eval_strategy", draft.get("evaluation_strategy", "no")))
    share = draft.get("test_split_size")
    if share is not None:
        draft.put("eval_data", number(share), "test_split_size")
    elif strategy not in ("no", "False") and "dataset_name" in draft.values:
        draft.put("eval_data", sources(draft, entries, "dataset_test_split"), "dataset_test_split")
    draft.drop("dataset_test_split", "no evaluation is asked for; some training rows are held out")


def sources(draft: Draft, entries: list[Any], split: str) -> Any:
    """The sources of data sets; one alone where there is one."""
    out = []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else as_object(entry)
        columns = entry.pop("columns", None)
        if columns:  # TRL keeps these columns, and reads no others
            draft.note("datasets", "mapped", "data")
        spec: dict[str, Any] = {"path": entry.get("path"), "split": entry.get("split") or draft.get(split)}
        if str(spec["path"]).endswith((".jsonl", ".json", ".csv", ".parquet", ".txt")):
            spec.pop("split")
        if entry.get("data_files"):
            spec["path"] = as_list(entry["data_files"])[0]
            spec.pop("split", None)
        if entry.get("name"):
            spec["name"] = entry["name"]
        field = draft.values.get("dataset_text_field")
        if field and field != "text":
            spec |= {"format": "text", "columns": {"text": field}}
        out.append(spec)
    return out[0] if len(out) == 1 else out


def read_template(draft: Draft) -> None:
    """A Jinja file, or another model's template."""
    path = draft.get("chat_template_path")
    if path is not None and str(path).endswith((".jinja", ".j2")):
        draft.put("chat_template", path, "chat_template_path")
    draft.drop(
        "chat_template_path", "the model's own chat template is used; `chat_template:` takes a .jinja file"
    )


PACKING = Drop("rows are always packed, and kept apart; a batch counts rows, not packed sequences")
VLLM = Drop("a rollout samples in the process, or from `roles: {sampler: {name: vllm, ...}}`")
SAMPLING = Drop("a rollout has temperature, top_p and top_k")
REFERENCE = Drop("the reference is the model without its adapter; roles.reference sets another")
SHOWING = Drop("the report shows samples")

KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "trainer": read_objective,
    "model_name_or_path": "model",
    "model_revision": Drop("the newest revision is used; download another into a folder"),
    "model_init_kwargs": Drop("dtype, attn_implementation and quantization are keys of a recipe"),
    "ref_model_init_kwargs": REFERENCE,
    "attn_implementation": ATTENTION,
    "use_peft": read_tuner,
    "num_processes": Drop("the steps count all processes; see --devices"),
    "accelerate_config": Drop("`accelerate launch` starts luthier alike"),
    "no_remove_unused_columns": Drop("columns that are not learned from are told"),
    **dict.fromkeys(LORA.values(), read_tuner),
    "lora_target_parameters": read_tuner,
    "lora_task_type": Drop("the architecture follows the model's config"),
    "load_in_4bit": read_tuner,
    "load_in_8bit": read_tuner,
    "bnb_4bit_quant_type": read_tuner,
    "bnb_4bit_quant_storage": Drop("codes are kept as bytes"),
    "bnb_4bit_compute_dtype": read_tuner,
    "use_bnb_nested_quant": read_tuner,
    "loss_type": read_objective,
    "loss_weights": read_objective,
    "label_smoothing_factor": read_objective,
    "label_smoothing": read_objective,
    "assistant_only_loss": read_objective,
    "completion_only_loss": read_objective,
    "beta": read_objective,
    "f_divergence_type": read_objective,
    "f_alpha_divergence_coef": Drop("objective f_dpo has it as a setting"),
    "rpo_alpha": read_objective,
    "ld_alpha": Drop("objective ld_dpo has it as a setting"),
    "discopop_tau": read_objective,
    "use_weighting": read_objective,
    "cpo_alpha": read_objective,
    "simpo_gamma": read_objective,
    "alpha": Drop("alpha-PO is not here"),
    "desirable_weight": read_objective,
    "undesirable_weight": read_objective,
    "center_rewards_coefficient": read_objective,
    "ref_model_name_or_path": read_objective,
    "reference_free": Drop("objectives without a reference are simpo, orpo and cpo"),
    "precompute_ref_log_probs": To("cache_reference", is_on),
    "precompute_ref_batch_size": Drop("the cache chooses its batches"),
    "base_model_attribute_name": LOADING,
    "sync_ref_model": REFERENCE,
    "ref_model_mixup_alpha": REFERENCE,
    "ref_model_sync_steps": REFERENCE,
    "force_use_ref_model": REFERENCE,
    "num_generations": read_objective,
    "max_completion_length": read_objective,
    "temperature": read_objective,
    "top_p": read_objective,
    "top_k": read_objective,
    "min_p": SAMPLING,
    "repetition_penalty": SAMPLING,
    "generation_kwargs": SAMPLING,
    "cache_implementation": SAMPLING,
    "use_transformers_paged": SAMPLING,
    "epsilon": read_objective,
    "epsilon_high": read_objective,
    "delta": Drop("ratios are clipped by epsilon and epsilon_high"),
    "scale_rewards": read_objective,
    "num_iterations": read_objective,
    "reward_funcs": read_objective,
    "reward_weights": read_objective,
    "reward_model_name_or_path": read_objective,
    "steps_per_generation": Drop("every step has fresh samples"),
    "generation_batch_size": Drop("every step has fresh samples"),
    "importance_sampling_level": Drop("ratios are of tokens, as in GRPO"),
    "mask_truncated_completions": Drop("truncated completions count as they are scored"),
    "top_entropy_quantile": Drop("every token counts"),
    "disable_dropout": Drop("dropout is the tuner's lora_dropout alone"),
    "shuffle_dataset": LOADING,
    "ds3_gather_for_generation": TRAINING_ARGUMENTS["deepspeed"],
    "log_completions": SHOWING,
    "num_completions_to_print": SHOWING,
    "wandb_log_unique_prompts": SHOWING,
    "generate_during_eval": SHOWING,
    "use_vllm": VLLM,
    "vllm_mode": VLLM,
    "vllm_server_base_url": VLLM,
    "vllm_server_host": VLLM,
    "vllm_server_port": VLLM,
    "vllm_server_timeout": VLLM,
    "vllm_gpu_memory_utilization": VLLM,
    "vllm_tensor_parallel_size": VLLM,
    "vllm_max_model_length": VLLM,
    "vllm_enable_sleep_mode": VLLM,
    "vllm_importance_sampling_correction": VLLM,
    "vllm_device": VLLM,
    "vllm_dtype": VLLM,
    "dataset_name": read_data,
    "dataset_config": read_data,
    "dataset_train_split": read_data,
    "dataset_test_split": read_data,
    "test_split_size": read_data,
    "datasets": read_data,
    "dataset_text_field": read_data,
    "dataset_streaming": LOADING,
    "streaming": LOADING,
    "dataset_num_proc": LOADING,
    "dataset_kwargs": LOADING,
    "dataset_mixer": Drop("write a list of sources under data:"),
    "max_length": To("max_length", whole),
    "max_prompt_length": Drop("max_length bounds prompt and completion together"),
    "truncation_mode": Drop("long rows are cut at the end of their completions, which is counted"),
    "packing": PACKING,
    "packing_strategy": PACKING,
    "eval_packing": PACKING,
    "padding_free": PACKING,
    "pad_to_multiple_of": PACKING,
    "pad_token": Drop("the tokenizer's own tokens are used"),
    "eos_token": Drop("the tokenizer's own tokens are used"),
    "pad_token_id": Drop("the tokenizer's own tokens are used"),
    "label_pad_token_id": Drop("padding is never learned"),
    "is_encoder_decoder": Drop("the architecture follows the model's config"),
    "chat_template_path": read_template,
    "chat_template": "chat_template",
    "activation_offloading": Drop("activations are recomputed, not moved"),
    "use_liger_loss": Drop("luthier computes the loss without all logits by itself"),
    "use_logits_to_keep": Drop("luthier computes the loss without all logits by itself"),
    "ignore_bias_buffers": LOADING,
    "config": LOADING,
    "profile": LOADING,
    "gradient_checkpointing_use_reentrant": Drop("layers are recomputed without reentry"),
}
