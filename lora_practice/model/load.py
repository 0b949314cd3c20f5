"""Loads the base model, to train it or to put an adapter on it, and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from lora_practice.console.errors import NOT_LIBRARY_FAILURES, UserError, reason_of
from lora_practice.console.text import tell, text
from lora_practice.machine.device import Machine, fits_in_fp32
from lora_practice.sources.find import Source, find_template

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # precision -> its name in torch


def load_tokenizer(base: Source, template: str = "", template_is_meant: bool = False) -> Any:
    """The base model's tokenizer, with a chat template, a pad token, and the template's end of turn as eos.

    Args:
        template: folder, .jinja file or Hub name whose template is borrowed where the base has none.
        template_is_meant: the user named the template, so it replaces the base's own.

    Raises:
        UserError: there is no template, it uses special tokens that this tokenizer does not have, or the tokenizer
            cannot be used.
    """
    from transformers import AutoTokenizer

    from lora_practice.data.chat_template import token_ids_of

    tokenizer = _from_folder(AutoTokenizer, base.path, text("分词器", "tokenizer"))
    if template and (template_is_meant or tokenizer.chat_template is None):
        _take_template(tokenizer, find_template(template))
    if tokenizer.chat_template is None:
        raise UserError(
            text("这个模型没有聊天模板", "this model has no chat template"),
            where=base.name,
            fix="--chat_template_path HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(text("聊天模板不止一个", "the chat template is not one text"), where=base.name)
    _check_template_tokens(tokenizer)
    _end_turns_with_template(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    token_ids_of(tokenizer, "Hello", base.name)  # some broken tokenizers load and then fail on any text
    return tokenizer


def load_base(base: Source, dtype: str, **quantization: Any) -> Any:
    """The base model in `dtype` ("fp32", "fp16", "bf16", or "stored": as its files have it), from safetensors only.

    `quantization`: keyword arguments of `quantization.four_bit`, for a base in 4 bits.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = "auto" if dtype == "stored" else torch_dtype(dtype)  # "auto" is transformers' own word
    options = {"dtype": wanted, "use_safetensors": True, "local_files_only": True, **quantization}
    thing = text("模型", "model")
    model, found = _from_folder(AutoModelForCausalLM, base.path, thing, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:  # transformers initialises them at random
        zh, en = f"缺 {len(missing)} 个张量，如 {missing[0]}", f"{len(missing)} tensors missing, such as {missing[0]}"
        raise _unloadable(thing, text(zh, en), base.path)
    return model


def check_vocabulary(model: Any, tokenizer: Any, where: str) -> None:
    """UserError if the tokenizer has ids without an embedding in the model."""
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(
            text(
                f"分词器与模型不配：token 编号到 {largest}，模型只有 {rows} 行",
                f"the tokenizer is not this model's: its ids reach {largest}, the model has {rows} rows",
            ),
            where=where,
            fix=text("用模型自己的分词器文件", "use the tokenizer files that came with the model"),
        )


def weights_dtype(machine: Machine, base: Source, fast: str) -> str:
    """The dtype to load a base's weights in: fp32 where it fits, else the machine's half precision (a small GPU).

    The fast path keeps its residual stream in fp32, so with --bf16 on a CPU its weights are bf16.
    """
    if machine.device == "cpu":
        return "bf16" if machine.precision == "bf16" and fast != "off" else "fp32"
    return "fp32" if fits_in_fp32(stored_bytes(base.path), machine.facts.gpu_memory) else machine.precision


def torch_dtype(precision: str) -> torch.dtype:
    """The torch dtype of "fp32", "fp16" or "bf16"."""
    import torch

    return getattr(torch, DTYPES[precision])


def stored_bytes(folder: Optional[Path]) -> int:
    """Bytes of the .safetensors files in a model's folder; 0 for None or if there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def _from_folder(loader: Any, folder: Optional[Path], thing: str, **options: Any) -> Any:
    """`loader.from_pretrained` on a folder; never runs Python code from it."""
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except NOT_LIBRARY_FAILURES:
        raise
    except BaseException as error:  # a damaged file makes transformers and tokenizers raise nearly anything
        raise _unloadable(thing, reason_of(error), folder) from error


def _unloadable(thing: str, reason: str, folder: Optional[Path]) -> UserError:
    return UserError(
        text(f"{thing}读不了：{reason}", f"the {thing} cannot be loaded: {reason}"),
        where=str(folder),
        fix=text("文件可能损坏或不完整，重新下载", "a file may be damaged or missing: fetch it again"),
    )


def _take_template(tokenizer: Any, template: Path) -> None:
    if template.is_file():
        try:
            tokenizer.chat_template = template.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(text("聊天模板不是 UTF-8", "the chat template is not UTF-8"), str(template)) from error
        return
    from transformers import AutoTokenizer

    other = _from_folder(AutoTokenizer, template, text("聊天模板", "chat template"))
    if other.chat_template is None:
        raise UserError(text("这里没有聊天模板", "there is no chat template here"), where=str(template))
    tokenizer.chat_template = other.chat_template


def _check_template_tokens(tokenizer: Any) -> None:
    """UserError if the template has a mark such as <|im_start|> that is no token: it would be split into letters."""
    marks = set(re.findall(r"<\|[^|<>\s]+\|>", tokenizer.chat_template))
    vocabulary = tokenizer.get_vocab()
    missing = sorted(mark for mark in marks if mark not in vocabulary)
    if missing:
        raise UserError(
            text(
                f"聊天模板用了分词器没有的标记 {missing}",
                f"the chat template uses marks the tokenizer lacks: {missing}",
            ),
            fix=text("换一个与模型相配的 --chat_template_path", "choose a --chat_template_path that fits the model"),
        )


def _end_turns_with_template(tokenizer: Any) -> None:
    """Make the template's end-of-turn mark the eos token, where generation stops; a base's own eos often differs."""
    from lora_practice.data.chat_template import end_of_turn

    mark = end_of_turn(tokenizer)
    if mark is None:
        tell(text("注意：聊天模板没有结束标记，回答可能停不下来", "note: the template ends answers with no mark"))
    elif mark != tokenizer.eos_token:
        tokenizer.eos_token = mark
