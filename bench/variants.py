"""The compared variants. Each trains the same LoRA on the same examples in the same order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to train. `engine` None: plain TRL; otherwise options of `fast.build`."""

    name: str
    dtype: str  # "fp32", "bf16" or "fp16": TRL's autocast flag, or the engine's compute dtype
    engine: dict | None = None
    checkpointing: bool = False
    batch: int = 1  # examples per micro-batch; batch x accumulation is the same for all


CPU_VARIANTS = [
    Variant("TRL, reference settings", "fp32", checkpointing=True),
    Variant("TRL tuned, fp32", "fp32", batch=8),
    Variant("TRL tuned, bf16", "bf16", batch=8),
    Variant("ours, fp32", "fp32", {}),
    Variant("ours, bf16", "bf16", {}),
    Variant("ours, fp32, no sharing", "fp32", {"share_prefix": False}),
    Variant("ours, bf16, no sharing", "bf16", {"share_prefix": False}),
    Variant("ours, fp32, torch only", "fp32", {"kernels": False}),
    Variant("ours, bf16, torch only", "bf16", {"kernels": False}),
]

# On a GPU: fp16 with loss scaling, which every NVIDIA GPU since Pascal supports; never bf16, never Triton.
GPU_VARIANTS = [
    Variant("TRL, reference settings", "fp16", checkpointing=True),
    Variant("TRL tuned, fp32", "fp32", batch=8),
    Variant("TRL tuned, fp16", "fp16", batch=8),
    Variant("ours, fp16", "fp16", {}),
    Variant("ours, fp16, no sharing", "fp16", {"share_prefix": False}),
    Variant("ours, fp32", "fp32", {}),
]

# Name of a way to generate -> `how` of bench.generation.generator.
GENERATION = {
    "generate, unmerged PEFT model, fp32": "generate",
    "ours, compiled 16-bit kernels": "kernels",
    "ours, torch only": "torch",
}
