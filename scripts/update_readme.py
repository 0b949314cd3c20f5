"""把 TrainSettings 的表写进 docs/settings.md。 / Writes the tables of TrainSettings into docs/settings.md.

python scripts/update_readme.py
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from fine_tuning_practice import TrainSettings
from lora_practice.console.settings import markdown_table
from lora_practice.console.text import text

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"zh": ROOT / "docs" / "settings.md", "en": ROOT / "docs" / "settings.en.md"}


def tables() -> str:
    """A table for the common settings, then one for each section, in the order of `--help`."""
    first, second, *rows = markdown_table(TrainSettings).splitlines()
    row_of = {row.split("`")[1]: row for row in rows}
    common, sections, current = [], {}, ""
    for field in dataclasses.fields(TrainSettings):
        current = text(*field.metadata["section"]) or current
        (common if field.metadata["common"] else sections.setdefault(current, [])).append(row_of[field.name])
    parts = {text("常用选项", "Common settings"): common}
    parts.update({title[:1].upper() + title[1:]: rows for title, rows in sections.items()})
    return "\n\n".join("\n".join([f"## {title}\n", first, second, *rows]) for title, rows in parts.items())


def with_table(page: str, language: str) -> str:
    """The page's text with fresh tables between its two marks."""
    os.environ["LORA_PRACTICE_LANG"] = language
    fresh = f"<!-- settings -->\n\n{tables()}\n\n<!-- /settings -->"
    return re.sub(r"<!-- settings -->.*<!-- /settings -->", lambda _: fresh, page, flags=re.S)


def main() -> None:
    """Rewrite both pages."""
    for language, path in PAGES.items():
        path.write_text(with_table(path.read_text("utf-8"), language), "utf-8")


if __name__ == "__main__":
    main()
