"""`lora-practice VERB ...`: choose, import that room, print. No logic.

To add a verb, write a function here: `@verb(zh, en)` above it, its parameters as typer reads them, its heavy imports
inside it. What it returns is the exit code (None is 0); a user's mistake is a UserError, as everywhere.
"""

# annotations stay objects here: on Python 3.9 typer finds no Annotated in a string
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Optional

import typer

from lora_practice import parameters as given
from lora_practice.errors import UserError, door, tell, text
from lora_practice.verbs import app, run, verb


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
    path: given.DataFile,
    show: given.Show = None,
    max_length: given.MaxLength = 512,
    model_name: given.ModelName = "",
    chat_template_path: given.TemplatePath = "",
    json: given.Json = False,
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
def merge(folder: given.Folder) -> None:
    """Write FOLDER/merged."""
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice import export

    tell(export.said(*export.merge(folder)))


@verb("看懂一个训练结果：每个文件、改了哪些层、能做什么", "what an output folder holds, and what it is good for")
def inspect(folder: given.Folder, json: given.Json = False) -> None:
    """Print the verdict on FOLDER."""
    from lora_practice.inspecting import as_json, lines
    from lora_practice.judging import judge

    verdict = judge(folder)
    for line in [as_json(verdict)] if json else lines(verdict):
        print(line)


@verb("一页看懂一次训练：写 文件夹/report.html", "a run on one page: writes FOLDER/report.html")
def report(folder: given.Folder, answers: given.Answers = False) -> None:
    """Write FOLDER/report.html and FOLDER/curves.png."""
    from fine_tuning_practice import TrainSettings
    from lora_practice.report import write
    from lora_practice.settings import reasons

    samples = None
    if answers:
        from lora_practice import compare

        samples = compare.samples(str(folder), _machine())
    page, sentence = write(folder, reasons(TrainSettings), samples)
    tell(sentence)
    print(page)


def _machine() -> Any:
    from lora_practice.environment import prepare_environment

    prepare_environment()
    from lora_practice.machine import decide
    from lora_practice.probe import look

    return decide(look())


@verb("在终端里聊天：历史、多行、随时换成底座听听", "chat at the terminal; /adapter off lets you hear the base")
def chat(folder: given.Folder, system: given.System = "", max_new_tokens: given.Tokens = 256) -> None:
    """Talk to what is in FOLDER; from a pipe, one question a line."""
    machine = _machine()
    from lora_practice import chat, generate

    talker = generate.load(str(folder), machine, keep_base=True)
    chat.chat(str(folder), talker, system, max_new_tokens=max_new_tokens)


@verb("底座和微调（或两个文件夹）并排回答，比较留出数据的损失", "base and adapter, or two folders, side by side")
def compare(
    folder: given.Folder,
    other: given.Other = None,
    prompt: given.Prompts = None,
    system: given.System = "",
    max_new_tokens: given.Tokens = 64,
    json: given.Json = False,
) -> None:
    """Show answers and held-out losses."""
    machine = _machine()
    from lora_practice import compare

    second = str(other) if other else None
    compare.run(str(folder), second, machine, prompt or [], json, system=system, max_new_tokens=max_new_tokens)


@verb(
    "写出 GGUF 和 Modelfile（llama.cpp、Ollama 用），并证明和适配器一致",
    "write GGUF files and a Modelfile (llama.cpp, Ollama), and prove that they equal the adapter",
)
def export(
    folder: given.Folder, only: given.Only = None, overwrite: given.Overwrite = False, check: given.Check = False
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
    if proof.verdict(lines) == "FAIL":
        return 1
    if (folder / room.GGUF / "Modelfile").is_file():
        command = f"cd {folder / room.GGUF} && ollama create my-model -f Modelfile"
        print(text("用 Ollama：", "with Ollama:") + f"\n  {command}")
    return 0


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
def doctor(json: given.Json = False) -> int:
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
