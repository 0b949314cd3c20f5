"""`lora-practice VERB ...`: choose, import that room, print. No logic.

To add a verb, write a function here: `@verb(zh, en)` above it, its parameters as typer reads them, its heavy imports
inside it. What it returns is the exit code (None is 0); a user's mistake is a UserError, as everywhere.
"""

# annotations stay objects here: on Python 3.9 typer finds no Annotated in a string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer

from lora_practice.errors import UserError, door, tell, text
from lora_practice.verbs import Door, Verb, Verbs, run

app = typer.Typer(
    cls=Verbs,
    help=text(
        "在弱机器上动手学 LoRA 微调。每个命令加 --help 看选项。",
        "Learn LoRA fine-tuning on weak hardware. Each command takes --help.",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def verb(zh: str, en: str, door_settings: Optional[Callable[[], Any]] = None) -> Callable[[Any], Any]:
    """Make a function a verb of the same name (`check_data` is `check-data`), with one line of help.

    With `door_settings`, which returns the dataclass of a door's flags, the words go to that door unread (ctx.args).
    """
    cls = Door if door_settings else Verb
    return app.command(cls=cls, help=text(zh, en), context_settings={"obj": door_settings})


Json = Annotated[bool, typer.Option("--json", help=text("输出 JSON，给程序读", "print JSON, for a program"))]
Folder = Annotated[
    Path, typer.Argument(metavar=text("文件夹", "FOLDER"), help=text("训练结果的文件夹", "the output folder of a run"))
]


def _train_settings() -> Any:
    from fine_tuning_practice import TrainSettings

    return TrainSettings


def _inference_settings() -> Any:
    from inference import InferenceSettings

    return InferenceSettings


def _upload_settings() -> Any:
    from lora_practice.hub.upload import UploadSettings

    return UploadSettings


@verb("训练（选项同 fine_tuning_practice.py）", "fine-tune (options of fine_tuning_practice.py)", _train_settings)
def train(ctx: typer.Context) -> None:
    """Door 1."""
    from fine_tuning_practice import main

    main(ctx.args)


@verb(
    "检查数据文件：格式、长度、重复、每个问题和改法",
    "look through a data file: shape, lengths, copies, each problem and its cure",
)
def check_data(
    path: Annotated[Path, typer.Argument(metavar=text("文件", "FILE"), help="JSONL, JSON, CSV, TSV, Parquet")],
    show: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            metavar="N",
            help=text(
                "按模型看到的样子显示第 N 行，标出训练的部分", "show row N as the model sees it, trained parts marked"
            ),
        ),
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(
            "--max_length", "--max-length", min=8, metavar="N", help=text("同训练的 --max_length", "as in train")
        ),
    ] = 512,
    model_name: Annotated[
        str,
        typer.Option(
            "--model_name",
            "--model-name",
            help=text("用谁的分词器；默认是内置模型的", "whose tokenizer; by default the embedded model's"),
        ),
    ] = "",
    chat_template_path: Annotated[
        str, typer.Option("--chat_template_path", "--chat-template-path", help=text("同训练的参数", "as in train"))
    ] = "",
    json: Json = False,
) -> int:
    """See `lora_practice.check`."""
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice.check import check

    return check(path, model_name, chat_template_path, max_length, show, json)


@verb(
    "和训练好的模型聊天（选项同 inference.py）",
    "talk to what was trained (options of inference.py)",
    _inference_settings,
)
def infer(ctx: typer.Context) -> None:
    """Door 2."""
    from inference import main

    main(ctx.args)


@verb("把适配器合并成完整模型，写到 文件夹/merged", "merge the adapter into a whole model, in FOLDER/merged")
def merge(folder: Folder) -> None:
    """Write FOLDER/merged."""
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice import export

    tell(export.said(*export.merge(folder)))


@verb("看懂一个训练结果：每个文件、改了哪些层、能做什么", "what an output folder holds, and what it is good for")
def inspect(folder: Folder, json: Json = False) -> None:
    """Print the verdict on FOLDER."""
    from lora_practice.inspecting import as_json, lines
    from lora_practice.judging import judge

    verdict = judge(folder)
    for line in [as_json(verdict)] if json else lines(verdict):
        print(line)


@verb(
    "写出 GGUF 和 Modelfile（llama.cpp、Ollama 用），并证明和适配器一致",
    "write GGUF files and a Modelfile (llama.cpp, Ollama), and prove that they equal the adapter",
)
def export(
    folder: Folder,
    only: Annotated[
        Optional[str], typer.Option(metavar="f16|q8_0", help=text("只写一种精度", "write one precision only"))
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help=text("换掉已有的 文件夹/gguf", "replace an earlier FOLDER/gguf"))
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help=text("什么都不导出，只重做证明", "export nothing, only prove again"))
    ] = False,
) -> int:
    """Write FOLDER/gguf and prove it; exit code 1 when the proof fails."""
    from lora_practice.gguf_write import KINDS

    if only is not None and only not in KINDS:
        raise UserError(text(f"没有 {only} 这种精度", f"no such precision: {only}"), "--only", " / ".join(KINDS))
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice import export as room
    from lora_practice import proof

    kinds = KINDS if only is None else (only,)
    lines = room.prove_gguf(folder) if check else room.to_gguf(folder, kinds, overwrite)
    print(proof.show(lines))
    return int(proof.verdict(lines) == "FAIL")


@verb(
    "上传到 Hugging Face Hub（选项同 scripts/upload_lora_to_hub.py）",
    "upload to the Hub (options of scripts/upload_lora_to_hub.py)",
    _upload_settings,
)
def upload(ctx: typer.Context) -> None:
    """Door 3."""
    from lora_practice.hub.upload import main

    main(ctx.args)


@verb(
    "这台机器能不能练：硬件、显卡、网络、要下载什么、哪里不对、怎么改",
    "can this machine train: hardware, card, network, downloads, what is wrong and its cure",
)
def doctor(json: Json = False) -> int:
    """See `lora_practice.doctor.passport`."""
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice.doctor.passport import Plan, present

    defaults = _train_settings()
    return present(Plan(defaults.model_name, defaults.dataset_path, defaults.dataset_name, defaults.output_dir), json)


@verb("当场证明：resume 杀掉一次训练再继续，比较结果", "see it proved: resume kills a training, goes on, and compares")
def selftest(proof: Annotated[str, typer.Argument(metavar="resume", help=text("证明什么", "what to prove"))]) -> int:
    """Run a proof of this name."""
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice import selftest as proofs

    return proofs.run(proof)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lora_practice import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help=text("显示版本", "show the version")),
    ] = False,
) -> None:
    """The options of the program itself."""


@door
def main(argv: Optional[Sequence[str]] = None) -> Optional[int]:
    """The console script."""
    return run(app, sys.argv[1:] if argv is None else argv, "lora-practice")


if __name__ == "__main__":
    main()
