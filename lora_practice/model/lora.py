"""Adds LoRA to a base model: settings -> PEFT's `LoraConfig` -> a model whose trained weights are fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.model import pissa
from lora_practice.model.pissa import changes_base
from lora_practice.model.settings import LoraSettings
from lora_practice.sources.find import Source

if TYPE_CHECKING:
    import torch


def check_lora_settings(settings: LoraSettings) -> None:
    """Check combinations of settings before anything is loaded.

    Raises:
        UserError: two settings exclude each other, or bitsandbytes is not installed.
    """
    start, leave_one_out = settings.init_lora_weights, text("两个去掉一个", "leave one of the two out")
    if changes_base(settings) and settings.use_dora:  # PEFT's conversion would lose DoRA's magnitudes
        raise UserError(
            text(
                f"{start} 和 DoRA 不能一起用：存不成普通的 LoRA", f"{start} with DoRA cannot be saved as a plain LoRA"
            ),
            where="--use_dora",
            fix=leave_one_out,
        )
    if settings.load_in_4bit and changes_base(settings):
        raise UserError(
            text(f"{start} 要 fp32 的权重", f"{start} needs weights in fp32"),
            where="--load_in_4bit",
            fix=leave_one_out,
        )
    if settings.load_in_4bit:
        compat.check_installed("bitsandbytes", "--load_in_4bit")


def add_lora(model: Any, settings: LoraSettings, base: Source) -> Any:
    """The PEFT model of `model` with LoRA or one of its variants; LoRA weights are fp32 whatever the base's dtype.

    W x + (alpha / r) B A x, with A (r, in) and B (out, r), B zero at first (Hu et al. 2021, arXiv 2106.09685).

    Raises:
        UserError: packing is on and the model's attention cannot mask the parts of a row from each other (only "sdpa"
            takes such a mask); max_length exceeds the model's positions; or see `lora_config_arguments`.
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
    model.config.use_cache = False  # training does not use the key-value cache
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base.name if base.kind == "hub" else str(base.path)
    keep_trained_in_fp32(adapted)
    pissa.remember_start(adapted)
    return adapted


def keep_trained_in_fp32(adapted: Any) -> None:
    """Cast trainable LoRA weights to fp32, without changing a value, and say so.

    In half precision small updates round away, and fp16's loss scaler refuses such tensors.

    Raises:
        UserError: another tensor is trainable and not fp32; its owner must decide about its dtype.
    """
    import torch

    half = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    for name, parameter in half:
        dtype = str(parameter.dtype).replace("torch.", "")
        if "lora_" not in name or not parameter.is_floating_point():
            raise UserError(
                text(f"要训练的 {name} 是 {dtype}，不是 fp32", f"{name} is to be trained but is {dtype}, not fp32"),
                fix=text("训练前转成 float32，或不训练它", "make it float32 first, or do not train it"),
            )
        parameter.data = parameter.data.float()
    if half:
        name, count = half[0][0], len(half)
        tell(text(f"{count} 个 LoRA 张量转成了 fp32，如 {name}", f"{count} LoRA tensors put into fp32, such as {name}"))


class LinearLayer(NamedTuple):
    """A layer that can get LoRA: the last part of its name, its weight, and whether it is GPT-2's Conv1D."""

    name: str
    weight: torch.Tensor
    is_conv1d: bool


def lora_config_arguments(model: Any, settings: LoraSettings) -> dict[str, Any]:
    """Keyword arguments for `peft.LoraConfig`: target modules, variant and initialisation.

    Raises:
        UserError: a target module that the model does not have; an initialisation that needs a smaller rank, weights in
            fp32, or other layers.
    """
    layers = _linear_layers(model)
    names = _target_names(settings.target_modules, sorted({layer.name for layer in layers}))
    if changes_base(settings):
        _check_initialisation(settings, [layer for layer in layers if layer.name in names])
    return {
        "target_modules": settings.target_modules if settings.target_modules == "all-linear" else names,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights if changes_base(settings) else True,
    }


def _linear_layers(model: Any) -> list[LinearLayer]:
    """The layers that PEFT's "all-linear" stands for: every linear layer but the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        LinearLayer(name.rpartition(".")[2], module.weight, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]


def _target_names(wanted: str, known: list[str]) -> list[str]:
    """The layer names that --target_modules asks for; UserError if the model has no such layer."""
    names = known if wanted == "all-linear" else [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            text(f"模型里没有可以加 LoRA 的层 {unknown[0]!r}", f"the model has no layer {unknown[0]!r} for LoRA"),
            where=f"--target_modules {wanted}",
            fix=", ".join(known),
        )
    return names


def _check_initialisation(settings: LoraSettings, layers: list[LinearLayer]) -> None:
    """Check that PiSSA or OLoRA can take a part out of these layers' weights; UserError if not."""
    import torch

    start = settings.init_lora_weights
    if any(layer.is_conv1d for layer in layers):
        raise UserError(
            text(f"{start} 不支持这个模型的层（Conv1D）", f"{start} does not know this model's layers (Conv1D)"),
            where=f"--init_lora_weights {start}",
            fix=text("去掉它", "leave it out"),
        )
    if any(layer.weight.dtype != torch.float32 for layer in layers):  # what is taken out would be rounded away
        or_bf16 = text("，或去掉 --bf16", ", or --bf16") if settings.bf16 else ""
        raise UserError(
            text(f"{start} 要 fp32 的权重", f"{start} needs weights in fp32"),
            where=f"--init_lora_weights {start}",
            fix=text("去掉它", "leave it out") + or_bf16,
        )
    largest_rank = min(min(layer.weight.shape) for layer in layers)
    if settings.lora_r > largest_rank:
        raise UserError(
            text(
                f"{start} 的秩最多 {largest_rank}（最小的层）",
                f"{start} takes a rank of {largest_rank} at most: the smallest layer",
            ),
            where=f"--lora_r {settings.lora_r}",
            fix=f"--lora_r {largest_rank}",
        )
    if start == "pissa":
        zh = f"先对 {len(layers)} 个矩阵做 SVD，慢机器上要一两分钟；pissa_niter_4 快几倍"
        en = f"an SVD of {len(layers)} matrices first: a minute or two on a slow machine; pissa_niter_4 is faster"
        tell(text(zh, en))
