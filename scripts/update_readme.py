"""把 TrainSettings 的表写进 docs/settings.md。 / Writes the table of TrainSettings into docs/settings.md.

python scripts/update_readme.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fine_tuning_practice import TrainSettings
from lora_practice.console.settings import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"zh": ROOT / "docs" / "settings.md", "en": ROOT / "docs" / "settings.en.md"}


def with_table(page: str, language: str) -> str:
    """The page's text with a fresh table between its two marks."""
    os.environ["LORA_PRACTICE_LANG"] = language
    table = f"<!-- settings -->\n{markdown_table(TrainSettings)}\n<!-- /settings -->"
    return re.sub(r"<!-- settings -->.*<!-- /settings -->", lambda _: table, page, flags=re.S)


def main() -> None:
    """Rewrite both pages."""
    for language, path in PAGES.items():
        path.write_text(with_table(path.read_text("utf-8"), language), "utf-8")


if __name__ == "__main__":
    main()
