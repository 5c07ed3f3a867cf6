"""What LLaMA-Factory, ms-swift and TRL share: the keys of transformers' TrainingArguments, and readers of
what several keys say together.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from luthier.tools.foreign.draft import Draft, Drop, Rule, To, as_list, as_object, is_on, number, whole

SCHEDULES = {  # transformers' schedule -> ours
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_min_lr": "cosine_with_min_lr",
    "cosine_warmup_with_min_lr": "cosine_with_min_lr",
    "polynomial": "polynomial",
    "warmup_stable_decay": "warmup_stable_decay",
}
NEAREST_SCHEDULES = {
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "rex": "cosine",
    "quadratic": "cosine",
    "one_cycle": "cosine",
    "inverse_sqrt": "linear",
    "log_sweep": "linear",
    "reduce_lr_on_plateau": "constant",
}
ADAMW = ("adamw", "adam", "paged_adamw", "schedule_free_adamw", "ao_adamw", "anyprecision_adamw", "came")
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "comet_ml": ("comet_ml",)}
INSTEAD = "adamw is used, so check the learning rate"
OTHERS = "all", "none", "azure_ml", "codecarbon", "neptune", "flyte"


def read_batch(draft: Draft) -> None:
    """Rows of a micro-batch and micro-batches of a step; with several devices, the rows of all of them."""
    size = whole(draft.get("per_device_train_batch_size", 8))
    steps = whole(draft.get("gradient_accumulation_steps", 1))
    put_batch(draft, size, steps, "per_device_train_batch_size", "gradient_accumulation_steps")


def put_batch(draft: Draft, size: int, steps: int, size_key: str, steps_key: str) -> None:
    """The batch, with the effective batch size of all devices in one process."""
    draft.put("per_device_train_batch_size", size, size_key)
    draft.put("gradient_accumulation_steps", steps * draft.devices)
    if draft.devices == 1:
        draft.note(steps_key, "mapped", "gradient_accumulation_steps")
    else:
        why = f"times {draft.devices} devices, so that a step has as many rows"
        draft.change(steps_key, "gradient_accumulation_steps", why)


def read_length(draft: Draft) -> None:
    """Epochs, or steps where they are set."""
    steps = whole(draft.get("max_steps", -1))
    if steps > 0:
        draft.put("max_steps", steps, "max_steps")
        draft.drop("num_train_epochs", "max_steps is set, and counts")
    else:
        draft.put("num_train_epochs", number(draft.get("num_train_epochs", 3.0)), "num_train_epochs")
        draft.drop("max_steps", "it is not positive, so epochs count")


def read_schedule(draft: Draft) -> None:
    """Schedule and warm-up of the learning rate."""
    put_schedule(draft, str(draft.get("lr_scheduler_type", "linear")), "lr_scheduler_type")
    put_warmup(draft)


def put_schedule(draft: Draft, name: str, key: str) -> None:
    """The schedule of that name, or the nearest one."""
    settings = str(draft.get("lr_scheduler_kwargs", ""))
    needs_least = SCHEDULES.get(name) == "cosine_with_min_lr" and "min_lr" not in settings
    if name in SCHEDULES and not needs_least:
        draft.put("lr_scheduler_type", SCHEDULES[name], key)
        return
    nearest = NEAREST_SCHEDULES.get(name, "linear")
    draft.put("lr_scheduler_type", nearest)
    why = f"there is no schedule '{name}'; '{nearest}' is nearest"
    if needs_least:
        why = f"'{name}' sets no min_lr; '{nearest}' ends at 0"
    draft.change(key, "lr_scheduler_type", why)


def read_schedule_settings(draft: Draft) -> None:
    """Those settings of transformers' schedules that a recipe has."""
    settings = as_object(draft.get("lr_scheduler_kwargs"))
    for key in ("num_decay_steps", "num_stable_steps", "warmup_type"):
        if settings.pop(key, None) is not None:
            why = f"`{key}`: decay_ratio is the share of the steps in which the rate falls"
            draft.change("lr_scheduler_kwargs", "lr_scheduler_kwargs", why)
    if settings:
        draft.put("lr_scheduler_kwargs", settings, "lr_scheduler_kwargs")


def read_best_metric(draft: Draft) -> None:
    """The metric of the best weights; that of transformers may be one that is not measured here."""
    name = draft.get("metric_for_best_model")
    if name is None or str(name).removeprefix("eval_") in ("loss", "accuracy"):
        if name is not None:
            draft.put("metric_for_best_model", str(name), "metric_for_best_model")
        return
    why = f"'{name}' may be measured by no evaluator here; the held-out loss is used"
    draft.change("metric_for_best_model", "metric_for_best_model", why)


