"""Checks that a resumed run is the same run: the same settings, base model and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lora_practice.console.errors import UserError
from lora_practice.console.settings import given_as_flags, with_given
from lora_practice.console.text import text
from lora_practice.sources.find import BASE_FILES, Source
from lora_practice.storage import manifest, signature
from lora_practice.storage.json_files import RECORD

Settings = TypeVar("Settings")
HASHED_BYTES = 1 << 29  # of a file of weights, so that its hash takes half a second at most

ASKED_ONCE = ("output_dir", "overwrite", "resume", "trust_checkpoint", "plan", "json", "skip_login")  # what to do
# Settings that name what lies outside the folder: models, data, templates, and who gets the curves.
OUTWARD = ("model_name", "chat_template_path", "dataset_path", "dataset_name", "report_to")
# Settings that may change when a run is resumed; every other one affects the result.
FREE_ON_RESUME = (
    *ASKED_ONCE,
    "gradient_checkpointing",  # computes the same numbers twice
    *("logging_steps", "report_to"),  # what is logged
    *("save_strategy", "save_steps", "save_total_limit"),  # which checkpoints are kept
    *("merge_adapter", "run_inference"),  # happen after the training
)
# Values of the settings that did not exist yet when an old record was written.
LATER = {
    "target_modules": "all-linear",
    **dict.fromkeys(("use_rslora", "use_dora", "load_in_4bit"), False),
    "init_lora_weights": "default",
    "loraplus_lr_ratio": 1.0,
}


def settings_as_begun(settings: Settings, record: Mapping[str, Any]) -> Settings:
    """Settings of a run that is resumed: those given now, and for the rest those that its `record` has.

    A default that was edited in the source since then counts as given; `check_same_settings` will name it. What
    OUTWARD names is taken only from a record that this user wrote on this machine, or with --trust_checkpoint.

    Raises:
        UserError: the record holds a value that the setting cannot have, or a stranger's record names what lies
            outside its folder.
    """
    before, given = {**LATER, **(record.get("settings") or {})}, given_as_flags(settings)
    defaults = vars(type(settings)())
    then = record.get("given")
    if not isinstance(then, list) or not all(
        isinstance(name, str) for name in then
    ):  # an older record does not tell them
        then = [name for name, value in before.items() if name in defaults and value != defaults[name]]
    again = [name for name in then if name in before and name in defaults and name not in {*given, *ASKED_ONCE}]
    _check_outward(vars(settings), before, again, record)
    try:
        return with_given(settings, **{name: before[name] for name in again})
    except UserError as error:
        place = f"{vars(settings)['output_dir']}/{RECORD}"
        raise UserError(error.what, place, error.fix) from error


def sign_outward(settings: Mapping[str, Any]) -> str:
    """The "mark" of a record: this user's signature over those of its `settings` that are OUTWARD."""
    return signature.sign_values(_outward(settings))


def _outward(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in OUTWARD}


def _check_outward(now: Mapping[str, Any], before: Mapping[str, Any], again: list[str], record: Any) -> None:
    """UserError if the settings `again`, taken from a record that is not the user's own, lead out of its folder.

    Args:
        now: the settings without the record's; `before`: the settings in the record.
    """
    found = [name for name in again if name in OUTWARD and before[name] != now.get(name)]
    if not found or now["trust_checkpoint"] or signature.signed_here(_outward(before), record.get("mark")):
        return
    named = ", ".join(f"--{name} {str(before[name])[:80]}" for name in found)
    raise UserError(
        text(
            f"认不出这份训练记录是你在这台机器上写的（也可能是旧版本写的），其中指向外部的参数没有采用：{named}",
            "not known to be written by you on this machine (it may be an earlier version's), "
            f"so what leads out of the folder is not taken from it: {named}",
        ),
        where=f"{now['output_dir']}/{RECORD}",
        fix=text(
            "核对后自己写上这些参数；如果信任它的来源，也可以加 --trust_checkpoint",
            "look at them and give them again, or add --trust_checkpoint if you trust where it comes from",
        ),
    )


