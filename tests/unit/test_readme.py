"""The two READMEs say the same, and what they say about flags, files and settings is so."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lora_practice", "tests", "docs", "scripts", "bench", "requirements", ".ci")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = {"zh": (ROOT / "README.md").read_text("utf-8"), "en": (ROOT / "README.en.md").read_text("utf-8")}


def blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, flags=re.S)


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text) for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def test_both_have_the_same_sections_tables_and_commands():
    headings = {name: re.findall(r"^#+ ", text, flags=re.M) for name, text in README.items()}
    assert headings["zh"] == headings["en"]
    rows = {name: len(re.findall(r"^\|", text, flags=re.M)) for name, text in README.items()}
    assert rows["zh"] == rows["en"]
    names = {"你的名字/仓库名": "your-name/repository", "<本仓库地址>": "<this repository>"}

    def plain(text: str) -> list[list[str]]:
        for zh, en in names.items():
            text = text.replace(zh, en)
        return commands(text)

    assert plain(README["zh"]) == plain(README["en"])


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_settings_table_is_the_one_that_help_shows(language, monkeypatch):
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts/update_readme.py")
    update_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_readme)
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    page = update_readme.PAGES[language].read_text("utf-8")
    assert update_readme.with_table(page, language) == page


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_python_command_has_flags_that_exist(language):
    from fine_tuning_practice import TrainSettings
    from inference import InferenceSettings
    from lora_practice.console.settings import parse
    from lora_practice.export.hub.upload import UploadSettings

    doors = {
        "fine_tuning_practice.py": TrainSettings,
        "inference.py": InferenceSettings,
        "scripts/upload_lora_to_hub.py": UploadSettings,
        "./scripts/train.sh": TrainSettings,
    }
    seen = set()
    for words in commands(README[language]):
        if words[:3] == ["uv", "run", "python"]:
            words = words[2:]
        script = words[1] if words[0] == "python" and len(words) > 1 else words[0]
        if script in doors:
            first = 2 if words[0] == "python" else 1
            parse(doors[script], words[first:], script, "")
            seen.add(script)
    assert seen == set(doors)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_path_in_the_structure_exists(language):
    tree = re.search(r"```\n(fine_tuning_practice\.py.*?)```", README[language], flags=re.S).group(1)
    for line in tree.splitlines():
        for name in re.findall(r"[\w/]+(?:\.py|\.sh|/)(?=\s|$)", re.split(r"\s{2,}(?=\S*[^\x00-\x7f])", line)[0]):
            inside = ROOT / "lora_practice" / name if line.startswith("  ") else ROOT / name
            assert inside.exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_that_a_page_names_exists(page):
    """In `code` and in commands: a path from the root, or the bare name of a file."""
    text = page.read_text("utf-8")
    code = " ".join([*re.findall(r"```\w*\n(.*?)```", text, flags=re.S), *re.findall(r"`([^`\n]+)`", text)])
    ours = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*")}
    for name in re.findall(r"(?<![\w/.<*-])(?:\./)?([\w-]+(?:/[\w.-]+)*(?:\.py|\.sh|\.cpp|\.toml|/))(?![\w<*])", code):
        first = name.partition("/")[0]
        if first in FOLDERS or "/" not in name:
            assert (ROOT / name).exists() or name in ours, name


def test_every_link_leads_somewhere():
    for text in README.values():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (ROOT / target).exists(), target
