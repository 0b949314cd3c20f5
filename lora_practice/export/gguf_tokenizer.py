"""Writes a byte-level BPE tokenizer as GGUF fields; one that llama.cpp would split in another way is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_WORD_PATTERN = (  # of Qwen2 and Llama 3, but for the number of digits in a piece
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# {steps that split a text into words: llama.cpp's name for them ("tokenizer.ggml.pre")}
SPLITS = {
    (("digits",), ("bytes", True)): "smollm",
    (("bytes", True),): "gpt-2",
    (("split", _WORD_PATTERN % ""), ("bytes", False)): "qwen2",
    (("split", _WORD_PATTERN % "{1,3}"), ("bytes", False)): "llama-bpe",
}


def split_name(folder: Path) -> str:
    """llama.cpp's name for how the tokenizer in `folder` splits a text into words.

    Raises:
        UserError: llama.cpp does not know this way.
    """
    return _split_name(_read(folder), folder)


def token_fields(folder: Path, tokenizer: Any, rows: int, stop_ids: list[int]) -> dict[str, Any]:
    """All "tokenizer.*" fields of the tokenizer in `folder`.

    Args:
        tokenizer: the same tokenizer, loaded.
        rows: of the embedding; ids above the vocabulary become unused tokens, since llama.cpp wants one for each row.
        stop_ids: ids that end an answer; the first that is not eos becomes "eot".

    Raises:
        UserError: see `split_name`.
    """
    whole = _read(folder)
    name = _split_name(whole, folder)
    vocab: dict[str, int] = whole["model"]["vocab"]
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for token, number in vocab.items():
        tokens[number], types[number] = token, NORMAL
    for one in whole.get("added_tokens") or []:
        tokens[one["id"]], types[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    pairs = whole["model"]["merges"]
    eos = tokenizer.eos_token_id
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.eot_token_id": next((one for one in stop_ids if one != eos), eos),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": adds_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    if tokenizer.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    return fields


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "tokenizer.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(text("没有 tokenizer.json", "there is no tokenizer.json"), folder) from error


def _split_name(whole: dict[str, Any], folder: Path) -> str:
    model = whole["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = str(model.get("type"))
        raise _refused(text(f"分词器是 {kind}，不是字节级 BPE", f"{kind} is no byte-level BPE"), folder)
    name = SPLITS.get(tuple(_steps(whole.get("pre_tokenizer"))), "")
    normal = (whole.get("normalizer") or {}).get("type")
    wanted_normal = "NFC" if name == "qwen2" else None
    if not name or normal != wanted_normal or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _refused(text("不认识它的分词方式", "its way of splitting words is unknown here"), folder)
    return name


def _steps(pre: Any) -> list[tuple[Any, ...]]:
    """The steps of a pre_tokenizer in tokenizer.json, as the keys of SPLITS have them."""
    if not pre:
        return []
    if pre["type"] == "Sequence":
        return [step for one in pre["pretokenizers"] for step in _steps(one)]
    if pre["type"] == "Digits" and pre.get("individual_digits"):
        return [("digits",)]
    if pre["type"] == "ByteLevel" and not pre.get("add_prefix_space"):
        return [("bytes", pre.get("use_regex", True))]
    if pre["type"] == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [("split", pre["pattern"].get("Regex"))]
    return [(pre["type"],)]


def _refused(reason: str, folder: Path) -> UserError:
    return no_gguf(reason, folder / "tokenizer.json")


def no_gguf(reason: str, file: Path) -> UserError:
    """The error for a model whose `file` says that it cannot be written as GGUF."""
    return UserError(
        text(f"写不成 GGUF：{reason}", f"no GGUF can be made: {reason}"),
        where=str(file),
        fix=text("用 lora-practice merge 的结果，或 llama.cpp 的转换程序", "use merged/, or llama.cpp's converter"),
    )
