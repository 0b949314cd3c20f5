"""Base and adapter, or two adapters, side by side: their answers as they are written, and their loss on unseen rows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import columns
from lora_practice.console.text import tell, text, visible
from lora_practice.data import held_out
from lora_practice.inference import load as load_chat
from lora_practice.inference.chat_model import ChatModel, without_adapter
from lora_practice.inference.samples import SAMPLE_PROMPTS, SAMPLE_TOKENS, cut, say, system_messages
from lora_practice.machine.device import Machine
from lora_practice.model import loss as model_loss
from lora_practice.run.folder import read_record

NARROW = 80  # columns; below, answers stand under each other


def two_sides(folder: str, other: Optional[str], machine: Machine) -> dict[str, ChatModel]:
    """What is compared, by name: the base and the adapter in `folder`, or the adapters in both folders."""
    shelf: dict[Path, Any] = {}  # of a base that both were trained on there is one copy
    talker = load_chat.load_chat_model(folder, machine, keep_base=True, shelf=None if other is None else shelf)
    if other is None:
        return {text("底座", "base"): without_adapter(talker), text("微调后", "fine-tuned"): talker}
    if Path(folder).resolve() == Path(other).resolve():
        raise UserError(text("两个文件夹是同一个", "both folders are the same one"), other)
    return {folder: talker, other: load_chat.load_chat_model(other, machine, keep_base=True, shelf=shelf)}


def answers(
    sides: Mapping[str, ChatModel], prompts: Sequence[str], system: str = "", quiet: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Ask everyone every prompt, and show the answers as they come unless `quiet`.

    Returns:
        One {"prompt", "answers": {name: words}} each.
    """
    found = []
    for prompt in prompts:
        messages = [*system_messages(system), {"role": "user", "content": prompt}]
        if quiet:
            said = {name: talker.answer(messages, **options) for name, talker in sides.items()}
        elif sys.stdout.isatty() and shutil.get_terminal_size().columns >= NARROW:
            said = _in_columns(sides, prompt, messages, options)
        else:
            said = _stacked(sides, prompt, messages, options)
        found.append({"prompt": prompt, "answers": said})
    return found


def in_turn(streams: Mapping[str, Iterator[str]]) -> Iterator[dict[str, str]]:
    """What each has said so far, by name, whenever one of them has said more: a piece of each, in turn."""
    said = dict.fromkeys(streams, "")
    left = dict(streams)
    yield said
    while left:
        for name, stream in list(left.items()):
            piece = next(stream, None)
            if piece is None:
                del left[name]
                continue
            said = {**said, name: said[name] + piece}
            yield said


def samples(folder: str, machine: Machine) -> list[dict[str, str]]:
    """The four sample prompts answered by base and adapter, as `--run_inference` records them."""
    base, adapted = two_sides(folder, None, machine).values()
    names = {"base": base, "adapter": adapted}
    found = answers(names, SAMPLE_PROMPTS, quiet=True, max_new_tokens=SAMPLE_TOKENS)
    return [{"prompt": one["prompt"], **one["answers"]} for one in found]


def losses(sides: Mapping[str, ChatModel], folder: str, other: Optional[str]) -> dict[str, Any]:
    """{"rows", "loss": {name: nats per token}} on the rows that the run in `folder` held out.

    Raises:
        UserError: there are none, or `other` may have been trained on them.
    """
    record = read_record(Path(folder)) or {}
    talkers = list(sides.values())
    rows = held_out.held_out_rows(record, talkers[-1 if other is None else 0].tokenizer, folder)
    if other is not None:
        theirs = (read_record(Path(other)) or {}).get("data") or {}
        if theirs.get("fingerprint") != record["data"].get("fingerprint"):
            zh, en = (
                "它训练用的行不同，可能见过这些留出的行",
                "it was trained on other rows, and may have seen the held-out ones",
            )
            raise UserError(text(zh, en), other)
    found = {}
    for name, talker in sides.items():
        model = talker.model.float() if talker.model.device.type == "cpu" else talker.model
        if other is None and talker is talkers[0]:
            with model.disable_adapter():
                found[name] = model_loss.mean_loss(model, rows)
        else:
            found[name] = model_loss.mean_loss(model, rows)
    return {"rows": len(rows), "loss": found}


def compare_folders(
    folder: str, other: Optional[str], machine: Machine, prompts: Sequence[str], as_json: bool, **options: Any
) -> None:
    """The verb: answers, then losses; what cannot be compared is said in a line."""
    sides = two_sides(folder, other, machine)
    result: dict[str, Any] = {"answers": answers(sides, prompts or SAMPLE_PROMPTS, quiet=as_json, **options)}
    try:
        result["held_out"] = losses(sides, folder, other)
    except UserError as error:
        tell(text("没有比较留出数据的损失：", "held-out losses are not compared: ") + str(error))
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    elif "held_out" in result:
        rows, each = result["held_out"]["rows"], result["held_out"]["loss"]
        listed = text("，", ", ").join(f"{name} {loss:.3f}" for name, loss in each.items())
        print(text(f"留出的 {rows} 行的损失：{listed}", f"loss on {rows} held-out rows: {listed}"))


def _stacked(
    sides: Mapping[str, ChatModel], prompt: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> dict[str, str]:
    print(f"> {visible(prompt)}")
    said = {}
    for name, talker in sides.items():
        heading = f"[{visible(name)}] "
        print(heading, end="", flush=True)
        said[name] = say(talker, messages, columns(heading), **options)
    print(flush=True)
    return said


def _in_columns(
    sides: Mapping[str, ChatModel], prompt: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> dict[str, str]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(said: Mapping[str, str], marks: Mapping[str, str]) -> Table:
        shown = Table(title=Text(f"> {visible(prompt)}"), title_justify="left", expand=True, title_style="bold")
        for name in said:
            shown.add_column(Text(visible(name)), ratio=1, overflow="fold")
        cells = [Text(visible(words)) for words in said.values()]
        for cell, mark in zip(cells, marks.values()):
            cell.append(f"\n{mark}" if mark else "", style="dim")
        shown.add_row(*cells)
        return shown

    said: dict[str, str] = {}
    with Live(console=Console(highlight=False), refresh_per_second=12) as live:
        for said in in_turn({name: one.stream(messages, **options) for name, one in sides.items()}):
            live.update(table(said, {}))
        live.update(table(said, {name: cut(one) for name, one in sides.items()}))
    return said
