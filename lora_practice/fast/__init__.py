"""LoRA training without autograd, for a CPU or an old card: same loss, same gradients, less work.

Reading order: plan (what is computed), noise (dropout as a function), ops (the small pieces), attention, products,
space (memory used again), linear (LoRA inside one matrix product), loss, layer (forward and backward of a decoder
layer), weights (from a PEFT model to layers), native (optional compiled pieces), engine (the step); and for
generation decode_weights, decode_native, decode. Imports torch only.
"""

from __future__ import annotations

from lora_practice.fast.engine import Engine, build
from lora_practice.fast.weights import NotServed

__all__ = ["Engine", "NotServed", "build"]
