"""Compares base and adapter, or two adapters: answers side by side as they are generated, losses on unseen rows."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import columns
from lora_practice.console.text import tell, text, visible
from lora_practice.data import held_out
from lora_practice.data.conversations import Conversation
from lora_practice.inference import load as load_chat
from lora_practice.inference.chat_model import ChatModel, without_adapter
from lora_practice.inference.samples import (
    SAMPLE_PROMPTS,
    SAMPLE_TOKENS,
    cut_note,
    print_answer,
    sample_questions,
    system_messages,
)
from lora_practice.machine.device import Machine
from lora_practice.model import loss as model_loss
from lora_practice.storage.json_files import read_record

LEAST_COLUMNS = 80  # in a narrower terminal, answers stand under each other


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared.

    Attributes:
        key: its name for programs: "base", "fine-tuned", or the folder as the user wrote it.
        heading: its name for people, in their language.
        folder: the output folder that it was loaded from.
        is_base: the adapter in `folder` is turned off.
    """

    key: str
    heading: str
    folder: str
    chat_model: ChatModel
    is_base: bool = False


def two_sides(folder: str, other: Optional[str], machine: Machine) -> tuple[Side, Side]:
    """The base and the adapter in `folder`, or the adapters in `folder` and `other`.

    Adapters of one base share its weights in memory.

    Raises:
        UserError: `other` is `folder`, or one of them cannot be loaded.
    """
    if other is None:
        adapted = load_chat.load_chat_model(folder, machine, keep_base=True)
        base = without_adapter(adapted)
        return (
            Side("base", text("底座", "base"), folder, base, is_base=True),
            Side("fine-tuned", text("微调后", "fine-tuned"), folder, adapted),
        )
    if Path(folder).resolve() == Path(other).resolve():
        raise UserError(text("两个文件夹是同一个", "both folders are the same one"), other)
    bases: dict[Path, Any] = {}
    first = load_chat.load_chat_model(folder, machine, keep_base=True, shared_bases=bases)
    second = load_chat.load_chat_model(other, machine, keep_base=True, shared_bases=bases)
    return Side(folder, folder, folder, first), Side(other, other, other, second)


