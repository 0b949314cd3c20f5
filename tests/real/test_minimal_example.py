"""examples/minimal.py is the plain path: the same losses, step by step, and an adapter that PEFT loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from journey_harness import ROOT, succeeded, train

from lora_practice.sources import embedded

STEPS = 3


@pytest.mark.usefixtures("embedded_model", "embedded_rows")
def test_its_losses_are_those_of_the_plain_path(tmp_path: Path) -> None:
    flags = ("--fast", "off", "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no")
    succeeded(train(tmp_path, "--embedded", *flags, "--output_dir", "ours"))
    environment = {**os.environ, "LORA_PRACTICE_CACHE": str(embedded.cache_dir())}
    script = [sys.executable, str(ROOT / "examples" / "minimal.py"), str(STEPS)]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "outputs/minimal/trainer_state.json").read_text("utf-8"))["log_history"]
    losses = [entry["loss"] for entry in theirs if "loss" in entry]
    assert len(losses) == STEPS
    ours = json.loads((tmp_path / "ours/run_record.json").read_text("utf-8"))["losses"]
    assert losses == pytest.approx([entry["loss"] for entry in ours], rel=1e-6)
    written = {file.name for file in (tmp_path / "outputs/minimal").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= written


def test_it_uses_nothing_of_this_project() -> None:
    text = (ROOT / "examples" / "minimal.py").read_text("utf-8")
    code = [line for line in text.split('"""')[2].splitlines() if line.strip()]
    assert not [line for line in code if "import" in line and "lora_practice" in line] and len(code) <= 80
    for folder in (embedded.MODEL.folder, embedded.CONVERSATIONS.folder):  # where the set-up has put them
        assert folder in text
