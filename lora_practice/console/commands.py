"""How `lora-practice VERB` looks and fails: typer's commands, with this project's help and one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Callable, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from lora_practice.console.errors import UserError
from lora_practice.console.help import Help
from lora_practice.console.text import text

# click's ClickException; typer carries a click of its own from 0.26 on, and stands on the installed one before
Mistake: Any = typer.BadParameter.__mro__[2]


class Command(TyperCommand):
    """A command whose parameters typer reads from its function."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The same page as the doors print, in the user's language."""
        page = _page(ctx, self)
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                page.add_argument(parameter.name, metavar=_metavar(parameter), help=_help_of(parameter))
        _add_options(page, self.get_params(ctx))
        formatter.write(page.format_help())


class EntryPointCommand(TyperCommand):
    """A command whose words go to one of the doors as they are, `--help` too: its function finds them in ctx.args."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take every word, read none."""
        ctx.args = list(args)
        return []

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The door's flags: those of the dataclass that ctx.obj() returns."""
        fields = [one for one in dataclasses.fields(ctx.obj()) if "zh" in one.metadata]
        typed = incomplete.lstrip("-").replace("-", "_")
        return [
            Completion(f"--{one.name}", text(one.metadata["zh"], one.metadata["en"]))
            for one in fields
            if incomplete.startswith("-") and one.name.startswith(typed)
        ]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One suggestion, as click's shells read it."""

    value: str
    help: str
    type: str = "plain"


class Commands(TyperGroup):
    """All commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """One line for each verb, then the few options of the program itself."""
        page = _page(ctx, self)
        listed = page.add_argument_group(text("命令", "commands"))
        for name, command in self.commands.items():
            if not command.hidden:
                listed.add_argument(name, metavar=name, help=command.help)
        _add_options(page, self.get_params(ctx))
        formatter.write(page.format_help())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that the first word names.

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
        "在弱机器上动手学 LoRA 微调。每个命令加 --help 看选项。",
        "Learn LoRA fine-tuning on weak hardware. Each command takes --help.",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(zh: str, en: str, door_settings: Optional[Callable[[], Any]] = None) -> Callable[[Any], Any]:
    """Make a function a verb of the same name (`check_data` is `check-data`), with one line of help.

    With `door_settings`, which returns the dataclass of a door's flags, the words go to that door unread (ctx.args).
    """
    cls = EntryPointCommand if door_settings else Command
    return app.command(cls=cls, help=text(zh, en), context_settings={"obj": door_settings})


def run_command(app: typer.Typer, argv: Sequence[str], prog: str) -> Optional[int]:
    """Do what the words say; what the verb's function returns is the exit code.

    Raises:
        UserError: a mistake in the words themselves.
    """
    command: Any = typer.main.get_command(app)
    try:
        return command.main(list(argv) or ["--help"], prog_name=prog, standalone_mode=False)
    except Mistake as error:
        raise _in_our_words(error) from error


def _in_our_words(error: Any) -> UserError:
    context, kind = error.ctx, type(error).__name__
    parameter = getattr(error, "param", None)
    name = ""
    if parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else _metavar(parameter)
    if kind == "NoSuchOption":
        near = list(error.possibilities or [])
        hint = text(f"，是不是 {near[0]}？", f", did you mean {near[0]}?") if near else ""
        what = text(f"没有 {error.option_name} 这个选项{hint}", f"unknown flag {error.option_name}{hint}")
    elif kind == "MissingParameter":
        what = text(f"缺少 {name}", f"{name} is missing")
    elif kind == "BadOptionUsage":
        what = text(f"{error.option_name} 后面要有一个值", f"{error.option_name} needs a value")
    elif kind == "UsageError":  # the only one left: words too many
        what = text("多余的参数：", "unexpected argument: ") + error.message.rpartition("(")[2].rstrip(").")
    else:
        what = text(f"{name} 的值不对：{error.message}", f"{name}: {error.message}")
    path = context.command_path if context else ""
    return UserError(what, fix=f"{path} --help")


def _page(ctx: Any, command: Any) -> argparse.ArgumentParser:
    words = [_metavar(one) for one in command.get_params(ctx) if one.param_type_name == "argument"]
    if isinstance(command, Commands):
        words = [text("命令", "COMMAND")]
    return argparse.ArgumentParser(
        usage=" ".join([ctx.command_path, *words, text("[选项]", "[options]")]),
        description=command.help,
        epilog=command.epilog,
        formatter_class=Help,
        add_help=False,
    )


def _add_options(page: argparse.ArgumentParser, parameters: Sequence[Any]) -> None:
    listed = page.add_argument_group(text("选项", "options"))
    for parameter in parameters:
        if parameter.param_type_name == "option" and not parameter.hidden:
            value: dict[str, Any] = {"action": "store_true"} if parameter.is_flag else {"metavar": _metavar(parameter)}
            listed.add_argument(*sorted(parameter.opts, key=len), help=_help_of(parameter), **value)


def _metavar(parameter: Any) -> str:
    if parameter.param_type_name == "option":
        return parameter.metavar or "…"
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _help_of(parameter: Any) -> str:
    ours = {
        "help": text("显示这些说明", "show this help"),
        "install_completion": text("为当前的 shell 装上补全", "install completion for this shell"),
        "show_completion": text("显示补全脚本", "show the completion script"),
    }
    return (ours.get(parameter.name) or parameter.help or "").replace("%", "%%")
