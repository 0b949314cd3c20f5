"""重新运行 docs/walkthrough.md 里的每个命令，写入真实的输出。 / Runs every command of docs/walkthrough.md again.

    python scripts/walkthrough.py

In each page (Chinese and English) every ```bash block that a ```text block follows is run in a fresh folder, in order,
and the text block becomes what was printed. A block that begins ```json FILE is written to that file first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"zh": ROOT / "docs" / "walkthrough.md", "en": ROOT / "docs" / "walkthrough.en.md"}
FILE = re.compile(r"```json (\S+)\n(.*?)```", re.S)
SHOWN = re.compile(r"```bash\n(?P<commands>[^`]*)```\n\n```text\n(?P<output>.*?)```", re.S)
EXIT_CODES = {
    "lora-practice check-data my_data.jsonl\n": 1
}  # the page's data file has a bad row; everything else ends with 0
COPIED = ("fine_tuning_practice.py", "inference.py", "scripts", "examples", "requirements", "pyproject.toml")


def fresh_folder(place: Path) -> Path:
    """Give `place` the files that a clone has beside the package, and `python` and `lora-practice` in place/bin."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copyfile(source, place / name)
    (place / "bin").mkdir()
    for name, words in (("python", ""), ("lora-practice", " -m lora_practice.cli"), ("pip", " -m pip")):
        script = place / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n', "utf-8")
        script.chmod(0o755)
    return place


def environment(place: Path, language: str) -> dict[str, str]:
    """Variables for commands in a fresh folder: its `bin` first, and no token of this machine's user."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "LORA_PRACTICE_LANG": language, "COLUMNS": "100"}


def output_of(commands: str, place: Path, language: str) -> str:
    """What the commands print, stdout and stderr as they come.

    Raises:
        SystemExit: a command ends otherwise than expected.
    """
    both: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    env = environment(place, language)
    shell = shutil.which("bash") or "/bin/bash"
    done = subprocess.run([shell, "-ec", commands], cwd=place, env=env, text=True, encoding="utf-8", **both)
    if done.returncode != EXIT_CODES.get(commands, 0):
        raise SystemExit(f"{commands}\n{done.stdout}")
    shown = done.stdout.replace(str(place), "~/lora-finetune-practice").replace(str(Path.home()), "~")
    return "\n".join(line.rstrip() for line in shown.splitlines()).strip("\n") + "\n"


def rewrite(page: Path, language: str) -> None:
    """Run the commands of one page and write their output into it."""
    words = page.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        place = fresh_folder(Path(folder))
        for name, content in FILE.findall(words):
            (place / name).write_text(content, "utf-8")

        def again(found: re.Match) -> str:
            print(found["commands"], end="", flush=True)
            return f"```bash\n{found['commands']}```\n\n```text\n{output_of(found['commands'], place, language)}```"

        page.write_text(SHOWN.sub(again, words), "utf-8")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PAGES:
        rewrite(PAGES[chosen], chosen)
