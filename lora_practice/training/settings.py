"""The settings of training: those fields of fine_tuning_practice.TrainSettings that this wing reads."""

from __future__ import annotations

from typing import Optional, Protocol

from lora_practice.model.settings import LoraSettings

DEFAULT_LOGGING_STEPS = 10  # optimizer steps


class TrainingSettings(LoraSettings, Protocol):
    """Fields of TrainSettings."""

    eval_strategy: str
    eval_steps: int
    load_best_model_at_end: bool
    early_stopping_patience: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    max_grad_norm: float
    optim: str
    loraplus_lr_ratio: float
    fast: str
    gradient_checkpointing: str
    logging_steps: int
    save_strategy: str
    save_steps: int
    save_total_limit: Optional[int]
    report_to: str
    allow_shorter: bool
    resume: bool
    merge_adapter: bool
    json: bool
