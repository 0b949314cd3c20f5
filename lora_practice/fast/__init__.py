"""LoRA training without autograd on a CPU or an older GPU: the same loss and gradients as PEFT, with less work.

Reading order, for training:

    step_plan        micro-batches of one optimizer step, with shared prefixes
    dropout          dropout masks as a function of seed, step, LoRA module, row and column
    matmul           the two matmuls of a linear layer
    buffers          row buffers that every pass reuses
    attention_tiles  attention blocks as padded tiles
    attention        attention of packed rows, forward and backward
    ops              the operations between the matmuls, in torch
    lora_linear      linears with LoRA as one matmul
    loss             output head and cross-entropy
    layer            forward and backward of one decoder layer
    weights          a PEFT model read into layers
    kernels/         optional compiled versions of ops: build (compiler), native (Python side), *.cpp
    engine           the whole step

For generation: decode/weights, decode/decoder (also the specification, in torch), decode/native with
kernels/decode.cpp. This wing imports torch only.
"""

from __future__ import annotations

from lora_practice.fast.engine import Engine, build
from lora_practice.fast.weights import NotServed

__all__ = ["Engine", "NotServed", "build"]