def answers(
    sides: Sequence[Side], prompts: Sequence[str], system: str = "", quiet: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Ask every side every prompt, and print the answers as they come unless `quiet`.

    Args:
        options: for `ChatModel.answer`.

    Returns:
        {"prompt", "answers": {key of a side: its answer}} for each prompt.
    """
    found = []
    for prompt in prompts:
        messages = [*system_messages(system), {"role": "user", "content": prompt}]
        if quiet:
            answered = {side.key: side.chat_model.answer(messages, **options) for side in sides}
        elif sys.stdout.isatty() and shutil.get_terminal_size().columns >= LEAST_COLUMNS:
            answered = _in_columns(sides, prompt, messages, options)
        else:
            answered = _stacked(sides, prompt, messages, options)
        found.append({"prompt": prompt, "answers": answered})
    return found


def in_turn(streams: Mapping[str, Iterator[str]]) -> Iterator[dict[str, str]]:
    """Draw a piece from each stream in turn, until all have ended.

    Yields:
        {key: text so far}, at first empty, then after each piece.
    """
    texts = dict.fromkeys(streams, "")
    running = dict(streams)
    yield texts
    while running:
        for key, stream in list(running.items()):
            piece = next(stream, None)
            if piece is None:
                del running[key]
                continue
            texts = {**texts, key: texts[key] + piece}
            yield texts


def samples(folder: str, machine: Machine) -> list[dict[str, Any]]:
    """Answers of base and adapter to the questions of `sample_questions`, as `--run_inference` records them."""
    base, adapted = two_sides(folder, None, machine)
    record = read_record(Path(folder)) or {}
    rows: Sequence[Conversation] = ()
    if (record.get("data") or {}).get("rows_held_out"):
        try:
            rows = held_out.prepare_again(record, adapted.chat_model.tokenizer, folder).held_out_conversations
        except UserError as error:
            tell(text("不用验证集提问：", "no validation questions are asked: ") + str(error))
    found = []
    for question in sample_questions(rows):
        messages = [dict(message) for message in question.messages]
        from_base, from_adapter = (
            side.chat_model.answer(messages, max_new_tokens=SAMPLE_TOKENS) for side in (base, adapted)
        )
        cut = [key for key, side in (("base", base), ("adapter", adapted)) if side.chat_model.cut_at]
        found.append(question.as_sample(from_base, from_adapter, cut))
    return found


def losses(sides: Sequence[Side], folder: str, other: Optional[str]) -> dict[str, Any]:
    """Mean loss of each side on the rows of the validation set of the run in `folder`.

    Returns:
        {"rows": how many, "loss": {key of a side: nats per token}}

    Raises:
        UserError: the run has no validation set, or `other` may have been trained on them.
    """
    record = read_record(Path(folder)) or {}
    tokenizer = next(side for side in sides if side.folder == folder).chat_model.tokenizer
    rows = held_out.held_out_rows(record, tokenizer, folder)
    if other is not None:
        other_data = (read_record(Path(other)) or {}).get("data") or {}
        if other_data.get("fingerprint") != record["data"].get("fingerprint"):
            what = text(
                "它是用别的数据训练的，验证集里的对话它可能见过",
                "it was trained on other rows, and may have seen the validation rows",
            )
            raise UserError(what, other)
    return {"rows": len(rows), "loss": {side.key: _loss(side, rows) for side in sides}}


def _loss(side: Side, rows: Sequence[Any]) -> float:
    model = side.chat_model.model
    model = model.float() if model.device.type == "cpu" else model
    with model.disable_adapter() if side.is_base else contextlib.nullcontext():
        return model_loss.mean_loss(model, rows)


def compare_folders(
    folder: str, other: Optional[str], machine: Machine, prompts: Sequence[str], as_json: bool, **options: Any
) -> None:
    """The command `compare`: prints answers, then losses, or a line that says why there are no losses."""
    sides = two_sides(folder, other, machine)
    result: dict[str, Any] = {"answers": answers(sides, prompts or SAMPLE_PROMPTS, quiet=as_json, **options)}
    try:
        result["held_out"] = losses(sides, folder, other)
    except UserError as error:
        tell(text("没有比较验证集上的损失：", "validation losses are not compared: ") + str(error))
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    elif "held_out" in result:
        rows, loss_of = result["held_out"]["rows"], result["held_out"]["loss"]
        listed = text("，", ", ").join(f"{side.heading} {loss_of[side.key]:.3f}" for side in sides)
        print(
            text(
                f"验证集（训练时没见过的 {rows} 段对话）上的损失，越低越好：{listed}",
                f"loss on {rows} validation rows (lower is better): {listed}",
            )
        )


def _stacked(
    sides: Sequence[Side], prompt: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> dict[str, str]:
    print(f"> {visible(prompt)}")
    answered = {}
    for side in sides:
        heading = f"[{visible(side.heading)}] "
        print(heading, end="", flush=True)
        answered[side.key] = print_answer(side.chat_model, messages, columns(heading), **options)
    print(flush=True)
    return answered


def _in_columns(
    sides: Sequence[Side], prompt: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> dict[str, str]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(texts: Mapping[str, str], has_ended: bool = False) -> Table:
        shown = Table(title=Text(f"> {visible(prompt)}"), title_justify="left", expand=True, title_style="bold")
        cells = []
        for side in sides:
            shown.add_column(Text(visible(side.heading)), ratio=1, overflow="fold")
            cell = Text(visible(texts[side.key]))
            note = cut_note(side.chat_model) if has_ended else ""
            cells.append(cell.append(f"\n{note}" if note else "", style="dim"))
        shown.add_row(*cells)
        return shown

    texts: dict[str, str] = {}
    with Live(console=Console(highlight=False), refresh_per_second=12) as live:
        for texts in in_turn({side.key: side.chat_model.stream(messages, **options) for side in sides}):
            live.update(table(texts))
        live.update(table(texts, has_ended=True))
    return texts
