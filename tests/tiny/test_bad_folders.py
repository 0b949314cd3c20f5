"""Damaged, foreign and hostile folders: one clear line from each command, nothing run, nothing written or changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.folders import BAD_ADAPTERS, BAD_MODELS, MARKER
from bad_inputs.runs import BAD_RECORDS, HOSTILE_PATTERNS

from inference import main as infer
from lora_practice.cli import main as cli

ASK = ("--prompt", "Hi", "--max-new-tokens", "2")
ADAPTERS = [*BAD_ADAPTERS, *HOSTILE_PATTERNS, *((f"record: {name}", *case) for name, *case in BAD_RECORDS)]
SAMPLE = ADAPTERS[::5]  # in the order of the lists, which goes through the kinds of damage
# damage that shows when the model is built or the template is rendered; `inspect` does neither
LOADING_TELLS = {
    "targets are nowhere",
    "fewer targets than weights",
    "tokenizer too large",
    "a rank beyond the weights",
    *(name for name, *_ in BAD_ADAPTERS if name.startswith("template ")),
}


@pytest.fixture
def copy(no_hub: None, whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "out", tmp_path / "out"))


def test_the_whole_folder_answers_and_merges(copy: Path, capsys: pytest.CaptureFixture) -> None:
    """Without this, the refusals below would prove nothing."""
    assert enter(infer, capsys, "--model-dir", "out", *ASK).code == 0
    assert enter(cli, capsys, "merge", "out").code == 0
    assert enter(infer, capsys, "--model-dir", "out/merged", *ASK).code == 0


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in ADAPTERS], ids=[c[0] for c in ADAPTERS])
def test_a_bad_adapter_does_not_answer(
    damage: Callable[[Path], None], words: str, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(copy)
    before = snapshot(copy.parent)
    told = refusal(enter(infer, capsys, "--model-dir", "out", *ASK))
    assert words in told, told
    assert snapshot(copy.parent) == before and not (copy.parent / MARKER).exists()


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in SAMPLE], ids=[c[0] for c in SAMPLE])
def test_a_bad_adapter_is_not_merged(
    damage: Callable[[Path], None], words: str, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(copy)
    before = snapshot(copy.parent)
    told = refusal(enter(cli, capsys, "merge", "out"))
    # a folder without it might be a merged model: `merge` says first that there is nothing to merge
    wanted = words if (copy / "adapter_config.json").exists() else "no adapter here"
    assert wanted in told, told
    assert snapshot(copy.parent) == before and not (copy.parent / MARKER).exists()


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in BAD_MODELS], ids=[c[0] for c in BAD_MODELS])
def test_a_bad_model_folder_is_refused(
    damage: Callable[[Path], None],
    words: str,
    no_hub: None,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    damage(folder)
    before = snapshot(tmp_path)
    told = refusal(enter(infer, capsys, "--model-dir", "model", *ASK))
    assert words in told, told
    assert snapshot(tmp_path) == before and not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_not_answered(prompt: str, no_hub: None, capsys: pytest.CaptureFixture) -> None:
    assert "the prompt is empty" in refusal(enter(infer, capsys, "--prompt", "Hi", "--prompt", prompt))


@pytest.mark.parametrize(("name", "damage"), [case[:2] for case in ADAPTERS], ids=[case[0] for case in ADAPTERS])
def test_inspect_says_of_a_bad_adapter_that_it_cannot_answer(
    name: str, damage: Callable[[Path], None], copy: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(copy)
    before = snapshot(copy.parent)
    said = enter(cli, capsys, "inspect", "out", "--json")
    if name.startswith("record: "):
        assert "run_record.json: the record of the run cannot be read" in refusal(said)
    else:
        inference = json.loads(said.out)["uses"]["inference"]
        assert said.code == 0 and inference["possible"] == (name in LOADING_TELLS), inference
    assert snapshot(copy.parent) == before and not (copy.parent / MARKER).exists()
