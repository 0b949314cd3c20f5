"""The settings of a run as its readers see them: the model card and the report show the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_practice.sources.find import SHIPPED

# settings that do not affect the result
WITHOUT_EFFECT = (
    *("output_dir", "overwrite", "resume", "trust_checkpoint", "plan", "json"),
    *("run_inference", "merge_adapter", "skip_login", "report_to", "logging_steps"),
)


def shown_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the `record` of a run that made its result what it is, in their order.

    Left out too are the names of a model or a data set that an embedded one stood in for.
    """
    settings: Mapping[str, Any] = record.get("settings") or {}
    hidden = set(WITHOUT_EFFECT)
    if (record.get("model") or {}).get("kind") == "embedded":
        hidden.add("model_name")
        if settings.get("chat_template_path") == SHIPPED["chat_template_path"]:  # the embedded model has its own
            hidden.add("chat_template_path")
    if (record.get("data") or {}).get("kind") == "embedded":
        hidden.update(("dataset_path", "dataset_name"))
    return {name: value for name, value in settings.items() if name not in hidden}
