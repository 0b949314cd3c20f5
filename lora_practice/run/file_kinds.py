"""Explains each file that may be in an output folder, and which uses need it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional

from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_practice.storage.json_files import RECORD

CHECKPOINT_MANIFEST, CARD = "checkpoint.json", "README.md"
BEST = "best.safetensors"  # the adapter with the lowest validation loss so far; deleted when the run is finished
MERGED, GGUF, ADAPTER_GGUF = "merged", "gguf", "adapter.gguf"  # folders of `merge` and `export`, a file in the second
REPORT_PAGE, CURVES = "report.html", "curves.png"  # what `report` writes
REPORT_MARK = "lora-finetune-practice report"  # stands in both, which may be replaced because of it
FIRST_ROW_MARKS = ("<!-- first row -->", "<!-- /first row -->")  # in the page, around a row of the training data


@dataclass(frozen=True)
class FileKind:
    """Files of one kind: what they are and when they are used, in both languages.

    names: patterns of `fnmatch`; a folder's ends in "/". needed_for: any of "inference", "sharing", "resuming".
    """

    names: tuple[str, ...]
    zh: str
    en: str
    zh_when: str
    en_when: str
    needed_for: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """What the file is, in the user's language."""
        return text(self.zh, self.en)

    @property
    def when(self) -> str:
        """When the file is used, in the user's language."""
        return text(self.zh_when, self.en_when)


_ALWAYS, _ANSWERS = ("inference", "sharing", "resuming"), ("inference", "sharing")
FILE_KINDS = (
    FileKind(
        (ADAPTER_WEIGHTS,),
        "LoRA 的权重（A 和 B）",
        "the LoRA weights (A and B)",
        "推理、合并、上传",
        "inference, merging, upload",
        _ALWAYS,
    ),
    FileKind(
        (ADAPTER_CONFIG,),
        "秩、alpha、目标模块、底座是哪个",
        "rank, alpha, target modules, which base",
        "加载适配器",
        "loading the adapter",
        _ALWAYS,
    ),
    FileKind(
        (BEST,),
        "训练中：验证损失最低的适配器",
        "during training: the adapter of the lowest validation loss",
        "--resume",
        "--resume",
        ("resuming",),
    ),
    FileKind(("config.json",), "模型结构的参数", "the model's architecture", "加载模型", "loading the model", _ANSWERS),
    FileKind(
        ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
        "完整模型的权重",
        "the whole model's weights",
        "推理",
        "inference",
        _ANSWERS,
    ),
    FileKind(
        ("generation_config.json",),
        "生成的默认参数",
        "defaults of generation",
        "加载模型",
        "loading the model",
    ),
    FileKind(
        ("tokenizer.json",),
        "完整的分词器",
        "the whole tokenizer",
        "加载分词器",
        "loading the tokenizer",
        _ANSWERS,
    ),
    FileKind(
        ("tokenizer_config.json",),
        "分词器的类型、特殊 token、聊天模板",
        "the tokenizer's class, special tokens, template",
        "加载分词器",
        "loading the tokenizer",
        _ANSWERS,
    ),
    FileKind(
        ("chat_template.jinja",),
        "聊天格式",
        "the chat format",
        "训练和推理都用它",
        "training and inference both use it",
        _ANSWERS,
    ),
    FileKind(
        ("special_tokens_map.json", "added_tokens.json"),
        "特殊 token 的名字",
        "names of the special tokens",
        "旧版工具",
        "old tools",
    ),
    FileKind(
        ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        "词表和合并规则",
        "vocabulary and merges",
        "旧版和其他工具",
        "old and other tools",
    ),
    FileKind(
        (RECORD,),
        "参数、版本、机器、loss",
        "settings, versions, machine, losses",
        "重现、比较、找底座",
        "repeating, comparing, finding the base",
        ("resuming",),
    ),
    FileKind(
        (CARD,),
        "这次训练的模型卡",
        "this run's model card",
        "给人看，上传时用",
        "for people and the upload",
        ("sharing",),
    ),
    FileKind(
        ("training_args.bin",),
        "训练参数（pickle，这里从不加载）",
        "training arguments (a pickle, never loaded here)",
        "查看参数",
        "looking arguments up",
    ),
    FileKind((REPORT_PAGE,), "训练报告", "the report", "用浏览器打开", "opened in a browser"),
    FileKind((CURVES,), "训练曲线", "the training curves", "放进模型卡", "in the model card"),
    FileKind(
        ("optimizer.pt",),
        "优化器的动量",
        "the optimizer's moments",
        "--resume",
        "--resume",
        ("resuming",),
    ),
    FileKind(
        ("scheduler.pt", "scaler.pt"),
        "学习率和 fp16 缩放的状态",
        "state of the learning rate and the fp16 scale",
        "--resume",
        "--resume",
        ("resuming",),
    ),
    FileKind(
        ("rng_state*.pth",),
        "随机数的状态",
        "state of the random numbers",
        "--resume",
        "--resume",
        ("resuming",),
    ),
    FileKind(
        ("trainer_state.json",),
        "步数、loss 的历史",
        "the step, the losses so far",
        "--resume",
        "--resume",
        ("resuming",),
    ),
    FileKind(
        (CHECKPOINT_MANIFEST,),
        "这个检查点的清单，最后写",
        "the checkpoint's manifest, written last",
        "检查它是否完整",
        "checking that it is whole",
        ("resuming",),
    ),
    FileKind(
        ("checkpoint-*/",),
        "检查点：训练到这一步的全部状态",
        "a checkpoint: the whole state after that step",
        "--resume；训练完成后可删",
        "--resume; not needed after the run",
        ("resuming",),
    ),
    FileKind(
        (f"{MERGED}/",),
        "合并后的完整模型",
        "the merged whole model",
        "没有 peft 的环境",
        "where there is no peft",
    ),
    FileKind(
        (f"{GGUF}/",),
        "GGUF 和 Modelfile",
        "GGUF files, a Modelfile",
        "llama.cpp、Ollama",
        "llama.cpp, Ollama",
    ),
)


def file_kind(name: str) -> Optional[FileKind]:
    """The kind of a file of this name (a folder's name ends in "/"); None for what no run writes."""
    return next((kind for kind in FILE_KINDS for pattern in kind.names if fnmatchcase(name, pattern)), None)
