"""Writes into docs/reliability.md and docs/reliability.en.md how many bad inputs the corpus holds.

python tests/count_bad_inputs.py
"""

from __future__ import annotations

import re
from pathlib import Path

from bad_inputs.files import BROKEN, UNUSABLE
from bad_inputs.folders import BAD_ADAPTERS, BAD_MODELS
from bad_inputs.rows import TABLE
from bad_inputs.runs import BAD_RECORDS, BAD_RUNS, BAD_TARGETS, BAD_UPLOADS, HOSTILE_PATTERNS
from bad_inputs.settings import BAD_SETTINGS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"zh": DOCS / "reliability.md", "en": DOCS / "reliability.en.md"}
HEADS = {"zh": "| 什么 | 种数 |", "en": "| what | kinds |"}
RECORDS = len(BAD_RECORDS)  # they are in BAD_RUNS and in BAD_UPLOADS too
COUNTS = [  # Chinese, English, how many
    ("数据行", "rows of data", len(TABLE)),
    ("数据文件", "data files", len(BROKEN) + len(UNUSABLE)),
    ("参数", "settings", len(BAD_SETTINGS)),
    (
        "适配器（损坏的、别的底座的、恶意路径和正则）",
        "adapters (damaged, of another base, hostile paths and patterns)",
        len(BAD_ADAPTERS) + len(HOSTILE_PATTERNS),
    ),
    ("底座模型", "base models", len(BAD_MODELS)),
    (
        "训练记录（伪造、类型不对、嵌套 100,000 层），各经过四个入口",
        "records of a run (forged, mistyped, nested 100,000 deep), through four entry points each",
        RECORDS,
    ),
    ("检查点和要继续的训练", "checkpoints and runs to be resumed", len(BAD_RUNS) - RECORDS),
    ("写入的位置", "places to write to", len(BAD_TARGETS)),
    ("不能上传的文件夹", "folders that must not be uploaded", len(BAD_UPLOADS) - RECORDS),
]
COUNTS.append(("合计", "all", sum(count for _, _, count in COUNTS)))


def with_counts(page: str, language: str) -> str:
    """The page's text with a fresh table between its two marks."""
    rows = [f"| {zh if language == 'zh' else en} | {count} |" for zh, en, count in COUNTS]
    table = "\n".join(["<!-- bad inputs -->", HEADS[language], "|---|---|", *rows, "<!-- /bad inputs -->"])
    return re.sub(r"<!-- bad inputs -->.*<!-- /bad inputs -->", lambda _: table, page, flags=re.S)


def main() -> None:
    """Rewrite both pages."""
    for language, path in PAGES.items():
        path.write_text(with_counts(path.read_text("utf-8"), language), "utf-8")


if __name__ == "__main__":
    main()
