"""Every command of the README, and how a test runs it: for real in a fresh folder, or by a test that is named."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Union

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"zh": ROOT / "README.md", "en": ROOT / "README.en.md"}
TRANSLATED = {"本页网址": "address-of-this-page"}
TRAINED = "python fine_tuning_practice.py --embedded --overwrite"
FOLDER = "outputs/SmolLM2-FT-MyDataset"
SHORT = "--max_steps 2 --train_subset_size 24"


@dataclass(frozen=True)
class Real:
    """Run as written with `extra` words, `typed` on stdin, after the commands `needs` in the same folder.

    Then the file `makes` is there, and what was printed matches `shows`.
    """

    extra: str = ""
    typed: str = ""
    needs: tuple[str, ...] = (TRAINED,)
    makes: str = ""
    shows: str = r"\S"


@dataclass(frozen=True)
class By:
    """Held by this test: tests/FILE.py::NAME."""

    test: str


CLONED = By("tests/real/test_readme_commands.py::test_a_clone_is_installed_and_trained_by_the_script")
INSTALLED = By("tests/unit/test_readme.py::test_what_pip_is_asked_to_install_is_there")
COMMANDS: dict[str, Union[Real, By]] = {
    "pip config set global.index-url https://pypi.tuna.tsinghua.edu.cn/simple": Real(
        needs=(), makes="home/.config/pip/pip.conf"
    ),
    "git clone address-of-this-page lora-finetune-practice": CLONED,
    "cd lora-finetune-practice": CLONED,
    "./scripts/train.sh --embedded": CLONED,
    "source .venv/bin/activate": CLONED,
    "python -m lora_practice.sources.embedded": Real(needs=(), shows=r"^$"),
    "python examples/minimal.py 24": By(
        "tests/real/test_minimal_example.py::test_its_losses_are_those_of_the_plain_path"
    ),
    "lora-practice chat": Real(typed="Hello\n"),
    'lora-practice compare --prompt "My printer is not printing."': Real("--max_new_tokens 4"),
    'python inference.py --prompt "My printer is not printing."': Real("--max_new_tokens 4"),
    'python inference.py --model_dir outputs/SmolLM2-FT-MyDataset/merged --prompt "Hello" --temperature 0.7': Real(
        "--max_new_tokens 4", needs=(TRAINED, "lora-practice merge")
    ),
    "lora-practice check-data my_data.jsonl": Real(needs=()),
    "lora-practice check-data my_data.jsonl --show 1": Real(needs=()),
    "python fine_tuning_practice.py --embedded --dataset_path my_data.jsonl --output_dir outputs/mine": Real(
        "--max_steps 1", needs=(), makes="outputs/mine/adapter_model.safetensors"
    ),
    "python fine_tuning_practice.py --embedded --plan": Real(SHORT, needs=()),
    TRAINED: Real(SHORT, needs=(), makes=f"{FOLDER}/adapter_model.safetensors"),
    "python fine_tuning_practice.py --embedded --eval_subset_size 100 --early_stopping_patience 3 "
    "--output_dir outputs/checked": Real(
        f"{SHORT} --eval_steps 1", needs=(), makes="outputs/checked/adapter_model.safetensors"
    ),
    "lora-practice inspect": Real(),
    "lora-practice report": Real(makes=f"{FOLDER}/report.html"),
    "python fine_tuning_practice.py --resume": By(
        "tests/real/test_readme_commands.py::test_an_interrupted_run_is_resumed_as_the_readme_writes_it"
    ),
    "lora-practice selftest resume": By(
        "tests/real/test_selftest.py::test_the_proof_passes_leaves_nothing_behind_and_would_see_one_other_bit"
    ),
    "lora-practice merge": Real(makes=f"{FOLDER}/merged/model.safetensors"),
    'pip install -e ".[gguf]"': INSTALLED,
    "lora-practice export": By("tests/real/test_journey_export.py::test_every_form_passes_and_the_card_says_so"),
    "cd outputs/SmolLM2-FT-MyDataset/gguf": By(
        "tests/real/test_journey_export.py::test_every_form_passes_and_the_card_says_so"
    ),
    "ollama create my-model -f Modelfile": By(
        "tests/real/test_journey_export.py::test_the_modelfile_writes_each_prompt_as_the_template_does"
    ),
    "lora-practice upload --repo_id your-name/repository --dry_run": Real(),
    "lora-practice upload --repo_id your-name/repository": By(
        "tests/real/test_upload.py::test_a_new_repository_is_private_and_holds_every_file"
    ),
    "./scripts/run_tests.sh": By("tests/unit/test_readme.py::test_ci_begins_with_the_test_script"),
    "./scripts/run_tests.sh tests/unit": By("tests/unit/test_readme.py::test_ci_begins_with_the_test_script"),
}
# What bash alone understands, and what does the same in PowerShell
TWINS: dict[str, list[str]] = {
    "git clone address-of-this-page lora-finetune-practice": ["git clone address-of-this-page lora-finetune-practice"],
    "cd lora-finetune-practice": ["cd lora-finetune-practice"],
    "./scripts/train.sh --embedded": [
        "py -m venv .venv",
        "Set-ExecutionPolicy -Scope Process RemoteSigned",
        r".venv\Scripts\Activate.ps1",
        r"pip install -c requirements\cpu.txt -e .",
        "python fine_tuning_practice.py --embedded",
    ],
    "source .venv/bin/activate": [],  # activated above, for the installation
}


def blocks(text: str, language: str = "bash") -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def lines(text: str, language: str = "bash") -> list[str]:
    """Each command of these blocks as written, without its comment; the Chinese placeholders in English."""
    for zh, en in TRANSLATED.items():
        text = text.replace(zh, en)
    every = [line for block in blocks(text, language) for line in block.splitlines()]
    return [command for line in every if (command := re.sub(r"\s+#\s.*$", "", line).strip())]


def words(text: str) -> list[list[str]]:
    """The commands in words, those joined by && apart."""
    return [shlex.split(part) for line in lines(text) for part in line.split(" && ")]