def put_warmup(draft: Draft) -> None:
    """Steps of warm-up, or else their share of the run. transformers' `constant` has none."""
    steps, share = number(draft.get("warmup_steps", 0)), number(draft.get("warmup_ratio", 0))
    if draft.get("lr_scheduler_type") == "constant":
        draft.put("warmup_steps", 0)
        draft.drop("warmup_steps", "the schedule 'constant' of transformers has no warm-up")
        draft.drop("warmup_ratio", "the schedule 'constant' of transformers has no warm-up")
    elif steps:
        draft.put("warmup_steps", steps, "warmup_steps")
        draft.drop("warmup_ratio", "warmup_steps is set, and counts")
    else:
        draft.put("warmup_steps", share, "warmup_ratio", "warmup_steps")


def read_optimizer(draft: Draft) -> None:
    """The optimizer and its settings."""
    name = str(draft.get("optim", "adamw_torch"))
    put_optimizer(draft, name, "optim")


def put_optimizer(draft: Draft, name: str, key: str) -> None:
    """The optimizer of that name with its settings; AdamW for those that are not here."""
    ours = optimizer_of(name)
    if ours is None:
        draft.put("optim.name", "adamw")
        draft.change(key, "optim", f"there is no optimizer '{name}'; {INSTEAD}")
    else:
        same = ours.endswith("_8bit") or name.split("_")[-1] not in ("8bit", "4bit")
        draft.put("optim.name", ours, *([key] if same else []))
        draft.change(key, "optim", f"'{name}' as {ours}, whose state is kept in full precision")
    draft.put("optim.weight_decay", number(draft.get("weight_decay", 0.0)), "weight_decay")
    draft.put("optim.max_grad_norm", number(draft.get("max_grad_norm", 1.0)), "max_grad_norm")
    names = ("adam_beta1", "adam_beta2", "adam_epsilon")
    if ours == "lion":
        names = ("adam_beta1", "adam_beta2")
    if ours in ("sgd", "adafactor"):
        names = ()
    for setting in names:
        if draft.get(setting) is not None:
            place = setting.removeprefix("adam_") if ours == "lion" else setting
            draft.put(f"optim.{place}", number(draft.get(setting)), setting)


def optimizer_of(name: str) -> str | None:
    """Our optimizer of a name of transformers such as paged_adamw_8bit; None where there is none."""
    if name.startswith(ADAMW) and "mini" not in name:
        return "adamw_8bit" if name.endswith("_8bit") else "adamw"
    for ours in ("lion", "sgd", "adafactor"):
        if name.removeprefix("paged_").startswith(ours):
            return ours
    return None


def read_saving(draft: Draft) -> None:
    """When checkpoints are written and rows evaluated: by steps, by epochs, or not at all."""
    for key, place, words in (
        ("save_steps", "save_steps", ("save_strategy",)),
        ("eval_steps", "eval_steps", ("eval_strategy", "evaluation_strategy")),
    ):
        strategy = next((str(draft.get(word)) for word in words if draft.get(word) is not None), None)
        if strategy in ("no", "False", "false"):
            for word in (key, *words):
                draft.drop(word, "checkpoints always are written" if key == "save_steps" else "there is none")
        elif strategy == "epoch":
            share = min(1.0, 1 / max(1.0, float(draft.recipe.get("num_train_epochs", 1))))
            draft.put(place, 0.999 if share == 1 else round(share, 6), *words)
            draft.drop(key, "the strategy is epoch, and counts")
        elif draft.get(key) is not None:
            value = number(draft.get(key))
            if value > 0:
                draft.put(place, value, key, *words)
        for word in words:
            draft.drop(word, "the default is kept")


def read_dtype(draft: Draft) -> None:
    """The number format of the computation."""
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if str(draft.get(key)).lower() == "auto":
            draft.note(key, "mapped", "dtype")
        elif is_on(draft.get(key)):
            draft.put("dtype", name, key)
        else:
            draft.note(key, "mapped", "dtype")
    for key in ("torch_dtype", "dtype"):
        name = str(draft.get(key, "")).removeprefix("torch.")
        if name in ("float32", "bfloat16", "float16") and "dtype" not in draft.recipe:
            draft.put("dtype", name, key)
        draft.note(key, "mapped", "dtype")


def read_trackers(draft: Draft) -> None:
    """The trackers that are installed; what is not would be refused."""
    names = [str(name).lower() for name in as_list(draft.get("report_to"))]
    put_trackers(draft, names, "report_to")


