"""What may stand in an output folder: each file explained, and what needs it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional

from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Kind:
    """Files of one kind. `names` are patterns; `needed_for` any of "inference", "sharing" and "resuming"."""

    names: tuple[str, ...]
    zh: str
    en: str
    zh_when: str
    en_when: str
    needed_for: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """What it is, in the reader's language."""
        return text(self.zh, self.en)

    @property
    def when(self) -> str:
        """When it is used."""
        return text(self.zh_when, self.en_when)


_ALWAYS, _ANSWERS = ("inference", "sharing", "resuming"), ("inference", "sharing")
KINDS = (
    Kind(
        (ADAPTER_WEIGHTS,),
        *("LoRA 的权重（A 和 B）", "the LoRA weights (A and B)"),
        *("推理、合并、上传", "inference, merging, upload"),
        _ALWAYS,
    ),
    Kind(
        ("adapter_config.json",),
        *("秩、alpha、目标层、底座是谁", "rank, alpha, targets, which base"),
        *("加载适配器", "loading the adapter"),
        _ALWAYS,
    ),
    Kind(("config.json",), *("模型的形状", "the model's shape"), *("加载模型", "loading the model"), _ANSWERS),
    Kind(
        ("model*.safetensors", "model.safetensors.index.json"),
        *("完整模型的权重", "the whole model's weights"),
        *("推理", "inference"),
        _ANSWERS,
    ),
    Kind(
        ("generation_config.json",),
        *("生成的默认参数", "defaults of generation"),
        *("加载模型", "loading the model"),
    ),
    Kind(
        ("tokenizer.json",),
        *("分词器全部内容", "the whole tokenizer"),
        *("加载分词器", "loading the tokenizer"),
        _ANSWERS,
    ),
    Kind(
        ("tokenizer_config.json",),
        *("分词器的类、特殊 token、模板", "the tokenizer's class, special tokens, template"),
        *("加载分词器", "loading the tokenizer"),
        _ANSWERS,
    ),
    Kind(
        ("chat_template.jinja",),
        *("聊天格式", "the chat format"),
        *("训练和推理用同一个", "the same in training and inference"),
        _ANSWERS,
    ),
    Kind(
        ("special_tokens_map.json", "added_tokens.json"),
        *("特殊 token 的名字", "names of the special tokens"),
        *("老版本的读取器", "old readers"),
    ),
    Kind(
        ("vocab.json", "merges.txt"),
        *("词表和合并规则", "vocabulary and merges"),
        *("老版本和其他工具", "old readers and other tools"),
    ),
    Kind(
        ("run_record.json",),
        *("参数、版本、机器、loss", "settings, versions, machine, losses"),
        *("重现、比较、找到底座", "repeating, comparing, finding the base"),
        ("resuming",),
    ),
    Kind(
        ("README.md",),
        *("这次训练的模型卡", "this run's model card"),
        *("给人看、上传", "for people, for the upload"),
        ("sharing",),
    ),
    Kind(
        ("training_args.bin",),
        *("训练参数（pickle，这里从不加载）", "training arguments (a pickle, never loaded here)"),
        *("回看参数", "looking arguments up"),
    ),
    Kind(("report.html",), *("训练报告", "the report"), *("用浏览器看", "in a browser")),
    Kind(("curves.png",), *("训练曲线", "the training curves"), *("放进模型卡", "in the model card")),
    Kind(
        ("optimizer.pt",),
        *("优化器的动量", "the optimizer's moments"),
        *("--resume", "--resume"),
        ("resuming",),
    ),
    Kind(
        ("scheduler.pt", "scaler.pt"),
        *("学习率和 fp16 缩放走到哪了", "where learning rate and fp16 scale are"),
        *("--resume", "--resume"),
        ("resuming",),
    ),
    Kind(
        ("rng_state*.pth",),
        *("随机数走到哪了", "where the random numbers are"),
        *("--resume", "--resume"),
        ("resuming",),
    ),
    Kind(
        ("trainer_state.json",),
        *("第几步、loss 的历史", "the step, the history of the loss"),
        *("--resume", "--resume"),
        ("resuming",),
    ),
    Kind(
        ("checkpoint.json",),
        *("这个存盘点的清单，最后写", "the checkpoint's manifest, written last"),
        *("判断它是否完整", "judging whether it is whole"),
        ("resuming",),
    ),
    Kind(
        ("checkpoint-*/",),
        *("第 N 步的全部状态", "the whole state after N steps"),
        *("--resume；训练完可删", "--resume; not needed after the run"),
        ("resuming",),
    ),
    Kind(
        ("merged/",),
        *("合并好的完整模型", "the merged whole model"),
        *("不装 peft 的地方", "where there is no peft"),
    ),
    Kind(
        ("gguf/",),
        *("GGUF 和 Modelfile", "GGUF files, a Modelfile"),
        *("llama.cpp、Ollama", "llama.cpp, Ollama"),
    ),
)


def file_kind(name: str) -> Optional[Kind]:
    """The kind of a file of this name (a folder's name ends in "/"); None for what no run writes."""
    return next((kind for kind in KINDS for pattern in kind.names if fnmatchcase(name, pattern)), None)
