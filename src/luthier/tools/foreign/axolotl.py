"""axolotl: the YAML that `axolotl train` takes."""

from __future__ import annotations

from typing import Any

from luthier.data.foreign import AXOLOTL_TYPES, from_axolotl
from luthier.errors import RecipeError
from luthier.tools.foreign import goals
from luthier.tools.foreign.draft import Draft, Drop, Rule, To, as_list, as_object, is_on, number, whole
from luthier.tools.foreign.training_arguments import (
    ATTENTION,
    GROUPING,
    HUB,
    LOADING,
    MANY_DEVICES,
    PRECISION,
    RESUME,
    TRAINING_ARGUMENTS,
    TRUST,
    WATCHING,
    check_text_only,
    put_batch,
    put_optimizer,
    put_schedule,
    put_trackers,
    read_lora,
)

NAME = "axolotl"
SIGNS = ("base_model", "micro_batch_size", "sequence_len", "val_set_size", "dataset_prepared_path")
DEFAULTS = {
    "learning_rate": 2e-4,
    "num_epochs": 1.0,
    "sequence_len": 512,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "lora_alpha": 16,
    "rl_beta": 0.1,
    "orpo_alpha": 0.1,
}
LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "modules_to_save": "lora_modules_to_save",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "bias": "lora_bias",
}
# type of a data set -> columns of its rows: ours -> theirs
COLUMNS = {
    "alpaca_w_system": {"system": "system_prompt", "instruction": "question", "output": "response"},
    "alpaca_chat": {"prompt": "question", "completion": "answer"},
    "intel": {"prompt": "question"},
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "summarizetldr": {"prompt": "article", "completion": "summary"},
    "gpteacher": {"output": "response"},
    "reflection": {},
}
CONVERSATIONS = ("chat_template", "sharegpt")
# keys of a data set's entry that change nothing here, or that a recipe cannot have
IGNORED = {
    "revision": "the newest revision is read",
    "trust_remote_code": "code that comes with a data set is never run",
    "shards": "use limit: for a part of the rows",
    "shards_idx": "use limit: for a part of the rows",
    "preprocess_shards": "rows are prepared in one go",
    "conversation": "the tokenizer's own chat template is used",
    "chat_template": "the tokenizer's own chat template is used",
    "chat_template_jinja": "write it as the recipe's chat_template",
    "train_on_eos": "the token that ends a reply is learned",
    "train_on_eot": "the token that ends a reply is learned",
    "eot_tokens": "the tokenizer's own tokens are used",
    "message_field_training": "`train`, `loss` and `loss_scale` of a turn are read",
    "message_field_training_detail": "single tokens are weighted by a column token_weights",
    "drop_system_message": "system messages stay",
    "split_thinking": "the row's own thinking goes through the chat template",
    "input_format": "the data set's own type is read",
    "input_transform": "rows are read as they are",
    "temporary_directory": "the hub's cache is used",
    "step_separator": "steps are separated by the tokenizer",
    "max_completion_length": "max_length bounds prompt and completion",
    "train_on_last_step_only": "every step is learned",
}


def prepare(draft: Draft, command: str) -> None:
    """Settings that axolotl has in groups (`trl:`, `lisa`) stand beside the others."""
    values = dict(draft.values)
    for group in ("trl", "dpo", "kto"):
        if isinstance(values.get(group), dict):
            inner = values.pop(group)
            values.update({key: value for key, value in inner.items() if value is not None})
    for key in [key for key, value in values.items() if value == ""]:
        del values[key]
    draft.values = values


def refuse(draft: Draft) -> None:
    """Raises RecipeError for models that read images."""
    why = check_text_only(draft, ("processor_type", "image_size", "is_multimodal"), ("base_model",))
    if why is None and "ForConditionalGeneration" in str(draft.get("model_type", "")):
        why = f"`model_type: {draft.get('model_type')}` is a model that reads images or sound"
    if why:
        raise RecipeError(f"{NAME}: {why}; a recipe trains models of text")


