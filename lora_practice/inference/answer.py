"""Answers prompts, or chats: what `inference.py` and `lora-practice infer` do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from lora_practice.console.errors import UserError, entry_point
from lora_practice.console.settings import parse, setting
from lora_practice.console.text import text
from lora_practice.inference import chat
from lora_practice.inference.load import load_chat_model
from lora_practice.inference.samples import piped, print_answer, system_messages
from lora_practice.machine.device import choose_device
from lora_practice.machine.facts import read_facts
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.sources.environment import prepare_environment


@dataclass
class InferenceSettings:
    """All settings of an answer. Each field: default, why (zh), why (en), limits."""

    model_dir: str = setting(
        DEFAULT_OUTPUT_DIR,
        "训练结果、检查点或合并后的文件夹，或 Hub 上的名字",
        "output, checkpoint or merged folder, or a Hub name",
    )
    prompt: Optional[list[str]] = setting(
        None,
        "要问的问题，可以写多次；不写则进入聊天，或从管道读取，一行一问",
        "what to ask, repeatable; without it a chat, or the lines of a pipe",
    )
    base_model: str = setting(
        "",
        "底座和分词器的来源：文件夹里没有写明时使用",
        "where base and tokenizer come from if the folder does not say",
    )
    max_new_tokens: int = setting(
        128, "每个回答最多多少个 token", "most tokens in an answer", minimum=1, maximum=1_000_000
    )
    temperature: float = setting(
        0.0,
        "0 总是取最可能的词；越大越随机",
        "0 always takes the likeliest word; higher is more random",
        minimum=0,
        maximum=5,
    )
    top_p: float = setting(
        1.0,
        "temperature 大于 0 时，只在累计概率达到这个值的词里选",
        "with a temperature above 0: choose among words of this total probability",
        above=0,
        maximum=1,
    )
    device: str = setting("auto", "用什么设备计算", "where to compute", choices=("auto", "cpu", "cuda"))
    system: str = setting("", "系统提示词；留空则用模板自带的", "system prompt; empty leaves the template's own")
    seed: int = setting(
        42,
        "随机种子：temperature 大于 0 时有用",
        "random seed: matters with a temperature above 0",
        minimum=0,
        maximum=2**32 - 1,
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None, prog: str = "inference.py") -> int:
    """Load a result once, then answer each prompt, or chat."""
    what = text("和训练好的模型聊天", "chat with the trained model")
    settings = parse(InferenceSettings, argv, prog, what)
    prompts = prompts_of(settings)
    prepare_environment()
    from transformers import set_seed

    set_seed(settings.seed)
    machine = choose_device(read_facts(), device=settings.device)
    chat_model = load_chat_model(settings.model_dir, machine, settings.base_model or None, keep_base=not prompts)
    options = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p")}
    if not prompts:
        chat.chat_loop(settings.model_dir, chat_model, settings.system, **options)
        return 0
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        print_answer(chat_model, [*system_messages(settings.system), {"role": "user", "content": prompt}], **options)
    return 0


def prompts_of(settings: InferenceSettings) -> list[str]:
    """The questions: those of --prompt, or a pipe's lines; none at a terminal, where a chat begins.

    Raises:
        UserError: a question is empty, or the pipe holds none.
    """
    prompts = settings.prompt
    if prompts is None and not sys.stdin.isatty():
        prompts = [*piped()]
        if not prompts:
            what = text("没有 --prompt，标准输入里也没有问题", "no --prompt, and no question on stdin")
            raise UserError(what, fix='--prompt "…"')
    if any(not prompt.strip() for prompt in prompts or []):
        raise UserError(text("问题是空的", "the prompt is empty"), where="--prompt", fix='--prompt "…"')
    return prompts or []
