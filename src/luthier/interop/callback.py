"""The callback that takes a tuner through the steps of transformers' Trainer and of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.interop.steps import Steps


class TunerCallback(TrainerCallback):
    """Begins with the training, and writes what the tuner needs to go on into every checkpoint."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        step = state.global_step
        self.steps.follow(optimizer, state.max_steps, step)
        if step:
            folders = [Path(args.output_dir) / f"checkpoint-{step}"]
            if isinstance(args.resume_from_checkpoint, str):
                folders.append(Path(args.resume_from_checkpoint))
            self.steps.restore(folders)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.steps.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.release()
