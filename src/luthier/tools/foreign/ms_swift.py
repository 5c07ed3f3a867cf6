"""ms-swift: the command line of `swift sft`, `swift pt` and `swift rlhf`, or a YAML or JSON file of its
arguments.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.tools.foreign import goals
from luthier.tools.foreign.draft import Draft, Drop, Rule, To, as_list, as_object, is_on, number, whole
from luthier.tools.foreign.training_arguments import (
    ATTENTION,
    HUB,
    LOADING,
    MANY_DEVICES,
    MEGATRON,
    TRAINING_ARGUMENTS,
    WATCHING,
    check_text_only,
    put_batch,
    put_optimizer,
    read_lora,
    read_quantization,
)

NAME = "ms-swift"
SIGNS = (
    "train_type",
    "tuner_type",
    "rlhf_type",
    "split_dataset_ratio",
    "target_regex",
    "loss_scale",
    "model_type",
)
DEFAULTS = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "seed": 42,
    "logging_steps": 5,
    "save_steps": 500,
    "num_generations": 8,
    "max_completion_length": 512,
    "bnb_4bit_use_double_quant": True,
}
TOTAL_BATCH = 16  # rows of a step where gradient_accumulation_steps is not set
BETAS = {"dpo": 0.1, "kto": 0.1, "orpo": 0.1, "cpo": 0.1, "simpo": 2.0, "grpo": 0.04}
LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
    "bias": "lora_bias",
}
ADALORA = {"adalora_target_r": "target_r", "adalora_init_r": "init_r"}
# standard columns of ms-swift -> ours
COLUMNS = {"query": "prompt", "response": "completion", "rejected_response": "rejected"}


def prepare(draft: Draft, command: str) -> None:
    """The command says what is trained for where no key does; former names of keys are read as today's."""
    values = dict(draft.values)
    for former, now in (
        ("sft_type", "train_type"),
        ("tuner_type", "train_type"),
        ("model_id_or_path", "model"),
        ("lora_target_modules", "target_modules"),
        ("quantization_bit", "quant_bits"),
        ("learning_rate_scheduler", "lr_scheduler_type"),
        ("max_new_tokens", "max_completion_length"),
        ("batch_size", "per_device_train_batch_size"),
        # those of Megatron
        ("micro_batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("lr_decay_style", "lr_scheduler_type"),
        ("lr_warmup_fraction", "warmup_ratio"),
        ("train_iters", "max_steps"),
    ):
        if former in values and now not in values:
            values[now] = values.pop(former)
    if "global_batch_size" in values and "gradient_accumulation_steps" not in values:
        size = whole(values.get("per_device_train_batch_size", 1)) * draft.devices
        values["gradient_accumulation_steps"] = max(1, whole(values.pop("global_batch_size")) // size)
    if command in ("sft", "pt", "rlhf"):
        values["command"] = command
    draft.values = values


def refuse(draft: Draft) -> None:
    """Raises RecipeError for models that read images."""
    keys = ("freeze_vit", "freeze_aligner", "vit_lr", "vit_gradient_checkpointing", "max_pixels")
    why = check_text_only(draft, keys, ("model", "model_type", "template"))
    if why:
        raise RecipeError(f"{NAME}: {why}; a recipe trains models of text")


def read_batch(draft: Draft) -> None:
    """The batch; where no accumulation is set a step has sixteen rows over all devices."""
    size = whole(draft.get("per_device_train_batch_size"))
    steps = draft.get("gradient_accumulation_steps")
    if steps is None:
        steps = max(1, -(-TOTAL_BATCH // (size * draft.devices)))
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    put_batch(draft, size, whole(steps), *keys)


def read_tuner(draft: Draft) -> None:
    """Which parameters are trained, and at which rate by default."""
    kind = str(draft.get("train_type", "lora"))
    rate = 1e-5 if kind == "full" else 1e-4
    draft.put("learning_rate", number(draft.get("learning_rate", rate)), "learning_rate")
    if kind == "full":
        draft.put("tuner", "full", "train_type")
        why = "all weights are trained; tuners part and telly train some"
        for key in ("freeze_parameters", "freeze_parameters_ratio", "trainable_parameters"):
            draft.change(key, "tuner", why)
        return
    if kind == "adalora":
        draft.put("tuner.name", "adalora", "train_type")
        for key, setting in ADALORA.items():
            if draft.get(key) is not None:
                draft.put(f"tuner.{setting}", whole(draft.get(key)), key)
        return
    read_lora(draft, LORA)
    if draft.get("target_regex"):
        draft.put("tuner.target_modules", draft.get("target_regex"), "target_regex")
    if kind == "lora":
        draft.note("train_type", "mapped", "tuner")
    draft.change("train_type", "tuner", f"there is no '{kind}' of ms-swift; lora is used")
    start = str(draft.get("init_weights", draft.get("init_lora_weights", "true")))
    if start.startswith(("pissa", "olora", "gaussian")):
        draft.put("tuner.init_lora_weights", start, "init_weights", "init_lora_weights")
    for key in ("init_weights", "init_lora_weights"):
        draft.note(key, "mapped", "tuner.init_lora_weights")


def read_base(draft: Draft) -> None:
    """A quantized base, by ms-swift's keys or those of bitsandbytes."""
    bits = draft.get("quant_bits")
    if bits is not None and whole(bits) == 8:
        draft.put("quantization", "int8", "quant_bits")
    elif bits is not None:
        draft.put("quantization.name", str(draft.get("bnb_4bit_quant_type", "nf4")), "quant_bits")
        double = is_on(draft.get("bnb_4bit_use_double_quant"))
        draft.put("quantization.double_quant", double, "bnb_4bit_use_double_quant")
        draft.note("bnb_4bit_compute_dtype", "mapped", "dtype")
        if "dtype" not in draft.recipe and draft.get("bnb_4bit_compute_dtype") is not None:
            draft.put("dtype", draft.get("bnb_4bit_compute_dtype"))
    else:
        read_quantization(draft)
    method = str(draft.get("quant_method", "bnb"))
    if "quantization" in draft.recipe and method == "bnb":
        draft.note("quant_method", "mapped", "quantization")
    draft.change("quant_method", "quantization", f"'{method}': luthier's own codes are used")


def read_optimizer(draft: Draft) -> None:
    """The optimizer, with LoRA+ or GaLore where they are set."""
    put_optimizer(draft, str(draft.get("optim", "adamw_torch")), "optim")
    settings = draft.recipe["optim"]
    clip = {"name": "clip", "max_grad_norm": settings["max_grad_norm"]}
    decay = {"name": "weight_decay", "weight_decay": settings["weight_decay"]}
    adam = {key: value for key, value in settings.items() if key.startswith("adam_")} | {"name": "adam"}
    ratio = draft.get("lorap_lr_ratio")
    if ratio is not None:
        plus = {"name": "lora_plus", "loraplus_lr_ratio": number(ratio)}
        draft.put("optim", [clip, adam, decay, plus], "lorap_lr_ratio")
    elif is_on(draft.get("use_galore")):
        galore: dict[str, Any] = {"name": "galore", "rank": whole(draft.get("galore_rank", 128))}
        galore["update_proj_gap"] = whole(draft.get("galore_update_proj_gap", 50))
        galore["scale"] = number(draft.get("galore_scale", 1.0))
        keys = ("use_galore", "galore_rank", "galore_update_proj_gap", "galore_scale")
        draft.put("optim", [clip, galore, decay], *keys)
    draft.change("optimizer", "optim", "'" + str(draft.get("optimizer")) + "' is not here; optim is used")


def read_objective(draft: Draft) -> None:
    """What is trained for: the command, and for `swift rlhf` its rlhf_type."""
    kind = draft.get("rlhf_type")
    if kind is None:
        name = "dft" if is_on(draft.get("enable_dft_loss")) else "sft"
        draft.put("objective.name", name, "command", "enable_dft_loss")
        if draft.get("label_smoothing_factor") is not None:
            factor = number(draft.get("label_smoothing_factor"))
            draft.put("objective.label_smoothing_factor", factor, "label_smoothing_factor")
        if str(draft.get("task_type", "causal_lm")) != "causal_lm":
            draft.change("task_type", "objective", "a causal model learns the labels as text")
        return
    draft.note("command", "mapped", "objective")
    if kind in ("grpo", "ppo"):
        read_samples(draft, str(kind))
    elif kind == "rm":
        draft.put("objective.name", "reward", "rlhf_type")
        draft.put("architecture", "reward_model")
        if draft.get("center_rewards_coefficient") is not None:
            factor = number(draft.get("center_rewards_coefficient"))
            draft.put("objective.center_rewards_coefficient", factor, "center_rewards_coefficient")
    elif kind == "gkd":
        draft.put("objective", {"name": "distill_jsd", "beta": number(draft.get("beta", 0.5))}, "beta")
        teacher = draft.get("teacher_model", draft.recipe.get("model"))
        draft.put("roles.teacher", {"name": "model", "model": teacher}, "teacher_model")
        draft.change("rlhf_type", "objective", "the rows' own answers are distilled, without fresh samples")
    elif str(kind) in BETAS:
        read_preference(draft, str(kind))
    else:
        choices = ", ".join((*BETAS, "rm", "ppo", "gkd"))
        raise RecipeError(f"{NAME}: rlhf_type: {kind!r} must be one of {choices}")


def read_preference(draft: Draft, kind: str) -> None:
    """DPO and its relatives."""
    losses = [kind]
    if kind == "dpo":
        losses = [str(loss) for loss in as_list(draft.get("loss_type", "sigmoid"))]
    weights = [number(weight) for weight in as_list(draft.get("loss_weights"))]
    goals.put_preference(draft, losses, weights, "loss_type")
    for key in ("rlhf_type", "loss_weights"):
        draft.note(key, "mapped", "objective")
    goals.put_setting(draft, "beta", number(draft.get("beta", BETAS[kind])), "beta")
    settings = {
        "label_smoothing": ("dpo", "label_smoothing"),
        "simpo_gamma": ("simpo", "simpo_gamma"),
        "cpo_alpha": ("cpo", "cpo_alpha"),
        "desirable_weight": ("kto", "desirable_weight"),
        "undesirable_weight": ("kto", "undesirable_weight"),
    }
    for key, (of, setting) in settings.items():
        if kind == of and draft.get(key) is not None:
            goals.put_setting(draft, setting, number(draft.get(key)), key)
    if kind == "simpo" and draft.get("simpo_gamma") is None:
        goals.put_setting(draft, "simpo_gamma", 1.0, "simpo_gamma")
    if kind == "dpo" and draft.get("rpo_alpha"):
        goals.add_term(draft, "chosen_sft", number(draft.get("rpo_alpha")), "rpo_alpha")
    if kind in ("dpo", "kto"):
        goals.put_reference(draft, "ref_model")


def read_samples(draft: Draft, kind: str) -> None:
    """Fresh samples in each step; a batch of ms-swift counts completions."""
    n = whole(draft.get("num_generations"))
    names = {"n": "num_generations", "max_new_tokens": "max_completion_length"}
    goals.put_samples(draft, n, {**names, **{name: name for name in ("temperature", "top_p", "top_k")}})
    goals.put_rewards(draft, "reward_funcs", "reward_weights")
    loss = str(draft.get("loss_type", "grpo"))
    goals.put_policy_gradient(draft, loss, "loss_type")
    if draft.get("beta") is None:
        draft.put("objective.beta", BETAS["grpo"])
    why = "no reward reads a reward model; exact_match stands in its place, so choose one before training"
    for key in ("reward_model", "reward_model_type", "reward_adapters"):
        draft.change(key, "online_stages.1.reward", why)
    if kind == "ppo":
        text = f"ppo as grpo: {n} answers to a prompt are compared, without a value network"
        draft.change("rlhf_type", "objective", text)
        return
    draft.note("rlhf_type", "mapped", "objective")
    size = draft.recipe["per_device_train_batch_size"]
    goals.put_prompts(draft, size, n, "per_device_train_batch_size")


def read_data(draft: Draft) -> None:
    """Training and held-out rows: [hub::]name[:subset][#rows]."""
    entries = data_names(draft.get("dataset"))
    if not entries:
        raise RecipeError(f"{NAME}: `dataset` is not set, so there is nothing to train on")
    draft.put("data", sources(draft, entries), "dataset", "columns")
    if data_names(draft.get("val_dataset")):
        draft.put("eval_data", sources(draft, data_names(draft.get("val_dataset"))), "val_dataset")
        draft.drop("split_dataset_ratio", "val_dataset is set, and counts")
    elif draft.values.get("split_dataset_ratio") is not None:
        draft.put("eval_data", number(draft.get("split_dataset_ratio")), "split_dataset_ratio")


def data_names(value: Any) -> list[str]:
    """The data sets of a key; names have no commas."""
    if isinstance(value, str):
        return value.split()
    return [str(name) for name in as_list(value)]


def sources(draft: Draft, entries: list[str]) -> Any:
    """The sources of data sets; one alone where there is one."""
    out = [source(draft, entry) for entry in entries]
    return out[0] if len(out) == 1 else out


def source(draft: Draft, entry: str) -> dict[str, Any]:
    """One data set."""
    entry, _, rows = entry.partition("#")
    name = entry.partition("::")[2] or entry
    path, _, subset = name.partition(":")
    spec: dict[str, Any] = {"path": path}
    if subset:
        spec["name"] = subset.partition("/")[0]
    if rows:
        spec["limit"] = whole(rows)
    columns = as_object(draft.get("columns"))
    if columns:
        spec["columns"] = {COLUMNS.get(str(ours), str(ours)): theirs for theirs, ours in columns.items()}
    if draft.get("command") == "pt":
        spec["format"] = "text"
    if str(draft.get("loss_scale", "default")) == "all" and draft.get("rlhf_type") is None:
        spec["format"] = {"name": "messages", "assistant_only_loss": False}
        draft.note("loss_scale", "mapped", "data.format")
    return spec


TEMPLATE = Drop("the tokenizer's own chat template is used; `chat_template:` sets another")
PACKING = Drop("rows are always packed, and kept apart; a batch counts rows, not packed sequences")
VLLM = Drop("a rollout samples in the process, or from `roles: {sampler: {name: vllm, ...}}`")
SAMPLING = Drop("a rollout has temperature, top_p and top_k")
IDENTITY = Drop("write the name into the rows of swift/self-cognition")
ROWS_ARE_TEXT = Drop("rows are text")
FREEZING = Drop("adapters leave the base frozen")

FP8 = Drop("products are in the run's dtype")

KEYS: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    **MEGATRON,
    "finetune": Drop("a run starts anew; `luthier resume` goes on with one"),
    "no_save_optim": Drop("a checkpoint has all that a resumed run needs"),
    "no_save_rng": Drop("a checkpoint has all that a resumed run needs"),
    "min_lr": Drop("lr_scheduler_kwargs: {min_lr: ...} of cosine and linear has it"),
    "eval_iters": Drop("all held-out rows are evaluated"),
    "moe_aux_loss_coeff": Drop("the model's own loss of its router is not added"),
    "mtp_num_layers": Drop("the model's own heads are trained as they are"),
    "fp8_recipe": FP8,
    "fp8_format": FP8,
    "fp8_param_gather": FP8,
    "enable_thinking": Drop("chat_template_kwargs: {enable_thinking: ...} hands it to the chat template"),
    "use_logits_to_keep": Drop("the loss is computed without all logits"),
    "gkd_logits_topk": Drop("the teacher's whole distribution is compared"),
    "teacher_deepspeed": MANY_DEVICES,
    "offload_teacher_model": MANY_DEVICES,
    "vllm_enable_lora": VLLM,
    "vllm_server_pass_dataset": VLLM,
    "use_gym_env": Drop("a rollout has one turn"),
    "gym_env": Drop("a rollout has one turn"),
    "log_rollout_offpolicy_metrics": Drop("a rollout is the model's own, in the same step"),
    "advantage_estimator": Drop("grpo compares the answers to each prompt"),
    "teacher_model_server": Drop("write a model under roles.teacher.model"),
    "to_cached_dataset": LOADING,
    "model": "model",
    "adapters": To("init_from", lambda value: as_list(value)[0]),
    "model_type": Drop("the architecture follows the model's config"),
    "model_revision": Drop("the newest revision is used; download another into a folder"),
    "task_type": read_objective,
    "num_labels": Drop("labels are learned as text"),
    "problem_type": Drop("labels are learned as text"),
    "gradient_accumulation_steps": read_batch,
    "per_device_train_batch_size": read_batch,
    "train_type": read_tuner,
    "learning_rate": read_tuner,
    **dict.fromkeys(LORA.values(), read_tuner),
    **dict.fromkeys(ADALORA, read_tuner),
    "target_regex": read_tuner,
    "init_weights": read_tuner,
    "init_lora_weights": read_tuner,
    "freeze_parameters": read_tuner,
    "freeze_parameters_ratio": read_tuner,
    "trainable_parameters": read_tuner,
    "freeze_parameters_regex": FREEZING,
    "trainable_parameters_regex": FREEZING,
    "freeze_llm": ROWS_ARE_TEXT,
    "lora_dtype": Drop("adapters are kept in float32"),
    "lora_ga_batch_size": Drop("init_rows of the tuner counts the rows of an initialisation"),
    "quant_bits": read_base,
    "quant_method": read_base,
    "load_in_4bit": read_base,
    "load_in_8bit": read_base,
    "bnb_4bit_quant_type": read_base,
    "bnb_4bit_use_double_quant": read_base,
    "bnb_4bit_compute_dtype": read_base,
    "bnb_4bit_quant_storage": Drop("codes are kept as bytes"),
    "hqq_axis": Drop("luthier's own codes are used"),
    "optim": read_optimizer,
    "optimizer": read_optimizer,
    "weight_decay": read_optimizer,
    "max_grad_norm": read_optimizer,
    "adam_beta1": read_optimizer,
    "adam_beta2": read_optimizer,
    "adam_epsilon": read_optimizer,
    "lorap_lr_ratio": read_optimizer,
    "use_galore": read_optimizer,
    "galore_rank": read_optimizer,
    "galore_update_proj_gap": read_optimizer,
    "galore_scale": read_optimizer,
    "galore_target_modules": Drop("galore projects every matrix"),
    "galore_proj_type": Drop("galore projects on the smaller dimension"),
    "galore_optim_per_parameter": Drop("galore projects every matrix"),
    "lisa_activated_layers": Drop("tuner lisa trains a few layers at a time"),
    "lisa_step_interval": Drop("tuner lisa trains a few layers at a time"),
    "command": read_objective,
    "rlhf_type": read_objective,
    "loss_type": read_objective,
    "loss_weights": read_objective,
    "beta": read_objective,
    "label_smoothing": read_objective,
    "label_smoothing_factor": read_objective,
    "simpo_gamma": read_objective,
    "cpo_alpha": read_objective,
    "rpo_alpha": read_objective,
    "ld_alpha": Drop("objective ld_dpo has it as a setting"),
    "desirable_weight": read_objective,
    "undesirable_weight": read_objective,
    "enable_dft_loss": read_objective,
    "center_rewards_coefficient": read_objective,
    "ref_model": read_objective,
    "ref_model_type": Drop("the architecture follows the model's config"),
    "ref_adapters": Drop("write a merged model under roles.reference.model"),
    "teacher_model": read_objective,
    "teacher_adapters": Drop("write a merged model under roles.teacher.model"),
    "lmbda": Drop("the rows' own answers are distilled"),
    "seq_kd": Drop("the rows' own answers are distilled"),
    "sft_alpha": Drop("add it as a term of the objective"),
    "reward_model": read_objective,
    "reward_model_type": read_objective,
    "reward_adapters": read_objective,
    "reward_funcs": read_objective,
    "reward_weights": read_objective,
    "reward_model_plugin": Drop("there is no reward model"),
    "external_plugins": Drop("a reward of your own is a method of a package with an entry point"),
    "num_generations": read_objective,
    "max_completion_length": read_objective,
    "temperature": read_objective,
    "top_p": read_objective,
    "top_k": read_objective,
    "repetition_penalty": SAMPLING,
    "stop_words": SAMPLING,
    "epsilon": read_objective,
    "epsilon_high": read_objective,
    "delta": Drop("ratios are clipped by epsilon and epsilon_high"),
    "scale_rewards": read_objective,
    "num_iterations": read_objective,
    "steps_per_generation": Drop("every step has fresh samples"),
    "generation_batch_size": Drop("every step has fresh samples"),
    "importance_sampling_level": Drop("ratios are of tokens, as in GRPO"),
    "dynamic_sample": Drop("groups of one score teach nothing and are counted"),
    "max_resample_times": Drop("groups of one score teach nothing and are counted"),
    "overlong_filter": Drop("truncated completions count as they are scored"),
    "soft_max_length": Drop("add reward length"),
    "soft_cache_length": Drop("add reward length"),
    "log_completions": Drop("the report shows samples"),
    "log_entropy": Drop("the report shows samples"),
    "sync_ref_model": Drop("the reference stays as it is"),
    "multi_turn_scheduler": Drop("a rollout has one turn"),
    "max_turns": Drop("a rollout has one turn"),
    "use_vllm": VLLM,
    "vllm_mode": VLLM,
    "vllm_gpu_memory_utilization": VLLM,
    "vllm_max_model_len": VLLM,
    "vllm_tensor_parallel_size": VLLM,
    "vllm_server_host": VLLM,
    "vllm_server_port": VLLM,
    "vllm_server_base_url": VLLM,
    "vllm_enable_prefix_caching": VLLM,
    "num_infer_workers": VLLM,
    "async_generate": VLLM,
    "sleep_level": VLLM,
    "offload_model": VLLM,
    "offload_optimizer": VLLM,
    "gc_collect_after_offload": VLLM,
    "move_model_batches": VLLM,
    "num_ppo_epochs": Drop("`num_iterations:` reuses the samples of a step"),
    "whiten_rewards": Drop("grpo compares the answers to each prompt"),
    "kl_coef": Drop("objective.beta is the weight of the KL term"),
    "response_length": Drop("max_completion_length bounds a sample"),
    "missing_eos_penalty": Drop("add reward length"),
    "local_rollout_forward_batch_size": Drop("a rollout chooses its batches"),
    "dataset": read_data,
    "val_dataset": read_data,
    "split_dataset_ratio": read_data,
    "columns": read_data,
    "loss_scale": read_data,
    "custom_dataset_info": Drop("columns and format of a source say how its rows are read"),
    "custom_register_path": Drop("code that comes with a data set is never run"),
    "dataset_num_proc": LOADING,
    "dataset_shuffle": LOADING,
    "train_dataloader_shuffle": LOADING,
    "load_from_cache_file": LOADING,
    "cached_dataset": LOADING,
    "lazy_tokenize": LOADING,
    "streaming": LOADING,
    "shuffle_buffer_size": LOADING,
    "interleave_prob": Drop("data sets are joined and shuffled; `limit:` of a source bounds it"),
    "stopping_strategy": Drop("data sets are joined and shuffled; `limit:` of a source bounds it"),
    "strict": Drop("unusable rows are set aside; max_bad_rows bounds them"),
    "max_length": To("max_length", whole),
    "max_prompt_length": Drop("max_length bounds prompt and completion together"),
    "truncation_strategy": Drop("long rows are cut, which is counted and reported"),
    "packing": PACKING,
    "packing_length": PACKING,
    "packing_num_proc": PACKING,
    "packing_cache": PACKING,
    "padding_free": PACKING,
    "padding_side": PACKING,
    "template": TEMPLATE,
    "agent_template": TEMPLATE,
    "use_chat_template": TEMPLATE,
    "template_backend": TEMPLATE,
    "response_prefix": TEMPLATE,
    "norm_bbox": ROWS_ARE_TEXT,
    "system": Drop("write the system prompt into the rows"),
    "model_name": IDENTITY,
    "model_author": IDENTITY,
    "attn_impl": ATTENTION,
    "use_flash_attn": ATTENTION,
    "rope_scaling": Drop("set it in the model's config.json"),
    "max_model_len": Drop("max_length bounds a row"),
    "device_map": MANY_DEVICES,
    "max_memory": MANY_DEVICES,
    "sequence_parallel_size": MANY_DEVICES,
    "zero_hpz_partition_size": MANY_DEVICES,
    "deepspeed_autotp_size": MANY_DEVICES,
    "new_special_tokens": Drop("the tokenizer's tokens must fit the model"),
    "add_version": WATCHING,
    "create_checkpoint_symlink": WATCHING,
    "swanlab_project": WATCHING,
    "swanlab_token": WATCHING,
    "swanlab_exp_name": WATCHING,
    "swanlab_mode": WATCHING,
    "check_model": LOADING,
    "ignore_args_error": LOADING,
    "load_args": LOADING,
    "load_data_args": LOADING,
    "resume_only_model": Drop("write the run under init_from"),
    "acc_strategy": Drop("evaluator `accuracy` runs before and after"),
    "metric": Drop("`evaluate:` names what is measured"),
    "eval_limit": Drop("`evaluate:` names what is measured"),
    "eval_use_evalscope": Drop("`evaluate:` names what is measured"),
    "eval_datasets": Drop("`evaluate:` names what is measured"),
    "early_stop_interval": To("early_stopping_patience", whole),
    "router_aux_loss_coef": Drop("the model's own loss of its router is not added"),
    "use_ray": MANY_DEVICES,
    "tuner_backend": Drop("adapters are luthier's own, and written as PEFT reads them"),
    "export_model": HUB,
    "merge_lora": Drop("`luthier export` merges"),
    "freeze_vit": ROWS_ARE_TEXT,
    "freeze_aligner": ROWS_ARE_TEXT,
    "vit_lr": ROWS_ARE_TEXT,
    "vit_gradient_checkpointing": ROWS_ARE_TEXT,
    "max_pixels": ROWS_ARE_TEXT,
}
