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
