"""What the report's page says: its title, whether the run made the model better, facts, settings, next steps."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Optional

from lora_practice.compat import LIBRARIES
from lora_practice.console.text import text
from lora_practice.machine.gpus import WHEELS
from lora_practice.report.checks import FolderVerdict
from lora_practice.report.loss_curve import FEWEST, CurveVerdict, smoothed
from lora_practice.report.points import held_out_points, intervals, logged_points
from lora_practice.run.settings import shown_settings

SHELL = re.compile(r"[&|<>^%;$`!\"\r\n]")  # what a shell does not take as a part of a word
OUR_SCRIPT = Path(__file__).resolve().parents[2] / "fine_tuning_practice.py"

SAME = 0.01  # a loss that changes by less than this share is the same


@dataclass(frozen=True)
class Headline:
    """Whether it got better: `measure` went from `before` to `after` on `subject`.

    tone: "good", "bad" or "neutral"; judgement: the same in words; detail: what was measured, and how.
    """

    subject: str
    measure: str
    before: str
    after: str
    tone: str
    judgement: str
    detail: str


@dataclass(frozen=True)
class SettingRow:
    """One setting of the run with the line of why; `changed`: it is not the default."""

    name: str
    value: Any
    changed: bool
    why: str


def title(record: Mapping[str, Any]) -> str:
    """What was taught to which model: "SmolLM2-135M fine-tuned on orders.jsonl (240 rows)"."""
    model, data = record.get("model") or {}, record.get("data") or {}
    base = str(model.get("hub_id") or model.get("name") or "?").rstrip("/").rpartition("/")[2]
    rows = data.get("rows_trained")
    zh, en = (f"（{rows:,} 行）", f" ({rows:,} rows)") if isinstance(rows, int) else ("", "")
    name = data_name(record)
    return text(f"用 {name}{zh}微调 {base}", f"{base} fine-tuned on {name}{en}")


def data_name(record: Mapping[str, Any]) -> str:
    """The data set's short name: a file's own name, or the Hub's with its subset."""
    data = record.get("data") or {}
    name = str(data.get("name") or "?").partition("==")[0]
    if data.get("kind") == "hub":
        older = (record.get("settings") or {}).get("dataset_name")  # a record that does not tell the subset
        subset = data.get("subset", older)
        return f"{name.rpartition('/')[2]}/{subset}" if subset else name.rpartition("/")[2]
    return PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name


def headline(record: Mapping[str, Any]) -> Optional[Headline]:
    """Whether the model got better on rows that it never saw; without a validation set, how the training went."""
    held_out = held_out_points(record)
    if len(held_out) < 2:
        return _training_headline(record)
    ends = record.get("held_out_loss") or {}
    before, after = float(ends.get("before", held_out[0][1])), float(ends.get("after", held_out[-1][1]))
    rows = (record.get("data") or {}).get("rows_held_out")
    detail = [text(f"验证集 {rows} 行，从不参与训练", f"{rows} validation rows, never trained on")]
    detail.append(f"loss {before:.3f} → {after:.3f}")
    kept = record.get("best_step")
    if kept and kept != record.get("steps"):
        zh, en = f"留下的是第 {kept} 步的适配器（loss 最低）", f"the adapter kept is that of step {kept}, the lowest"
        detail.append(text(zh, en))
    measure, shown = _perplexity_or_loss(before, after)
    tone, judgement = _tone(before, after, of_perplexity=measure != "loss")
    joined = text("；", "; ").join(detail)
    return Headline(text("没见过的对话", "unseen conversations"), measure, *shown, tone, judgement, joined)


def _training_headline(record: Mapping[str, Any]) -> Optional[Headline]:
    losses = logged_points(record, "loss")
    if not losses:
        return None
    values = [loss for _, loss in losses]
    if len(values) >= FEWEST:
        values = smoothed(values, [last - first for first, last in intervals(losses)])
    unknown = text(
        "没有验证集，不知道没见过的对话有没有变好：下次加 --eval_subset_size 40",
        "there is no validation set, so nobody knows about unseen conversations: next time add --eval_subset_size 40",
    )
    rose = not values[-1] <= 1.1 * values[0]  # NaN too
    return Headline(
        text("训练用的对话", "the rows trained on"),
        text("训练 loss", "training loss"),
        f"{values[0]:.2f}",
        f"{values[-1]:.2f}",
        "bad" if rose else "neutral",
        text("不降反升", "it rose") if rose else "",
        unknown,
    )


