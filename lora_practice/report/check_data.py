"""`lora-practice check-data`: prints what a run would read from a data file, and each thing that is wrong with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.text import Text

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import aligned, fit_to_terminal
from lora_practice.console.text import counted, text, visible
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import read_file
from lora_practice.data.row_view import Piece, row_pieces
from lora_practice.data.survey import LISTED, Problem, Survey, histogram, survey_file
from lora_practice.data.tokenization import Encoder, count_trained
from lora_practice.model import load as load_model
from lora_practice.sources import find


def print_survey(
    path: Path, model_name: str, template: str, max_length: int, show: Optional[int], as_json: bool
) -> int:
    """Print the survey of `path`, or with `show` one row as the model sees it, counted from 1.

    Returns: 0 if a run would take the file as it is, 1 if not.

    Raises:
        UserError: the file cannot be read, the model or template is not at hand, or there is no such row.
    """
    reader = read_file(path)  # a mistake in the path is told before any model is looked for
    base = find.find_model(model_name, False) if model_name else find.find_model("", True, want_embedded=True)
    tokenizer = load_model.load_tokenizer(base, template, bool(template))
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal  # a pipe gets each row in one line
    if show is not None:
        return _show(
            console, list(itertools.islice(reader, max(0, show - 1), show)), show, tokenizer, max_length, as_json
        )
    found = survey_file(path, tokenizer, max_length)
    if as_json:
        print(json.dumps(as_dict(found, max_length), ensure_ascii=False, indent=2))
    else:
        _print(console, found, max_length, base)
    return 0 if found.trainable else 1


def as_dict(found: Survey, max_length: int) -> dict[str, Any]:
    """The survey for a machine; `problems` holds the first LISTED of each kind, `counts` counts all."""
    return {
        "file": str(found.path),
        "encoding": found.encoding or None,
        "shapes": dict(found.shapes),
        "rows": found.good + found.counts["bad"],
        "rows_trained": found.rows_trained,
        "rows_with_system": found.with_system,
        "turns": {str(turns): rows for turns, rows in sorted(found.turns.items())},
        "tokens": found.tokens,
        "trained_tokens": found.trained_tokens,
        "max_length": max_length,
        "longest": max(found.lengths, default=0),
        "lengths": [{"from": low, "to": high, "rows": rows} for low, high, rows in histogram(found.lengths)],
        "counts": {kind: count for kind, count in found.counts.items() if count},
        "problems": [dataclasses.asdict(one) for one in found.problems],
        "warnings": [found.language] if found.language else [],
        "trainable": found.trainable,
    }


def _print(console: Console, found: Survey, max_length: int, base: find.Source) -> None:
    for line in aligned(_facts(found, base)):
        console.print(Text(line))
    bars = histogram(found.lengths)
    if bars:
        console.print(text("\n每行的长度（token）", "\nlengths of the rows, in tokens"))
        most, width = max(rows for _, _, rows in bars), len(f"{bars[-1][0]}-{bars[-1][1]}")
        for low, high, rows in bars:
            mark = text("  ← max_length", "  <- max_length") if low <= max_length <= high and len(bars) > 1 else ""
            bar = "█" * (-(-rows * 40 // most))
            console.print(f"{low}-{high}".rjust(width), f"[cyan]{bar}[/cyan]{' ' if bar else ''}{rows}{mark}")
    for kind, title in _titles().items():
        listed = [one for one in found.problems if one.kind == kind]
        if listed:
            count = text(f"（{found.counts[kind]}）", f" ({found.counts[kind]})")
            console.print(f"\n[{'red' if kind == 'bad' else 'yellow'}]{title}{count}[/]")
            for one in listed:
                console.print(Text(fit_to_terminal(f"  {_line(one)}", sys.stdout)))
            if found.counts[kind] > len(listed):
                more = found.counts[kind] - len(listed)
                console.print(
                    text(
                        f"  ……还有 {more} 行（只列前 {LISTED} 行）",
                        f"  ... and {more} more (the first {LISTED} are listed)",
                    )
                )
    if found.language:
        console.print(Text("\n" + fit_to_terminal(found.language, sys.stdout)))
    console.print(Text("\n" + _verdict(found)))


def _facts(found: Survey, base: find.Source) -> list[tuple[str, str]]:
    comma = text("，", ", ")
    shapes = comma.join(
        shape + (text(f"（{rows}）", f" ({rows})") if len(found.shapes) > 1 else "")
        for shape, rows in found.shapes.items()
    )
    bad = found.counts["bad"]
    rows = text(f"{found.good} 行可用", f"{found.good} usable") + (text(f"，{bad} 行坏", f", {bad} bad") if bad else "")
    kind = found.path.suffix.lower()[1:] + (f"{comma}{found.encoding}" if found.encoding else "")
    turns = comma.join(
        text(f"{n} 条：{rows} 行", f"{n} in {counted(rows, 'row')}") for n, rows in sorted(found.turns.items())[:4]
    )
    system = text(f"{found.with_system} 行有", f"in {counted(found.with_system, 'row')}")
    share = f"{found.trained_tokens / found.tokens:.0%}" if found.tokens else "0%"
    tokens = text(
        f"{found.tokens}，训练其中 {found.trained_tokens}（{share}）",
        f"{found.tokens}, {found.trained_tokens} of them trained ({share})",
    )
    return [
        (text("文件", "file"), visible(text(f"{found.path}（{kind}）", f"{found.path} ({kind})"))),
        (text("格式", "shape"), shapes or "-"),
        (text("行", "rows"), rows),
        (text("每行消息数", "messages"), (turns or "-") + (text("，……", ", ...") if len(found.turns) > 4 else "")),
        (text("系统提示", "system prompt"), system),
        ("token", tokens),
        (text("分词器", "tokenizer"), _tokenizer_name(base)),
    ]  # fmt: skip


def _tokenizer_name(base: find.Source) -> str:
    """Whose tokenizer counted; if it is the default, the flag that chooses another."""
    name = visible(base.name)
    if base.kind != "embedded":
        return name
    name = name.rpartition("/")[2]
    return text(f"{name}（内置；换一个用 --model_name）", f"{name} (embedded; another: --model_name)")


def _titles() -> dict[str, str]:
    return {
        "bad": text("坏行：训练会停在这里", "bad rows, where a run would stop"),
        "nothing": text("没有可训练的内容的行，会跳过", "rows with nothing to train on, left out"),
        "cut": text("会被截断的行", "rows that would be cut"),
        "rewritten": text("只训练最后一个回答的行", "rows that would train on their last answer only"),
        "duplicate": text("重复的行", "copies"),
    }


def _line(problem: Problem) -> str:
    return visible(f"{problem.origin}: {problem.what} {text('→', '->')} {problem.fix}")


def _verdict(found: Survey) -> str:
    if found.trainable:
        return text("可以训练。", "Ready to train.")
    if not found.rows_trained:
        return text("现在还不能训练：没有一行可训练。", "Not ready: there is not one row to train on.")
    bad = found.counts["bad"]
    return text(
        f"现在还不能训练：先改好 {bad} 行坏数据，或加 --skip_bad_rows。",
        f"Not ready: mend {counted(bad, 'bad row')}, or pass --skip_bad_rows.",
    )


def _show(console: Console, rows: list[Any], number: int, tokenizer: Any, max_length: int, as_json: bool) -> int:
    if not rows:
        raise UserError(text(f"没有第 {number} 行", f"there is no row {number}"), where="--show")
    (row,) = rows
    if isinstance(row, BadRow):
        raise UserError(row.reason, row.origin, row.fix)
    encoder = Encoder(tokenizer, max_length)
    examples = list(encoder.encode([row]))
    if not examples:
        raise UserError(text("这一行没有可训练的内容", "this row has nothing to train on"), row.origin)
    (example,) = examples
    parts = list(row_pieces(tokenizer, example))
    if as_json:
        listed = [dataclasses.asdict(piece) for piece in parts]
        print(json.dumps({"origin": row.origin, "pieces": listed}, ensure_ascii=False, indent=2))
        return 0
    colour = console.is_terminal and not console.no_color
    total, trained = len(example.input_ids), count_trained(example.labels)
    how = text("绿色", "in green") if colour else text("〔〕内", "in 〔 〕")
    zh = f"{row.origin}：{total} token，训练 {trained} 个（{how}），· 是 token 的分界"
    en = f"{row.origin}: {total} tokens, {trained} trained ({how}), · parts two tokens"
    console.print(Text(text(zh, en)))
    if any(piece.tokens > 1 for piece in parts):
        zh, en = (
            "（一个字可能由几个 token 组成，中间不画分界）",
            "(one character may be several tokens: no · within it)",
        )
        console.print(Text(text(zh, en)))
    console.print(_row_text(parts, colour))
    for line in encoder.lost.lines(max_length):
        console.print(Text(line))
    return 0


def _row_text(parts: list[Piece], colour: bool) -> Text:
    shown, inside = Text(), False
    for number, piece in enumerate(parts):
        if not colour and piece.trained != inside:
            shown.append("〔" if piece.trained else "〕")
        elif number and not shown.plain.endswith("\n"):
            shown.append("·", style="dim" if colour else "")
        inside = piece.trained
        shown.append(visible(piece.text).replace("\n", "⏎\n"), style="green" if colour and inside else "")
    return shown.append("〕") if inside and not colour else shown