def check_same_settings(path: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """UserError, with each difference, if `settings` are not those in the `record` of the run in `path`."""
    before = {**LATER, **(record.get("settings") or {})}
    fixed = [name for name in settings if name in before and name not in FREE_ON_RESUME]
    changed = [name for name in fixed if before[name] != settings[name]]
    if changed:
        pairs = [(name, str(before[name])[:80], settings[name]) for name in changed]
        listed = text(
            "，".join(f"{name} 从 {then} 改成 {now}" for name, then, now in pairs),
            ", ".join(f"{name}: {then} -> {now}" for name, then, now in pairs),
        )
        raise UserError(
            text(f"参数变了，不是同一次训练：{listed}", f"not the same run any more: {listed}"),
            where=str(path),
            fix=text("改回原来的参数，或用另一个 --output_dir", "restore them, or use another --output_dir"),
        )


def with_file_digests(base: Source, known: Mapping[str, Any] = {}) -> Source:
    """`base` with the size, time and SHA-256 of its config and weights in `files`, for the record.

    A file whose size and time are as in `known` is not read again.
    """
    assert base.path is not None
    files = {}
    for file in sorted(path for pattern in BASE_FILES for path in base.path.glob(pattern)):
        noted, stat = known.get(file.name) or {}, file.stat()
        same = (noted.get("size"), noted.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
        files[file.name] = noted if same else manifest.file_entry(file, HASHED_BYTES)
    return replace(base, files=files)


def changed_files(record: Mapping[str, Any], base: Source) -> str:
    """Names of the files in which `base` differs from the base in the `record` of a run; "" if there are none."""
    before = (record.get("model") or {}).get("files")
    if not before:  # an old record does not have them
        return ""
    now = base.files or with_file_digests(base, before).files
    return ", ".join(sorted(name for name in {*before, *now} if _content(before, name) != _content(now, name)))


def _content(files: Mapping[str, Any], name: str) -> Any:
    note = files.get(name) or {}
    return note.get("size"), note.get("sha256")


def another_base(record: Mapping[str, Any], base: Source) -> str:
    """A message if `base` is not the one in the `record` of the adapter's run; "" if it is."""
    changed = changed_files(record, base)
    zh, en = f"底座不是训练时的那个：{changed}", f"this is not the base that it was trained on: {changed}"
    return text(zh, en) if changed else ""


def check_same_base(resumed: Mapping[str, Any], base: Source) -> None:
    """Check that a resumed run has its own base; `resumed` is its record, {} for a new run.

    Raises:
        UserError: a file of the base has changed.
    """
    if changed := changed_files(resumed, base):
        raise UserError(
            text(
                f"底座变了，不是同一次训练：{changed}",
                f"the base model is not what this run began with: {changed}",
            ),
            where=base.name,
            fix=text("把底座换回来，或用另一个 --output_dir", "bring it back, or use another --output_dir"),
        )


def check_same_data(resumed: dict[str, Any], facts: dict[str, Any]) -> None:
    """Check that a resumed run has its own data; `resumed` is its record, {} for a new run, `facts` those of `prepare`.

    Raises:
        UserError: the prepared rows are not those of the run.
    """
    before = resumed.get("data") or {}
    if "fingerprint" not in before or before["fingerprint"] == facts["fingerprint"]:
        return
    then, now = ((one.get("rows_trained"), one.get("tokens")) for one in (before, facts))
    zh, en = "数据变了，不是同一次训练", "the data is not what this run began with"
    if then == now:
        what = text(f"{zh}：行数一样（{now[0]}），内容或顺序不同", f"{en}: {now[0]} rows, but not the same ones")
    else:
        what = text(
            f"{zh}：原来 {then[0]} 行、{then[1]} token，现在 {now[0]} 行、{now[1]} token",
            f"{en}: {then[0]} rows, {then[1]} tokens -> {now[0]} rows, {now[1]} tokens",
        )
    fix = text("把数据改回来，或用另一个 --output_dir", "bring the data back, or use another --output_dir")
    raise UserError(what, str(before.get("name", "")), fix)
