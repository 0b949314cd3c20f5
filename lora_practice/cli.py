"""`lora-practice VERB ...`: choose, import that room, print. No logic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lora_practice.errors import UserError, door, tell, text


@door
def main(argv: Optional[Sequence[str]] = None) -> int:
    """The console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = {"train": _train, "infer": _infer, "merge": _merge, "upload": _upload}
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from lora_practice import __version__

        print(__version__)
        return 0
    if words[0] not in verbs:
        raise UserError(text(f"没有 {words[0]} 这个命令", f"no such command: {words[0]}"), fix=", ".join(verbs))
    verbs[words[0]](words[1:])
    return 0


def _help() -> str:
    return text(
        """lora-practice 命令 [选项]

  train    训练（选项同 fine_tuning_practice.py）
  infer    和训练好的模型聊天（选项同 inference.py）
  merge    文件夹：把适配器合并成完整模型，写到 文件夹/merged
  upload   上传到 Hugging Face Hub（选项同 scripts/upload_lora_to_hub.py）

每个命令加 --help 看选项。""",
        """lora-practice COMMAND [options]

  train    fine-tune (options of fine_tuning_practice.py)
  infer    talk to what was trained (options of inference.py)
  merge    FOLDER: merge the adapter into a whole model, in FOLDER/merged
  upload   upload to the Hub (options of scripts/upload_lora_to_hub.py)

Each command takes --help.""",
    )


def _train(words: list[str]) -> None:
    from fine_tuning_practice import main as train

    train(words)


def _infer(words: list[str]) -> None:
    from inference import main as infer

    infer(words)


def _merge(words: list[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        print(text("用法：lora-practice merge 文件夹", "usage: lora-practice merge FOLDER"))
        sys.exit(0 if words in (["-h"], ["--help"]) else 2)
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice.export import merge, said

    tell(said(*merge(Path(words[0]))))


def _upload(words: list[str]) -> None:
    from lora_practice.hub.upload import main as upload

    upload(words)


if __name__ == "__main__":
    main()
