"""The arguments and options that verbs share, as typer reads them; one of a verb alone stands at its function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_practice.errors import text

Folder = Annotated[
    Path, typer.Argument(metavar=text("文件夹", "FOLDER"), help=text("训练结果的文件夹", "the output folder of a run"))
]
Other = Annotated[
    Optional[Path], typer.Argument(metavar=text("另一个", "OTHER"), help=text("另一个训练结果", "another result"))
]
Json = Annotated[bool, typer.Option("--json", help=text("输出 JSON，给程序读", "print JSON, for a program"))]
Tokens = Annotated[
    int, typer.Option(min=1, metavar="N", help=text("回答最多多少 token", "tokens in an answer at most"))
]
System = Annotated[str, typer.Option(metavar="…", help=text("系统提示", "system prompt"))]
Prompts = Annotated[
    Optional[list[str]], typer.Option(metavar="…", help=text("要问的话，可以写多次", "what to ask, repeatable"))
]
Answers = Annotated[
    bool, typer.Option("--answers", help=text("现在让底座和微调各答四个问题", "let base and adapter answer now"))
]
DataFile = Annotated[Path, typer.Argument(metavar=text("文件", "FILE"), help="JSONL, JSON, CSV, TSV, Parquet")]
Show = Annotated[
    Optional[int],
    typer.Option(
        min=1,
        metavar="N",
        help=text(
            "按模型看到的样子显示第 N 行，标出训练的部分", "show row N as the model sees it, trained parts marked"
        ),
    ),
]
MaxLength = Annotated[
    int,
    typer.Option("--max_length", "--max-length", min=8, metavar="N", help=text("同训练的 --max_length", "as in train")),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model_name",
        "--model-name",
        help=text("用谁的分词器；默认是内置模型的", "whose tokenizer; by default the embedded model's"),
    ),
]
TemplatePath = Annotated[
    str, typer.Option("--chat_template_path", "--chat-template-path", help=text("同训练的参数", "as in train"))
]
Only = Annotated[Optional[str], typer.Option(metavar="f16|q8_0", help=text("只写一种精度", "write one precision only"))]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help=text("换掉已有的 文件夹/gguf", "replace an earlier FOLDER/gguf"))
]
Check = Annotated[
    bool, typer.Option("--check", help=text("什么都不导出，只重做证明", "export nothing, only prove again"))
]
