"""LLaMA-Factory: the YAML or JSON that `llamafactory-cli train` takes, or its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.tools.foreign import goals
from luthier.tools.foreign.draft import Draft, Drop, Rule, To, as_list, is_on, number, whole
from luthier.tools.foreign.training_arguments import (
    ATTENTION,
    HUB,
    INSTEAD,
    LOADING,
    MANY_DEVICES,
    MEGATRON,
    TRAINING_ARGUMENTS,
    WATCHING,
    check_text_only,
    put_optimizer,
    read_lora,
)

NAME = "LLaMA-Factory"
SIGNS = ("finetuning_type", "stage", "template", "dataset_dir", "cutoff_len", "peft_config", "dist_config")
DEFAULTS = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_target": "all",
    "finetuning_type": "lora",
    "stage": "sft",
    "dataset_dir": "data",
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "max_new_tokens": 1024,
    "temperature": 0.95,
    "top_p": 0.7,
    "top_k": 50,
}
STAGES = ("sft", "pt", "dpo", "kto", "rm", "ppo")
LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "additional_target",
}


def special_tokens(value: Any) -> dict[str, Any]:
    """Tokens that decoding leaves out."""
    return {"tokens": as_list(value), "special": True}


def prepare(draft: Draft, command: str) -> None:
    """The configuration of its version 1 in the words of version 0: groups by `name:`, other keys."""
    values = dict(draft.values)
    for former, now in (
        ("model", "model_name_or_path"),
        ("train_dataset", "dataset"),
        ("micro_batch_size", "per_device_train_batch_size"),
    ):
        if former in values and now not in values:
            values[now] = values.pop(former)
    if isinstance(values.get("peft_config"), dict):
        settings = dict(values.pop("peft_config"))
        values["finetuning_type"] = settings.pop("name", "lora")
        for setting, value in settings.items():
            values[LORA.get(str(setting), str(setting))] = value
    elif "train_dataset" in draft.values:
        values.setdefault("finetuning_type", "full")
    if isinstance(values.get("optim_config"), dict):
        values["optim"] = values.pop("optim_config").get("name", "adamw_torch")
    draft.values = values


def refuse(draft: Draft) -> None:
    """Raises RecipeError for models that read images."""
    keys = ("image_max_pixels", "video_max_pixels", "freeze_vision_tower", "freeze_multi_modal_projector")
    why = check_text_only(draft, keys, ("model_name_or_path", "template"))
    if why:
        raise RecipeError(f"{NAME}: {why}; a recipe trains models of text")


def read_stage(draft: Draft) -> None:
    """What is trained for: the objective of the stage, with its settings."""
    stage = str(draft.get("stage"))
    if stage not in STAGES:
        raise RecipeError(f"{NAME}: stage: {stage!r} must be one of {', '.join(STAGES)}")
    if stage in ("sft", "pt"):
        draft.put("objective.name", "dft" if goals.flag(draft, "use_dft_loss") else "sft", "stage")
        draft.note("use_dft_loss", "mapped", "objective")
        if draft.get("label_smoothing_factor") is not None:
            factor = number(draft.get("label_smoothing_factor"))
            draft.put("objective.label_smoothing_factor", factor, "label_smoothing_factor")
    elif stage == "dpo":
        read_preference(draft)
    elif stage == "kto":
        draft.put("objective.name", "kto", "stage")
        draft.put("objective.beta", number(draft.get("pref_beta")), "pref_beta")
        for key, setting in (
            ("kto_chosen_weight", "desirable_weight"),
            ("kto_rejected_weight", "undesirable_weight"),
        ):
            if draft.get(key) is not None:
                draft.put(f"objective.{setting}", number(draft.get(key)), key)
    elif stage == "rm":
        draft.put("objective", "reward", "stage")
        draft.put("architecture", "reward_model")
    else:
        read_ppo(draft)
    if stage in ("dpo", "kto"):
        goals.put_reference(draft, "ref_model")
        add_reference_free(draft)


def read_preference(draft: Draft) -> None:
    """DPO and the losses that LLaMA-Factory has beside it."""
    goals.put_preference(draft, [str(draft.get("pref_loss"))], [], "pref_loss")
    draft.note("stage", "mapped", "objective")
    objective = draft.recipe["objective"]["name"]
    draft.put("objective.beta", number(draft.get("pref_beta")), "pref_beta")
    if objective == "simpo":
        draft.put("objective.simpo_gamma", number(draft.get("simpo_gamma", 0.5)), "simpo_gamma")
    smoothing = number(draft.get("dpo_label_smoothing", 0))
    if smoothing and objective == "dpo":
        draft.put("objective.label_smoothing", smoothing, "dpo_label_smoothing")


def add_reference_free(draft: Draft) -> None:
    """The supervised loss that is added to a preference loss."""
    weight = number(draft.get("pref_ftx", 0))
    if weight:
        goals.add_term(draft, "chosen_sft", weight, "pref_ftx")
    draft.note("pref_ftx", "mapped", "objective")


def read_ppo(draft: Draft) -> None:
    """PPO as GRPO: there is no value network here, so samples of a prompt are compared with each other."""
    names = {name: name for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    goals.put_samples(draft, 8, names)
    draft.put("objective.name", "grpo")
    draft.put("objective.beta", number(draft.get("ppo_target", 0.04)) if draft.get("ppo_beta") else 0.04)
    why = "ppo as grpo: 8 answers to a prompt are compared, without a value network"
    draft.change("stage", "objective", why)
    why = "no reward reads a reward model; exact_match stands in its place, so choose one before training"
    for key in ("reward_model", "reward_model_type", "reward_model_adapters"):
        draft.change(key, "online_stages.1.reward", why)


def read_tuner(draft: Draft) -> None:
    """Which parameters are trained."""
    kind = str(draft.get("finetuning_type"))
    if kind == "full":
        draft.put("tuner", "full", "finetuning_type")
    elif kind == "freeze":
        read_freeze(draft)
    elif kind == "oft":
        read_oft(draft)
    elif kind == "lora":
        read_lora(draft, LORA)
        draft.note("finetuning_type", "mapped", "tuner")
        if goals.flag(draft, "pissa_init"):
            iterations = whole(draft.get("pissa_iter", 16))
            name = "pissa" if iterations < 0 else f"pissa_niter_{iterations}"
            draft.put("tuner.init_lora_weights", name, "pissa_init", "pissa_iter")
    else:
        raise RecipeError(f"{NAME}: finetuning_type: {kind!r} must be lora, oft, freeze or full")


def read_oft(draft: Draft) -> None:
    """PEFT's orthogonal rotations."""
    draft.put("tuner", {"name": "peft", "type": "oft"}, "finetuning_type")
    if draft.get("oft_block_size") is not None:
        draft.put("tuner.config.oft_block_size", whole(draft.get("oft_block_size")), "oft_block_size")
    elif draft.get("oft_rank") is not None:
        draft.put("tuner.config.r", whole(draft.get("oft_rank")), "oft_rank")
        draft.put("tuner.config.oft_block_size", 0)
    if draft.get("module_dropout") is not None:
        draft.put("tuner.config.module_dropout", number(draft.get("module_dropout")), "module_dropout")
    targets = as_list(draft.get("oft_target", "all"))
    if targets != ["all"]:
        draft.put("tuner.config.target_modules", targets)
    draft.note("oft_target", "mapped", "tuner.config.target_modules")


