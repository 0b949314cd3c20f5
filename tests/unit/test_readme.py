"""README and docs/: both languages say the same, and what they say about flags, files and settings is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from readme_commands import COMMANDS, TWINS, By, Real, blocks, lines, words

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lora_practice", "tests", "docs", "scripts", "bench", "requirements", "examples", ".ci")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TWO = [page for page in PAGES if page.with_suffix("").suffix != ".en" and page.with_suffix(".en.md").exists()]
README = {"zh": (ROOT / "README.md").read_text("utf-8"), "en": (ROOT / "README.en.md").read_text("utf-8")}
CJK = r"[\u3001-\u303f\u4e00-\u9fff\uff01-\uff5e]"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_page_of_docs_has_its_twin_and_both_readmes_are_short():
    chinese = [page for page in PAGES if page.parent == ROOT / "docs" and not page.name.endswith(".en.md")]
    assert set(TWO) == {*chinese, ROOT / "README.md"}
    assert all(len(text.splitlines()) <= 300 for text in README.values())


@pytest.mark.parametrize("page", TWO, ids=name_of)
def test_both_languages_have_the_same_sections_tables_blocks_and_commands(page):
    both = [page.read_text("utf-8"), page.with_suffix(".en.md").read_text("utf-8")]
    for shape in (r"^#+ ", r"^\|", r"^```\w*", r"^- ", r"^!\["):
        zh, en = (re.findall(shape, text, flags=re.M) for text in both)
        assert zh == en, shape
    zh, en = (lines(text) for text in both)
    assert zh == en
    assert lines(both[0], "powershell") == lines(both[1], "powershell")


@pytest.mark.parametrize("page", [page for page in PAGES if not page.name.endswith(".en.md")], ids=name_of)
def test_a_chinese_paragraph_is_one_line(page):
    """A line break shows as a space, which does not belong between two Chinese characters."""
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    assert not re.findall(rf"{CJK}\n *{CJK}", prose)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_command_of_the_readme_is_in_the_table(language):
    assert set(lines(README[language])) == set(COMMANDS)


def test_what_the_table_names_exists():
    for run in COMMANDS.values():
        if isinstance(run, By):
            file, _, name = run.test.partition("::")
            functions = [
                node.name for node in ast.parse((ROOT / file).read_text("utf-8")).body if hasattr(node, "name")
            ]
            assert name in functions, run.test
        else:
            assert isinstance(run, Real) and all(need in COMMANDS for need in run.needs)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_powershell_can_run_each_command_or_has_a_twin(language):
    only_bash = re.compile(r"&&|\\$|^\./|^source |^\w+=|<|\.venv/bin")
    scripts = {line for line in lines(README[language]) if "run_tests.sh" in line}  # docs/install.md: they need bash
    assert {line for line in lines(README[language]) if only_bash.search(line)} <= {*TWINS, *scripts}
    assert lines(README[language], "powershell") == [line for twin in TWINS.values() for line in twin]
    for bash, twin in TWINS.items():
        if "train.sh" in bash:
            assert twin[-1].split()[2:] == bash.split()[1:]  # the same flags
        for path in re.findall(r"requirements\\[\w.]+", " ".join(twin)):
            assert (ROOT / path.replace("\\", "/")).is_file()


def test_what_pip_is_asked_to_install_is_there():
    extras = re.search(
        r"^\[project\.optional-dependencies\](.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    known = re.findall(r"^(\w+) = \[", extras.group(1), re.M)
    asked = set()
    for page in PAGES:
        text = page.read_text("utf-8")
        code = " ".join([*blocks(text), *blocks(text, "powershell"), *re.findall(r"`([^`\n]+)`", text)])
        asked |= set(re.findall(r"-e \"?\.\[(\w+)\]", code)) | set(re.findall(r"--extra (\w+)", code))
        for file in re.findall(r"-c (requirements[/\\][\w.]+)", code):
            assert (ROOT / file.replace("\\", "/")).is_file(), (page.name, file)
    assert {"gguf", "test", "bnb"} <= asked <= set(known)


def test_ci_begins_with_the_test_script():
    """.ci/run is what must pass; it runs the script that the README names, and the script takes pytest's arguments."""
    assert "./scripts/run_tests.sh" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert re.search(r'^ *exec .*pytest.* "\$@"$', (ROOT / "scripts" / "run_tests.sh").read_text("utf-8"), re.M)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_settings_table_is_the_one_that_help_shows(language, monkeypatch):
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts/update_readme.py")
    update_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_readme)
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    page = update_readme.PAGES[language].read_text("utf-8")
    assert update_readme.with_table(page, language) == page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_command_has_flags_that_exist(page):
    from fine_tuning_practice import TrainSettings
    from inference import InferenceSettings
    from lora_practice.console.settings import parse
    from lora_practice.export.hub.upload import UploadSettings

    programs = {
        "fine_tuning_practice.py": TrainSettings,
        "inference.py": InferenceSettings,
        "scripts/upload_lora_to_hub.py": UploadSettings,
        "./scripts/train.sh": TrainSettings,
        "lora-practice train": TrainSettings,
        "lora-practice infer": InferenceSettings,
        "lora-practice upload": UploadSettings,
    }
    text, read = page.read_text("utf-8"), 0
    for command in words(text):
        if command[:3] == ["uv", "run", "python"]:
            command = command[2:]
        program = command[1] if command[0] == "python" and len(command) > 1 else command[0]
        rest = command[2:] if command[0] == "python" else command[1:]
        if program == "lora-practice" and rest:
            program, rest = f"lora-practice {rest[0]}", rest[1:]
        if program in programs:
            parse(programs[program], rest, program, "")
            read += 1
    assert read or not any(program in block for program in programs for block in blocks(text))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_path_in_the_structure_exists(language):
    tree = re.search(r"```\n(examples/minimal\.py.*?)```", README[language], flags=re.S).group(1)
    for line in tree.splitlines():
        for name in re.findall(r"[\w/]+(?:\.py|\.sh|/)(?=\s|$)", re.split(r"\s{2,}(?=\S*[^\x00-\x7f])", line)[0]):
            inside = ROOT / "lora_practice" / name if line.startswith("  ") else ROOT / name
            assert inside.exists(), name


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_structure_lists_every_wing_in_its_order(language):
    import lora_practice

    tree = re.search(r"```\n(examples/minimal\.py.*?)```", README[language], flags=re.S).group(1)
    listed = [re.split(r"\.py|/", line.split()[0])[0] for line in tree.splitlines() if line.startswith("  ")]
    wings = [line.split()[0] for line in lora_practice.__doc__.splitlines() if line.startswith("    ")]
    assert listed == wings


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_of_ours_that_a_page_names_exists(page):
    """In `code` and in commands: a path from the root, or the bare name of a file."""
    text = page.read_text("utf-8")
    code = " ".join([*re.findall(r"```\w*\n(.*?)```", text, flags=re.S), *re.findall(r"`([^`\n]+)`", text)])
    ours = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*")}
    for name in re.findall(r"(?<![\w/.<*-])(?:\./)?([\w-]+(?:/[\w.-]+)*(?:\.py|\.sh|\.cpp|\.toml|/))(?![\w<*])", code):
        first = name.partition("/")[0]
        if first in FOLDERS or "/" not in name:
            assert (ROOT / name).exists() or name in ours, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for picture in (ROOT / "docs" / "images").glob("*"):
        assert picture.stat().st_size < 200_000, picture