def put_trackers(draft: Draft, names: list[str], key: str) -> None:
    """Trackers by name. Those that are not installed are left out, since a recipe with them is refused."""
    usable, missing = [], []
    for name in names:
        if name in OTHERS:
            continue
        installed = any(is_installed(package) for package in PACKAGES.get(name, (name,)))
        (usable if installed else missing).append(name)
    if usable:
        draft.put("report_to", usable)
    if missing:
        text = " ".join(missing)
        draft.change(key, "report_to", f"not installed here: {text} (pip install {text}, then add it)")
    draft.note(key, "mapped", "report_to")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a name that none can have is not."""
    return package.isidentifier() and find_spec(package) is not None


def read_noise(draft: Draft) -> None:
    """NEFTune, a setting of the architecture."""
    alpha = number(draft.get("neftune_noise_alpha", 0))
    if alpha:
        draft.put("architecture.name", "causal")
        draft.put("architecture.neftune_noise_alpha", alpha, "neftune_noise_alpha")
    draft.note("neftune_noise_alpha", "mapped", "architecture")


def read_lora(draft: Draft, names: dict[str, str]) -> None:
    """LoRA's settings. names: our setting -> the tool's key."""
    draft.put("tuner.name", "lora")
    r = whole(draft.get(names["r"], 8))
    draft.put("tuner.r", r, names["r"])
    draft.put("tuner.lora_alpha", number(draft.get(names["lora_alpha"], 2 * r)), names["lora_alpha"])
    draft.put("tuner.lora_dropout", number(draft.get(names["lora_dropout"], 0.0)), names["lora_dropout"])
    for setting in ("use_rslora", "use_dora"):
        if is_on(draft.get(names[setting])):
            draft.put(f"tuner.{setting}", True, names[setting])
    targets = names["target_modules"]
    draft.put("tuner.target_modules", target_modules(draft.get(targets)), targets)
    for setting in ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"):
        key = names.get(setting)
        if key and as_list(draft.get(key)):
            value = draft.get(key)
            if setting != "layers_pattern":
                value = as_list(value)
            draft.put(f"tuner.{setting}", value, key)
    bias = names.get("bias")
    if bias and draft.get(bias) is not None:
        draft.put("tuner.bias", draft.get(bias), bias)


def target_modules(value: Any) -> Any:
    """Names of modules, a pattern, or all linear ones, as PEFT takes them."""
    names = as_list(value)
    if not names or names in (["all"], ["all-linear"], ["ALL"], ["auto"]):
        return "all-linear"
    if isinstance(value, str) and any(letter in value for letter in "*\\([|"):
        return value
    return names


def read_quantization(draft: Draft) -> None:
    """A quantized base, in the words of bitsandbytes."""
    if is_on(draft.get("load_in_4bit")):
        draft.put("quantization.name", str(draft.get("bnb_4bit_quant_type", "nf4")), "load_in_4bit")
        draft.note("bnb_4bit_quant_type", "mapped", "quantization")
        double = draft.get("bnb_4bit_use_double_quant")
        if double is not None:
            draft.put("quantization.double_quant", is_on(double), "bnb_4bit_use_double_quant")
    elif is_on(draft.get("load_in_8bit")):
        draft.put("quantization", "int8", "load_in_8bit")
    dtype = draft.get("bnb_4bit_compute_dtype")
    if dtype in ("float16", "bfloat16", "float32") and "quantization" in draft.recipe:
        if "dtype" not in draft.recipe:
            draft.put("dtype", dtype)
        draft.note("bnb_4bit_compute_dtype", "mapped", "dtype")
    for key in ("load_in_4bit", "load_in_8bit"):
        draft.note(key, "mapped", "quantization")


def check_text_only(draft: Draft, keys: tuple[str, ...], places: tuple[str, ...]) -> str | None:
    """Why a configuration of a model that reads images cannot be a recipe; None for a text one. keys: that
    only such configurations have; places: keys whose value names the model or its template.
    """
    words = ("-vl", "_vl", "vl-", "llava", "vision", "paligemma", "pixtral", "internvl", "minicpm-v", "-omni")
    for key in keys:
        if draft.get(key) not in (None, False, "false", ""):
            return f"`{key}` is of models that read images or sound"
    for key in places:
        name = str(draft.get(key, "")).lower()
        if any(word in name for word in words) or name.endswith("vl"):
            return f"`{key}: {draft.get(key)}` is a model that reads images or sound"
    return None


MANY_DEVICES = Drop(
    "processes are started by torchrun or accelerate launch, and each holds the whole model;"
    " --devices keeps the effective batch size"
)
LOADING = Drop("how rows are loaded does not change a run; luthier chooses")
HUB = Drop("luthier uploads nothing; `luthier export` writes the result for other tools")
GROUPING = Drop("rows are packed without padding, so they need no grouping by length")
TRUST = Drop("code that comes with a model is never run")
WATCHING = Drop("the tracker takes the recipe and the folder's name")
OF_MEGATRON = Drop("it says how Megatron divides or fuses its work")
MEGATRON: dict[str, Rule] = {
    "tensor_model_parallel_size": OF_MEGATRON,
    "pipeline_model_parallel_size": OF_MEGATRON,
    "context_parallel_size": OF_MEGATRON,
    "expert_model_parallel_size": OF_MEGATRON,
    "expert_tensor_parallel_size": OF_MEGATRON,
    "sequence_parallel": OF_MEGATRON,
    "decoder_first_pipeline_num_layers": OF_MEGATRON,
    "decoder_last_pipeline_num_layers": OF_MEGATRON,
    "recompute_granularity": OF_MEGATRON,
    "recompute_method": OF_MEGATRON,
    "recompute_num_layers": OF_MEGATRON,
    "recompute_modules": OF_MEGATRON,
    "attention_backend": OF_MEGATRON,
    "apply_rope_fusion": OF_MEGATRON,
    "cross_entropy_loss_fusion": OF_MEGATRON,
    "cross_entropy_fusion_impl": OF_MEGATRON,
    "masked_softmax_fusion": OF_MEGATRON,
    "gradient_accumulation_fusion": OF_MEGATRON,
    "bias_activation_fusion": OF_MEGATRON,
    "moe_permute_fusion": OF_MEGATRON,
    "moe_grouped_gemm": OF_MEGATRON,
    "moe_shared_expert_overlap": OF_MEGATRON,
    "moe_token_dispatcher_type": OF_MEGATRON,
    "moe_router_dtype": OF_MEGATRON,
    "moe_expert_capacity_factor": OF_MEGATRON,
    "experts_impl": OF_MEGATRON,
    "optimizer_cpu_offload": OF_MEGATRON,
    "optimizer_offload_fraction": OF_MEGATRON,
    "use_precision_aware_optimizer": OF_MEGATRON,
    "exp_avg_dtype": OF_MEGATRON,
    "exp_avg_sq_dtype": OF_MEGATRON,
    "offload_bridge": OF_MEGATRON,
    "overlap_param_gather": OF_MEGATRON,
    "overlap_grad_reduce": OF_MEGATRON,
    "use_distributed_optimizer": OF_MEGATRON,
    "distributed_backend": OF_MEGATRON,
}
RESUME = Drop("a run goes on from its last checkpoint when the same command is run again")
PRECISION = Drop("the number format follows `dtype`")
ATTENTION = Drop("luthier packs rows with its own block-wise attention; `attn_implementation:` sets another")

TRAINING_ARGUMENTS: dict[str, Rule] = {
    "output_dir": "output_dir",
    "learning_rate": To("learning_rate", number),
    "per_device_train_batch_size": read_batch,
    "gradient_accumulation_steps": read_batch,
    "num_train_epochs": read_length,
    "max_steps": read_length,
    "lr_scheduler_type": read_schedule,
    "warmup_ratio": read_schedule,
    "warmup_steps": read_schedule,
    "lr_scheduler_kwargs": read_schedule_settings,
    "optim": read_optimizer,
    "optim_args": Drop("further settings stand under `optim:`"),
    "optim_target_modules": Drop("further settings stand under `optim:`"),
    "weight_decay": read_optimizer,
    "max_grad_norm": read_optimizer,
    "adam_beta1": read_optimizer,
    "adam_beta2": read_optimizer,
    "adam_epsilon": read_optimizer,
    "bf16": read_dtype,
    "fp16": read_dtype,
    "torch_dtype": read_dtype,
    "dtype": read_dtype,
    "bf16_full_eval": PRECISION,
    "fp16_full_eval": PRECISION,
    "tf32": PRECISION,
    "gradient_checkpointing": To("gradient_checkpointing", is_on),
    "gradient_checkpointing_kwargs": Drop("layers are recomputed without reentry"),
    "torch_compile": To("torch_compile", is_on),
    "torch_compile_backend": Drop("the default backend is used"),
    "torch_compile_mode": Drop("the default mode is used"),
    "neftune_noise_alpha": read_noise,
    "seed": To("seed", whole),
    "data_seed": Drop("`seed:` covers the order of rows as well"),
    "full_determinism": Drop("runs are reproducible by `seed:`"),
    "logging_steps": To("logging_steps", lambda steps: max(1, whole(steps))),
    "logging_strategy": Drop("lines are written by `logging_steps:`"),
    "logging_first_step": Drop("the first step is always logged"),
    "logging_dir": WATCHING,
    "log_level": WATCHING,
    "disable_tqdm": WATCHING,
    "report_to": read_trackers,
    "run_name": WATCHING,
    "project": WATCHING,
    "trackio_space_id": WATCHING,
    "save_steps": read_saving,
    "save_strategy": read_saving,
    "eval_steps": read_saving,
    "eval_strategy": read_saving,
    "evaluation_strategy": read_saving,
    "save_total_limit": To("save_total_limit", lambda count: max(1, whole(count))),
    "save_only_model": Drop("a checkpoint always has all that a run needs to go on"),
    "save_safetensors": Drop("weights are always written as safetensors"),
    "save_on_each_node": MANY_DEVICES,
    "load_best_model_at_end": To("load_best_model_at_end", is_on),
    "metric_for_best_model": read_best_metric,
    "greater_is_better": Drop("the metric says which way is better"),
    "early_stopping_patience": To("early_stopping_patience", whole),
    "early_stopping_threshold": To("early_stopping_threshold", number),
    "eval_on_start": Drop("the model is always evaluated before training"),
    "eval_delay": Drop("evaluations follow `eval_steps:`"),
    "per_device_eval_batch_size": Drop("evaluation chooses its batches"),
    "eval_accumulation_steps": Drop("evaluation chooses its batches"),
    "prediction_loss_only": Drop("`evaluate:` names what is measured"),
    "include_num_input_tokens_seen": Drop("tokens are always counted"),
    "include_tokens_per_second": Drop("speed is always measured"),
    "skip_memory_metrics": Drop("memory is always measured"),
    "batch_eval_metrics": Drop("`evaluate:` names what is measured"),
    "do_train": Drop("a recipe always trains"),
    "do_eval": Drop("a recipe always evaluates"),
    "do_predict": Drop("evaluator `generate` writes answers to held-out rows"),
    "predict_with_generate": Drop("evaluator `generate` writes answers to held-out rows"),
    "overwrite_output_dir": To("overwrite", is_on),
    "resume_from_checkpoint": RESUME,
    "ignore_data_skip": RESUME,
    "restore_callback_states_from_checkpoint": RESUME,
    "auto_find_batch_size": Drop("`gradient_checkpointing: auto` saves memory where a step would not fit"),
    "group_by_length": GROUPING,
    "train_sampling_strategy": GROUPING,
    "length_column_name": GROUPING,
    "remove_unused_columns": LOADING,
    "label_names": LOADING,
    "dataloader_num_workers": LOADING,
    "dataloader_pin_memory": LOADING,
    "dataloader_drop_last": LOADING,
    "dataloader_persistent_workers": LOADING,
    "dataloader_prefetch_factor": LOADING,
    "split_batches": LOADING,
    "average_tokens_across_devices": Drop("every supervised token of a step counts the same"),
    "use_liger_kernel": Drop("luthier computes the loss without all logits by itself"),
    "liger_kernel_config": Drop("luthier computes the loss without all logits by itself"),
    "torch_empty_cache_steps": Drop("memory is managed by luthier"),
    "deepspeed": MANY_DEVICES,
    "fsdp": MANY_DEVICES,
    "fsdp_config": MANY_DEVICES,
    "accelerator_config": MANY_DEVICES,
    "parallelism_config": MANY_DEVICES,
    "ddp_timeout": MANY_DEVICES,
    "ddp_find_unused_parameters": MANY_DEVICES,
    "ddp_backend": MANY_DEVICES,
    "ddp_bucket_cap_mb": MANY_DEVICES,
    "ddp_broadcast_buffers": MANY_DEVICES,
    "local_rank": MANY_DEVICES,
    "use_cpu": Drop("the device is chosen by luthier"),
    "no_cuda": Drop("the device is chosen by luthier"),
    "push_to_hub": HUB,
    "hub_model_id": HUB,
    "hub_token": HUB,
    "hub_strategy": HUB,
    "hub_private_repo": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "use_hf": HUB,
    "use_hub": HUB,
    "hub_organization": HUB,
    "cache_dir": Drop("the hub's cache is chosen by HF_HOME"),
    "trust_remote_code": TRUST,
}
