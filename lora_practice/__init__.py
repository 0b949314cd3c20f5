"""LoRA fine-tuning for a laptop CPU or an old card, one room per thing. Start at fine_tuning_practice.py."""

__version__ = "0.1.0"
