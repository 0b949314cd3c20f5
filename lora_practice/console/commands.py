"""How `lora-practice COMMAND` looks and fails: typer's commands, with this project's help and one-line errors."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from lora_practice.console.errors import UserError
from lora_practice.console.help import Section, default_note, help_page, shown_flag
from lora_practice.console.text import text

# click's ClickException; typer carries a click of its own from 0.26 on, and stands on the installed one before
ClickError: Any = typer.BadParameter.__mro__[2]


class Command(TyperCommand):
    """A command whose parameters typer reads from its function."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the same kind of page as the entry points print, in the user's language."""
        named = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        arguments = Section(text("参数", "arguments"), [(_metavar(one), _help_of(one)) for one in named])
        formatter.write(help_page(_usage(ctx, self), self.help or "", [arguments, _options(ctx, self)]))


class EntryPointCommand(TyperCommand):
    """A command that hands its words to an entry point unread, `--help` too: its function finds them in ctx.args."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep every word in ctx.args."""
        ctx.args = list(args)
        return []

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The entry point's flags: those of the settings class that ctx.obj() returns."""
        fields = [field for field in dataclasses.fields(ctx.obj()) if "zh" in field.metadata]
        typed = shown_flag(incomplete).lstrip("-")
        return [
            Completion(f"--{field.name}", text(field.metadata["zh"], field.metadata["en"]))
            for field in fields
            if incomplete.startswith("-") and field.name.startswith(typed)
        ]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One suggestion, as click's shells read it."""

    value: str
    help: str
    type: str = "plain"


FOLDER_FLAGS = ("model_dir", "local_dir", "output_dir", "folder")  # with which other commands and programs name one


class Commands(TyperGroup):
    """All commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write one line for each command, then the options of the program itself."""
        rows = [(name, command.help or "") for name, command in self.commands.items() if not command.hidden]
        listed = Section(text("命令", "commands"), rows)
        formatter.write(help_page(_usage(ctx, self), self.help or "", [listed, _options(ctx, self)]))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names.

        Raises:
            UserError: there is none of this name.
        """
        if args[0] not in self.commands and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = text(f"，是不是 {near[0]}？", f", did you mean {near[0]}?") if near else ""
            what = text(f"没有 {args[0]} 这个命令{hint}", f"no such command: {args[0]}{hint}")
            raise UserError(what, fix=", ".join(self.commands))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    help=text(
        "用配置不高的电脑动手学 LoRA 微调。每个命令加 --help 查看选项。",
        "Learn LoRA fine-tuning on weak hardware. Each command takes --help.",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(zh: str, en: str, entry_point_settings: Optional[Callable[[], Any]] = None) -> Callable[[Any], Any]:
    """Make a function a command of the same name (`check_data` is `check-data`), with one line of help.

    With `entry_point_settings`, which returns the dataclass of an entry point's flags, the words go to that entry
    point unread (ctx.args). Flags are accepted with dashes too, and shown with underscores.
    """
    cls = EntryPointCommand if entry_point_settings else Command
    context = {"obj": entry_point_settings, "token_normalize_func": lambda name: name.replace("-", "_")}
    return app.command(cls=cls, help=text(zh, en), context_settings=context)


def run_command(app: typer.Typer, argv: Sequence[str], prog: str) -> Optional[int]:
    """Run the command that the words name; its function's return value is the exit code (None is 0).

    Raises:
        UserError: a mistake in the words themselves.
    """
    command: Any = typer.main.get_command(app)
    try:
        return command.main(list(argv) or ["--help"], prog_name=prog, standalone_mode=False)
    except ClickError as error:
        raise _as_user_error(error, prog) from error


def _as_user_error(error: Any, prog: str) -> UserError:
    """click's error in this project's words."""
    context, kind = error.ctx, type(error).__name__
    parameter = getattr(error, "param", None)
    name = ""
    if parameter is not None:
        name = _shown(parameter) if parameter.param_type_name == "option" else _metavar(parameter)
    if kind == "NoSuchOption":
        near = [shown_flag(flag) for flag in error.possibilities or []]
        hint = text(f"，是不是 {near[0]}？", f", did you mean {near[0]}?") if near else ""
        what = text(f"没有 {error.option_name} 这个选项{hint}", f"unknown flag {error.option_name}{hint}")
        if error.option_name.replace("-", "_").lstrip("_") in FOLDER_FLAGS and _takes_a_folder(context):
            fix = text("文件夹直接写在命令后面：", "the folder goes without a flag: ")
            return UserError(what, fix=f"{fix}{context.command_path} outputs/mine")
    elif kind == "MissingParameter":
        what = text(f"缺少 {name}", f"{name} is missing")
    elif kind == "BadOptionUsage":
        flag = shown_flag(error.option_name)
        what = text(f"{flag} 后面要有一个值", f"{flag} needs a value")
    elif kind == "UsageError":  # the only one left: words too many
        what = text("多余的参数：", "unexpected argument: ") + error.message.rpartition("(")[2].rstrip(").")
    elif (least := _least(parameter)) is not None:
        what = text(f"{name} 应是不小于 {least} 的整数", f"{name} needs a whole number >= {least}")
    else:
        what = text(f"{name} 的值不对：{error.message}", f"{name}: {error.message}")
    return UserError(what, fix=f"{context.command_path if context else prog} --help")


def _takes_a_folder(context: Any) -> bool:
    return context is not None and any(one.name == "folder" for one in context.command.params)


def _least(parameter: Any) -> Optional[int]:
    """The smallest value that an option takes, where it takes a whole number: typer 0.26 and later hold it themselves,
    before they leave it to click's type."""
    return getattr(parameter, "min", None) or getattr(getattr(parameter, "type", None), "min", None)


def _usage(ctx: Any, command: Any) -> str:
    words = [_metavar(one) for one in command.get_params(ctx) if one.param_type_name == "argument"]
    if isinstance(command, Commands):
        words = [text("命令", "COMMAND")]
    return " ".join([ctx.command_path, *words, text("[选项]", "[options]")])


def _options(ctx: Any, command: Any) -> Section:
    """The section of options, help first as on the entry points' pages."""
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option" and not one.hidden]
    options.sort(key=lambda one: one.name != "help")  # a stable sort: the others keep their order
    rows = [(f"{_shown(one)} {'' if one.is_flag else _metavar(one)}".rstrip(), _help_of(one)) for one in options]
    return Section(text("选项", "options"), rows)


def _shown(option: Any) -> str:
    """The flag as it is shown: "-h, --help"; the program's own flags are spelt as typer spells them."""
    if option.name in ("install_completion", "show_completion"):
        return option.opts[0]
    return ", ".join(dict.fromkeys(shown_flag(flag) for flag in sorted(option.opts, key=len)))


def _metavar(parameter: Any) -> str:
    if parameter.param_type_name == "option":
        return parameter.metavar or "…"
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _help_of(parameter: Any) -> str:
    ours = {
        "help": text("显示这份说明", "show this help"),
        "install_completion": text("为当前的 shell 安装补全", "install completion for this shell"),
        "show_completion": text("显示补全脚本", "show the completion script"),
    }
    default = parameter.default
    shown = isinstance(default, (int, str, Path)) and not isinstance(default, bool) and str(default) != ""
    return (ours.get(parameter.name) or parameter.help or "") + (default_note(default) if shown else "")
