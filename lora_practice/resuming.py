"""Whether a run that goes on would still be the same run: its settings, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_practice.errors import UserError, text

# Every other setting must stay as it was, or the resumed run would no longer be the same run.
FREE_ON_RESUME = (
    *("output_dir", "overwrite", "resume", "trust_checkpoint", "plan", "json", "skip_login"),  # ask what to do, not how
    "gradient_checkpointing",  # the same numbers, computed twice
    *("logging_steps", "report_to"),  # what is told of the training
    *("save_strategy", "save_steps", "save_total_limit"),  # how much a kill may cost
    *("merge_adapter", "run_inference"),  # come after the training
)
# Settings that a record may be too old to name: the run had these values.
LATER = {
    "target_modules": "all-linear",
    **dict.fromkeys(("use_rslora", "use_dora", "load_in_4bit"), False),
    "init_lora_weights": "default",
    "loraplus_lr_ratio": 1.0,
}


def check_same_settings(path: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """UserError if `settings` differ from those in the `record` of the run in `path`; names each difference."""
    before = {**LATER, **(record.get("settings") or {})}
    fixed = [name for name in settings if name in before and name not in FREE_ON_RESUME]
    changed = [name for name in fixed if before[name] != settings[name]]
    if changed:
        listed = ", ".join(f"{name}: {str(before[name])[:80]} -> {settings[name]}" for name in changed)
        raise UserError(
            text(f"参数变了，不是同一次训练：{listed}", f"not the same run any more: {listed}"),
            where=str(path),
            fix=text("改回原来的参数，或用另一个 --output_dir", "restore them, or use another --output_dir"),
        )


def check_same_data(resumed: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to go on with other data; `resumed` is the record of the run that is resumed, {} for a new one.

    Raises:
        UserError: the prepared rows are not those that the run began with.
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
            f"{zh}：{then[0]} 行 {then[1]} token -> {now[0]} 行 {now[1]} token",
            f"{en}: {then[0]} rows, {then[1]} tokens -> {now[0]} rows, {now[1]} tokens",
        )
    fix = text("把数据改回来，或用另一个 --output_dir", "bring the data back, or use another --output_dir")
    raise UserError(what, str(before.get("name", "")), fix)
