"""Adds LoRA to a base model: PEFT's `LoraConfig` from our settings, trained weights in fp32."""

from __future__ import annotations

from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.model import pissa
from lora_practice.model.pissa import moves_base
from lora_practice.sources.find import Source


def add_lora(model: Any, settings: Any, base: Source) -> Any:
    """PEFT's LoRA, or one of its variants; the LoRA weights are fp32 whatever the base is.

    W x + (alpha / r) B A x, with A (r, in) and B (out, r), B zero at first (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: packing is asked for, and this model has only an attention that would let the parts of a row
            see each other ("sdpa" takes the mask of a packed row as it is); max_length is beyond its positions; or
            see `variants.options`.
    """
    if settings.packing and model.config._attn_implementation != "sdpa":
        raise UserError(
            text("这个模型的注意力隔不开拼在一行里的样本", "this model's attention cannot keep packed examples apart"),
            where="--packing",
            fix="--no_packing",
        )
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    if settings.max_length > positions:
        raise UserError(
            text(f"这个模型最多 {positions} 个 token", f"this model takes {positions} tokens at most"),
            where=f"--max_length {settings.max_length}",
            fix=f"--max_length {positions}",
        )
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)  # A is drawn here, before the trainer sets its seed
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        **lora_config_arguments(model, settings),
    )
    model.config.use_cache = False  # training never reads the key-value cache
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base.name if base.kind == "hub" else str(base.path)
    keep_trained_in_fp32(adapted)
    pissa.remember_start(adapted)
    return adapted


def keep_trained_in_fp32(adapted: Any) -> None:
    """Half-precision tensors cannot be trained: small updates round away, and fp16's scaler refuses them.

    Ours, the LoRA weights, are put into fp32 (no value changes by that) and named.

    Raises:
        UserError: another tensor is trainable and not fp32; what it is to be is its owner's decision.
    """
    import torch

    narrow = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    for name, parameter in narrow:
        dtype = str(parameter.dtype).replace("torch.", "")
        if "lora_" not in name or not parameter.is_floating_point():
            raise UserError(
                text(f"要训练的 {name} 是 {dtype}，不是 fp32", f"{name} is to be trained but is {dtype}, not fp32"),
                fix=text("训练前转成 float32，或不训练它", "make it float32 first, or do not train it"),
            )
        parameter.data = parameter.data.float()
    if narrow:
        name, count = narrow[0][0], len(narrow)
        tell(text(f"{count} 个 LoRA 张量转成了 fp32，如 {name}", f"{count} LoRA tensors put into fp32, such as {name}"))


def lora_config_arguments(model: Any, settings: Any) -> dict[str, Any]:
    """Of `peft.LoraConfig`, for this model.

    Raises:
        UserError: a layer that the model does not have; a start that needs smaller ranks, or weights in fp32.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, wanted, start = model.get_output_embeddings(), settings.target_modules, settings.init_lora_weights
    kinds = (torch.nn.Linear, Conv1D)  # what PEFT's "all-linear" means; GPT-2's layers are of the second kind
    linears = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if isinstance(m, kinds)]
    linears = [(name, module) for name, module in linears if module is not head]
    known = sorted({name for name, _ in linears})
    names = known if wanted == "all-linear" else [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            text(f"模型里没有可以加 LoRA 的层 {unknown[0]!r}", f"the model has no layer {unknown[0]!r} for LoRA"),
            where=f"--target_modules {wanted}",
            fix=", ".join(known),
        )
    if moves_base(settings):
        if any(name in names and isinstance(module, Conv1D) for name, module in linears):
            raise UserError(
                text(f"{start} 不认这个模型的层（Conv1D）", f"{start} does not know this model's layers (Conv1D)"),
                where=f"--init_lora_weights {start}",
                fix=text("去掉它", "leave it out"),
            )
        chosen = [module.weight for name, module in linears if name in names]
        if any(weight.dtype != torch.float32 for weight in chosen):  # else what is taken out is rounded away
            or_bf16 = text("，或去掉 --bf16", ", or --bf16") if settings.bf16 else ""
            raise UserError(
                text(f"{start} 要 fp32 的权重", f"{start} needs weights in fp32"),
                where=f"--init_lora_weights {start}",
                fix=text("去掉它", "leave it out") + or_bf16,
            )
        most = min(min(weight.shape) for weight in chosen)
        if settings.lora_r > most:
            raise UserError(
                text(
                    f"{start} 的秩最多 {most}（最小的层）",
                    f"{start} takes a rank of {most} at most: the smallest layer",
                ),
                where=f"--lora_r {settings.lora_r}",
                fix=f"--lora_r {most}",
            )
        if start == "pissa":
            zh = f"先对 {len(chosen)} 个矩阵做 SVD，慢机器上要一两分钟；pissa_niter_4 快几倍"
            en = f"an SVD of {len(chosen)} matrices first: a minute or two on a slow machine; pissa_niter_4 is faster"
            tell(text(zh, en))
    return {
        "target_modules": wanted if wanted == "all-linear" else names,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": start if moves_base(settings) else True,
    }
