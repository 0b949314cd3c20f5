"""Why a card cannot be used, and the command that fixes it: pure functions of the facts that `read_facts` found."""

from __future__ import annotations

from dataclasses import dataclass

from lora_practice.console.text import text
from lora_practice.machine import gpus
from lora_practice.machine.facts import Facts


@dataclass(frozen=True)
class MachineProblem:
    """A problem in one sentence, and its fix: a command, advice, or nothing."""

    what: str
    cure: str = ""


def gpu_problem(facts: Facts) -> MachineProblem | None:
    """Why the card cannot be used, with the fix; None if it can. No card at all is a problem without a fix."""
    if not facts.gpu:
        return _no_card(facts)
    line = ""
    if facts.capability:
        line = gpus.pip_line(facts.capability, _driver(facts), facts.torch, facts.python)
        if facts.capability < (5, 0):
            zh = f"{facts.gpu}（{sm_name(facts)}）太老：torch 2.6 起不再包含它的内核"
            return MachineProblem(
                text(zh, f"{facts.gpu} ({sm_name(facts)}) is too old: no torch since 2.6 has kernels for it")
            )
    if not facts.cuda_usable or not facts.capability:
        return _unusable(facts, line)
    if not facts.kernels or gpus.runs_on(facts.capability, facts.kernels):
        return None
    name, built_for = f"{facts.gpu} ({sm_name(facts)})", ", ".join(facts.kernels)
    what = text(
        f"已安装的 torch 不含 {facts.gpu}（{sm_name(facts)}）的内核（只有 {'、'.join(facts.kernels)}）",
        f"the installed torch has no kernels for {name}, only for {built_for}",
    )
    return MachineProblem(what, line or _other_driver(facts))


def _no_card(facts: Facts) -> MachineProblem:
    if facts.card_on_bus:
        reason = f"（{facts.driver_trouble}）" if facts.driver_trouble else ""
        reason_en = f" ({facts.driver_trouble})" if facts.driver_trouble else ""
        return MachineProblem(
            text(
                f"有 NVIDIA 显卡，但驱动没有安装或没有启动{reason}",
                f"an NVIDIA card without a working driver{reason_en}",
            ),
            text(
                "安装 NVIDIA 驱动（GTX 10xx 及更老的卡最高用 580 版）后重启；容器里用 docker run --gpus all",
                "install NVIDIA's driver (580 at most for GTX 10xx and older), then restart; in a container: "
                "docker run --gpus all",
            ),
        )
    if facts.driver_trouble:
        zh, en = f"驱动看不到显卡（{facts.driver_trouble}）", f"the driver sees no card ({facts.driver_trouble})"
        return MachineProblem(text(zh, en), text("重启，或重新安装驱动", "restart, or install the driver again"))
    return MachineProblem(text("没有可用的 NVIDIA 显卡", "no usable NVIDIA card"))


def _unusable(facts: Facts, line: str) -> MachineProblem:
    """The problem of a card that the driver names but torch cannot use."""
    if facts.card_hidden:
        what = text(f"CUDA_VISIBLE_DEVICES 屏蔽了 {facts.gpu}", f"CUDA_VISIBLE_DEVICES hides {facts.gpu}")
        return MachineProblem(what, "unset CUDA_VISIBLE_DEVICES")
    if facts.torch and not facts.cuda:
        zh, en = "已安装的 torch 是 CPU 版，用不了", "the installed torch is a CPU build: no"
        what = text(f"{zh} {facts.gpu}", f"{en} {facts.gpu}")
        return MachineProblem(what, line or _other_driver(facts))
    least = gpus.oldest_driver(facts.cuda, facts.capability or (0, 0))
    if facts.cuda and (_driver(facts) or least) < least:
        return MachineProblem(
            text(
                f"驱动 {facts.driver} 太旧：CUDA {facts.cuda} 的 torch 要 {least} 以上",
                f"driver {facts.driver} is too old: a torch for CUDA {facts.cuda} needs {least} or newer",
            ),
            line or _other_driver(facts),
        )
    zh, en = f"{facts.gpu} 不能用（驱动与 torch 不匹配）", f"{facts.gpu} cannot be used (driver or torch)"
    return MachineProblem(
        text(zh, en), facts.driver_trouble or text("重启，或重新安装驱动", "restart, or install the driver again")
    )


def _other_driver(facts: Facts) -> str:
    """The driver and the torch to install where no torch supports this card with the present driver."""
    if not facts.capability:
        return text("更新 NVIDIA 驱动", "update NVIDIA's driver")
    newest = gpus.pip_line(facts.capability, None, facts.torch, facts.python)
    if not newest:
        return ""
    old = facts.capability < (7, 5)
    need = text("安装 580 版", "install version 580 of") if old else text("更新", "update")
    return text(f"{need} NVIDIA 驱动，再 {newest}", f"{need} NVIDIA's driver, then {newest}")


def sm_name(facts: Facts) -> str:
    """The name of kernels for this card, like "sm_61"."""
    return "sm_" + "".join(map(str, facts.capability or "?"))


def _driver(facts: Facts) -> int | None:
    return gpus.release(facts.driver + ".0")[0] or None
