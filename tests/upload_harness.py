"""A small but real output folder, and the upload script run on it as a user runs it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
from hub_server import WRITE_TOKEN, HubServer
from safetensors.numpy import save_file

from lora_practice.storage import manifest

ROOT = Path(__file__).resolve().parents[1]
REPO = "alice/my-lora"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = """---
base_model: {base}
library_name: peft
tags:
- base_model:adapter:{base}
- lora
---
# Fine-tuned from [{base}]({base})
"""


def make_adapter_folder(folder: Path, base: str = HUB_ID, hub_id: str | None = HUB_ID, kind: str = "embedded") -> Path:
    """An adapter trained on `base`, with one checkpoint and the record of its run."""
    record = {
        "model": {"kind": kind, "name": hub_id or base, "hub_id": hub_id, "path": base},
        "settings": {"output_dir": str(folder), "max_steps": 2, "dataset_path": "data.jsonl"},
        "status": "finished",
    }
    for place in (folder, folder / "checkpoint-2"):
        place.mkdir(parents=True)
        config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": base}
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        (place / "README.md").write_text(CARD.format(base=base), "utf-8")
        rng = np.random.default_rng(0)
        save_file(
            {"lora_A": rng.normal(size=(2, 64)).astype("f4"), "note": np.arange(len(place.parts))},
            place / "adapter_model.safetensors",
        )
        (place / "training_args.bin").write_bytes(pickle.dumps({"output_dir": f"outputs/{place.name}"}))
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    state = {"global_step": 2, "best_model_checkpoint": str(folder / "checkpoint-2")}
    (folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state), "utf-8")
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(bytes(range(256)) * 40)
    manifest.write_manifest(folder / "checkpoint-2", "checkpoint.json")
    return folder


def run_upload(hub: HubServer, folder: Path, *flags: str, **variables: str | None) -> subprocess.CompletedProcess:
    """Run the script in its own process, in the folder above `folder`, with an empty home beside it.

    `variables` are environment variables, None takes one away. Whatever happens, no token may show: neither
    in the output nor in a request's body.
    """
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    kept = ("PATH", "SYSTEMROOT", "TEMP", "LD_LIBRARY_PATH")
    env: dict = {name: os.environ[name] for name in kept if name in os.environ}
    env.update(HOME=str(home), USERPROFILE=str(home), PYTHONPATH=str(ROOT), NO_PROXY="*", PYTHONUTF8="1")
    env.update(LORA_PRACTICE_LANG="en", HF_ENDPOINT=hub.url, HF_TOKEN=WRITE_TOKEN, HF_REPO_ID=REPO)
    env = {name: value for name, value in {**env, **variables}.items() if value is not None}
    script = str(ROOT / "scripts" / "upload_lora_to_hub.py")
    command = [sys.executable, script, "--local-dir", str(folder), *flags]
    options: dict = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run(command, env=env, cwd=folder.parent, **options)
    assert "Traceback" not in done.stderr, done.stderr
    for token in {*hub.tokens, variables.get("HF_TOKEN") or WRITE_TOKEN}:
        assert token not in done.stdout + done.stderr
        assert not any(token.encode() in request.body for request in hub.requests)
    return done


def lines(hub: HubServer) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests if "harness" not in request.path]


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one error line that holds these words."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