def read_freeze(draft: Draft) -> None:
    """The last layers alone; the number of layers is not known here."""
    count = whole(draft.get("freeze_trainable_layers", 2))
    draft.put("tuner", "part")
    if count == 1:
        draft.note("finetuning_type", "mapped", "tuner")
        draft.note("freeze_trainable_layers", "mapped", "tuner")
    why = f"`part` trains the last layer; for {count} layers: tuner {{name: telly, k: LAYERS - {count}}}"
    draft.change("finetuning_type", "tuner", why)
    for key in ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"):
        draft.change(key, "tuner", why)


def read_base(draft: Draft) -> None:
    """A quantized base."""
    bits = draft.get("quantization_bit")
    if bits is None:
        return
    if whole(bits) == 8:
        draft.put("quantization", "int8", "quantization_bit")
    elif whole(bits) == 4:
        draft.put("quantization.name", str(draft.get("quantization_type", "nf4")), "quantization_bit")
        draft.note("quantization_type", "mapped", "quantization")
        double = draft.get("double_quantization")
        if double is not None:
            draft.put("quantization.double_quant", is_on(double), "double_quantization")
    else:
        draft.put("quantization", {"name": "rtn", "bits_per_weight": whole(bits)})
        draft.change("quantization_bit", "quantization", f"{bits} bits by rounding to nearest")
    method = str(draft.get("quantization_method", "bnb"))
    draft.change("quantization_method", "quantization", f"'{method}': luthier's own codes are used")


