"""The machine page that `lora-practice doctor` prints, for a person or as JSON."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_practice.console.errors import EXIT_USER_ERROR
from lora_practice.console.terminal import PAGE_COLUMNS, columns, wrap
from lora_practice.console.text import counted, text, visible
from lora_practice.machine.device import Machine, choose_device
from lora_practice.machine.doctor.diagnosis import NOTE, STOP, Finding, diagnose, gigabytes
from lora_practice.machine.doctor.surroundings import Hub, Need, Place, PlannedRun, Surroundings, read_surroundings
from lora_practice.machine.facts import Facts, read_facts
from lora_practice.machine.gpu_problems import sm_name

LABEL_COLUMNS = 12  # at the left of the page
Row = tuple[str, str]


@dataclass(frozen=True)
class MachineReport:
    """Everything that was found on a machine and what follows; `machine` is the decision without any flag."""

    machine: Machine
    around: Surroundings
    findings: list[Finding]

    @property
    def can_train(self) -> bool:
        """Whether training works here, even if slowly."""
        return not any(one.level == STOP for one in self.findings)

    @property
    def next_command(self) -> str:
        """The command to run next; empty if training does not work here.

        `chat` where a run is finished already. Otherwise `train`, with the embedded model where the Hub's is neither
        on this disk nor within reach.
        """
        if self.around.finished and self.can_train:
            return f"lora-practice chat {shlex.quote(self.around.output.path)}"
        served = self.around.hub.reachable or all(need.here for need in self.around.wanted)
        command = "lora-practice train" + ("" if served else " --embedded")
        return command if self.can_train else ""


def examine_machine(plan: PlannedRun) -> MachineReport:
    """Read this machine's facts and surroundings, and diagnose them."""
    facts = read_facts(driver_too=True, measure=True)
    around = read_surroundings(plan, facts)
    return MachineReport(choose_device(facts), around, diagnose(facts, around))


def print_machine_page(plan: PlannedRun, as_json: bool) -> int:
    """Print the machine page. Returns the exit code: 0 if training works here, 2 if not."""
    report = examine_machine(plan)
    print(
        json.dumps(report_as_json(report), ensure_ascii=False, indent=2) if as_json else visible(machine_page(report))
    )
    return 0 if report.can_train else EXIT_USER_ERROR


def report_as_json(report: MachineReport) -> dict[str, Any]:
    """The report for `--json`. Memory and disks in bytes, downloads in megabytes; unknown values are null or empty."""
    machine = report.machine
    return {
        "can_train": report.can_train,
        "next_command": report.next_command,
        "decision": {name: getattr(machine, name) for name in ("device", "precision", "reason", "advice")},
        "findings": [dataclasses.asdict(one) for one in report.findings],
        "machine": dataclasses.asdict(machine.facts),
        "surroundings": dataclasses.asdict(report.around),
    }


def machine_page(report: MachineReport) -> str:
    """The page: what is here, the findings, the conclusion last. Within PAGE_COLUMNS but for commands and paths."""
    facts, around, lines = report.machine.facts, report.around, []
    for label, words in (*_machine(facts, around), *_disks(around), *_network(around)):
        first, *more = wrap(words, PAGE_COLUMNS - LABEL_COLUMNS)
        lines.append(label + " " * (LABEL_COLUMNS - columns(label)) + first)
        lines += [" " * LABEL_COLUMNS + line for line in more]
    if report.findings:
        lines += ["", text("注意事项", "What to know")]
    for finding in report.findings:
        mark = "-" if finding.level == NOTE else "!"
        first, *more = wrap(finding.what, PAGE_COLUMNS - 4)
        lines += [f"  {mark} {first}", *(f"    {line}" for line in more)]
        if finding.cure:
            lines += [f"    {line}" for line in wrap(f"{text('→', '->')} {finding.cure}", PAGE_COLUMNS - 4)]
    return "\n".join([*lines, "", *_conclusion(report)])


def _machine(facts: Facts, around: Surroundings) -> Iterator[Row]:
    sets = text("指令集未知", "instruction sets unknown")
    if facts.instructions is not None:
        sets = " ".join(facts.instructions) or text("没有 AVX2", "no AVX2")
    cores = text(f"{facts.cores} 核", counted(facts.cores, "core"))
    yield "CPU", f"{facts.cpu or '?'}{text('，', ', ')}{cores}{text('；', '; ')}{sets}"
    left, total = gigabytes(facts.memory), gigabytes(facts.memory_total)
    limit = text("（容器的限制）", " (the container's limit)") if facts.memory_limit else ""
    limit = text("（ulimit -v 的限制）", " (ulimit -v)") if 0 < facts.memory_ulimit <= facts.memory else limit
    yield text("内存", "memory"), text(f"{left} 可用，共 {total}{limit}", f"{left} free of {total}{limit}")
    yield text("显卡", "card"), _card(facts)
    yield text("编译器", "compiler"), around.compiler or text("没有", "none")
    build = f"CUDA {facts.cuda}" if facts.cuda else text("CPU 版", "CPU build")
    torch = f"torch {facts.torch} ({build})" if facts.torch else text("torch 未安装好", "no working torch")
    others = [f"{name} {around.versions.get(name) or '?'}" for name in ("transformers", "trl", "peft")]
    yield text("软件", "software"), ", ".join([f"Python {'.'.join(map(str, facts.python))}", torch, *others])