def _perplexity_or_loss(before: float, after: float) -> tuple[str, tuple[str, str]]:
    """The measure and its two values; the loss where a perplexity would be astronomical."""
    if not (before < 12 and after < 12):  # NaN too
        return "loss", (f"{before:.2f}", f"{after:.2f}")
    return text("困惑度", "perplexity"), (_perplexity(before), _perplexity(after))


def _perplexity(loss: float) -> str:
    value = math.exp(loss)
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _tone(before: float, after: float, of_perplexity: bool) -> tuple[str, str]:
    if not (math.isfinite(before) and math.isfinite(after)):
        return "bad", text("训练失败", "it failed")
    if abs(after - before) <= SAME * before:
        return "neutral", text("几乎没变", "hardly changed")
    change = math.expm1(after - before) if of_perplexity else after / before - 1
    share = f"{abs(change):.0%}" if abs(change) < 10 else f"{abs(change) + 1:,.0f}×"
    if after < before:
        return "good", text(f"变好了，低了 {share}", f"better: {share} lower")
    return "bad", text(f"变差了，高了 {share}", f"worse: {share} higher")


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of how long it took and what it needed."""
    losses = logged_points(record, "loss")
    rows = [(text("步数", "steps"), f"{record.get('steps', losses[-1][0] if losses else 0):,}")]
    if "seconds" in record:
        rows.insert(0, (text("用时", "time"), duration(float(record["seconds"]))))
    if "tokens_per_second" in record:
        rows.append(
            (text("速度", "speed"), text("{:,.0f} token/秒", "{:,.0f} tokens/s").format(record["tokens_per_second"]))
        )
    if "peak_memory_mb" in record:
        rows.append((text("内存峰值", "peak memory"), f"{record['peak_memory_mb']:,.0f} MB"))
    return rows


def duration(seconds: float) -> str:
    """A time as people say it: "61 s", "45 min", "2 h 5 min"."""
    if seconds < 120:
        return text(f"{seconds:.0f} 秒", f"{seconds:.0f} s")
    minutes = round(seconds / 60)
    if minutes < 120:
        return text(f"{minutes} 分钟", f"{minutes} min")
    hours, minutes = divmod(minutes, 60)
    return text(f"{hours} 小时 {minutes} 分", f"{hours} h {minutes} min")


def settings_rows(record: Mapping[str, Any], reasons: Mapping[str, tuple[Any, str]]) -> list[SettingRow]:
    """The settings that shaped the result, in their order; `reasons`: name -> (default, why)."""
    rows = []
    for name, value in shown_settings(record).items():
        default, why = reasons.get(name, (value, ""))
        rows.append(SettingRow(name, value, value != default, why))
    return rows


def first_row_parts(record: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The first row as (text, whether it is trained); in the record the trained parts stand in 〔〕."""
    row = str((record.get("data") or {}).get("first_row") or "")
    parts = re.split("[〔〕]", row)
    if "".join(re.findall("[〔〕]", row)) != "〔〕" * (len(parts) // 2):  # brackets of the data's own: show it as it is
        return [(row, False)]
    return [(part, bool(number % 2)) for number, part in enumerate(parts) if part]


def lost_rows(record: Mapping[str, Any]) -> int:
    """Rows that were cut, left out or skipped."""
    data = record.get("data") or {}
    return sum(int(count) for key in ("rows_lost", "bad_rows_skipped") for count in (data.get(key) or {}).values())


def next_steps(verdict: FolderVerdict, curve: CurveVerdict) -> list[tuple[str, str]]:
    """(what for, command) of what can be done with this folder now; another training first where it would help."""
    record, place = verdict.record, shlex.quote(str(verdict.folder))
    steps = _more_training(verdict, curve)
    if verdict.uses["inference"].possible:
        talk = text("和它聊天（/adapter off 换成底座回答）", "talk to it (/adapter off lets the base answer)")
        steps.append((talk, f"lora-practice chat {place}"))
        if not record.get("samples"):
            ask = text("让底座和微调后的模型各答几个问题，写进这份报告", "let base and adapter answer, for this report")
            steps.append((ask, f"lora-practice report {place} --answers"))
        if verdict.config:
            own = text("用自己的问题比较底座和微调后的模型", "compare base and adapter with a question of your own")
            steps.append((own, f'lora-practice compare {place} --prompt "…"'))
            export = text("导出给 Ollama、llama.cpp", "export it for Ollama and llama.cpp")
            steps.append((export, f"lora-practice export {place}"))
    if verdict.uses["sharing"].possible:
        share = text("上传到 Hugging Face Hub，分享给别人", "share it on the Hugging Face Hub")
        steps.append((share, f"lora-practice upload --local_dir {place} --repo_id …"))
    return steps


def _more_training(verdict: FolderVerdict, curve: CurveVerdict) -> list[tuple[str, str]]:
    """The training that the curve asks for, into a folder of its own, or the rest of an interrupted one."""
    record, settings = verdict.record, verdict.record.get("settings") or {}
    command = training_command(record)
    if verdict.uses["resuming"].possible:
        again = command or f"lora-practice train --output_dir {shlex.quote(str(verdict.folder))}"
        return [(text("接着训练", "go on training"), f"{again} --resume")]
    if record.get("status") != "finished" or not command:
        return []
    again = f"{command} --output_dir {shlex.quote(f'{verdict.folder}-2')}"
    rate, epochs, steps = (settings.get(key) for key in ("learning_rate", "num_train_epochs", "max_steps"))
    if curve.kind in ("diverges", "broken") and rate:
        lower = text("用三分之一的学习率重新训练", "train again with a third of the learning rate")
        return [(lower, f"{again} --learning_rate {rate / 3:.1g}")]
    if curve.kind in ("falling", "unchanged", "unread") and epochs:
        longer = text("训练两倍的时间，看看会不会更好", "train twice as long, and see whether it gets better")
        flag = f"--max_steps {2 * steps}" if steps and steps > 0 else f"--num_train_epochs {2 * epochs:g}"
        return [(longer, f"{again} {flag}")]
    if curve.kind == "overfits" and curve.step:
        return [(text("在过拟合之前停下", "stop before it overfits"), f"{again} --max_steps {curve.step}")]
    return []


def training_command(record: Mapping[str, Any]) -> str:
    """The command that trained this run, "" where the record has none that this project writes.

    A record may be a stranger's, and this is a line to copy into a shell: it starts our training and nothing else,
    in cmd.exe too, which knows no single quotes.
    """
    try:
        words = shlex.split(str(record.get("command") or ""))
    except ValueError:  # a quote that does not end
        return ""
    if any(SHELL.search(word) for word in words):
        return ""
    script = re.split(r"[\\/]", words[1])[-1] if len(words) > 1 and words[0] == "python" else ""
    if script == OUR_SCRIPT.name:
        is_ours = Path(words[1]).resolve() == OUR_SCRIPT
        return shlex.join(["python", words[1] if is_ours else script, *words[2:]])
    return shlex.join(words) if words[:2] == ["lora-practice", "train"] else ""


def install_command(versions: Mapping[str, Any]) -> str:
    """The pip command for these versions of the libraries that a run depends on; what else a record names is left out.

    PyPI has no "+cpu": such a torch comes from an index of its own.
    """
    numbers = {name: str(versions.get(name)).partition("+")[0] for name in LIBRARIES}
    named = [f"{name}=={number}" for name, number in numbers.items() if re.fullmatch(r"\d[\w.]*", number)]
    build = str(versions.get("torch")).partition("+")[2]
    index = [f"--extra-index-url {WHEELS}{build}"] if re.fullmatch(r"cpu|cu\d+", build) else []
    return " ".join(["pip install", *named, *index])