def read_optimizers(draft: Draft) -> None:
    """The optimizer, and what LLaMA-Factory puts around it."""
    put_optimizer(draft, str(draft.get("optim", "adamw_torch")), "optim")
    settings = draft.recipe["optim"]
    chain: list[Any] = [{"name": "clip", "max_grad_norm": settings["max_grad_norm"]}]
    decay = {"name": "weight_decay", "weight_decay": settings["weight_decay"]}
    if draft.get("loraplus_lr_ratio") is not None:
        ratio = {"name": "lora_plus", "loraplus_lr_ratio": number(draft.get("loraplus_lr_ratio"))}
        draft.put("optim", [*chain, "adam", decay, ratio])
        draft.note("loraplus_lr_ratio", "mapped", "optim")
    elif goals.flag(draft, "use_galore"):
        galore: dict[str, Any] = {"name": "galore", "rank": whole(draft.get("galore_rank", 16))}
        galore["update_proj_gap"] = whole(draft.get("galore_update_interval", 200))
        galore["scale"] = number(draft.get("galore_scale", 2.0))
        draft.put("optim", [*chain, galore, decay])
        for key in ("use_galore", "galore_rank", "galore_update_interval", "galore_scale"):
            draft.note(key, "mapped", "optim")
    for key in ("use_apollo", "use_badam", "use_muon", "use_adam_mini"):
        if goals.flag(draft, key):
            name = key.removeprefix("use_")
            draft.change(key, "optim", f"there is no optimizer '{name}'; {INSTEAD}")


def read_data(draft: Draft) -> None:
    """The entries of dataset_info.json, and what is held out."""
    draft.put("data", sources(draft, "dataset"), "dataset")
    if draft.get("eval_dataset") is not None:
        draft.put("eval_data", sources(draft, "eval_dataset"), "eval_dataset")
        draft.drop("val_size", "eval_dataset is set")
        return
    share = number(draft.get("val_size", 0))
    if share >= 1:
        why = f"a share is held out, not {share:g} rows: write eval_data: 0.05 or a file"
        draft.change("val_size", "eval_data", why)
    elif draft.values.get("val_size") is not None:
        draft.put("eval_data", share, "val_size")


def checkpointing(off: Any) -> Any:
    """Whether layers are recomputed, of a switch that turns it off."""
    return False if is_on(off) else "auto"


def sources(draft: Draft, key: str) -> Any:
    """The data sets of a key; one alone where there is one."""
    names = as_list(draft.get(key))
    if not names:
        raise RecipeError(f"{NAME}: `dataset:` is not set, so there is nothing to train on")
    folder = str(draft.get("dataset_dir"))
    entries = [source(draft, name, folder) for name in names]
    draft.note("dataset_dir", "mapped", "data")
    draft.note("max_samples", "mapped", "data.limit")
    return entries[0] if len(entries) == 1 else entries


def source(draft: Draft, name: str, folder: str) -> dict[str, Any]:
    """One data set: an entry of the folder's dataset_info.json, or a data set of the hub."""
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        spec: dict[str, Any] = {"path": name}
        entry: dict[str, Any] = {}
    else:
        spec = {"path": f"{folder}/dataset_info.json", "name": name}
        entry = entry_of(Path(folder) / "dataset_info.json", name)
    if draft.get("stage") == "pt":
        column = (entry.get("columns") or {}).get("prompt", "text")
        spec |= {"format": "text", "columns": {"text": column}}
    if draft.get("max_samples") is not None:
        spec["limit"] = whole(draft.get("max_samples"))
    if is_on(draft.get("train_on_prompt")):
        if entry.get("formatting") == "sharegpt":
            spec["format"] = {"name": "sharegpt", "assistant_only_loss": False}
            draft.note("train_on_prompt", "mapped", "data.format")
        else:
            why = "only conversations can learn prompts: format {name: sharegpt, assistant_only_loss: false}"
            draft.change("train_on_prompt", "data.format", why)
    return spec