def _card(facts: Facts) -> str:
    if not facts.gpu:
        if facts.card_on_bus:
            return text("有一张 NVIDIA 卡，没有驱动", "an NVIDIA card without a driver")
        return text("没有检测到 NVIDIA 显卡", "no NVIDIA card is seen")
    parts = [facts.gpu, sm_name(facts) if facts.capability else text("计算能力未知", "compute capability unknown")]
    parts += [gigabytes(facts.gpu_memory)] if facts.gpu_memory else []
    parts.append(text(f"驱动 {facts.driver or '未知'}", f"driver {facts.driver or 'unknown'}"))
    if facts.kernels:
        parts.append(text("torch 有内核：", "kernels in torch: ") + " ".join(facts.kernels))
    return text("，", ", ").join(parts)


def _disks(around: Surroundings) -> Iterator[Row]:
    yield text("输出", "output"), _place(around.output)
    yield text("内置缓存", "cache"), _place(around.cache)
    yield text("Hub 缓存", "Hub cache"), _place(around.hub_cache)
    yield text("数据集缓存", "data cache"), _place(around.datasets_cache)


def _place(place: Place) -> str:
    held = ("" if place.whole else text("至少 ", "at least ")) + f"{place.size / 1e6:.0f} MB"
    free = gigabytes(place.free)
    closed = "" if place.writable else text("，不可写", ", not writable")
    return text(
        f"{place.path}（已用 {held}，磁盘剩 {free}{closed}）", f"{place.path} ({held} used, {free} free{closed})"
    )


def _network(around: Surroundings) -> Iterator[Row]:
    hub = around.hub
    state = text("可以连接", "reachable") if hub.reachable else text("无法连接", "not reachable")
    state = text("按 HF_HUB_OFFLINE 不连接", "not asked (HF_HUB_OFFLINE)") if hub.offline_wanted else state
    yield "Hub", f"{hub.endpoint}{text('，', ', ')}{state}"
    yield "token", _token(hub)
    yield text("默认需要", "default"), _needs(around.wanted)
    yield text("内置需要", "embedded"), _needs(around.embedded)


def _token(hub: Hub) -> str:
    words = {
        "none": text("没有（下载公开的模型不需要）", "none (public models need none)"),
        "unchecked": text("有，未能核对", "present, not checked"),
        "refused": text("有，但 Hub 不接受", "present, refused by the Hub"),
        "read": text("有，只读", "present, read-only"),
        "write": text("有，可写", "present, may write"),
        "fineGrained": text("有，细粒度，部分仓库可写", "present, fine-grained, may write in places"),
    }
    scope = words.get(hub.token, hub.token)
    return f"{scope}{text('，', ', ')}{hub.user}" if hub.user else scope


def _needs(needs: tuple[Need, ...]) -> str:
    return text("；", "; ").join(f"{need.name} {_need(need)}" for need in needs)


def _need(need: Need) -> str:
    if need.here:
        return text("已在本机", "is here")
    if need.megabytes is None:
        return text("要下载，大小未知", "to be fetched, size unknown")
    size = f"{need.megabytes:.1f}" if need.megabytes < 10 else f"{need.megabytes:.0f}"
    return text(f"要下载 {size} MB", f"to be fetched, {size} MB")


def _conclusion(report: MachineReport) -> list[str]:
    machine = report.machine
    if not report.can_train:
        return [text("现在还不能训练：请先解决上面第一条带 ! 的问题。", "No training yet: mend the first ! above.")]
    facts, findings = machine.facts, report.findings
    why = machine.reason
    if machine.device == "cpu":
        shown_above = any(one.what in why for one in findings)
        why = text("显卡用不了，见上", "the card cannot be used, see above") if shown_above else why
        plain = facts.instructions is not None and not facts.cpu_bf16
        why += text("；CPU 没有 bf16 指令", "; the CPU has no bf16 instructions") if plain else ""
        why = f"CPU{text('，', ', ')}{machine.precision}{text('：', ': ')}{why}"
    sentence = text(f"训练会用 {why}", f"Training will use {why}")
    cures = [one.cure for one in findings if one.cure]
    # the card's fix stands among the findings already
    advice = [line for line in machine.advice.splitlines() if not any(cure in line for cure in cures)]
    lines = [line for words in (sentence, *advice) for line in wrap(words, PAGE_COLUMNS)]
    there = text("已经有训练好的结果，", "a run is finished already; ") if report.around.finished else ""
    return [*lines, there + text("下一步：", "next:"), f"  {report.next_command}"]
