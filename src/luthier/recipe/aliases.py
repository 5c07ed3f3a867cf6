"""Words of other tools, and of luthier 0.1, for keys and values of a recipe."""

from __future__ import annotations

# other tools' keys -> ours; "" where a recipe needs none
ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id": "model",
    "model_name": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_file": "data",
    "train_data": "data",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "val_size": "eval_data",
    "test_datasets": "eval_data",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "schedule": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "optimizers": "optim",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "finetuning_type": "tuner",
    "peft_type": "tuner",
    "adapter": "tuner",
    "loss": "objective",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "sample_packing": "packing",
    "pref_beta": "beta",
    "gradient_clipping": "max_grad_norm",
    "num_generations": "n",
    "max_completion_length": "max_new_tokens",
    "clip_grad_norm": "max_grad_norm",
    "torch_dtype": "dtype",
    "precompute_ref_log_probs": "cache_reference",
    "resume_from_checkpoint": "",
    "do_train": "",
    "overwrite_output_dir": "overwrite",
    "report": "report_to",
    "output": "output_dir",
}
# key of a recipe -> the kind of its one method
METHOD_KEYS = {
    "tuner": "tuner",
    "quantization": "quantizer",
    "estimator": "estimator",
    "optim": "optimizer",
    "architecture": "architecture",
}
# other tools' names of methods -> ours
NAMES = {
    "optim": {
        "adamw_torch": "adamw",
        "adamw_hf": "adamw",
        "adamw_torch_fused": "adamw",
        "paged_adamw": "adamw",
        "paged_adamw_32bit": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_torch_8bit": "adamw_8bit",
        "paged_adamw_8bit": "adamw_8bit",
        "lion_32bit": "lion",
        "paged_lion_32bit": "lion",
    },
    "quantization": {
        "4bit": "nf4",
        "bnb_4bit": "nf4",
        "8bit": "int8",
        "bnb_8bit": "int8",
        "llm_int8": "int8",
    },
    "tuner": {
        "prompt_tuning": "prompt",
        "prefix_tuning": "prefix",
        **{
            name: {"name": "peft", "type": name}
            for name in ("vera", "oft", "boft", "loha", "lokr", "hra", "fourierft", "randlora", "ln_tuning")
        },
        "dora": {"name": "lora", "use_dora": True},
        "rslora": {"name": "lora", "use_rslora": True},
        "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    },
    "objective": {"reinforce++": "reinforce_pp", "gkd": "distill_jsd", "online_dpo": "dpo"},
}


# other words for types of numbers
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

# keys of luthier 0.1 -> what they are called now
FORMER_KEYS = {"live": "online_stages", "start": "init_from", "transforms": "optim"}

# names of roles of luthier 0.1 -> what they are called now
FORMER_ROLES = {"parts": "part_heads", "paired": "feature_pairs"}

# transformers' settings of a quantized base -> ours
QUANTIZATION = {"bnb_4bit_use_double_quant": "double_quant", "llm_int8_skip_modules": "skip_modules"}
