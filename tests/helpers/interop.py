"""transformers' Trainer on a tiny network and a few rows of tokens."""

from __future__ import annotations

import torch

ROWS = []
for i in range(8):
    TOKENS = [(7 * i + j) % 90 + 3 for j in range(8)]
    ROWS.append({"input_ids": TOKENS, "labels": TOKENS})
IDS = torch.arange(3, 17).reshape(2, 7)


def train(model, folder, *, steps=2, resume=None, callbacks=None, loss=None, **options):
    """A few steps of Trainer, with the callbacks of luthier; the trainer."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    import luthier

    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="steps" if "save_steps" in options else "no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        callbacks=luthier.callbacks(model) if callbacks is None else callbacks,
        compute_loss_func=loss,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer
