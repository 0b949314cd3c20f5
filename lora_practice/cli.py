"""`lora-practice COMMAND ...`: each command imports the module that does its work and prints what it returns.

To add a command, write a function here: `@command(zh, en)` above it, its parameters as typer reads them, its heavy
imports inside it. What it returns is the exit code (None is 0); a user's mistake is a UserError, as everywhere.
"""

# annotations stay objects here: on Python 3.9 typer finds no Annotated in a string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lora_practice.console.commands import app, command, run_command
from lora_practice.console.errors import UserError, entry_point
from lora_practice.console.text import tell, text
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR

# arguments and options that commands share, as typer reads them
DEFAULT_FOLDER = Path(DEFAULT_OUTPUT_DIR)
Folder = Annotated[
    Path,
    typer.Argument(
        metavar=text("文件夹", "FOLDER"),
        help=text("训练结果所在的文件夹", "output folder of a run"),
    ),
]
Other = Annotated[
    Optional[Path],
    typer.Argument(
        metavar=text("另一个", "OTHER"),
        help=text("另一个训练结果；不写就和底座比较", "another output folder; without it the base is compared with"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help=text("输出 JSON，供程序读取", "print JSON, for a program"))]
Tokens = Annotated[
    int,
    typer.Option(
        "--max_new_tokens", min=1, metavar="N", help=text("每个回答最多多少个 token", "most tokens in an answer")
    ),
]
System = Annotated[str, typer.Option("--system", metavar="…", help=text("系统提示词", "system prompt"))]
Prompts = Annotated[
    Optional[list[str]],
    typer.Option("--prompt", metavar="…", help=text("要问的问题，可以写多次", "what to ask, repeatable")),
]
Answers = Annotated[
    bool,
    typer.Option(
        "--answers", help=text("现场让底座和微调后的模型各答几个问题", "let base and adapter answer some questions now")
    ),
]
DataFile = Annotated[Path, typer.Argument(metavar=text("文件", "FILE"), help="JSONL, JSON, CSV, TSV, Parquet")]
Show = Annotated[
    Optional[int],
    typer.Option(
        "--show",
        min=1,
        metavar="N",
        help=text(
            "按模型看到的样子显示第 N 行，标出参与训练的部分", "show row N as the model sees it, trained parts marked"
        ),
    ),
]
MaxLength = Annotated[
    int, typer.Option("--max_length", min=8, metavar="N", help=text("同训练的 --max_length", "as in train"))
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model_name",
        metavar="…",
        help=text("用哪个模型的分词器；默认用内置模型的", "whose tokenizer; by default the embedded model's"),
    ),
]
TemplatePath = Annotated[
    str,
    typer.Option("--chat_template_path", metavar="…", help=text("同训练的 --chat_template_path", "as in train")),
]
Only = Annotated[
    Optional[str], typer.Option("--only", metavar="f16|q8_0", help=text("只写一种精度", "write one precision only"))
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help=text("替换已有的 文件夹/gguf", "replace an earlier FOLDER/gguf"))
]
OverwriteMerged = Annotated[
    bool, typer.Option("--overwrite", help=text("替换已有的 文件夹/merged", "replace an earlier FOLDER/merged"))
]
Check = Annotated[
    bool, typer.Option("--check", help=text("不导出，只重新验证已有的 GGUF", "export nothing, only verify again"))
]


def _train_settings() -> Any:
    from fine_tuning_practice import TrainSettings

    return TrainSettings


def _inference_settings() -> Any:
    from lora_practice.inference.answer import InferenceSettings

    return InferenceSettings


def _upload_settings() -> Any:
    from lora_practice.export.hub.upload import UploadSettings

    return UploadSettings


def _check_trained(folder: Path) -> None:
    """Refuse the default folder where nothing has been trained yet.

    Raises:
        UserError: `folder` is the default one and does not exist.
    """
    if folder == DEFAULT_FOLDER and not folder.is_dir():
        what = text("没有这个文件夹：还没有训练过", "no such folder: nothing has been trained yet")
        fix = text("先训练：lora-practice train，或写出文件夹", "train first: lora-practice train, or name a folder")
        raise UserError(what, str(folder), fix)


@command("训练（选项同 fine_tuning_practice.py）", "fine-tune (options of fine_tuning_practice.py)", _train_settings)
def train(ctx: typer.Context) -> None:
    """Run fine_tuning_practice.py's main."""
    from fine_tuning_practice import main

    main(ctx.args, ctx.command_path)


@command(
    "检查数据文件：格式、长度、重复，列出每个问题和改法",
    "check a data file: shape, lengths, copies, each problem and its cure",
)
def check_data(
    path: DataFile,
    show: Show = None,
    max_length: MaxLength = 512,
    model_name: ModelName = "",
    chat_template_path: TemplatePath = "",
    json: Json = False,
) -> int:
    """See `lora_practice.report.check_data`."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.report.check_data import print_survey

    return print_survey(path, model_name, chat_template_path, max_length, show, json)


@command(
    "回答一个问题，或逐行回答管道里的问题（选项同 inference.py）",
    "answer a question, or each line of a pipe (options of inference.py)",
    _inference_settings,
)
def infer(ctx: typer.Context) -> None:
    """Run inference.py's main."""
    from lora_practice.inference.answer import main

    main(ctx.args, ctx.command_path)


@command(
    "把适配器合并进底座，完整模型写到 文件夹/merged",
    "merge the adapter into the base: a whole model in FOLDER/merged",
)
def merge(folder: Folder = DEFAULT_FOLDER, overwrite: OverwriteMerged = False) -> None:
    """Write FOLDER/merged."""
    _check_trained(folder)
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.export import merge as export_merge

    target, difference = export_merge.merge_adapter(folder, overwrite)
    tell(export_merge.merge_sentence(target, difference) + "\n" + export_merge.merged_next(target))


@command(
    "看懂一个训练结果：有哪些文件、改了哪些层、能做什么",
    "what an output folder holds, and what it can be used for",
)
def inspect(folder: Folder = DEFAULT_FOLDER, json: Json = False) -> None:
    """Print what FOLDER holds and what it can be used for."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()  # caches and language may stand in .env
    _check_trained(folder)
    from lora_practice.report.checks import check_folder
    from lora_practice.report.folder_text import verdict_as_json, verdict_lines

    verdict = check_folder(folder)
    for line in [verdict_as_json(verdict)] if json else verdict_lines(verdict):
        print(line)


@command("一页看懂一次训练：写出 文件夹/report.html", "a run on one page: writes FOLDER/report.html")
def report(folder: Folder = DEFAULT_FOLDER, answers: Answers = False) -> None:
    """Write FOLDER/report.html and FOLDER/curves.png."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()  # caches and language may stand in .env
    _check_trained(folder)
    from fine_tuning_practice import TrainSettings
    from lora_practice.console.settings import reasons
    from lora_practice.report.html import write_report

    samples = None
    if answers:
        from lora_practice.inference import compare

        samples = compare.samples(str(folder), _machine())
    page, sentence = write_report(folder, reasons(TrainSettings), samples)
    tell(sentence)
    if not sys.stdout.isatty():  # for a program; a person has the command that opens it
        print(page)


def _machine() -> Any:
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.machine.device import choose_device
    from lora_practice.machine.facts import read_facts

    return choose_device(read_facts())


@command(
    "在终端里聊天：记住历史、可输入多行、随时切换到底座",
    "chat at the terminal; /adapter off switches to the base",
)
def chat(folder: Folder = DEFAULT_FOLDER, system: System = "", max_new_tokens: Tokens = 256) -> None:
    """Chat with the model in FOLDER; from a pipe, one question a line."""
    _check_trained(folder)
    machine = _machine()
    from lora_practice.inference import chat
    from lora_practice.inference import load as load_chat

    chat_model = load_chat.load_chat_model(str(folder), machine, keep_base=True)
    chat.chat_loop(str(folder), chat_model, system, max_new_tokens=max_new_tokens)


@command(
    "底座与微调后（或两个训练结果）并排回答，并比较验证损失",
    "base and adapter, or two output folders, side by side",
)
def compare(
    folder: Folder = DEFAULT_FOLDER,
    other: Other = None,
    prompt: Prompts = None,
    system: System = "",
    max_new_tokens: Tokens = 64,
    json: Json = False,
) -> None:
    """Show answers and validation losses."""
    _check_trained(folder)
    machine = _machine()
    from lora_practice.inference import compare

    second = str(other) if other else None
    compare.compare_folders(
        str(folder), second, machine, prompt or [], json, system=system, max_new_tokens=max_new_tokens
    )


@command(
    "写出 GGUF 和 Modelfile（供 llama.cpp、Ollama 使用），并验证与适配器一致",
    "write GGUF files and a Modelfile (llama.cpp, Ollama), and verify that they equal the adapter",
)
def export(
    folder: Folder = DEFAULT_FOLDER, only: Only = None, overwrite: Overwrite = False, check: Check = False
) -> int:
    """Write FOLDER/gguf and verify it; exit code 1 when it does not equal the adapter."""
    _check_trained(folder)
    from lora_practice.export.gguf_writer import PRECISIONS

    if only is not None and only not in PRECISIONS:
        raise UserError(text(f"没有 {only} 这种精度", f"no such precision: {only}"), "--only", " / ".join(PRECISIONS))
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.export import gguf, parity
    from lora_practice.run.file_kinds import GGUF

    precisions = PRECISIONS if only is None else (only,)
    results = gguf.check_export(folder) if check else gguf.export_gguf(folder, precisions, overwrite)
    print(parity.result_table(results))
    if parity.overall_verdict(results) == "FAIL":
        return 1
    if (folder / GGUF / "Modelfile").is_file():
        command = f"cd {folder / GGUF} && ollama create my-model -f Modelfile"
        print(text("用 Ollama：", "with Ollama:") + f"\n  {command}")
    return 0


@command(
    "上传到 Hugging Face Hub（选项同 scripts/upload_lora_to_hub.py）",
    "upload to the Hugging Face Hub (options of scripts/upload_lora_to_hub.py)",
    _upload_settings,
)
def upload(ctx: typer.Context) -> None:
    """Run the main of scripts/upload_lora_to_hub.py."""
    from lora_practice.export.hub.upload import main

    main(ctx.args, ctx.command_path)


@command(
    "检查这台机器能否训练：硬件、显卡、网络、要下载的内容，以及问题和改法",
    "check whether this machine can train: hardware, card, network, downloads, problems and their cures",
)
def doctor(json: Json = False) -> int:
    """See `lora_practice.machine.doctor.page`."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.machine.doctor.page import PlannedRun, print_machine_page

    defaults = _train_settings()
    return print_machine_page(
        PlannedRun(defaults.model_name, defaults.dataset_path, defaults.dataset_name, defaults.output_dir), json
    )


@command(
    "当场验证：resume 强行结束一次训练，再继续，并比较结果",
    "verify on this machine: resume kills a training, goes on, and compares the results",
)
def selftest(
    proof: Annotated[str, typer.Argument(metavar="resume", help=text("要验证的功能", "what to verify"))],
) -> int:
    """Run the self-test of this name."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    from lora_practice.run.selftest import run_selftest

    return run_selftest(proof)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lora_practice import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def program_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help=text("显示版本", "show the version")),
    ] = False,
) -> None:
    """Options of the program itself."""


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[int]:
    """The console script."""
    return run_command(app, sys.argv[1:] if argv is None else argv, "lora-practice")


if __name__ == "__main__":
    main()
