"""Card and report show the same settings, those that made the result what it is; the card is in one language."""

from __future__ import annotations

from typing import Any

import pytest

from lora_practice.report import page_content
from lora_practice.run import model_card
from lora_practice.sources.find import SHIPPED

SETTINGS: dict[str, Any] = {
    "model_name": SHIPPED["model_name"],
    "chat_template_path": SHIPPED["chat_template_path"],
    "dataset_path": SHIPPED["dataset_path"],
    "dataset_name": SHIPPED["dataset_name"],
    "output_dir": "out",
    "resume": True,
    "lora_r": 6,
}


def a_record(model: str, data: str, **changed: Any) -> dict[str, Any]:
    """The record of a run with a base and a data set of these kinds."""
    counts = {"rows_trained": 3, "tokens": 30, "trained_tokens": 9, "rows_held_out": 0}
    return {
        "losses": [],
        "seconds": 1.0,
        "tokens_per_second": 9.0,
        "peak_memory_mb": 900,
        "settings": {**SETTINGS, **changed},
        "model": {"kind": model, "name": "a", "path": "a", "hub_id": "b/c", "revision": None, "note": ""},
        "data": {"kind": data, "name": "d", "hub_id": "d", "note": "", "rows_lost": {}, "bad_rows_skipped": {}}
        | counts,
        "machine": {"device": "cpu", "precision": "fp32", "gpu": "", "cpu": "a CPU"},
        "versions": {},
    }


def in_the_card(record: dict[str, Any]) -> list[str]:
    """Names in the card's table of settings."""
    rows = model_card.card(record).partition("| setting | value |")[2].splitlines()[2:]
    return [row.split(" ")[1] for row in rows if row.startswith("| ")]


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (a_record("hub", "hub"), ["model_name", "chat_template_path", "dataset_path", "dataset_name", "lora_r"]),
        (a_record("embedded", "hub"), ["dataset_path", "dataset_name", "lora_r"]),
        (a_record("hub", "embedded"), ["model_name", "chat_template_path", "lora_r"]),
        # a template that the user named replaces the embedded model's own
        (a_record("embedded", "embedded", chat_template_path="x.jinja"), ["chat_template_path", "lora_r"]),
    ],
)
def test_a_setting_that_an_embedded_model_or_data_set_replaced_is_not_shown(
    record: dict[str, Any], shown: list[str]
) -> None:
    assert in_the_card(record) == shown


def test_the_report_shows_what_the_card_shows() -> None:
    record = a_record("embedded", "embedded")
    assert [row.name for row in page_content.settings_rows(record, {})] == in_the_card(record) == ["lora_r"]


@pytest.mark.parametrize(
    ("causes", "told"),
    [
        ({"broken JSON": 2}, "Lost: 3 (ending cut at max_length), 2 (broken JSON)."),
        ({"JSON 格式有误": 2, "内容是空的": 1}, "Lost: 3 (ending cut at max_length), 3 (bad rows)."),
        ({}, "Lost: 3 (ending cut at max_length)."),
    ],
)
def test_the_card_counts_what_was_lost_in_english_whatever_the_users_language(causes: dict, told: str) -> None:
    record = a_record("hub", "hub")
    record["data"].update(rows_lost={"cut": 3}, bad_rows_skipped=causes)
    assert told in model_card.card(record)
