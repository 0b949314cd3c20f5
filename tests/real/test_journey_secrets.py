"""A whole journey with a token in `.env`: it is in no output, no file and no upload, only in the header for the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from journey_harness import ROOT, SMALL, infer, refused, run, succeeded, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_server import HubServer, identity

TOKEN = "hf_" + "kXr7" * 8 + "Qz"
# an error that nobody foresaw, in the midst of a run, by a library that repeats the header it was to send
BROKEN = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import trl
def train(*args, **kwargs):
    raise RuntimeError(f"Illegal header value b'Bearer {os.environ['HF_TOKEN']}'")
trl.SFTTrainer.train = train
from fine_tuning_practice import main
main(sys.argv[1:])
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        server.tokens[TOKEN] = identity("write")
        yield server


def test_the_token_is_sent_to_the_hub_and_shows_nowhere_else(tmp_path, hub, embedded_model, embedded_rows):
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n", "utf-8")
    there = {"HF_ENDPOINT": hub.url, "LORA_PRACTICE_LANG": "en"}
    said = []

    few = (*SMALL, "--train_subset_size", "4", "--output_dir", "out")
    said.append(succeeded(train(tmp_path, *few, **there)))
    assert "chmod 600 .env" in said[0].stderr
    said.append(succeeded(infer(tmp_path, "--model-dir", "out", "--prompt", "Hi", "--max-new-tokens", "4", **there)))
    said.append(succeeded(run(tmp_path, "-m", "lora_practice.cli", "merge", "out", **there)))
    (tmp_path / "out" / "merged").rename(tmp_path / "merged")  # looked at below, but not sent
    upload = ("-m", "lora_practice.cli", "upload", "--local-dir", "out", "--repo-id", "alice/mine")
    said.append(succeeded(run(tmp_path, *upload, "--dry-run", **there)))
    said.append(succeeded(run(tmp_path, *upload, **there)))
    assert "out/README.md" not in said[-1].stdout and hub.repo("alice/mine").names()

    for status, where in ((401, "whoami"), (403, "/preupload/"), (500, "whoami")):
        hub.fail(status, where, times=1 if status == 500 else 9)
        done = run(tmp_path, *upload, "--commit-message", f"again {status}", **there)
        assert done.returncode == (0 if status == 500 else 2), done.stderr
        said.append(done)
        hub.faults.clear()
    done = run(tmp_path, *upload, "--commit-message", f"with {TOKEN}", **there)
    refused(done, "nor hold the token")
    said.append(done)
    # said by name on the command line of a run that is recorded
    (tmp_path / "broken.py").write_text(BROKEN, "utf-8")
    done = run_unforeseen(tmp_path, "broken.py", str(ROOT), *few[:-1], "broken", **there)
    assert done.returncode == 1 and "Illegal header value b'Bearer ***'" in done.stderr, done.stderr
    said.append(done)

    sent = [request.headers.get("Authorization") or request.headers.get("authorization") for request in hub.requests]
    assert f"Bearer {TOKEN}" in sent
    for done in said:
        assert TOKEN not in done.stdout + done.stderr
    for request in hub.requests:
        assert TOKEN.encode() not in request.body and TOKEN not in request.path
    for place in (tmp_path, hub.root):
        for file in place.rglob("*"):
            if file.is_file() and file.name != ".env":
                assert TOKEN.encode() not in file.read_bytes(), file
    assert json.loads((tmp_path / "out" / "run_record.json").read_text("utf-8"))["status"] == "finished"


def run_unforeseen(place, *command, **variables):
    """Like `run`, for the one command that ends in a traceback."""
    import subprocess

    from journey_harness import environment

    env = environment(place / "home", **variables)
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "stdin": subprocess.DEVNULL}
    return subprocess.run([sys.executable, *command], cwd=place, env=env, timeout=300, **options)