def entry_of(path: Path, name: str) -> dict[str, Any]:
    """An entry of a dataset_info.json; empty where the file is not here."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name) or {}
    except (OSError, ValueError, AttributeError):
        return {}


TEMPLATE = Drop("the tokenizer's own chat template is used; `chat_template:` sets another")
INFERENCE = Drop("it is of inference, not of training")
OPTIMIZER = Drop("the optimizer it belongs to is not here")
OPTIMIZER_KEYS = (
    *("apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj"),
    *("apollo_proj_type", "apollo_scale_type", "apollo_layerwise", "apollo_scale_front"),
    *("badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval"),
    *("badam_update_ratio", "badam_mask_mode", "badam_verbose"),
)
FP8 = Drop("products are in the run's dtype")
KTRANSFORMERS = Drop("luthier trains without KTransformers")
VERSION_1 = Drop("luthier has its own")
UNUSED_GALORE = Drop("galore projects every matrix on both sides of its smaller dimension")

KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": "model",
    "adapter_name_or_path": "init_from",
    "cutoff_len": To("max_length", whole),
    "stage": read_stage,
    "label_smoothing_factor": read_stage,
    "use_dft_loss": read_stage,
    "pref_loss": read_stage,
    "pref_beta": read_stage,
    "pref_ftx": read_stage,
    "simpo_gamma": read_stage,
    "dpo_label_smoothing": read_stage,
    "kto_chosen_weight": read_stage,
    "kto_rejected_weight": read_stage,
    "ref_model": read_stage,
    "reward_model": read_stage,
    "reward_model_type": read_stage,
    "reward_model_adapters": read_stage,
    "reward_model_quantization_bit": Drop("there is no reward model"),
    "ref_model_adapters": Drop("write a merged model under roles.reference.model"),
    "ref_model_quantization_bit": Drop("set it at roles.reference.quantization"),
    "pref_bco_weight": Drop("add it as a term: objective: dpo + 1.0*bco_pair"),
    "ld_alpha": Drop("objective ld_dpo has it as a setting"),
    "ppo_buffer_size": Drop("every step has fresh samples"),
    "ppo_epochs": Drop("`num_iterations:` reuses the samples of a step"),
    "ppo_score_norm": Drop("grpo compares the answers to each prompt"),
    "ppo_target": Drop("the weight of the KL term, objective.beta, stays as it is"),
    "ppo_whiten_rewards": Drop("grpo compares the answers to each prompt"),
    "max_new_tokens": read_stage,
    "temperature": read_stage,
    "top_p": read_stage,
    "top_k": read_stage,
    "do_sample": INFERENCE,
    "num_beams": INFERENCE,
    "repetition_penalty": INFERENCE,
    "length_penalty": INFERENCE,
    "skip_special_tokens": INFERENCE,
    "max_length": INFERENCE,
    "default_system": Drop("write the system prompt into the rows"),
    "finetuning_type": read_tuner,
    **dict.fromkeys(LORA.values(), read_tuner),
    "oft_block_size": read_tuner,
    "oft_rank": read_tuner,
    "oft_target": read_tuner,
    "module_dropout": read_tuner,
    "pissa_init": read_tuner,
    "pissa_iter": read_tuner,
    "pissa_convert": Drop("`luthier export --as lora` writes an adapter for the untouched base"),
    "create_new_adapter": Drop("training goes on with the adapter of init_from"),
    "freeze_trainable_layers": read_tuner,
    "freeze_trainable_modules": read_tuner,
    "freeze_extra_modules": read_tuner,
    "use_llama_pro": Drop("tuner telly trains the top layers"),
    "train_from_scratch": Drop("a recipe starts from a model's weights"),
    "pure_bf16": To("dtype", lambda on: "bfloat16" if is_on(on) else "auto"),
    "quantization_bit": read_base,
    "quantization_type": read_base,
    "quantization_method": read_base,
    "double_quantization": read_base,
    "quantization_device_map": Drop("the base is quantized while it is read"),
    "upcast_layernorm": Drop("norms are computed as the model does"),
    "upcast_lmhead_output": Drop("the loss is computed in float32"),
    "optim": read_optimizers,
    "weight_decay": read_optimizers,
    "max_grad_norm": read_optimizers,
    "adam_beta1": read_optimizers,
    "adam_beta2": read_optimizers,
    "adam_epsilon": read_optimizers,
    "loraplus_lr_ratio": read_optimizers,
    "loraplus_lr_embedding": Drop("embeddings that LoRA trains have the rate of B"),
    "use_galore": read_optimizers,
    "galore_rank": read_optimizers,
    "galore_update_interval": read_optimizers,
    "galore_scale": read_optimizers,
    **MEGATRON,
    "use_packed_sequences": Drop("rows are always packed, and kept apart"),
    "export_hf_on_finish": Drop("`luthier export` merges"),
    "cp_size": MANY_DEVICES,
    "cp_mode": MANY_DEVICES,
    **dict.fromkeys(OPTIMIZER_KEYS, OPTIMIZER),
    **dict.fromkeys(("fp8", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"), FP8),
    **dict.fromkeys(("use_kt", "kt_config", "kt_weight_path", "kt_cpu_activation"), KTRANSFORMERS),
    "kt_non_expert_weight_path": KTRANSFORMERS,
    "use_eaft_loss": Drop("no objective weights tokens by their entropy as EAFT does"),
    "eaft_alpha": Drop("no objective weights tokens by their entropy as EAFT does"),
    "use_asft_loss": Drop("objective dft with a term of kl to the reference is near it"),
    "asft_alpha": Drop("objective dft with a term of kl to the reference is near it"),
    "use_v1_kernels": VERSION_1,
    **dict.fromkeys(("model_class", "kernel_config", "dist_config", "batching_strategy"), VERSION_1),
    **dict.fromkeys(("init_config", "quant_config", "sample_backend", "batching_workers"), VERSION_1),
    "galore_target": UNUSED_GALORE,
    "galore_proj_type": UNUSED_GALORE,
    "galore_layerwise": UNUSED_GALORE,
    **dict.fromkeys(("use_apollo", "use_badam", "use_muon", "use_adam_mini"), read_optimizers),
    "dataset": read_data,
    "eval_dataset": read_data,
    "dataset_dir": read_data,
    "val_size": read_data,
    "max_samples": read_data,
    "train_on_prompt": read_data,
    "mask_history": Drop('every reply is learned; `"loss": false` in a turn leaves it out'),
    "media_dir": Drop("rows are text"),
    "template": TEMPLATE,
    "tokenized_path": LOADING,
    "data_shared_file_system": LOADING,
    "mix_strategy": Drop("data sets are joined and shuffled; `limit:` of a source bounds it"),
    "interleave_probs": Drop("data sets are joined and shuffled; `limit:` of a source bounds it"),
    "streaming": LOADING,
    "buffer_size": LOADING,
    "overwrite_cache": LOADING,
    "preprocessing_num_workers": LOADING,
    "preprocessing_batch_size": LOADING,
    "ignore_pad_token_for_loss": Drop("padding is never learned"),
    "eval_num_beams": INFERENCE,
    "eval_on_each_dataset": Drop("held-out rows are evaluated together"),
    "packing": Drop("rows are always packed, and kept apart; a batch counts rows, not packed blocks"),
    "neat_packing": Drop("rows are always packed, and kept apart; a batch counts rows, not packed blocks"),
    "enable_thinking": Drop("the row's own thinking goes through the chat template"),
    "tool_format": TEMPLATE,
    "flash_attn": ATTENTION,
    "shift_attn": Drop("attention is that of the model"),
    "rope_scaling": Drop("set rope_scaling in the model's config.json"),
    "mixture_of_depths": Drop("the model's layers stay as they are"),
    "use_unsloth": Drop("luthier has its own fast paths"),
    "use_unsloth_gc": Drop("luthier has its own fast paths"),
    "enable_liger_kernel": Drop("luthier computes the loss without all logits by itself"),
    "disable_gradient_checkpointing": To("gradient_checkpointing", checkpointing),
    "use_reentrant_gc": Drop("layers are recomputed without reentry"),
    "moe_aux_loss_coef": Drop("the model's own loss of its router is not added"),
    "resize_vocab": Drop("the tokenizer's tokens must fit the model"),
    "add_tokens": To("add_tokens", as_list),
    "add_special_tokens": To("add_tokens", special_tokens),
    "new_special_tokens": Drop("the tokenizer's tokens must fit the model"),
    "split_special_tokens": Drop("the tokenizer decides"),
    "use_fast_tokenizer": Drop("the fast tokenizer is used"),
    "model_revision": Drop("the newest revision is used; download another into a folder"),
    "low_cpu_mem_usage": LOADING,
    "plot_loss": Drop("every run has a report with its curves"),
    "compute_accuracy": Drop("evaluator `accuracy` runs before and after"),
    "use_swanlab": WATCHING,
    "swanlab_project": WATCHING,
    "swanlab_run_name": WATCHING,
    "swanlab_workspace": WATCHING,
    "swanlab_mode": WATCHING,
    "hf_hub_token": HUB,
    "ms_hub_token": HUB,
    "om_hub_token": HUB,
    "print_param_status": WATCHING,
    "ray_run_name": WATCHING,
    "ray_storage_path": WATCHING,
    "ray_num_workers": Drop("luthier trains without Ray"),
    "resources_per_worker": Drop("luthier trains without Ray"),
    "placement_strategy": Drop("luthier trains without Ray"),
    "infer_backend": INFERENCE,
    "infer_dtype": INFERENCE,
    "vllm_maxlen": INFERENCE,
    "vllm_gpu_util": INFERENCE,
    "vllm_enforce_eager": INFERENCE,
    "image_max_pixels": Drop("rows are text"),
    "video_max_pixels": Drop("rows are text"),
    "freeze_vision_tower": Drop("rows are text"),
    "freeze_multi_modal_projector": Drop("rows are text"),
}