def read_batch(draft: Draft) -> None:
    """Rows of a micro-batch and micro-batches of a step; `batch_size` is their product on one device."""
    size = whole(draft.get("micro_batch_size", 1))
    steps = draft.get("gradient_accumulation_steps")
    if steps is None and draft.get("batch_size") is not None:
        steps = max(1, whole(draft.get("batch_size")) // size)
        draft.note("batch_size", "mapped", "gradient_accumulation_steps")
    put_batch(draft, size, whole(steps or 1), "micro_batch_size", "gradient_accumulation_steps")
    draft.drop("batch_size", "gradient_accumulation_steps is set, and counts")


def read_length(draft: Draft) -> None:
    """Epochs, or steps where they are set."""
    steps = whole(draft.get("max_steps", 0))
    if steps > 0:
        draft.put("max_steps", steps, "max_steps")
        draft.drop("num_epochs", "max_steps is set, and counts")
    else:
        draft.put("num_train_epochs", number(draft.get("num_epochs")), "num_epochs")


def read_schedule(draft: Draft) -> None:
    """Schedule and warm-up; without either key axolotl warms up for three of a hundred steps."""
    put_schedule(draft, str(draft.get("lr_scheduler")), "lr_scheduler")
    if draft.get("warmup_steps") is not None:
        draft.put("warmup_steps", number(draft.get("warmup_steps")), "warmup_steps")
        draft.drop("warmup_ratio", "warmup_steps is set, and counts")
    else:
        draft.put("warmup_steps", number(draft.get("warmup_ratio", 0.03)), "warmup_ratio")
    if draft.get("lr_scheduler") == "constant":
        draft.recipe["warmup_steps"] = 0


def read_optimizer(draft: Draft) -> None:
    """The optimizer, with LoRA+ where a ratio is set."""
    put_optimizer(draft, str(draft.get("optimizer")), "optimizer")
    ratio = draft.get("loraplus_lr_ratio")
    if ratio is not None:
        settings = draft.recipe["optim"]
        clip = {"name": "clip", "max_grad_norm": settings["max_grad_norm"]}
        decay = {"name": "weight_decay", "weight_decay": settings["weight_decay"]}
        plus = {"name": "lora_plus", "loraplus_lr_ratio": number(ratio)}
        draft.put("optim", [clip, "adam", decay, plus], "loraplus_lr_ratio")


def read_saving(draft: Draft) -> None:
    """Checkpoints and evaluations: by steps, or several in an epoch."""
    epochs = float(draft.recipe.get("num_train_epochs", 1))
    for key, often in (("save_steps", "saves_per_epoch"), ("eval_steps", "evals_per_epoch")):
        strategy = str(draft.get(key.replace("steps", "strategy"), ""))
        times = number(draft.get(often, 1 if strategy == "epoch" else 0))
        if draft.get(key):
            draft.put(key, number(draft.get(key)), key)
        elif times and epochs:
            draft.put(
                key, min(0.999, round(1 / (times * epochs), 6)), often, key.replace("steps", "strategy")
            )
        for word in (key, often, key.replace("steps", "strategy")):
            draft.drop(word, "it asks for none" if not times else "the other key counts")


def read_dtype(draft: Draft) -> None:
    """The number format of the computation; `auto` is luthier's default too."""
    for key, name in (
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ):
        value = draft.get(key)
        if str(value).lower() not in ("auto", "none") and is_on(value) or value == "full":
            draft.put("dtype", name, key)
        draft.note(key, "mapped", "dtype")


def read_tuner(draft: Draft) -> None:
    """LoRA over a whole or a quantized base, LISA, or all weights."""
    adapter = draft.get("adapter")
    if adapter in ("lora", "qlora"):
        read_lora(draft, LORA)
        draft.note("adapter", "mapped", "tuner")
        if draft.get("lora_target_linear") is not None:
            read_linear(draft)
        if draft.get("peft_init_lora_weights") is not None:
            draft.put(
                "tuner.init_lora_weights", draft.get("peft_init_lora_weights"), "peft_init_lora_weights"
            )
    elif adapter:
        raise RecipeError(f"{NAME}: adapter: {adapter!r} must be lora or qlora, or left out")
    elif draft.get("lisa_n_layers") is not None:
        lisa = {"name": "lisa", "n_layers": whole(draft.get("lisa_n_layers"))}
        lisa["interval"] = whole(draft.get("lisa_step_interval", 20))
        draft.put("tuner", lisa, "lisa_n_layers", "lisa_step_interval")
    else:
        draft.put("tuner", "full")
        draft.change(
            "unfrozen_parameters", "tuner", "all weights are trained; tuners part and telly train some"
        )
    if adapter == "qlora" or adapter and is_on(draft.get("load_in_4bit")):
        draft.put("quantization", "nf4", "load_in_4bit")
        draft.drop("load_in_8bit", "the base has 4 bits")
    elif adapter and is_on(draft.get("load_in_8bit")):
        draft.put("quantization", "int8", "load_in_8bit")
    for key in ("load_in_4bit", "load_in_8bit"):
        draft.note(key, "mapped", "quantization")


def read_linear(draft: Draft) -> None:
    """All linear modules, beside those that are named."""
    if is_on(draft.get("lora_target_linear")):
        draft.put("tuner.target_modules", "all-linear", "lora_target_linear")
    draft.note("lora_target_linear", "mapped", "tuner.target_modules")


def read_least_rate(draft: Draft) -> None:
    """The share of the learning rate at which a cosine ends."""
    ratio = draft.get("cosine_min_lr_ratio")
    if ratio is None or draft.recipe.get("lr_scheduler_type") != "cosine":
        return
    draft.put("lr_scheduler_kwargs.min_lr_rate", number(ratio), "cosine_min_lr_ratio")


def read_reward_model(draft: Draft) -> None:
    """A reward of whole answers from pairs, or of the steps of a solution."""
    if not is_on(draft.get("reward_model")):
        draft.put("objective", "process_reward", "process_reward_model")
        draft.put("architecture", "reward_model")
        draft.put("stages", ["mark_steps"])
        return
    draft.put("objective.name", "reward", "reward_model")
    draft.put("architecture", "reward_model")
    if draft.get("center_rewards_coefficient") is not None:
        factor = number(draft.get("center_rewards_coefficient"))
        draft.put("objective.center_rewards_coefficient", factor, "center_rewards_coefficient")


def read_objective(draft: Draft) -> None:
    """What is trained for."""
    rl = draft.get("rl")
    if rl is None and (is_on(draft.get("reward_model")) or is_on(draft.get("process_reward_model"))):
        read_reward_model(draft)
    elif rl is None:
        draft.put("objective.name", "sft")
        if draft.get("label_smoothing_factor") is not None:
            factor = number(draft.get("label_smoothing_factor"))
            draft.put("objective.label_smoothing_factor", factor, "label_smoothing_factor")
    elif rl in ("grpo", "gdpo"):
        read_grpo(draft)
    elif str(rl) in goals.PREFERENCE_LOSSES or rl in ("dpo", "ipo"):
        read_preference(draft, str(rl))
    else:
        raise RecipeError(f"{NAME}: rl: {rl!r} must be one of dpo, ipo, kto, orpo, simpo, grpo")


def read_preference(draft: Draft, rl: str) -> None:
    """DPO and its relatives, with the loss and the terms that axolotl has beside it."""
    losses = [str(loss) for loss in as_list(draft.get("dpo_loss_type"))] or ["sigmoid"]
    if rl != "dpo":
        losses = [rl]
    weights = [number(weight) for weight in as_list(draft.get("dpo_loss_weights"))]
    goals.put_preference(draft, losses, weights, "dpo_loss_type")
    for key in ("rl", "dpo_loss_weights"):
        draft.note(key, "mapped", "objective")
    if rl == "dpo" and is_on(draft.get("dpo_use_weighting")):
        draft.put("objective.name", "wpo", "dpo_use_weighting")
    beta = "orpo_alpha" if rl == "orpo" else "rl_beta"
    goals.put_setting(draft, "beta", number(draft.get(beta)), beta)
    settings = {
        "simpo_gamma": ("simpo", "simpo_gamma"),
        "dpo_label_smoothing": ("dpo", "label_smoothing"),
        "kto_desirable_weight": ("kto", "desirable_weight"),
        "kto_undesirable_weight": ("kto", "undesirable_weight"),
    }
    for key, (of, setting) in settings.items():
        if rl == of and draft.get(key) is not None:
            goals.put_setting(draft, setting, number(draft.get(key)), key)
    for key in ("rpo_alpha", "cpo_alpha"):
        if draft.get(key):
            goals.add_term(draft, "chosen_sft", number(draft.get(key)), key)


def read_grpo(draft: Draft) -> None:
    """Fresh samples in each step; a batch of axolotl counts completions."""
    n = whole(draft.get("num_generations", 8))
    keys = {"n": "num_generations", "max_new_tokens": "max_completion_length"}
    goals.put_samples(draft, n, {**keys, **{name: name for name in ("temperature", "top_p", "top_k")}})
    goals.put_rewards(draft, "reward_funcs", "reward_weights")
    goals.put_policy_gradient(draft, str(draft.get("loss_type", "dapo")), "loss_type")
    goals.put_prompts(draft, draft.recipe["per_device_train_batch_size"], n, "micro_batch_size")
    draft.note("rl", "mapped", "objective")


def read_data(draft: Draft) -> None:
    """Training and held-out rows."""
    entries = as_list(draft.get("datasets")) or as_list(draft.get("pretraining_dataset"))
    if not entries:
        raise RecipeError(f"{NAME}: `datasets:` is not set, so there is nothing to train on")
    key = "datasets" if draft.get("datasets") else "pretraining_dataset"
    draft.put("data", sources(draft, entries, key), key)
    held_out = as_list(draft.get("test_datasets"))
    share = number(draft.get("val_set_size", 0))
    if held_out:
        draft.put("eval_data", sources(draft, held_out, "test_datasets"), "test_datasets")
        draft.drop("val_set_size", "test_datasets is set, and counts")
    elif share >= 1:
        why = f"a share is held out, not {share:g} rows: write eval_data: 0.05 or a file"
        draft.change("val_set_size", "eval_data", why)
    elif draft.values.get("val_set_size") is not None:
        draft.put("eval_data", share, "val_set_size")


def sources(draft: Draft, entries: list[Any], key: str) -> Any:
    """The sources of a list of data sets; one alone where there is one."""
    out = []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else as_object(entry)
        out.extend(of_files(draft, entry, key))
    return out[0] if len(out) == 1 else out


def of_files(draft: Draft, entry: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """An entry as one source, or as one for each of its files."""
    files = entry.pop("data_files", None)
    local = entry.get("ds_type") or entry.get("path") in ("json", "csv", "parquet", "text")
    if files and not local:
        draft.change(key, "data", f"{entry.get('path')}: all its files are read, not only {files}")
        files = None
    if files is None:
        return [source(draft, entry, key)]
    return [source(draft, {**entry, "path": file, "ds_type": "json"}, key) for file in as_list(files)]


def source(draft: Draft, entry: dict[str, Any], key: str) -> dict[str, Any]:
    """A data set as a source of ours. Keys that are left out are told."""
    for name in [name for name in entry if name in IGNORED]:
        value = entry.pop(name)
        if value not in (None, False):
            draft.change(key, "data", f"{name} of {entry.get('path')} is left out: {IGNORED[name]}")
    prompts = entry.pop("roles_to_train", None) not in (None, ["assistant"], ["gpt"], ["assistant", "gpt"])
    if draft.get("pretraining_dataset") and entry.get("type") in (None, "pretrain"):
        entry["type"] = "completion"
        column = entry.pop("text_column", None)
        if column:
            entry["field"] = column
    kind = entry.get("type")
    if isinstance(kind, str):
        entry = typed(draft, entry, kind, key)
    legacy = {"role": "message_field_role", "content": "message_field_content"}
    tags = {ours: entry.pop(theirs) for ours, theirs in legacy.items() if entry.get(theirs)}
    if tags:
        entry["message_property_mappings"] = {**tags, **(entry.get("message_property_mappings") or {})}
    mappings = entry.get("message_property_mappings") or {}
    entry["message_property_mappings"] = {ours: theirs for ours, theirs in mappings.items() if ours != theirs}
    spec = from_axolotl({name: value for name, value in entry.items() if value is not None})
    if prompts or is_on(draft.get("train_on_inputs")):
        learn_prompts(draft, spec, str(kind).partition(".")[0], prompts)
    return spec


def typed(draft: Draft, entry: dict[str, Any], kind: str, key: str) -> dict[str, Any]:
    """An entry whose type names columns, or a prompt that is not here."""
    entry = dict(entry)
    name, _, way = kind.partition(".")
    columns = COLUMNS.get(name) or COLUMNS.get(way)
    if name == "bradley_terry" or name in ("chatml", "llama3", "zephyr", "passthrough", "user_defined"):
        entry.pop("type")
    elif name == "stepwise_supervised":
        entry["type"] = "stepwise"
    elif name == "chat_template" and draft.get("rl") and draft.get("rl") != "grpo":
        entry.pop("type")
        messages = entry.pop("field_messages", "messages")
        if "field_chosen" in entry or "field_rejected" in entry:
            columns = {"prompt": messages}
    elif name not in AXOLOTL_TYPES and columns is None:
        entry.pop("type")
        draft.change(key, "data", f"type '{kind}' of {entry.get('path')}: the format follows the columns")
    elif columns is not None:
        entry.pop("type")
    if columns:
        entry["columns"] = {**columns, **(entry.get("columns") or {})}
    return entry


def learn_prompts(draft: Draft, spec: dict[str, Any], kind: str, by_role: bool) -> None:
    """Conversations of which every turn is learned; other formats learn completions alone."""
    key = "datasets" if by_role else "train_on_inputs"
    if kind in CONVERSATIONS:
        name = "sharegpt" if kind == "sharegpt" else "messages"
        spec["format"] = {"name": name, "assistant_only_loss": False}
        draft.note(key, "mapped", "data.format")
    elif kind not in ("completion", "None"):
        draft.change(key, "data", f"rows of type '{kind}' learn completions, not prompts")


def read_template(draft: Draft) -> None:
    """The chat template: a built-in one, a text, or the tokenizer's own."""
    name = str(draft.get("chat_template", ""))
    if name == "chatml":
        draft.put("chat_template", "chatml", "chat_template")
    elif draft.get("chat_template_jinja"):
        draft.put("chat_template", draft.get("chat_template_jinja"), "chat_template_jinja", "chat_template")
    draft.drop("chat_template", "the tokenizer's own chat template is used; `chat_template:` sets another")


def read_noise(draft: Draft) -> None:
    """NEFTune, a setting of the architecture."""
    for key in ("neftune_noise_alpha", "noisy_embedding_alpha"):
        if draft.get(key):
            draft.put("architecture", {"name": "causal", "neftune_noise_alpha": number(draft.get(key))}, key)


def read_checkpointing(draft: Draft) -> None:
    """Whether activations are recomputed; to move them elsewhere is not."""
    value = draft.get("gradient_checkpointing")
    if value is not None:
        on = True if str(value).startswith("offload") else is_on(value)
        draft.put("gradient_checkpointing", on, "gradient_checkpointing")


def read_trackers(draft: Draft) -> None:
    """The trackers, each switched on by a key of its own."""
    names = []
    for key, name in (
        ("wandb_project", "wandb"),
        ("use_wandb", "wandb"),
        ("use_mlflow", "mlflow"),
        ("mlflow_tracking_uri", "mlflow"),
        ("use_comet", "comet_ml"),
        ("use_tensorboard", "tensorboard"),
    ):
        if draft.get(key) and name not in names:
            put_trackers(draft, [name], key)
            names.append(name)
    for name in as_list(draft.get("report_to")):
        put_trackers(draft, [str(name)], "report_to")


ROPE = Drop("set it in the model's config.json")
FAST = Drop("luthier has its own fast paths")
PACKING = Drop("rows are always packed, and kept apart; a batch counts rows, not packed sequences")
TOKENS = Drop("the tokenizer's own tokens are used")
MERGING = Drop("tuner lora is merged by `luthier export`")
VLLM = Drop("a rollout samples in the process, or from `roles: {sampler: {name: vllm, ...}}`")
REFERENCE = Drop("the reference is the model without its adapter; roles.reference sets another")

SWANLAB = (
    *("use_swanlab", "swanlab_project", "swanlab_experiment_name", "swanlab_description", "swanlab_mode"),
    *("swanlab_workspace", "swanlab_log_model", "swanlab_log_completions"),
    *("swanlab_completion_log_interval", "swanlab_completion_max_buffer"),
)

KEYS: dict[str, Rule] = {
    "base_model": "model",
    "base_model_config": Drop("the model brings its config"),
    "base_model_ignore_patterns": LOADING,
    "revision_of_model": Drop("the newest revision is used; download another into a folder"),
    "model_type": Drop("the architecture follows the model's config"),
    "tokenizer_type": Drop("the model brings its tokenizer"),
    "tokenizer_config": Drop("the model brings its tokenizer"),
    "tokenizer_use_fast": Drop("the model brings its tokenizer"),
    "tokenizer_legacy": Drop("the model brings its tokenizer"),
    "tokenizer_use_mistral_common": Drop("the model brings its tokenizer"),
    "resize_token_embeddings_to_32x": TOKENS,
    "num_labels": Drop("a reward model has one value"),
    "is_llama_derived_model": Drop("the architecture follows the model's config"),
    "is_mistral_derived_model": Drop("the architecture follows the model's config"),
    "is_falcon_derived_model": Drop("the architecture follows the model's config"),
    "is_qwen_derived_model": Drop("the architecture follows the model's config"),
    "overrides_of_model_config": ROPE,
    "rope_scaling": ROPE,
    "trust_remote_code": TRUST,
    "strict": Drop("weights are always loaded strictly"),
    "gptq": Drop("the base is quantized while it is read"),
    "learning_rate": To("learning_rate", number),
    "micro_batch_size": read_batch,
    "gradient_accumulation_steps": read_batch,
    "batch_size": read_batch,
    "num_epochs": read_length,
    "max_steps": read_length,
    "lr_scheduler": read_schedule,
    "warmup_steps": read_schedule,
    "warmup_ratio": read_schedule,
    "lr_scheduler_kwargs": TRAINING_ARGUMENTS["lr_scheduler_kwargs"],
    "cosine_min_lr_ratio": read_least_rate,
    "cosine_constant_lr_ratio": Drop("schedules have no settings"),
    "optimizer": read_optimizer,
    "optim_args": Drop("further settings stand under `optim:`"),
    "optim_target_modules": Drop("further settings stand under `optim:`"),
    "weight_decay": read_optimizer,
    "max_grad_norm": read_optimizer,
    "adam_beta1": read_optimizer,
    "adam_beta2": read_optimizer,
    "adam_epsilon": read_optimizer,
    "loraplus_lr_ratio": read_optimizer,
    "loraplus_lr_embedding": Drop("embeddings that LoRA trains have the rate of B"),
    "embedding_lr": Drop("all weights have one rate; transform layerwise_decay scales it by depth"),
    "embedding_lr_scale": Drop("all weights have one rate; transform layerwise_decay scales it by depth"),
    "saves_per_epoch": read_saving,
    "save_steps": read_saving,
    "save_strategy": read_saving,
    "evals_per_epoch": read_saving,
    "eval_steps": read_saving,
    "eval_strategy": read_saving,
    "evaluation_strategy": Drop("evaluations follow eval_steps"),
    "save_total_limit": To("save_total_limit", lambda count: max(1, whole(count))),
    "save_first_step": Drop("checkpoints follow save_steps"),
    "save_only_model": TRAINING_ARGUMENTS["save_only_model"],
    "save_safetensors": TRAINING_ARGUMENTS["save_safetensors"],
    "load_best_model_at_end": TRAINING_ARGUMENTS["load_best_model_at_end"],
    "metric_for_best_model": TRAINING_ARGUMENTS["metric_for_best_model"],
    "greater_is_better": TRAINING_ARGUMENTS["greater_is_better"],
    "early_stopping_patience": TRAINING_ARGUMENTS["early_stopping_patience"],
    "bf16": read_dtype,
    "fp16": read_dtype,
    "bfloat16": read_dtype,
    "float16": read_dtype,
    "tf32": PRECISION,
    "fp8": PRECISION,
    "sequence_len": To("max_length", whole),
    "adapter": read_tuner,
    "load_in_4bit": read_tuner,
    "load_in_8bit": read_tuner,
    **dict.fromkeys(LORA.values(), read_tuner),
    "lora_target_linear": read_tuner,
    "peft_init_lora_weights": read_tuner,
    "lisa_n_layers": read_tuner,
    "lisa_step_interval": read_tuner,
    "lisa_layers_attribute": Drop("the layers are recognised"),
    "unfrozen_parameters": read_tuner,
    "lora_model_dir": "init_from",
    "lora_fan_in_fan_out": Drop("the layout of a module is recognised"),
    "lora_on_cpu": MERGING,
    "peft": Drop("further settings stand under `tuner:`"),
    "lora_mlp_kernel": FAST,
    "lora_qkv_kernel": FAST,
    "lora_o_kernel": FAST,
    "lora_embedding_kernel": FAST,
    "relora": Drop("LoRA is merged once, at the end"),
    "relora_steps": Drop("LoRA is merged once, at the end"),
    "relora_warmup_steps": Drop("LoRA is merged once, at the end"),
    "relora_prune_ratio": Drop("LoRA is merged once, at the end"),
    "relora_cpu_offload": Drop("LoRA is merged once, at the end"),
    "jagged_restart_steps": Drop("schedules have no restarts"),
    "jagged_restart_warmup_steps": Drop("schedules have no restarts"),
    "neftune_noise_alpha": read_noise,
    "noisy_embedding_alpha": read_noise,
    "rl": read_objective,
    "rl_beta": read_objective,
    "orpo_alpha": read_objective,
    "simpo_gamma": read_objective,
    "cpo_alpha": read_objective,
    "rpo_alpha": read_objective,
    "dpo_label_smoothing": read_objective,
    "dpo_loss_type": read_objective,
    "dpo_loss_weights": read_objective,
    "dpo_use_weighting": read_objective,
    "dpo_use_logits_to_keep": FAST,
    "dpo_padding_free": FAST,
    "dpo_norm_loss": Drop("losses are normalised by rows and tokens"),
    "kto_desirable_weight": read_objective,
    "kto_undesirable_weight": read_objective,
    "label_smoothing_factor": read_objective,
    "reward_model": read_objective,
    "process_reward_model": read_objective,
    "center_rewards_coefficient": read_objective,
    "quantize_moe_experts": Drop("every linear layer of a quantized base is quantized"),
    "qat": Drop("`quantization:` quantizes the base before it is tuned"),
    "lora_target_parameters": Drop("adapters sit on linear layers, not on fused experts"),
    "model_quantization_config": Drop("`quantization:` says how the base is kept"),
    "model_quantization_config_kwargs": Drop("`quantization:` says how the base is kept"),
    "bnb_config_kwargs": Drop("`quantization:` says how the base is kept"),
    "model_config": Drop("set it in the model's config.json"),
    "cls_model_config": Drop("the architecture follows the model's config"),
    "experimental_skip_move_to_device": LOADING,
    "low_cpu_mem_usage": LOADING,
    "expert_parallel_size": MANY_DEVICES,
    "accelerator_config": MANY_DEVICES,
    "use_otel_metrics": WATCHING,
    "otel_metrics_host": WATCHING,
    "otel_metrics_port": WATCHING,
    "precompute_ref_log_probs": "cache_reference",
    "num_generations": read_objective,
    "max_completion_length": read_objective,
    "max_prompt_length": Drop("max_length bounds prompt and completion together"),
    "temperature": read_objective,
    "top_p": read_objective,
    "top_k": read_objective,
    "min_p": Drop("a rollout has temperature, top_p and top_k"),
    "repetition_penalty": Drop("a rollout has temperature, top_p and top_k"),
    "generation_kwargs": Drop("a rollout has temperature, top_p and top_k"),
    "beta": read_objective,
    "epsilon": read_objective,
    "epsilon_high": read_objective,
    "loss_type": read_objective,
    "scale_rewards": read_objective,
    "num_iterations": read_objective,
    "reward_funcs": read_objective,
    "reward_weights": read_objective,
    "mask_truncated_completions": Drop("truncated completions count as they are scored"),
    "log_completions": Drop("the report shows samples"),
    "num_completions_to_print": Drop("the report shows samples"),
    "use_liger_loss": FAST,
    "sync_ref_model": REFERENCE,
    "ref_model_mixup_alpha": REFERENCE,
    "ref_model_sync_steps": REFERENCE,
    "rollout_func": VLLM,
    "use_vllm": VLLM,
    "vllm": VLLM,
    "vllm_mode": VLLM,
    "vllm_server_host": VLLM,
    "vllm_server_port": VLLM,
    "vllm_server_timeout": VLLM,
    "vllm_guided_decoding_regex": VLLM,
    "importance_sampling_level": Drop("ratios are of tokens, as in GRPO"),
    "datasets": read_data,
    "pretraining_dataset": read_data,
    "test_datasets": read_data,
    "val_set_size": read_data,
    "train_on_inputs": read_data,
    "roles_to_train": Drop("replies are learned; `loss` of a turn says otherwise"),
    "chat_template": read_template,
    "chat_template_jinja": read_template,
    "default_system_message": Drop("write the system prompt into the rows"),
    "eot_tokens": TOKENS,
    "special_tokens": TOKENS,
    "tokens": TOKENS,
    "added_tokens_overrides": TOKENS,
    "dataset_prepared_path": LOADING,
    "dataset_processes": LOADING,
    "dataset_num_proc": LOADING,
    "dataset_keep_in_memory": LOADING,
    "dataset_shard_num": LOADING,
    "dataset_shard_idx": LOADING,
    "push_dataset_to_hub": HUB,
    "shuffle_merged_datasets": LOADING,
    "shuffle_before_merging_datasets": LOADING,
    "dataset_exact_deduplication": Drop("`luthier data` shows duplicates; rows are read as they are"),
    "skip_prepare_dataset": LOADING,
    "streaming": LOADING,
    "streaming_multipack_buffer_size": LOADING,
    "remove_unused_columns": LOADING,
    "dataloader_num_workers": LOADING,
    "dataloader_pin_memory": LOADING,
    "dataloader_prefetch_factor": LOADING,
    "dataloader_drop_last": LOADING,
    "group_by_length": GROUPING,
    "curriculum_sampling": Drop("rows are shuffled"),
    "excess_length_strategy": Drop("long rows are cut, which is counted and reported"),
    "min_sample_len": Drop("rows without supervised tokens are set aside"),
    "sample_packing": PACKING,
    "eval_sample_packing": PACKING,
    "sample_packing_eff_est": PACKING,
    "sample_packing_group_size": PACKING,
    "sample_packing_bin_size": PACKING,
    "sample_packing_sequentially": PACKING,
    "multipack_real_batches": PACKING,
    "batch_flattening": PACKING,
    "pad_to_sequence_len": PACKING,
    "pretraining_sample_concatenation": PACKING,
    "pretrain_multipack_attn": PACKING,
    "total_num_tokens": PACKING,
    "max_packed_sequence_len": PACKING,
    "gradient_checkpointing": read_checkpointing,
    "gradient_checkpointing_kwargs": TRAINING_ARGUMENTS["gradient_checkpointing_kwargs"],
    "activation_offloading": Drop("activations are recomputed, not moved"),
    "torch_compile": To("torch_compile", is_on),
    "torch_compile_backend": TRAINING_ARGUMENTS["torch_compile_backend"],
    "torch_compile_mode": TRAINING_ARGUMENTS["torch_compile_mode"],
    "flash_attention": ATTENTION,
    "flash_attn_cross_entropy": ATTENTION,
    "flash_attn_rms_norm": ATTENTION,
    "flash_attn_fuse_qkv": ATTENTION,
    "flash_attn_fuse_mlp": ATTENTION,
    "xformers_attention": ATTENTION,
    "sdp_attention": ATTENTION,
    "flex_attention": ATTENTION,
    "flex_attn_compile_kwargs": ATTENTION,
    "eager_attention": To("attn_implementation", lambda on: "eager" if is_on(on) else None),
    "attn_implementation": "attn_implementation",
    "s2_attention": ATTENTION,
    "plugins": FAST,
    "liger_rope": FAST,
    "liger_rms_norm_gated": FAST,
    "use_scattermoe": FAST,
    "use_sonicmoe": FAST,
    "experts_implementation": FAST,
    "fused_attn_kernel": FAST,
    "gemma4_hybrid_attn_impl": FAST,
    "tiled_mlp": FAST,
    "liger_rms_norm": FAST,
    "liger_glu_activation": FAST,
    "liger_swiglu": FAST,
    "liger_layer_norm": FAST,
    "liger_cross_entropy": FAST,
    "liger_fused_linear_cross_entropy": FAST,
    "cut_cross_entropy": FAST,
    "chunked_cross_entropy": FAST,
    "unsloth_lora_mlp": FAST,
    "unsloth_lora_qkv": FAST,
    "unsloth_lora_o": FAST,
    "unsloth_cross_entropy_loss": FAST,
    "use_kernels": FAST,
    "gc_steps": FAST,
    "loss_watchdog_threshold": Drop("a loss that is no number ends a run"),
    "loss_watchdog_patience": Drop("a loss that is no number ends a run"),
    "seed": To("seed", whole),
    "output_dir": "output_dir",
    "logging_steps": To("logging_steps", lambda steps: max(1, whole(steps))),
    "eval_batch_size": Drop("evaluation chooses its batches"),
    "eval_table_size": Drop("evaluator `generate` writes answers to held-out rows"),
    "eval_max_new_tokens": Drop("evaluator `generate` writes answers to held-out rows"),
    "eval_causal_lm_metrics": Drop("`evaluate:` names what is measured"),
    "do_causal_lm_eval": Drop("`evaluate:` names what is measured"),
    "do_bench_eval": Drop("`evaluate:` names what is measured"),
    "bench_dataset": Drop("`evaluate:` names what is measured"),
    "include_tokens_per_second": Drop("speed is always measured"),
    "wandb_project": read_trackers,
    "use_wandb": read_trackers,
    "use_mlflow": read_trackers,
    "mlflow_tracking_uri": read_trackers,
    "use_comet": read_trackers,
    "use_tensorboard": read_trackers,
    "report_to": read_trackers,
    "wandb_mode": WATCHING,
    **dict.fromkeys(SWANLAB, WATCHING),
    "wandb_entity": WATCHING,
    "wandb_watch": WATCHING,
    "wandb_name": WATCHING,
    "wandb_run_id": WATCHING,
    "wandb_log_model": WATCHING,
    "mlflow_experiment_name": WATCHING,
    "mlflow_run_name": WATCHING,
    "hf_mlflow_log_artifacts": WATCHING,
    "comet_project_name": WATCHING,
    "comet_workspace": WATCHING,
    "comet_api_key": WATCHING,
    "comet_experiment_config": WATCHING,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hf_use_auth_token": HUB,
    "resume_from_checkpoint": RESUME,
    "auto_resume_from_checkpoints": RESUME,
    "debug": WATCHING,
    "deepspeed": MANY_DEVICES,
    "fsdp": MANY_DEVICES,
    "fsdp_config": MANY_DEVICES,
    "fsdp_version": MANY_DEVICES,
    "local_rank": MANY_DEVICES,
    "ddp": MANY_DEVICES,
    "ddp_timeout": MANY_DEVICES,
    "ddp_bucket_cap_mb": MANY_DEVICES,
    "ddp_broadcast_buffers": MANY_DEVICES,
    "ddp_find_unused_parameters": MANY_DEVICES,
    "sequence_parallel_degree": MANY_DEVICES,
    "context_parallel_size": MANY_DEVICES,
    "tensor_parallel_size": MANY_DEVICES,
    "dp_shard_size": MANY_DEVICES,
    "dp_replicate_size": MANY_DEVICES,
    "heads_k_stride": MANY_DEVICES,
    "ring_attn_func": MANY_DEVICES,
    "use_ray": MANY_DEVICES,
    "ray_num_workers": MANY_DEVICES,
    "device_map": MANY_DEVICES,
    "max_memory": MANY_DEVICES,
    "gpu_memory_limit": MANY_DEVICES,
    "merge_lora": MERGING,
}
