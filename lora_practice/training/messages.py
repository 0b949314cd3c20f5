"""The messages that a training prints: its events and errors, phrased in both languages."""

from __future__ import annotations

import functools

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.machine.memory import available_memory
from lora_practice.model.loss import perplexity
from lora_practice.run.folder import step_of
from lora_practice.training import events
from lora_practice.training.memory_fit import ComputeConfig, DoesNotFit
from lora_practice.training.nan_check import StepNumbers, Symptom, symptom


@functools.singledispatch
def phrase(event: object) -> str:
    """One line that tells an event."""
    raise TypeError(f"no message for {event!r}")


@phrase.register(events.MemoryFallback)
def _(event: events.MemoryFallback) -> str:
    before, now = portion(event.planned, event.fast), portion(event.config, event.fast)
    return text(
        f"内存放不下{before}：改为{now}（训练的行和步数不变）",
        f"no memory for {before}: now {now} (the same rows and steps)",
    )


@phrase.register(events.MaxLengthLowered)
def _(event: events.MaxLengthLowered) -> str:
    return text("内存放不下最长的一行", "no memory for the longest row") + f": max_length {event.max_length}"


@phrase.register(events.StepInSmallerPortions)
def _(event: events.StepInSmallerPortions) -> str:
    now = portion(event.config, event.fast)
    return text(
        f"第 {event.step} 步内存不够：重新计算这一步，{now}（训练的行和步数不变）",
        f"step {event.step}: out of memory; computed again, {now} (the same rows and steps)",
    )


@phrase.register(events.StepUpcast)
def _(event: events.StepUpcast) -> str:
    what = bad_numbers(event.numbers, event.tries, event.precision)
    return text(
        f"第 {event.step} 步：{what}；退回这一步之前，改用 fp32 继续",
        f"step {event.step}: {what}; back to the state before it, and on in fp32",
    )


@phrase.register(events.Resuming)
def _(event: events.Resuming) -> str:
    return text(f"从 {event.checkpoint} 继续", f"going on from {event.checkpoint}")


@phrase.register(events.StoppedEarly)
def _(event: events.StoppedEarly) -> str:
    return text(
        f"验证损失连续 {event.evaluations} 次没有降低，提前停止",
        f"the validation loss has not fallen in {event.evaluations} measurements: stopping early",
    )


@phrase.register(events.BestAdapterMissing)
def _(event: events.BestAdapterMissing) -> str:
    return text(
        f"{event.file} 不见了：使用最后一步的适配器", f"{event.file} is gone: the adapter of the last step is taken"
    )


@phrase.register(events.HeldOutMeasured)
def _(event: events.HeldOutMeasured) -> str:
    first, last = perplexity(event.before), perplexity(event.after)
    line = text(
        f"验证损失：{event.before:.3f} → {event.after:.3f}，困惑度 {first:.2f} → {last:.2f}",
        f"validation loss: {event.before:.3f} -> {event.after:.3f}, perplexity {first:.2f} -> {last:.2f}",
    )
    if not event.best_step:
        return line
    return line + text(
        f"，使用第 {event.best_step} 步的适配器（验证损失最低）", f"; the adapter of step {event.best_step}, the lowest"
    )


def portion(config: ComputeConfig, fast: bool) -> str:
    """A compute config in a few words: what is computed at once, and whether checkpointing is on."""
    at_once = text(f"一次 {config.rows} 行", f"{config.rows} row(s) at once")
    if fast:
        at_once = text(f"一次最多 {config.tokens} token", f"{config.tokens} tokens at once")
    checkpointing = text("，打开 gradient_checkpointing", ", gradient_checkpointing on")
    return at_once + (checkpointing if config.checkpointing else "")


def bad_numbers(numbers: StepNumbers, tries: int, precision: str) -> str:
    """What is wrong with the numbers of a step, in a few words."""
    found = symptom(numbers)
    if found is Symptom.LOSS_NOT_FINITE:
        return text(f"loss 是 {numbers.loss}", f"the loss is {numbers.loss}")
    if found is Symptom.LOSS_ZERO:
        return text("loss 正好是 0", "the loss is exactly 0")
    if found is Symptom.GRADIENT_ZERO:
        return text("梯度全是 0", "every gradient is 0")
    if found is Symptom.SCALE_COLLAPSED:
        return text(f"loss scale 降到 {numbers.scale:g}", f"the loss scale fell to {numbers.scale:g}")
    times = text(f"（连续 {tries} 次）", f" ({tries} times in a row)") if tries > 1 else ""
    return text(f"{precision} 的梯度中有 NaN 或无穷大{times}", f"a gradient in {precision} is not finite{times}")


def row_does_not_fit(error: DoesNotFit) -> UserError:
    """The user's error for data whose longest row does not fit into memory."""
    flags = [] if error.may_checkpoint else ["--gradient_checkpointing auto"]
    flags += [f"--max_length {error.max_length}"] if error.max_length else []
    free = available_memory() / 1e6
    return UserError(
        text(
            f"内存不够：一行 {error.longest} token 也放不下（还能用 {free:.0f} MB）",
            f"not enough memory: not even one row of {error.longest} tokens fits ({free:.0f} MB can be taken)",
        ),
        fix=text("关掉别的程序，或 ", "close other programs, or ")
        + (text(" 或 ", " or ").join(flags) or text("换一个更小的模型", "choose a smaller model")),
    )


def step_failed(error: events.StepFailed) -> UserError:
    """The user's error for a step that could not be computed."""
    kept = text("还没学到值得保存的东西", "nothing was learnt yet that is worth keeping")
    if error.checkpoint is not None:
        at = step_of(error.checkpoint)
        kept = text(f"第 {at} 步的状态在 {error.checkpoint}", f"the state after step {at} is in {error.checkpoint}")
    if isinstance(error, events.NumbersNotSound):
        what = bad_numbers(error.numbers, 1, "fp32")
        rate, row = f"--learning_rate {error.learning_rate:g}", f"{error.longest_row!r}"
        return UserError(
            text(f"第 {error.step} 步：{what}，用的已经是 fp32", f"step {error.step}: {what}, though in fp32"),
            where=str(error.folder),
            fix=text(
                f"多半是学习率太大（{rate}），或这一步的数据有问题（{row}）；",
                f"most likely {rate} is too large, or a row of this step is odd ({row}); ",
            )
            + kept,
        )
    return UserError(
        text(
            f"第 {error.step} 步内存不够，已经没有更省内存的办法",
            f"step {error.step}: out of memory, and nothing is left to shrink",
        ),
        where=str(error.folder),
        fix=text("关掉别的程序，再加 --resume 继续；", "close other programs, then go on with --resume; ") + kept,
    )


def not_served(reason: str) -> str:
    """The line for a model that the fast path does not serve."""
    return text(f"快速路径不支持：{reason}", f"not served by the fast path: {reason}")


def uses_plain_path(why: str) -> str:
    """The line for a run that takes the plain path; `why` is `not_served`."""
    return text(f"{why}，改用普通路径", f"{why}; taking the plain path")
