"""A byte-level BPE tokenizer as GGUF fields. One that llama.cpp would split otherwise is refused, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into words, step by step -> llama.cpp's name for it ("tokenizer.ggml.pre").
SPLITS = {
    (("digits",), ("bytes", True)): "smollm",
    (("bytes", True),): "gpt-2",
    (("split", _WORDS % ""), ("bytes", False)): "qwen2",
    (("split", _WORDS % "{1,3}"), ("bytes", False)): "llama-bpe",
}


def split_name(folder: Path) -> str:
    """llama.cpp's name for the way in which the tokenizer in `folder` cuts words.

    Raises:
        UserError: llama.cpp would cut them otherwise, or not at all.
    """
    return _split_name(_read(folder), folder)


def token_fields(folder: Path, tokenizer: Any, rows: int, stop_ids: list[int]) -> dict[str, Any]:
    """All "tokenizer.*" fields of the tokenizer in `folder`, which `tokenizer` is too.

    Args:
        rows: of the embedding; ids above the vocabulary become unused tokens, as llama.cpp wants one for each row.
        stop_ids: the ids that end an answer; the first that is not eos becomes "eot".

    Raises:
        UserError: see `split_name`.
    """
    whole = _read(folder)
    name = _split_name(whole, folder)
    vocab: dict[str, int] = whole["model"]["vocab"]
    words, kinds = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for word, number in vocab.items():
        words[number], kinds[number] = word, NORMAL
    for one in whole.get("added_tokens") or []:
        words[one["id"]], kinds[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    pairs = whole["model"]["merges"]
    eos = tokenizer.eos_token_id
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.eot_token_id": next((one for one in stop_ids if one != eos), eos),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": begins,
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
        raise _unknown(text("没有 tokenizer.json", "there is no tokenizer.json"), folder) from error


def _split_name(whole: dict[str, Any], folder: Path) -> str:
    model = whole["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = str(model.get("type"))
        raise _unknown(text(f"分词器是 {kind}，不是字节级 BPE", f"{kind} is no byte-level BPE"), folder)
    name = SPLITS.get(tuple(_steps(whole.get("pre_tokenizer"))), "")
    normal = (whole.get("normalizer") or {}).get("type")
    wanted_normal = "NFC" if name == "qwen2" else None
    if not name or normal != wanted_normal or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _unknown(text("不认识它切词的方式", "its way of cutting words is unknown here"), folder)
    return name


def _steps(pre: Any) -> list[tuple[Any, ...]]:
    """A pre_tokenizer of tokenizer.json as a list of steps that `SPLITS` can hold."""
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


def _unknown(why: str, folder: Path) -> UserError:
    return UserError(
        text(f"写不成 GGUF：{why}", f"no GGUF can be made: {why}"),
        where=str(folder / "tokenizer.json"),
        fix=text("用 lora-practice merge 的结果，或 llama.cpp 的转换程序", "use merged/, or llama.cpp's converter"),
    )
