"""Settings that no run can have: the words after `fine_tuning_practice.py`, and a part of the English complaint."""

from __future__ import annotations

NUMBERS = {  # flag: values that it refuses
    "--learning_rate": ("nan", "inf", "-inf", "0", "-1e-4", "2", "1e9", "1e999", "fast", "", "0x1p-3", "１e-４x"),
    "--max_length": ("0", "-5", "7", "512.5", "1e3", "nan", "None", "''", str(10**9), "9" * 30),
    "--lora_r": ("0", "-1", "six", "6.0", "nan", "六", str(10**6)),
    "--lora_alpha": ("0", "-8", "nan", str(10**9)),
    "--lora_dropout": ("1", "-0.1", "nan", "50%", "0,05"),
    "--num_train_epochs": ("0", "-1", "nan", "inf", "1e9", "once"),
    "--max_steps": ("-2", "1.5", "nan", "all", str(10**12)),
    "--train_subset_size": ("-1", "all", "nan", str(10**12)),
    "--eval_subset_size": ("-1", "10%", str(10**12)),
    "--per_device_train_batch_size": ("0", "-1", "auto", str(10**7)),
    "--gradient_accumulation_steps": ("0", "-8", str(10**7)),
    "--seed": ("-1", str(2**32), "1e3"),
    "--max_grad_norm": ("0", "-1", "nan", "inf", "1e30"),
    "--warmup_ratio": ("-0.1", "1", "nan"),
    "--logging_steps": ("1.5", "-1", "9" * 30),
    "--save_steps": ("0", "-1", "9" * 30),
    "--save_total_limit": ("0", "-3", "9" * 30),
}
WORDS = {  # flag: words that it refuses
    "--optim": ("adam", "ADAMW", "\x1b[2J", ""),
    "--lr_scheduler_type": ("cosin", "polynomial"),
    "--save_strategy": ("always", "step"),
    "--report_to": ("mlflow", "all"),
    "--fast": ("yes-please", "2"),
    "--gradient_checkpointing": ("maybe",),
    "--embedded": ("maybe", "2"),
    "--bf16": ("fp16",),
}
BAD_SETTINGS = [
    ((f"{flag}={value}",), flag) for table in (NUMBERS, WORDS) for flag, values in table.items() for value in values
]
BAD_SETTINGS += [
    (("--learning_rate",), "--learning_rate"),
    (("--no_such_setting", "1"), "--no_such_setting"),
    (("--lora-rank=8",), "did you mean"),
    (("--overwrite", "--resume", "--output_dir", "nowhere"), "contradict"),
    (("--resume", "--output_dir", "nowhere"), "no run to resume"),
    (("--output_dir", "n" * 300), "name too long"),
    (("--output_dir", "~nobody-of-this-name/x"), "--output_dir"),
    (("data.jsonl",), "unexpected argument 'data.jsonl'"),
    (("--=3",), "--"),
]
SEEN_LATER = [((f"--eval_subset_size={10**12}",), "--eval_subset_size")]  # when the data is known
